"""A packed dataset of thermally shaken molecules and recipes that train on it in seconds, by this process alone."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dig_shards import TrajectoryWriter

from dig_scale.config import Recipe
from dig_scale.recipe_files import parse_recipe
from dig_scale.records import POSITIONS, field_specs, pack_dataset, trajectory_attributes
from dig_scale.system import System

_ORIGIN = {"temperature_K": 300.0, "first_frame_ps": 0.0, "frame_spacing_ps": 1.0, "engine": "test"}


def small_recipe(model: dict[str, Any] | None = None, **train: Any) -> Recipe:
    """A recipe with a model of a few thousand parameters and a dozen steps; keyword arguments change [train]."""
    shape = {"layers": 2, "width": 32, "heads": 4, "feed_forward": 48, "radial_kernels": 16, "radial_knots": 0}
    settings = {
        "steps": 12,
        "global_batch": 16,
        "learning_rate": 2e-3,
        "warmup_steps": 4,
        "weight_decay": 0.01,
        "log_every": 1,
        "validate_every": 6,
        "checkpoint_every": 6,
        "precision": "fp32",
    }
    pack = {"validation_fraction": 0.2, "frames_per_member": 16, "split_by": "frame"}
    content = {"name": "small", "model": shape | (model or {}), "pack": pack, "train": settings | train}
    return parse_recipe(content, "test recipe")


def write_shaken(system: System, path: Path, frames: int, seed: int) -> Path:
    """A trajectory of the reference geometry with 0.1 Å of Gaussian noise on every site."""
    noise = np.random.default_rng(seed).normal(0, 0.1, (frames, system.n_sites, 3))
    attributes = trajectory_attributes(system, _ORIGIN)
    fields = field_specs(system.n_sites, [POSITIONS])
    with TrajectoryWriter.create(path, fields, attributes, chunk_frames=frames) as writer:
        writer.finish({POSITIONS: (system.reference_positions + noise).astype(np.float32)})
    return path


def make_dataset(folder: Path, systems: Sequence[System], frames: int) -> Path:
    """A packed dataset of `frames` frames of each system, a fifth of them for validation."""
    for number, system in enumerate(systems):
        write_shaken(system, folder / "trajectories" / f"{system.name}.zarr", frames, number)
    pack_dataset(small_recipe(), [folder / "trajectories"], folder / "dataset")
    return folder / "dataset"


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the only rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in ranks.items():
        monkeypatch.setenv(name, str(value))
