"""Physics-informed batches of a packed dataset with forces, and a run that trains on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from dig_shards import TrajectoryWriter

from dig_scale.config import Recipe
from dig_scale.errors import TrainingError
from dig_scale.recipe_files import load_recipe
from dig_scale.records import FORCES, POSITIONS, field_specs, pack_dataset, trajectory_attributes
from dig_scale.training.metrics import read_metrics
from dig_scale.training.physics import PhysicsBatch, PhysicsData, open_candidates
from dig_scale.training.trainer import train
from dig_scale.training.zero import Ranks
from dig_scale.units import thermal_energy
from tests.dig_scale.training.small_runs import make_dataset, one_rank, small_recipe
from tests.molecules import alanine_dipeptide_heavy

__all__ = ["one_rank"]

KT = thermal_energy(300.0)
STIFFNESS = 100.0
"""1/Å² in kT: springs to the places of the reference, which shake by 0.1 Å."""
PHYSICS = {"batch": 8, "temperature": 300.0}


@pytest.fixture(scope="module")
def with_forces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty frames of springs with their forces; the last three frames have forces 10^5 times too large."""
    folder, system = tmp_path_factory.mktemp("forces"), alanine_dipeptide_heavy()
    offsets = np.random.default_rng(0).normal(0, 0.1, (60, system.n_sites, 3))
    forces = -STIFFNESS * KT * offsets
    forces[-3:] *= 1e5
    origin = {"temperature_K": 300.0, "first_frame_ps": 0.0, "frame_spacing_ps": 1.0, "engine": "test"}
    store = folder / "trajectories" / "springs.zarr"
    fields = field_specs(system.n_sites, [POSITIONS, FORCES])
    with TrajectoryWriter.create(store, fields, trajectory_attributes(system, origin), chunk_frames=60) as writer:
        positions = (system.reference_positions + offsets).astype(np.float32)
        writer.finish({POSITIONS: positions, FORCES: forces.astype(np.float32)})
    pack_dataset(small_recipe(), [folder / "trajectories"], folder / "dataset")
    return folder / "dataset"


def opened(recipe: Recipe, dataset: Path) -> PhysicsData:
    data = open_candidates(recipe, dataset, rank(0, 1))
    assert data is not None
    return data


def rank(number: int, world_size: int) -> Ranks:
    return Ranks(number, world_size, torch.device("cpu"))


def test_candidates_carry_the_gradient_of_the_reduced_energy_and_large_forces_are_left_out(with_forces: Path) -> None:
    data = opened(small_recipe(physics_informed=PHYSICS), with_forces)
    total = int(data.data.reader.n_frames)
    assert total - 3 <= len(data.accepted[0]) < total
    batch = data.batch(0, rank(0, 1))
    found, state = batch.candidates.gradient.positions, batch.candidates.batch.state.positions
    system = alanine_dipeptide_heavy()
    reference = torch.as_tensor(system.reference_positions - system.reference_positions.mean(0)).float()
    expected = STIFFNESS * (state - reference)
    # the stored grid of positions is 1e-3 Å or finer; forces are as they were
    found = found - found.mean(1, keepdim=True)
    assert torch.allclose(found, expected, atol=0.2)


def test_ranks_share_out_what_one_rank_alone_would_see(with_forces: Path) -> None:
    data = opened(small_recipe(physics_informed=PHYSICS), with_forces)
    alone, parts = data.batch(3, rank(0, 1)), [data.batch(3, rank(k, 2)) for k in range(2)]

    def joined(read: Callable[[PhysicsBatch], torch.Tensor]) -> bool:
        return torch.equal(read(alone), torch.cat([read(part) for part in parts]))

    assert joined(lambda one: one.candidates.batch.state.positions)
    assert joined(lambda one: one.candidates.gradient.positions)
    assert joined(lambda one: one.draws.t)
    assert joined(lambda one: one.draws.noise.positions)
    assert joined(lambda one: one.draws.probes[0].positions)
    assert not torch.equal(data.batch(4, rank(0, 1)).draws.t, alone.draws.t)


