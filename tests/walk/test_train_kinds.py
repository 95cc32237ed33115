# ruff: noqa: F401, F811 (fixtures are imported, then named as arguments)
"""Every kind of system through the real training loop on two ranks, replicated and partitioned."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from dig_scale.model.checkpoint import load_checkpoint
from dig_scale.training.metrics import read_metrics
from tests.dig_scale.training.rank_groups import RankGroup, pair
from tests.dig_scale.training.small_runs import small_recipe
from tests.dig_scale.training.test_mixed_batches import copies, write_dataset
from tests.kinds import case

KINDS = ("protein", "pocket", "catalyst", "crystal")


def losses(group: RankGroup, dataset: Path, out: Path, **settings: Any) -> list[float]:
    recipe = small_recipe(steps=2, global_batch=4, validate_every=2, checkpoint_every=2, **settings)
    group.run("train_job", recipe=recipe.model_dump(mode="json"), dataset=str(dataset), out=str(out))
    return [row["loss"] for row in read_metrics(out) if "loss" in row]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_the_same_replicated_partitioned_and_recomputed(
    pair: RankGroup, tmp_path: Path, kind: str
) -> None:
    dataset, model = write_dataset(tmp_path, [copies(kind, count=30)]), {"sites": case(kind).sites}
    plain = losses(pair, dataset, tmp_path / "plain", model=model)
    assert len(plain) >= 2
    assert all(math.isfinite(loss) for loss in plain)
    partitioned = {"zero_stage": 3, "activation_checkpointing": "blocks", "batches": "mixed"}
    assert losses(pair, dataset, tmp_path / "partitioned", model=model, **partitioned) == pytest.approx(plain, abs=1e-5)
    assert load_checkpoint(tmp_path / "partitioned").systems[0].kind == case(kind).system.kind
