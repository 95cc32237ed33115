"""What every kind of system promises of its score: symmetries, padding, doors to stored frames, sites that stay."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from dig_scale.batch import Context, Geometry, Score, State, padded_to
from dig_scale.config import Diffusion
from dig_scale.diffusion.composition import composition_for, require_sites
from dig_scale.errors import UserError
from dig_scale.geometry.lattice import symmetric_matrix
from dig_scale.geometry.rotations import random_rotations
from dig_scale.model.features import ENVIRONMENT_CODES, featurise
from dig_scale.sampling.integrate import sample
from dig_scale.sampling.solvers import SOLVERS, fields_of
from dig_scale.system import SiteRole
from tests.kinds import KINDS, Case, case, doubled, lively_model, noise_of

TIMES = (0.05, 0.5, 0.95)
ROTATION = random_rotations(torch.tensor([0.3, -1.1, 0.7, 0.4], dtype=torch.float64))
SHIFT = torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64)


def scores(found: Case, noise: State, time: float, seed: int = 0) -> Score:
    """Scores of the case's frames, noised."""
    composition, context = found.composition, found.context
    t = torch.full((found.batch,), time, dtype=torch.float64)
    noised = composition.perturb(composition.state(found.frames, context), t, noise)
    with torch.no_grad():
        return composition.as_score_fn(lively_model(found.sites, seed))(noised, context, t)


def moved(found: Case, rotation: Tensor, shift: Tensor) -> Case:
    """The case with all of space turned and shifted."""
    turn = lambda values: values @ rotation.mT.numpy()  # noqa: E731
    system, frames = found.system, dict(found.frames)
    at = turn(system.reference_positions) + shift.numpy()
    cell = None if system.cell is None else turn(system.cell)
    frames["positions"] = frames["positions"] @ rotation.mT + shift
    if "rotations" in frames:
        frames["rotations"] = rotation @ frames["rotations"]
    if "cell" in frames:
        frames["cell"] = frames["cell"] @ rotation.mT
    return replace(found, system=replace(system, reference_positions=at, cell=cell), frames=frames)


def assert_close(found: Score, wanted: Score) -> None:
    """Every field to 1e-5 of its largest value: anchors and references are stored in single precision."""
    assert fields_of(found).keys() == fields_of(wanted).keys()
    for name, value in fields_of(wanted).items():
        assert value.abs().max() > 0
        assert (fields_of(found)[name] - value).abs().max() < 1e-5 * value.abs().max(), name


def on_positions(tree: State | Score, function) -> State | Score:
    return tree if tree.positions is None else replace(tree, positions=function(tree.positions))


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("kind", KINDS)
def test_scores_turn_with_space_and_ignore_its_origin(kind: str, time: float) -> None:
    found, noise, turn = case(kind), noise_of(case(kind)), lambda vectors: vectors @ ROTATION.mT
    turned = scores(moved(found, ROTATION, SHIFT), on_positions(noise, turn), time)
    assert_close(turned, on_positions(scores(found, noise, time), turn))