def test_data_or_settings_that_do_not_serve_are_refused(with_forces: Path, tmp_path: Path) -> None:
    bare = make_dataset(tmp_path, [alanine_dipeptide_heavy()], 20)
    with pytest.raises(TrainingError, match=r"no forces; pack all atoms"):
        opened(small_recipe(physics_informed=PHYSICS), bare)
    with pytest.raises(TrainingError, match=r"needs the temperature"):
        opened(small_recipe(physics_informed={"batch": 8}), with_forces)
    with pytest.raises(TrainingError, match=r"batch = 8 is not a multiple of 3 ranks"):
        open_candidates(small_recipe(physics_informed=PHYSICS), with_forces, rank(0, 3))
    with pytest.raises(TrainingError, match=r"use zero_stage 0 to 2"):
        opened(small_recipe(physics_informed=PHYSICS, zero_stage=3), with_forces)
    with pytest.raises(TrainingError, match="leaves steps without a loss"):
        opened(small_recipe(physics_informed=PHYSICS | {"every": 2, "denoising_weight": 0.0}), with_forces)


@pytest.mark.usefixtures("one_rank")
def test_a_model_learns_from_forces_alone(with_forces: Path, tmp_path: Path) -> None:
    alone = PHYSICS | {"denoising_weight": 0.0, "fokker_planck_weight": 0.1}
    schedule = {"steps": 10, "validate_every": 10, "checkpoint_every": 10, "warmup_steps": 2, "learning_rate": 5e-3}
    train(small_recipe(physics_informed=alone, micro_batch=8, **schedule), with_forces, tmp_path / "run")
    rows = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "train"]
    losses = [row["loss"] for row in rows]
    assert len(losses) == 10
    assert losses == pytest.approx([row["physics_loss"] for row in rows], rel=1e-5)
    assert all(level is None for row in rows for level in row["loss_by_level"]), "data were denoised at weight 0"
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-3:]) < sum(losses[:3])


@pytest.mark.usefixtures("one_rank")
def test_the_loss_is_that_of_data_and_candidates_by_their_weights(with_forces: Path, tmp_path: Path) -> None:
    both = PHYSICS | {"weight": 0.25, "denoising_weight": 0.5, "fokker_planck_weight": 0.0}
    schedule = {"steps": 2, "validate_every": 2, "checkpoint_every": 2, "micro_batch": 8}
    train(small_recipe(physics_informed=both, **schedule), with_forces, tmp_path / "run")
    train(small_recipe(**schedule), with_forces, tmp_path / "data")
    row, alone = (next(r for r in read_metrics(tmp_path / name) if r["kind"] == "train") for name in ("run", "data"))
    assert row["loss"] == pytest.approx(0.5 * alone["loss"] + 0.25 * row["physics_loss"], rel=1e-4)
    assert "physics_loss" not in alone


@pytest.mark.usefixtures("one_rank")
def test_some_steps_can_do_without_candidates(with_forces: Path, tmp_path: Path) -> None:
    every = PHYSICS | {"weight": 0.25, "every": 2, "fokker_planck_weight": 0.0}
    schedule = {"steps": 3, "validate_every": 3, "checkpoint_every": 3, "micro_batch": 8}
    train(small_recipe(physics_informed=every, **schedule), with_forces, tmp_path / "run")
    rows = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "train"]
    assert ["physics_loss" in row for row in rows] == [True, False, True]


def test_candidates_are_looked_for_beside_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('name = "r"\n[train.physics_informed]\ncandidates = "hot/dataset"\n')
    settings = load_recipe(recipe).train
    assert settings is not None and settings.physics_informed is not None
    assert settings.physics_informed.candidates == tmp_path / "hot" / "dataset"
