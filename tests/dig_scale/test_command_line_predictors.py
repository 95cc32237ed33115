# ruff: noqa: F401, F811 (fixtures are imported, then named as arguments)
"""Predictors as guides: samples go where they are sent, say who sent them, and guides that do not fit are refused.

The data are Gaussian with the extent that an untrained score model takes for granted, so that one is exact for them.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dig_scale.config import Recipe, Sample
from dig_scale.config_properties import GuideSpec
from dig_scale.ensemble import read_ensemble
from dig_scale.errors import UserError
from dig_scale.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from dig_scale.model.features import featurise
from dig_scale.model.predictor import network_for
from dig_scale.model.score_model import ScoreModel
from dig_scale.predictions import Predicted
from dig_scale.recipe_files import parse_recipe
from dig_scale.serving.block import draw_block
from dig_scale.serving.served import build_bench, checkpoint_hash, load_served_model
from dig_scale.stages.folders import RunFolders
from dig_scale.stages.run import run_all
from dig_scale.system import System, SystemKind
from tests.dig_scale.test_command_line_data import Command
from tests.dig_scale.test_command_line_physics import command
from tests.dig_scale.training.rank_groups import RankGroup, single
from tests.dig_scale.training.small_runs import small_recipe
from tests.dig_scale.training.test_mixed_batches import frames_of, write_dataset
from tests.kinds import case, system_of

CPU = torch.device("cpu")
SHAPE = {"layers": 1, "radial_kernels": 24, "vector_channels": 8}
STEPS = {"steps": 250, "global_batch": 128, "learning_rate": 4e-3, "warmup_steps": 30, "weight_decay": 0.0}
RARELY = {"log_every": 50, "validate_every": 250, "checkpoint_every": 250, "ema_decay": 0.98, "ranks": 1}


def three_atoms() -> System:
    """Carbon, nitrogen and oxygen without bonds."""
    positions = np.array([[0.0, 0.0, 0.0], [3.0, 0.0, 0.0], [0.0, 5.0, 0.0]])
    return system_of("three", SystemKind.MOLECULE, [6, 7, 8], positions)


def recipe_of(**sections: Any) -> Recipe:
    content = small_recipe(SHAPE, **(STEPS | RARELY)).model_dump(mode="json")
    return parse_recipe(content | sections, "test recipe")


def untrained(path: Path, recipe: Recipe, system: System) -> Path:
    """A score model that takes data for Gaussian: its heads begin near zero."""
    torch.manual_seed(1)
    weights = ScoreModel(recipe.model).state_dict()
    averaged = {name: tensor.clone() for name, tensor in weights.items()}
    save_checkpoint(path / "model.safetensors", Checkpoint(weights, averaged, recipe, (system,), 0))
    return path


@pytest.fixture(scope="module")
def folders(single: RankGroup, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A score model, and a predictor of a distance trained on what the model samples."""
    root, system = tmp_path_factory.mktemp("predictors"), three_atoms()
    extent = float(featurise(system).extent[0, 0])
    positions = np.random.default_rng(1).normal(0, extent, (4000, 3, 3))
    dataset = write_dataset(root, [(system, frames_of(positions - positions.mean(1, keepdims=True)))])
    recipe = recipe_of(predict={"property": "distance:0,1"})
    single.run("train_job", recipe=recipe.model_dump(mode="json"), dataset=str(dataset), out=str(root / "predictor"))
    return {"model": untrained(root / "model", recipe_of(), system), "predictor": root / "predictor", "root": root}


def distances(positions: np.ndarray) -> np.ndarray:
    return np.linalg.norm(positions[:, 0] - positions[:, 1], axis=1)


def sampled(folders: dict[str, Path], out: Path, *words: object) -> tuple[object, ...]:
    guide = ("--guide", f"predictor:{folders['predictor']}", "--guide-target", 8.0)
    return (
        "sample",
        folders["model"],
        "--num",
        48,
        "--steps",
        24,
        "--workers",
        2,
        "--batch",
        24,
        *guide,
        *words,
        "--out",
        out,
    )


def test_samples_go_where_the_predictor_sends_them_and_say_who_did(
    command: Command, folders: dict[str, Path], tmp_path: Path
) -> None:
    predicts = load_checkpoint(folders["predictor"]).predicts
    assert predicts is not None and predicts.property == "distance:0,1"
    done = command(*sampled(folders, tmp_path / "g"))
    assert done.code == 0, done.err
    guided = read_ensemble(tmp_path / "g")
    model = load_served_model(folders["model"], CPU)
    plain = draw_block(build_bench(model, guided.system), Sample(steps=24), np.arange(400))["positions"]
    spread = distances(plain).std()
    assert abs(distances(plain).mean() - predicts.centre) < 0.4 * predicts.spread
    assert 8.0 - predicts.centre > 1.5 * predicts.spread
    found = distances(guided.positions)
    assert abs(found.mean() - 8.0) < 0.3 * spread
    assert found.std() < 0.5 * spread
    told = guided.provenance
    assert told["guide"]["property"] == "predictor:distance:0,1" and told["guide"]["target"] == 8.0
    assert told["predictor"] == {"checkpoint": checkpoint_hash(folders["predictor"]), "recipe": "small"}