@pytest.mark.parametrize("kind", ["molecule", "protein", "pocket", "catalyst"])
def test_scores_of_mirror_images_are_no_mirror_images(kind: str) -> None:
    found, noise, mirror = case(kind), noise_of(case(kind)), torch.diag(torch.tensor([1.0, 1.0, -1.0]).double())
    turn = lambda vectors: vectors @ mirror  # noqa: E731
    straight = on_positions(scores(found, noise, 0.3), turn)
    difference = scores(moved(found, mirror, SHIFT), on_positions(noise, turn), 0.3).positions - straight.positions
    assert difference.abs().max() > 1e-3 * straight.positions.abs().max()


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("kind", KINDS)
def test_relabelling_sites_relabels_scores(kind: str, time: float) -> None:
    found, noise = case(kind), noise_of(case(kind))
    order = np.random.default_rng(1).permutation(found.system.n_sites)
    frames = {name: value if name == "cell" else value[:, order] for name, value in found.frames.items()}
    relabel = lambda tree: type(tree)(  # noqa: E731
        **{name: value if name == "lattice" else value[:, order] for name, value in fields_of(tree).items()}
    )
    relabelled = scores(replace(found, system=found.system.select(order), frames=frames), relabel(noise), time)
    assert_close(relabelled, relabel(scores(found, noise, time)))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing_and_has_no_score(kind: str) -> None:
    found, noise, t = case(kind), noise_of(case(kind)), torch.tensor([0.2, 0.5, 0.8]).double()
    n, composition = found.system.n_sites, found.composition
    context = doubled(padded_to([featurise(found.system)], n + 3)[0])
    longer = lambda name, value: (  # noqa: E731
        value if name in ("lattice", "cell") else pad(value, (0, 0) * (value.dim() - 2) + (0, 3))
    )
    clean = composition.state({name: longer(name, value) for name, value in found.frames.items()}, context)
    padded = State(**{name: longer(name, value) for name, value in fields_of(noise).items()})
    score_fn = composition.as_score_fn(lively_model(found.sites))
    with torch.no_grad():
        wide = score_fn(composition.perturb(clean, t, padded), context, t)
        alone = composition.perturb(composition.state(found.frames, found.context), t, noise)
        wanted = score_fn(alone, found.context, t)
    assert_close(Score(**{k: v if k == "lattice" else v[:, :n] for k, v in fields_of(wide).items()}), wanted)
    assert all((value[:, n:] == 0).all() for name, value in fields_of(wide).items() if name != "lattice")


def test_a_crystal_is_the_same_about_another_origin_and_with_an_atom_in_the_next_cell() -> None:
    found, noise = case("crystal"), noise_of(case("crystal"))
    positions, cell = found.frames["positions"], found.frames["cell"]
    across = positions.clone()
    across[:, 2] += cell[:, 0] - 2 * cell[:, 1]
    wanted = scores(found, noise, 0.4)
    for other in (across, positions + SHIFT, positions + cell[:, :1]):
        assert_close(scores(replace(found, frames={"positions": other, "cell": cell}), noise, 0.4), wanted)


