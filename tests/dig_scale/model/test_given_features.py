"""Features of other networks: part of a system and its identity, read by models that ask for them, else refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dig_scale.batch import Context, Geometry, Score, collate
from dig_scale.config import Model, Recipe
from dig_scale.errors import InvalidSystemError, UserError
from dig_scale.geometry.rotations import random_rotations
from dig_scale.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from dig_scale.model.features import features_read, featurise, require_features
from dig_scale.model.score_model import ScoreModel
from dig_scale.serving.served import build_bench, load_served_model
from dig_scale.system import System
from dig_scale.training.data import open_split
from tests.dig_scale.training.small_runs import small_recipe
from tests.dig_scale.training.test_mixed_batches import CPU, copies, losses, mixed, opened, steps, write_dataset
from tests.kinds import Case, case, doubled, lively_model

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported

WIDTHS = {"site_features": 5, "pair_features": 6}
READS_BOTH = Model(**WIDTHS)


def featured(system: System, seed: int = 0) -> System:
    """The system with random features, those of pairs different in their two directions."""
    generator, n = np.random.default_rng(seed), system.n_sites
    return replace(system, site_features=generator.normal(size=(n, 5)), pair_features=generator.normal(size=(n, n, 6)))


def answer(model: ScoreModel, seen: Geometry, context: Context) -> Score:
    with torch.no_grad():
        return model(seen, context, torch.full((len(seen.positions),), 0.7, dtype=seen.positions.dtype))


def seen_of(found: Case) -> Geometry:
    return Geometry(found.frames["positions"], found.frames.get("rotations"))


def difference(found: Score, other: Score) -> float:
    pairs = [(getattr(found, name), getattr(other, name)) for name in ("positions", "rotations")]
    return max(float((a - b).abs().max()) for a, b in pairs if a is not None)


CHANGES: dict[str, Callable[[System], System]] = {
    "sites": lambda system: replace(system, site_features=system.site_features[::-1]),
    "pairs": lambda system: replace(system, pair_features=system.pair_features[:, ::-1]),
    "directions": lambda system: replace(system, pair_features=system.pair_features.swapaxes(0, 1)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["protein", "catalyst"])
def test_features_of_sites_and_of_ordered_pairs_change_the_answer(kind: str, change: str) -> None:
    found = case(kind)
    model, system = lively_model(found.sites, **WIDTHS), featured(found.system)
    before, after = (
        answer(model, seen_of(found), doubled(featurise(one))) for one in (system, CHANGES[change](system))
    )
    assert difference(before, after) > 1e-3


def test_the_answer_turns_with_the_structure_whatever_the_features() -> None:
    found, model = case("protein"), lively_model("residues", **WIDTHS)
    seen, context = seen_of(found), doubled(featurise(featured(found.system)))
    turn = random_rotations(torch.randn(1, 1, 4, generator=torch.Generator().manual_seed(1)).double())[0, 0]
    straight = answer(model, seen, context)
    turned = answer(model, Geometry(seen.positions @ turn.T + 3.0, turn @ seen.rotations), context)
    assert straight.positions.abs().max() > 0.05
    torch.testing.assert_close(turned.positions, straight.positions @ turn.T, atol=1e-9, rtol=0)
    torch.testing.assert_close(turned.rotations, straight.rotations, atol=1e-9, rtol=0)


def test_a_padded_row_answers_as_it_does_alone() -> None:
    found, model = case("protein"), lively_model("residues", **WIDTHS)
    whole, part = featured(found.system), featured(found.system, 1).select([0, 1, 2, 3])
    contexts = [doubled(featurise(one)) for one in (whole, part)]
    seen = seen_of(found)
    together = answer(model, Geometry(seen.positions[:2], seen.rotations[:2]), collate(contexts))
    alone = answer(model, Geometry(seen.positions[1:2, :4], seen.rotations[1:2, :4]), contexts[1])
    torch.testing.assert_close(together.positions[1:, :4], alone.positions, atol=1e-9, rtol=0)
    torch.testing.assert_close(together.rotations[1:, :4], alone.rotations, atol=1e-9, rtol=0)
    assert (together.positions[1, 4:] == 0).all() and (together.rotations[1, 4:] == 0).all()


def gradients(kernels: str, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    found, few = case("protein"), slice(4)
    model = lively_model("residues", kernels=kernels, radial_knots=512, radial_kernels=8, layers=1, **WIDTHS).to(dtype)
    context = featurise(featured(found.system).select(range(4)))
    context = doubled(context) if dtype == torch.float64 else context
    seen = Geometry(*(found.frames[name][:1, few].to(dtype) for name in ("positions", "rotations")))
    out = model(seen, context, torch.full((len(seen.positions),), 0.7, dtype=dtype)).positions
    (out**2).sum().backward()
    named = {name: p.grad.double() for name, p in model.named_parameters() if "features" in name}
    return out.detach().double(), named


@pytest.mark.parametrize(("kernels", "dtype", "within"), [("auto", "float64", 1e-4), ("triton", "float32", 1e-3)])
def test_every_form_of_the_model_reads_them_as_the_formulas_do(kernels: str, dtype: str, within: float) -> None:
    wanted, of_wanted = gradients("reference", torch.float64)
    found, of_found = gradients(kernels, getattr(torch, dtype))
    assert float((found - wanted).abs().max()) < within * float(wanted.abs().max())
    assert len(of_wanted) == 8
    for name, value in of_wanted.items():
        assert float((of_found[name] - value).abs().max()) < within * float(value.abs().max()), name


def test_a_system_comes_back_from_json_with_its_features_and_identity() -> None:
    system = featured(case("protein").system)
    back = System.from_json(system.to_json())
    np.testing.assert_array_equal(back.site_features, system.site_features)
    np.testing.assert_array_equal(back.pair_features, system.pair_features)
    assert back.site_features.dtype == back.pair_features.dtype == np.float32
    assert back.system_id == system.system_id
    assert len({one.system_id for one in (system, featured(system, 1), case("protein").system)}) == 3


def test_the_identity_of_a_system_without_features_is_what_it_was() -> None:
    system = case("protein").system
    assert system.system_id == "baff3c613ef3e9ac"
    assert not {"site_features", "pair_features"} & set(system.to_dict())


def test_a_subsystem_keeps_the_features_of_its_sites() -> None:
    system, order = featured(case("protein").system), [5, 0, 3]
    part = system.select(order)
    np.testing.assert_array_equal(part.site_features, system.site_features[order])
    np.testing.assert_array_equal(part.pair_features[0, 2], system.pair_features[5, 3])


@pytest.mark.parametrize(
    ("field", "values", "words"),
    [
        ("site_features", np.zeros((6, 5)), r"'two-chains', site_features: shape \(6, 5\), expected \(7, features\)"),
        ("site_features", np.zeros((7, 0)), "at least one feature"),
        ("pair_features", np.zeros((7, 5)), r"expected \(7, 7, features\)"),
        ("site_features", np.full((7, 5), np.nan), "site_features: not finite, or beyond 65504, at ALA1:CA"),
        ("pair_features", np.full((7, 7, 1), 1e5), "at ALA1:CA .* and ALA1:CA"),
    ],
)
def test_features_that_do_not_fit_are_refused_with_their_place(field: str, values: np.ndarray, words: str) -> None:
    with pytest.raises(InvalidSystemError, match=words):
        replace(case("protein").system, **{field: values})


@pytest.mark.parametrize("damage", [{"float16": "A"}, {"float16": "AAAA"}, {"shape": "seven"}, {"shape": None}])
def test_damaged_features_in_json_are_told_in_one_line(damage: dict[str, object]) -> None:
    content = featured(case("protein").system).to_dict()
    content["site_features"] |= damage
    with pytest.raises(InvalidSystemError, match="'two-chains', site_features: expected a shape and base64"):
        System.from_dict(content)


def checkpoint_of(folder: Path, *systems: System, **model: object) -> Path:
    network = lively_model("residues", radial_knots=0, **model).float()
    recipe = Recipe(name="random", model=network.config)
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    again = {name: value.clone() for name, value in weights.items()}
    return save_checkpoint(folder / "model.safetensors", Checkpoint(weights, again, recipe, systems, step=0))


def test_a_checkpoint_keeps_features_beside_its_header(tmp_path: Path) -> None:
    systems = (case("protein").system, featured(case("protein").system))
    path = checkpoint_of(tmp_path, *systems, **WIDTHS)
    found = load_checkpoint(path)
    assert [one.system_id for one in found.systems] == [one.system_id for one in systems]
    assert b"float16" not in path.read_bytes()


def test_a_model_refuses_a_system_without_the_features_it_reads(tmp_path: Path) -> None:
    system = featured(case("protein").system)
    require_features(system, READS_BOTH)
    model = load_served_model(checkpoint_of(tmp_path, system, **WIDTHS), CPU)
    assert build_bench(model, system).context.pair_features.shape == (1, 7, 7, 6)
    with pytest.raises(UserError, match="'two-chains' has no site_features, this model reads 5"):
        build_bench(model, case("protein").system)
    with pytest.raises(UserError, match="'two-chains' has pair_features of width 2, this model reads 6"):
        build_bench(model, replace(system, pair_features=system.pair_features[..., :2]))


def test_a_dataset_without_the_features_is_refused_before_training(tmp_path: Path) -> None:
    recipe = small_recipe(model={"sites": "residues", **WIDTHS})
    bare, whole = copies("protein"), copies("protein", featured(case("protein").system))
    with pytest.raises(UserError, match="'two-chains' has no site_features, this model reads 5"):
        open_split(write_dataset(tmp_path / "bare", [bare]), "train", recipe, CPU)
    data = opened(write_dataset(tmp_path / "whole", [whole]), recipe)
    assert data.contexts[0].pair_features.shape == (1, 7, 7, 6)
    assert data.host_contexts[0].pair_features.numel() == data.host_contexts[0].site_features.numel() == 0


def test_mixed_batches_carry_each_systems_features(tmp_path: Path) -> None:
    small = replace(featured(case("protein").system, 2).select([0, 1, 2, 3]), name="short")
    whole = copies("protein", featured(case("protein").system))
    part = replace(whole[1], positions=whole[1].positions[:, :4], rotations=whole[1].rotations[:, :4])
    dataset = write_dataset(tmp_path, [whole, (small, part)])
    recipe = mixed(model={"sites": "residues", "conditions": [], **WIDTHS})
    data, network = opened(dataset, recipe), lively_model("residues", radial_knots=0, **WIDTHS).float()
    together, apart = (losses(steps(data, recipe, 1, size), network) for size in (None, 1))
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)


def test_a_model_that_reads_none_neither_needs_nor_carries_them() -> None:
    bare, whole = case("protein").system, featured(case("protein").system)
    require_features(bare, Model())
    context = features_read(featurise(whole), Model())
    assert context.site_features.shape == (1, 7, 0) and context.pair_features.shape == (1, 7, 7, 0)
    collate([context, featurise(bare)])
    assert case("protein").composition.normals(context) == Case(whole, {}, "residues").composition.normals(context)