def test_a_run_belongs_to_its_predictor_wherever_that_lies(
    command: Command, folders: dict[str, Path], tmp_path: Path
) -> None:
    out, few = tmp_path / "g", ("--num", 4, "--steps", 2, "--workers", 1)
    assert command(*sampled(folders, out, *few)).code == 0
    moved = folders | {"predictor": tmp_path / "elsewhere"}
    shutil.copytree(folders["predictor"], moved["predictor"])
    assert command(*sampled(moved, out, *few, "--num", 6)).code == 0
    assert read_ensemble(out).n_samples == 6
    found = load_checkpoint(moved["predictor"])
    save_checkpoint(moved["predictor"] / "model.safetensors", replace(found, step=found.step + 1))
    assert "another run (predictor" in command(*sampled(moved, out, *few, "--num", 6)).error


def test_a_wider_wish_leaves_samples_wider(folders: dict[str, Path]) -> None:
    bench = build_bench(load_served_model(folders["model"], CPU), three_atoms())
    found = []
    for spread in (None, 3.0):
        guide = GuideSpec(property=f"predictor:{folders['predictor']}", target=8.0, spread=spread)
        found.append(distances(draw_block(bench, Sample(steps=16, guide=guide), np.arange(64))["positions"]).std())
    assert found[1] > 1.5 * found[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--guide", "predictor:{model}"), "is a score model and predicts no property"),
        (("--guide", "predictor:{root}/nothing"), "no trained model at"),
        (("--guide", "predictor:{other_sites}"), "needs a model with model.sites = 'atoms', this one has 'anchored'"),
        (("--guide", "predictor:{other_atoms}"), "tells 'distance:0,1' of 'beads' (5 sites), and not of 'three'"),
        (("--guide", "predictor:{less_noise}"), "acts at noise from 0.01 to 20, and the predictor was trained from"),
        (("--steer", "predictor:{predictor}:1:1"), "a predictor guides samples (--guide)"),
    ],
)
def test_guides_that_do_not_fit_are_refused(
    command: Command, folders: dict[str, Path], tmp_path: Path, words: tuple[str, str], said: str
) -> None:
    found, others = load_checkpoint(folders["predictor"]), {}
    changes = {
        "other_sites": {"recipe": recipe_of(model=SHAPE | {"sites": "anchored"})},
        "less_noise": {"recipe": recipe_of(diffusion={"noise_max": 2.0})},
        "other_atoms": {"systems": (replace(case("molecule").system.select(range(5)), name="beads"),)},
    }
    for name, change in changes.items():
        checkpoint = replace(found, **change)
        if name == "other_sites":
            weights = network_for(checkpoint.recipe.model, found.predicts).state_dict()
            checkpoint = replace(checkpoint, weights=weights, ema={k: v.clone() for k, v in weights.items()})
        others[name] = save_checkpoint(tmp_path / name / "model.safetensors", checkpoint).parent
    option, value = words[0], words[1].format(**folders, **others)
    target = ("--guide-target", 8.0) if option == "--guide" else ()
    asked = ("sample", folders["model"], option, value, *target, "--num", 4, "--workers", 1, "--out", tmp_path / "s")
    assert said in command(*asked).error
    if "trained from" in said:
        assert command(*asked, "--guide-start", 0.5, "--steps", 3).code == 0


def test_a_predictor_is_no_model_and_takes_a_target(command: Command, folders: dict[str, Path], tmp_path: Path) -> None:
    for words in (("sample", folders["predictor"]), ("density", folders["root"], "--model", folders["predictor"])):
        said = command(*words, "--out", tmp_path / "s").error
        assert "predicts 'distance:0,1' has no score: give a score model" in said
    window = ("--guide", f"predictor:{folders['predictor']}", "--guide-window", 2, 4)
    error = command("sample", folders["model"], *window, "--num", 4, "--out", tmp_path / "s").error
    assert "guides to a target, not into a window" in error
    with pytest.raises(UserError, match="it trains a predictor"):
        run_all(load_checkpoint(folders["predictor"]).recipe, RunFolders(tmp_path / "run"))


def test_noise_of_several_fields_must_be_the_models(tmp_path: Path) -> None:
    """One number tells both networks the noise, and of crystals it says the lattice's only by the same schedules."""
    system = case("crystal").system
    shape = SHAPE | {"sites": "crystal"}
    served = load_served_model(untrained(tmp_path / "model", recipe_of(model=shape), system), CPU)
    found = {}
    for name, noise in (("same", 20.0), ("other", 10.0)):
        recipe, predicts = recipe_of(model=shape, diffusion={"lattice_noise_max": noise}), Predicted("gap")
        weights = network_for(recipe.model, predicts).state_dict()
        averaged = {key: tensor.clone() for key, tensor in weights.items()}
        checkpoint = Checkpoint(weights, averaged, recipe, (system,), 0, predicts=predicts)
        found[name] = save_checkpoint(tmp_path / name / "model.safetensors", checkpoint).parent
    bench = build_bench(served, system)
    guided = {
        name: Sample(steps=2, guide=GuideSpec(property=f"predictor:{p}", target=1.0)) for name, p in found.items()
    }
    assert np.isfinite(draw_block(bench, guided["same"], np.arange(3))["cell"]).all()
    with pytest.raises(UserError, match="another noise of fractional, lattice"):
        draw_block(bench, guided["other"], np.arange(3))
