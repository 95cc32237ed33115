"""Pairs of noised structures and their means: a folder of them, and a training that learns from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from dig_shards import ShardReader
from dig_shards.manifest import TRAIN, VALIDATION, load_manifest

from dig_scale.config import Recipe, Simulate, SystemSpec
from dig_scale.errors import TrainingError, UserError
from dig_scale.importers import system_from_spec
from dig_scale.recipe_files import load_recipe, parse_recipe
from dig_scale.records import LABEL, NOISE_STD, NOISED, POSITIONS
from dig_scale.simulation.potential import potential_for
from dig_scale.stages.posterior import COST, Pairs, posterior_stage
from dig_scale.training.data import open_split
from dig_scale.training.metrics import read_metrics
from dig_scale.training.posterior import PosteriorData, open_posterior
from dig_scale.training.trainer import train
from dig_scale.training.zero import Ranks
from tests.dig_scale.training.small_runs import one_rank, write_shaken

__all__ = ["one_rank"]

FRAMES, NOISE_MAX = 12, 0.1
SPEC = SystemSpec(name="ala2", sequence="ACE-ALA-NME")
FLEXIBLE = Simulate(constraints="none")


def recipe(posterior: Mapping[str, object] | None = MappingProxyType({})) -> Recipe:
    """A small model of alanine dipeptide, and dynamics of 126 steps; without pairs where None."""
    shape = {"layers": 1, "width": 32, "heads": 4, "feed_forward": 48, "radial_kernels": 16, "radial_knots": 0}
    dynamics = {"noise_max": NOISE_MAX, "step": 0.02, "periods": 4, "batch": 8}
    schedule = {
        "steps": 3,
        "global_batch": 8,
        "warmup_steps": 1,
        "log_every": 1,
        "checkpoint_every": 3,
        "precision": "fp32",
    }
    content = {
        "name": "r",
        "systems": [SPEC.model_dump(exclude_defaults=True)],
        "simulate": {"constraints": "none"},
        "pack": {"atoms": "all", "validation_fraction": 0.25, "split_by": "frame"},
        "model": shape,
        "train": schedule | ({} if posterior is None else {"posterior": dynamics | dict(posterior)}),
    }
    return parse_recipe(content, "test recipe")


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hot")
    for number in range(2):
        write_shaken(system_from_spec(SPEC, FLEXIBLE), folder / "ala2" / f"{number}.zarr", FRAMES, number)
    return folder


@pytest.fixture(scope="module")
def pairs(trajectories: Path, tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return posterior_stage(recipe(), [trajectories], tmp_path_factory.mktemp("pairs") / "out")


def stored(dataset: Path) -> dict[str, np.ndarray]:
    reader = ShardReader(dataset, TRAIN)
    ids = np.arange(reader.n_frames)
    return {name: reader.read_batch(ids, name) for name in (POSITIONS, NOISED, LABEL + NOISE_STD)}


def test_means_are_as_far_from_the_noised_structures_as_the_noise_and_make_sense_to_the_energy(pairs: Pairs) -> None:
    found = stored(pairs.dataset)
    levels = found[LABEL + NOISE_STD]
    assert pairs.count == len(levels) == 2 * 2 * FRAMES and pairs.lost == 0
    assert load_manifest(pairs.dataset).frames(VALIDATION) == 0
    assert 0 < levels.min() < 0.02 and 0.09 < levels.max() <= NOISE_MAX
    moved = (found[NOISED] - found[POSITIONS]).std(axis=(1, 2))
    # shaken by 0.1 Å before the noise; what the energy does not hold stays where the noise has put it
    assert 0.3 < np.median(moved / np.hypot(levels, 0.1)) < 1
    system = system_from_spec(SPEC, FLEXIBLE)
    potential = potential_for(system, FLEXIBLE)
    coarse = levels > 0.05
    before, after = (potential.energy_and_forces(found[name][coarse].astype(float))[0] for name in (NOISED, POSITIONS))
    assert np.median(after) < 0.1 * np.median(before)


def test_a_second_call_computes_nothing_and_a_new_folder_the_same(
    pairs: Pairs, trajectories: Path, tmp_path: Path
) -> None:
    out = pairs.dataset.parent
    before = json.loads((out / COST).read_text())
    assert posterior_stage(recipe(), [trajectories], out) == pairs
    assert json.loads((out / COST).read_text()) == before
    again = posterior_stage(recipe(), [trajectories], tmp_path / "again")
    for name, values in stored(again.dataset).items():
        np.testing.assert_array_equal(values, stored(pairs.dataset)[name])


def test_what_does_not_serve_is_refused(pairs: Pairs, trajectories: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"posterior .*noise_max"):
        posterior_stage(recipe({"noise_max": 0.2}), [trajectories], pairs.dataset.parent)
    with pytest.raises(UserError, match=r"has no \[train.posterior\] section"):
        posterior_stage(recipe(None), [trajectories], tmp_path / "a")
    with pytest.raises(UserError, match=r"has no \[simulate\] section"):
        posterior_stage(recipe().model_copy(update={"simulate": None}), [trajectories], tmp_path / "b")
    with pytest.raises(UserError, match="is not between the noise levels"):
        posterior_stage(recipe({"noise_max": 50.0}), [trajectories], tmp_path / "e")
    with pytest.raises(UserError, match="two trajectories have the same name"):
        posterior_stage(recipe(), [trajectories, trajectories], tmp_path / "d")
    heavy = recipe().model_copy(update={"pack": recipe().pack.model_copy(update={"atoms": "heavy"})})
    with pytest.raises(UserError, match=r"set pack.atoms = \"all\""):
        posterior_stage(heavy, [trajectories], tmp_path / "c")
    assert not list(tmp_path.glob("*/trajectories"))


# --- training on them -------------------------------------------------------------------------------------------------


def rank(number: int, world_size: int) -> Ranks:
    return Ranks(number, world_size, torch.device("cpu"))


def opened(pairs: Pairs, changes: Mapping[str, object] = MappingProxyType({})) -> PosteriorData:
    settings = recipe({"pairs": str(pairs.dataset)} | dict(changes))
    trained = open_split(pairs.dataset, TRAIN, settings, torch.device("cpu"))
    assert trained is not None
    found = open_posterior(settings, trained, rank(0, 1))
    assert found is not None
    return found


def test_a_batch_leads_from_means_to_noised_structures_at_their_level(pairs: Pairs) -> None:
    data = opened(pairs)
    micro = data.batch(5, rank(0, 1))
    state = micro.batch.state
    noised = micro.composition.perturb(state, micro.t, micro.noise).positions
    level = micro.composition.noise_level(micro.t)
    alpha = micro.composition.fields["positions"].process.coefficients(micro.t).alpha
    found = stored(pairs.dataset)
    centred = [found[name] - found[name].mean(1, keepdims=True) for name in (POSITIONS, NOISED)]
    for row in range(len(micro.t)):
        match = np.abs(centred[0] - state.positions[row].numpy()).max(axis=(1, 2)).argmin()
        assert np.abs(centred[0][match] - state.positions[row].numpy()).max() < 1e-5
        assert np.abs(centred[1][match] - (noised[row] / alpha[row]).numpy()).max() < 1e-4
        assert level[row] == pytest.approx(found[LABEL + NOISE_STD][match], rel=1e-3)
    halves = [data.batch(5, rank(k, 2)).noise.positions for k in range(2)]
    assert torch.equal(torch.cat(halves), micro.noise.positions)


def test_pairs_that_do_not_serve_are_refused(pairs: Pairs, trajectories: Path) -> None:
    with pytest.raises(TrainingError, match="names no dataset"):
        opened(pairs, {"pairs": None})
    with pytest.raises(TrainingError, match="is not between the noise levels"):
        opened(pairs, {"noise_max": 50.0})
    settings = recipe({"pairs": str(pairs.dataset), "batch": 9})
    trained = open_split(pairs.dataset, TRAIN, settings, torch.device("cpu"))
    assert trained is not None
    with pytest.raises(TrainingError, match=r"batch = 9 is not a multiple of 2 ranks"):
        open_posterior(settings, trained, rank(0, 2))


@pytest.mark.usefixtures("one_rank")
def test_frames_are_denoised_above_the_level_alone_and_both_losses_count_by_their_times(
    pairs: Pairs, tmp_path: Path
) -> None:
    settings = recipe({"pairs": str(pairs.dataset)})
    train(settings, pairs.dataset, tmp_path / "run")
    rows = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "train"]
    share = opened(pairs).share
    assert 1 / 8 < share < 0.4
    first = int(share * len(rows[0]["loss_by_level"]))
    assert all(level is None for row in rows for level in row["loss_by_level"][:first])
    for row in rows:
        of_frames = (row["loss"] - share * row["posterior_loss"]) / (1 - share)
        by_level = [level for level in row["loss_by_level"] if level is not None]
        assert min(by_level) < of_frames < max(by_level)
    plain = recipe(None)
    train(plain, pairs.dataset, tmp_path / "plain")
    assert all("posterior_loss" not in row for row in read_metrics(tmp_path / "plain"))


def test_pairs_are_looked_for_beside_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('name = "r"\n[train.posterior]\npairs = "pairs/dataset"\n')
    settings = load_recipe(path).train
    assert settings is not None and settings.posterior is not None
    assert settings.posterior.pairs == tmp_path / "pairs" / "dataset"
