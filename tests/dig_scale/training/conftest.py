"""Fixtures of the training tests."""

from __future__ import annotations

from tests.dig_scale.training.rank_groups import dataset, pair, single

__all__ = ["dataset", "pair", "single"]
