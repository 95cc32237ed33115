"""The ablation's datasets, recipes and table; its trainings are those of every run."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from dig_shards import ShardReader, TrajectoryWriter
from dig_shards.manifest import TRAIN, VALIDATION, load_manifest

from dig_scale.config import Recipe
from dig_scale.errors import UserError
from dig_scale.recipe_files import load_recipe, parse_recipe
from dig_scale.records import FORCES, POSITIONS, field_specs, trajectory_attributes
from dig_scale.stages.ablate import Ablation, Row, arms_of, gain_of, lines_of, write_table
from tests.molecules import alanine_dipeptide_heavy

FRAMES = 30
SYSTEM = {"name": "ala2", "sequence": "ACE-ALA-NME"}


def recipe(**changes: object) -> Recipe:
    physics = {"batch": 4, "temperature": 300.0}
    content = {"name": "r", "systems": [SYSTEM], "train": {"physics_informed": physics}} | changes
    return parse_recipe({"ablate": {"frames": 10, "candidates": 20}, **content}, "test recipe")


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trajectories at each of two temperatures, whose first coordinate tells temperature and frame."""
    folder, system = tmp_path_factory.mktemp("trajectories"), alanine_dipeptide_heavy()
    fields = field_specs(system.n_sites, [POSITIONS, FORCES])
    for kelvin in (300.0, 600.0):
        for number in range(2):
            positions = np.repeat(system.reference_positions[None], FRAMES, 0).astype(np.float32)
            positions[:, 0, 0] = kelvin + number * FRAMES + np.arange(FRAMES)
            origin = {"temperature_K": kelvin, "first_frame_ps": 0.0, "frame_spacing_ps": 1.0, "engine": "test"}
            store = folder / "ala2" / f"{number}-T{kelvin:.0f}.zarr"
            attributes = trajectory_attributes(system, origin)
            with TrajectoryWriter.create(store, fields, attributes, chunk_frames=FRAMES) as writer:
                writer.finish({POSITIONS: positions, FORCES: np.zeros_like(positions)})
    return folder


def marks(dataset: Path) -> np.ndarray:
    reader = ShardReader(dataset, TRAIN)
    return np.sort(reader.read_batch(np.arange(reader.n_frames), POSITIONS)[:, 0, 0].round())


def test_the_energy_alone_sees_hot_frames_only_and_all_are_evenly_spread(trajectories: Path, tmp_path: Path) -> None:
    energy, data, both = arms_of(recipe(), trajectories, tmp_path)
    assert len(marks(data.dataset)) == data.frames == both.frames == 10
    assert np.abs(np.diff(marks(data.dataset)) - (2 * FRAMES - 1) / 9).max() < 1
    assert marks(data.dataset).max() < 400
    assert len(marks(energy.dataset)) == energy.candidates == both.candidates == 20
    assert marks(energy.dataset).min() >= 600
    assert energy.frames == data.candidates == 0
    assert load_manifest(data.dataset).frames(VALIDATION) == 0
    assert both.dataset == data.dataset


def test_the_trainings_differ_in_their_losses_alone(trajectories: Path, tmp_path: Path) -> None:
    energy, data, both = (arm.recipe.train for arm in arms_of(recipe(), trajectories, tmp_path))
    assert data.physics_informed is None
    assert energy.physics_informed.denoising_weight == 0
    assert both.physics_informed.denoising_weight == 1
    assert energy.physics_informed.temperature == both.physics_informed.temperature == 300
    assert both.physics_informed.candidates == tmp_path / "candidates" / "dataset"
    assert (
        len({one.model_copy(update={"physics_informed": None}).model_dump_json() for one in (energy, data, both)}) == 1
    )


def test_a_second_call_finds_its_datasets(trajectories: Path, tmp_path: Path) -> None:
    first, again = (arms_of(recipe(), trajectories, tmp_path) for _ in range(2))
    assert first == again


def test_recipes_and_trajectories_that_do_not_serve_are_refused(trajectories: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \[train.physics_informed\]"):
        arms_of(recipe(train={}), trajectories, tmp_path)
    with pytest.raises(UserError, match=r"has 0 systems"):
        arms_of(recipe(systems=[]), trajectories, tmp_path)
    with pytest.raises(UserError, match=r"60 frames at 300 K, 100 are asked for"):
        arms_of(recipe(ablate={"frames": 100}), trajectories, tmp_path)
    cold = {"frames": 10, "candidates": 5, "candidate_temperature": 300.0}
    with pytest.raises(UserError, match=r"would be data at the target temperature"):
        arms_of(recipe(ablate=cold), trajectories, tmp_path / "cold")


def test_the_table_is_written_and_the_gain_is_that_over_data_alone(tmp_path: Path) -> None:
    rows = (
        Row("energy only", 0, 20, 5, 10.0, 9.0, 0, None, None, None, "no finite samples"),
        Row("data only", 10, 0, 8, 10.0, 9.0, 64, 0.2, 0.01, 0.02),
        Row("both", 10, 20, 4, 10.0, 9.0, 64, 0.05, 0.01, 0.02),
    )
    assert gain_of(rows) == pytest.approx(0.75)
    assert gain_of((rows[0], *rows[2:], Row("data only", 10, 0, 8, 1.0, 1.0, 0, None, None, None, "none"))) is None
    table = Ablation("r", "equal steps", "(φ, ψ)", rows, gain_of(rows))
    write_table(table, tmp_path)
    assert json.loads((tmp_path / "ablation.json").read_text())["rows"][2]["divergence"] == 0.05
    with (tmp_path / "ablation.csv").open() as stream:
        written = list(csv.DictReader(stream))
    assert [row["training"] for row in written] == ["energy only", "data only", "both"]
    assert written[0]["divergence"] == "" and written[1]["divergence"] == "0.2"
    assert "by 75 %" in lines_of(table)[-1]
    assert "none: no finite samples" in lines_of(table)[2]


def test_the_bundled_recipe_can_be_ablated_and_has_flexible_bonds() -> None:
    found = load_recipe("pidp")
    assert found.ablate is not None and found.simulate is not None and found.train is not None
    assert found.simulate.constraints == "none"
    assert found.pack is not None and found.pack.atoms == "all"
    exchange = found.simulate.replica_exchange
    assert exchange is not None and found.ablate.candidate_temperature in exchange.temperatures[1:]
