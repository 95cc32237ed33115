# ruff: noqa: F401, F811 (fixtures are imported, then named as arguments)
"""Predictors through the real training loop: their labels, every kind of system, interruption, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dig_shards.manifest import TRAIN

from dig_scale.config import Recipe
from dig_scale.errors import RecipeError, TrainingError, UserError
from dig_scale.evaluation.structure import dihedrals
from dig_scale.model.checkpoint import build_predictor, build_score_model, load_checkpoint
from dig_scale.objectives.regression import Labels
from dig_scale.predictions import Family
from dig_scale.recipe_files import load_recipe, parse_recipe
from dig_scale.system import Frames, System
from dig_scale.training.data import TrainingData, open_split
from dig_scale.training.labels import labelled, predicted_by
from dig_scale.training.metrics import read_metrics
from dig_scale.training.run_folder import claim_folder
from tests.dig_scale.training.rank_groups import RankGroup, pair, single
from tests.dig_scale.training.small_runs import small_recipe
from tests.dig_scale.training.test_mixed_batches import copies, shaken_frames, write_dataset
from tests.kinds import KINDS, case
from tests.molecules import alanine_dipeptide_heavy, five_beads

CPU = torch.device("cpu")
QUICK = {"steps": 2, "global_batch": 4, "validate_every": 2, "checkpoint_every": 2, "warmup_steps": 0}


def predicting(wanted: str, model: dict[str, Any] | None = None, settings: dict[str, Any] | None = None) -> Recipe:
    """A recipe that predicts `wanted`."""
    content = small_recipe(model, **(settings or QUICK)).model_dump(mode="json")
    return parse_recipe(content | {"predict": {"property": wanted}}, "test recipe")


def opened(dataset: Path, recipe: Recipe) -> TrainingData:
    data = open_split(dataset, TRAIN, recipe, CPU)
    assert data is not None
    return data


def labels_of(dataset: Path, recipe: Recipe) -> tuple[Labels, TrainingData]:
    """The labels of all training frames, and the data."""
    plain = opened(dataset, recipe)
    data = labelled(plain, predicted_by(recipe, plain, dataset))
    assert data.label is not None
    ids = np.arange(data.reader.n_frames)
    return data.label(data, ids, data.clean(ids)), data


@pytest.fixture(scope="module")
def energies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shaken molecules whose frames have an energy, a label that some lack, and one that never varies."""
    system, count = alanine_dipeptide_heavy(), 60
    gap = np.where(np.arange(count) % 3 == 0, np.nan, np.linspace(1, 4, count))
    frames = shaken_frames(system, count, 1, gap=gap, flat=np.ones(count))
    frames = replace(frames, energy=-4000.0 + np.linspace(0, 1, count))
    return write_dataset(tmp_path_factory.mktemp("energies"), [(system, frames)])


# --- labels -----------------------------------------------------------------------------------------------------------


def test_stored_energies_keep_their_digits_and_missing_labels_count_for_nothing(energies: Path) -> None:
    recipe = predicting("energy")
    labels, data = labels_of(energies, recipe)
    stored = data.reader.read_batch(np.arange(data.reader.n_frames), "energy")
    assert labels.known.all()
    np.testing.assert_allclose(labels.values, (stored - stored.mean()) / stored.std(), atol=1e-5)
    labels, data = labels_of(energies, predicting("gap"))
    stored = data.reader.read_batch(np.arange(data.reader.n_frames), "label_gap")
    known = stored < 10
    assert 0 < known.sum() < len(known)
    np.testing.assert_array_equal(labels.known, known)
    np.testing.assert_allclose(
        labels.values[known], (stored[known] - stored[known].mean()) / stored[known].std(), atol=1e-5
    )
    assert (labels.values[~known] == 0).all()


def test_properties_are_those_of_the_clean_structures_in_units_of_their_spread(energies: Path) -> None:
    labels, data = labels_of(energies, predicting("distance:0,9"))
    x = data.reader.read_batch(np.arange(data.reader.n_frames), "positions")
    apart = np.linalg.norm(x[:, 0] - x[:, 9], axis=1)
    np.testing.assert_allclose(labels.values, (apart - apart.mean()) / apart.std(), atol=1e-4)
    given = predicting("angle:0,1,3").model_dump(mode="json")
    given["predict"] |= {"centre": 90.0, "spread": 9.0}
    predicts = predicted_by(parse_recipe(given, "here"), data, energies)
    assert predicts is not None
    assert (predicts.centre, predicts.spread) == pytest.approx((math.pi / 2, math.pi / 20))
    labels, data = labels_of(energies, predicting("dihedral:3,4,6,8"))
    np.testing.assert_allclose(labels.values, dihedrals(x, np.array([[3, 4, 6, 8]]))[:, 0], atol=1e-4)
    assert labelled(data, None) is data


