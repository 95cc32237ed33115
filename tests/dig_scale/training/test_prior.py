"""Users are told where samples would start from noise that the network never saw, and are told a remedy that works."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from dig_shards.manifest import TRAIN

from dig_scale.config import Diffusion, Recipe
from dig_scale.training.data import open_split
from dig_scale.training.prior import prior_warning
from tests.dig_scale.training.small_runs import small_recipe


def with_noise(largest: float) -> Recipe:
    diffusion = Diffusion(schedule="log-linear", noise_min=0.01, noise_max=largest)
    return small_recipe().model_copy(update={"diffusion": diffusion})


def warned(largest: float, dataset: Path) -> str | None:
    recipe = with_noise(largest)
    data = open_split(dataset, TRAIN, recipe, torch.device("cpu"))
    assert data is not None
    return prior_warning(recipe, data)


def test_noise_that_hides_the_structures_needs_no_warning(dataset: Path) -> None:
    assert warned(30.0, dataset) is None


def test_the_remedy_of_the_warning_works(dataset: Path) -> None:
    told = warned(0.5, dataset)
    assert told is not None
    wanted = re.search(r"diffusion\.noise_max = (\d+)", told)
    assert wanted is not None
    assert warned(max(1.0, float(wanted[1])), dataset) is None


def test_the_divergence_falls_with_the_square_of_the_noise(dataset: Path) -> None:
    nats = [float(re.findall(r"\((\d+) nats\)", warned(s, dataset) or "")[0]) for s in (0.1, 0.2)]
    assert np.log2(nats[0] / nats[1]) == pytest.approx(2, abs=0.01)