def test_a_turned_crystal_gives_the_same_state_and_a_turned_strain() -> None:
    found, model = case("crystal"), lively_model("crystal")
    turned = moved(found, ROTATION, 0 * SHIFT)
    states = [one.composition.state(one.frames, one.context) for one in (found, turned)]
    assert torch.allclose(states[0].lattice, states[1].lattice, atol=1e-10)
    assert torch.allclose(states[0].fractional, states[1].fractional, atol=1e-10)
    seen = [Geometry(one.frames["positions"], cell=one.frames["cell"]) for one in (found, turned)]
    level = torch.full((3,), 0.1, dtype=torch.float64)
    with torch.no_grad():
        straight, answer = (model(geometry, found.context, level) for geometry in seen)
    assert torch.allclose(answer.fractional, straight.fractional, atol=1e-10)
    strain = ROTATION @ symmetric_matrix(straight.lattice) @ ROTATION.mT
    assert torch.allclose(symmetric_matrix(answer.lattice), strain, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_stored_frames_become_states_and_come_back(kind: str) -> None:
    found = case(kind)
    composition, context = found.composition, found.context
    state = composition.state(found.frames, context)
    arrays = composition.arrays(state, context)
    assert set(arrays) == set(composition.stored) == set(found.frames)
    again = composition.state(arrays, context)
    for name, value in fields_of(state).items():
        difference = fields_of(again)[name] - value
        difference = difference - torch.round(difference) if name == "fractional" else difference
        assert difference.abs().max() < 1e-9, name
    distances = [torch.cdist(one, one) for one in (arrays["positions"], found.frames["positions"])]
    if kind == "crystal":
        cells = [one @ one.mT for one in (arrays["cell"], found.frames["cell"])]
        assert torch.allclose(*cells, atol=1e-9)
    else:
        assert torch.allclose(*distances, atol=1e-9)
    if kind in ("pocket", "catalyst"):
        assert torch.allclose(arrays["positions"], found.frames["positions"], atol=1e-9)


@pytest.mark.parametrize("solver", list(SOLVERS))
@pytest.mark.parametrize("kind", ["pocket", "catalyst"])
def test_fixed_sites_never_move(kind: str, solver: str) -> None:
    found, context = case(kind), featurise(case(kind).system)
    composition = found.composition
    score_fn = composition.as_score_fn(lively_model(found.sites).float())
    with torch.no_grad():
        drawn = sample(score_fn, composition, context, SOLVERS[solver], 5, 1, torch.arange(4))
    positions = composition.arrays(drawn, context)["positions"]
    fixed = ~torch.as_tensor(found.system.mobile)
    assert torch.equal(positions[:, fixed], context.anchor[:, fixed].expand(4, -1, -1))
    assert (positions[0] - positions[1])[~fixed].abs().min() > 0


@pytest.mark.parametrize("kind", ["protein", "crystal"])
def test_a_fixed_site_without_a_place_is_refused(kind: str) -> None:
    system = case(kind).system
    mobile = np.arange(system.n_sites) != 2
    with pytest.raises(UserError, match=rf"{system.name!r}: .*atom 2\) is fixed"):
        featurise(replace(system, mobile=mobile))


def test_nothing_of_a_ligands_place_is_told() -> None:
    """The reference geometry of a ligand may stand anywhere: anchors, extents and scores are the same."""
    found, noise = case("pocket"), noise_of(case("pocket"))
    ligand = found.system.roles == SiteRole.LIGAND
    elsewhere = found.system.reference_positions.copy()
    elsewhere[ligand] = elsewhere[ligand] @ ROTATION.numpy() + SHIFT.numpy()
    other = replace(found, system=replace(found.system, reference_positions=elsewhere))
    centre = torch.as_tensor(elsewhere[~ligand].mean(0))
    for context in (found.context, other.context):
        assert torch.allclose(context.anchor[0, ligand], centre, atol=1e-5)
    assert torch.allclose(found.context.extent, other.context.extent, atol=1e-6)
    assert_close(scores(other, noise, 0.3), scores(found, noise, 0.3))


def test_scores_of_a_protein_know_its_frames_and_its_sequence() -> None:
    found, noise = case("protein"), noise_of(case("protein"))
    straight = scores(found, noise, 0.2)
    turned = {**found.frames, "rotations": found.frames["rotations"] @ ROTATION}
    names = ("TRP", *found.system.residue_names[1:])
    for other in (
        replace(found, frames=turned),
        replace(found, system=replace(found.system, residue_names=names)),
    ):
        assert (scores(other, noise, 0.2).positions - straight.positions).abs().max() > 1e-3
    codes = featurise(found.system).environment[0]
    assert codes.max() < ENVIRONMENT_CODES
    assert codes[3] != featurise(found.system.select([0, 1, 3])).environment[0, 1]  # a neighbour is told from a gap


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_other_sites_is_refused(kind: str) -> None:
    found = case(kind)
    for sites in {"atoms", "anchored", "residues", "crystal"} - {found.sites}:
        with pytest.raises(UserError, match=rf"{found.system.name!r} needs a model with model.sites = {found.sites!r}"):
            require_sites(found.composition, found.context, sites, found.system.name)
    require_sites(found.composition, found.context, found.sites, found.system.name)


def test_an_unknown_kind_is_named_with_the_known_ones() -> None:
    system = replace(case("molecule").system, kind="polymer")
    with pytest.raises(UserError, match=r"'ala2-heavy': no features for systems of kind 'polymer'; known .*crystal"):
        featurise(system)
    with pytest.raises(UserError, match=r"no diffusion process for systems of kind 'polymer'; known .*crystal"):
        composition_for(system.kind, Diffusion())


@pytest.mark.parametrize("kind", KINDS)
def test_contexts_are_whole(kind: str) -> None:
    context, n = featurise(case(kind).system), case(kind).system.n_sites
    for field in fields(Context):
        value = getattr(context, field.name)
        assert len(value) == 1, field.name
        assert not value.is_floating_point() or value.isfinite().all(), field.name
    assert context.n_sites == n
    assert context.extent.min() > 0