def test_batches_of_several_systems_have_every_systems_labels(tmp_path: Path) -> None:
    pairs = [(alanine_dipeptide_heavy(), 20), (five_beads(), 30)]
    content = [(system, shaken_frames(system, count, 2, size=np.full(count, 1.0 * count))) for system, count in pairs]
    dataset = write_dataset(tmp_path, content)
    labels, data = labels_of(dataset, predicting("size", settings=QUICK | {"batches": "mixed"}))
    sizes = np.array([content[k][0].n_sites for k in range(2)])[data.system_of(np.arange(data.reader.n_frames))]
    assert set(sizes) == {5, 10}
    assert len(np.unique(labels.values[sizes == 5])) == len(np.unique(labels.values[sizes == 10])) == 1
    assert labels.values[sizes == 5][0] > labels.values[sizes == 10][0]
    by_structure, _ = labels_of(dataset, predicting("distance:0,4", settings=QUICK | {"batches": "mixed"}))
    assert by_structure.known.all()


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("mass", r"no label 'mass' to predict; labels there: energy, flat, gap"),
        ("flat", r"'flat' is known of \d+ of \d+ training frames and has one value"),
        ("distance:0,99", "has sites 0 to 9"),
        ("dihedral:0,1", "a dihedral takes 4"),
        ("predictor:somewhere", "guides samples"),
    ],
)
def test_properties_that_cannot_be_learned_are_refused(energies: Path, wanted: str, said: str) -> None:
    recipe = predicting(wanted)
    with pytest.raises(UserError, match=said):
        predicted_by(recipe, opened(energies, recipe), energies)


def test_dihedrals_take_no_centre_and_recipes_of_energies_alone_no_predictor(energies: Path) -> None:
    content = predicting("dihedral:3,4,6,8").model_dump(mode="json")
    centred = parse_recipe(content | {"predict": {"property": "dihedral:3,4,6,8", "centre": 60.0}}, "here")
    with pytest.raises(TrainingError, match="not for dihedrals"):
        predicted_by(centred, opened(energies, centred), energies)
    with pytest.raises(RecipeError, match="trains no score model"):
        parse_recipe(content | {"train": content["train"] | {"physics_informed": {}}}, "here")


# --- training ---------------------------------------------------------------------------------------------------------


def run(group: RankGroup, recipe: Recipe, dataset: Path, out: Path, job: str = "train_job") -> list[float]:
    group.run(job, recipe=recipe.model_dump(mode="json"), dataset=str(dataset), out=str(out))
    return [row["loss"] for row in read_metrics(out) if "loss" in row]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_the_same_replicated_partitioned_and_recomputed(
    pair: RankGroup, tmp_path: Path, kind: str
) -> None:
    dataset, model = write_dataset(tmp_path, [copies(kind, count=30)]), {"sites": case(kind).sites}
    plain = run(pair, predicting("distance:0,4", model), dataset, tmp_path / "plain")
    assert len(plain) == 3 and all(math.isfinite(loss) for loss in plain)
    partitioned = QUICK | {"zero_stage": 3, "activation_checkpointing": "blocks", "batches": "mixed"}
    again = run(pair, predicting("distance:0,4", model, partitioned), dataset, tmp_path / "partitioned")
    assert again == pytest.approx(plain, abs=1e-5)
    found = load_checkpoint(tmp_path / "partitioned")
    assert found.predicts is not None and found.predicts.property == "distance:0,4"
    assert found.systems[0].kind == case(kind).system.kind


def test_a_stopped_training_carries_on_to_the_same_weights(pair: RankGroup, energies: Path, tmp_path: Path) -> None:
    recipe = predicting("dihedral:3,4,6,8", settings={"steps": 12, "checkpoint_every": 4, "validate_every": 6})
    whole = run(pair, recipe, energies, tmp_path / "whole")
    run(pair, recipe, energies, tmp_path / "stopped", "warned_train_job")
    assert load_checkpoint(tmp_path / "stopped").step < 12
    assert run(pair, recipe, energies, tmp_path / "stopped") == whole
    one, other = load_checkpoint(tmp_path / "whole"), load_checkpoint(tmp_path / "stopped")
    assert all(torch.equal(one.ema[name], other.ema[name]) for name in one.ema)
    assert one.predicts == other.predicts and one.predicts is not None
    assert one.predicts.family is Family.VON_MISES
    assert build_predictor(one).family is Family.VON_MISES
    with pytest.raises(UserError, match="predicts 'dihedral:3,4,6,8' has no score: give a score model"):
        build_score_model(one)


def test_a_folder_of_another_property_or_of_a_score_model_is_refused(energies: Path, tmp_path: Path) -> None:
    plain = small_recipe(**QUICK)
    claim_folder(tmp_path / "score", plain, energies)
    claim_folder(tmp_path / "gap", predicting("gap"), energies)
    for folder, recipe in (("score", predicting("gap")), ("gap", plain), ("gap", predicting("energy"))):
        with pytest.raises(TrainingError, match=r"predict\.property is"):
            claim_folder(tmp_path / folder, recipe, energies)
    claim_folder(tmp_path / "gap", predicting("gap"), energies)


def test_bfloat16_leaves_a_predictions_digits(energies: Path, tmp_path: Path, single: RankGroup) -> None:
    settings = QUICK | {"precision": "bf16"}
    losses = run(single, predicting("gap", settings=settings), energies, tmp_path / "run")
    assert all(math.isfinite(loss) for loss in losses)


def test_a_property_can_be_set_on_any_recipe_and_predictors_of_recipes_lie_beside_them(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart", ["predict.property=dihedral:6,8,10,16", "predict.spread=2.0"])
    assert recipe.predict is not None and recipe.predict.property == "dihedral:6,8,10,16"
    file = tmp_path / "guided.toml"
    file.write_text('name = "guided"\n[sample.guide]\nproperty = "predictor:models/p"\ntarget = 1.0\n')
    guide = load_recipe(file).sample.guide
    assert guide is not None and guide.property == f"predictor:{tmp_path}/models/p"
