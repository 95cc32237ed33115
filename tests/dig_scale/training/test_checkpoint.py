"""The consolidated file: what goes in comes out, wrong files are told in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dig_scale.errors import UserError
from dig_scale.model.checkpoint import Checkpoint, build_score_model, load_checkpoint, save_checkpoint
from dig_scale.model.score_model import ScoreModel
from tests.dig_scale.training.small_runs import small_recipe
from tests.molecules import alanine_dipeptide_heavy


def some_checkpoint() -> Checkpoint:
    recipe = small_recipe()
    weights, ema = (ScoreModel(recipe.model).state_dict() for _ in range(2))
    return Checkpoint(weights, ema, recipe, (alanine_dipeptide_heavy(),), 7, {"cpu_seconds": 1.5})


def test_checkpoint_comes_back_whole(tmp_path: Path) -> None:
    wrote = some_checkpoint()
    path = save_checkpoint(tmp_path / "model.safetensors", wrote)
    for found in (load_checkpoint(path), load_checkpoint(tmp_path)):
        assert (found.step, found.recipe, found.training_cost) == (7, wrote.recipe, {"cpu_seconds": 1.5})
        assert found.systems[0].system_id == wrote.systems[0].system_id
        for group in ("weights", "ema"):
            assert all(torch.equal(getattr(found, group)[k], v) for k, v in getattr(wrote, group).items())


def test_model_is_built_from_the_average_unless_asked_otherwise(tmp_path: Path) -> None:
    found = load_checkpoint(save_checkpoint(tmp_path / "model.safetensors", some_checkpoint()))
    name, value = next(iter(found.ema.items()))
    assert torch.equal(build_score_model(found).state_dict()[name], value)
    assert torch.equal(build_score_model(found, "weights").state_dict()[name], found.weights[name])


def test_nothing_is_left_beside_the_file(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model.safetensors", some_checkpoint())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_missing_foreign_and_damaged_files_are_told_in_one_line(tmp_path: Path) -> None:
    foreign, damaged = tmp_path / "foreign.safetensors", tmp_path / "damaged.safetensors"
    save_file({"x": torch.zeros(2)}, foreign)
    damaged.write_bytes(b"not safetensors at all")
    cases = {tmp_path: "no trained model", foreign: "not written by dig-scale", damaged: "not a safetensors file"}
    for path, words in cases.items():
        with pytest.raises(UserError, match=words) as caught:
            load_checkpoint(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "model.safetensors", some_checkpoint())
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="not a safetensors file"):
        load_checkpoint(path)


def test_weights_of_another_shape_are_refused_in_one_line() -> None:
    wrong = replace(some_checkpoint(), recipe=small_recipe({"width": 64}))
    with pytest.raises(UserError, match="do not fit the model of its recipe") as caught:
        build_score_model(wrong)
    assert "\n" not in str(caught.value)
