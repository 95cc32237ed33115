"""Paths between states: ends with exact scores, every field's way, superposition; and the command from files to files."""

from __future__ import annotations

from pathlib import Path

import mdtraj
import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from dig_scale.batch import Context, Score, ScoreFn, State
from dig_scale.cli import app
from dig_scale.config import Diffusion, Model, Recipe
from dig_scale.diffusion.composition import Composition, Field, residue_frames
from dig_scale.diffusion.parametrisation import CellCoordinates, ScaledScore
from dig_scale.diffusion.periodic import WrappedNormal, wrapped_normal_score
from dig_scale.ensemble import read_ensemble
from dig_scale.errors import UserError
from dig_scale.geometry import rotations
from dig_scale.geometry.alignment import aligned_rmsd, rmsd
from dig_scale.model.checkpoint import Checkpoint, save_checkpoint
from dig_scale.outputs.molecules import write_pdb
from dig_scale.sampling.flow import Integration
from dig_scale.sampling.interpolation import PathSettings, Way, interpolated, pathway, superposed
from dig_scale.toy_states import anchored_context, toy_system
from dig_scale.toys import DoubleWell, GaussianMixture
from tests.kinds import case
from tests.molecules import alanine_dipeptide_heavy
from tests.truth.test_score_model import lively_model

SCHEDULE = Diffusion(schedule="power", noise_min=0.02, noise_max=40)
SETTINGS = PathSettings(frames=7, integration=Integration(rtol=1e-5, atol=1e-5))


def two_modes(sites: int) -> GaussianMixture:
    """A mixture of two narrow states of `sites` sites, 2 Å apart in every coordinate."""
    shift = torch.ones(3 * sites).double()
    return GaussianMixture(
        torch.stack([shift, -shift]), torch.tensor([0.3, 0.3]).double(), torch.full((2,), 0.5).double()
    )


@pytest.mark.parametrize("way", list(Way))
def test_the_ends_of_a_path_are_the_states_it_joins(way: Way) -> None:
    """To 0.1 Å with an exact score; a path from well to well stays where the density is, but for the way over."""
    toy = toy_system(two_modes(3), SCHEDULE)
    generator = torch.Generator().manual_seed(1)
    ends = torch.stack([sign + 0.3 * torch.randn(3, 3, generator=generator).double() for sign in (1, -1)])
    settings = PathSettings(7, way, SETTINGS.integration)
    path = pathway(toy.score_fn, toy.composition, State(ends), toy.context, settings).positions
    assert rmsd(path[[0, -1]].numpy(), ends.numpy()).max() < 0.1
    off = (path.mean((1, 2)).abs() - 1).abs()
    assert (off < 0.5).sum() >= 5


def test_a_path_crosses_a_barrier_once() -> None:
    toy = toy_system(DoubleWell(4.0, 1.5, 3), SCHEDULE)
    ends = State(torch.tensor([[[-1.5, 0.1, 0.2]], [[1.5, -0.3, 0.4]]]).double())
    path = pathway(toy.score_fn, toy.composition, ends, toy.context, SETTINGS).positions[:, 0, 0]
    assert float((path[[0, -1]].abs() - 1.5).abs().max()) < 0.1
    assert (path.diff() > 0).all()


def uniform_but_for_positions(toy_score: ScoreFn) -> ScoreFn:
    """Rotations uniform at every noise, so that their score is 0 and the ODE leaves them where they are."""

    def score_fn(state: State, context: Context, t: Tensor) -> Score:
        positions = toy_score(State(state.positions), context, t).positions
        return Score(positions, torch.zeros_like(state.positions))

    return score_fn


def test_frames_turn_along_the_geodesic() -> None:
    toy = toy_system(two_modes(2), SCHEDULE)
    axis = torch.tensor([[0.0, 0.0, 0.2], [1.0, -0.5, 0.3]]).double()
    first = rotations.exp(torch.tensor([[0.3, 0.1, -0.2], [0.0, 2.0, 0.0]]).double())
    turns = torch.stack([first, first @ rotations.exp(axis)])
    ends = State(torch.stack([torch.ones(2, 3), -torch.ones(2, 3)]).double(), turns)
    composition = residue_frames(SCHEDULE)
    path = pathway(uniform_but_for_positions(toy.score_fn), composition, ends, toy.context, SETTINGS)
    expected = first @ rotations.exp(torch.linspace(0, 1, 7).double()[:, None, None] * axis)
    assert (path.rotations - expected).abs().max() < 1e-5
    published = rotations.exp(0.5 * rotations.log(turns[1] @ turns[0].mT)) @ turns[0]
    assert (path.rotations[3] - published).abs().max() < 1e-5


def test_crystals_go_the_short_way_round_the_torus() -> None:
    process, centre = WrappedNormal(0.005, 0.5), torch.tensor([0.95, 0.5, 0.05]).double()
    composition = Composition(
        {"fractional": Field(process, ScaledScore(process.score_scale))}, (), CellCoordinates(10, 0.2)
    )

    def score_fn(state: State, context: Context, t: Tensor) -> Score:
        sigma = torch.sqrt(process.sigma(t.double()) ** 2 + 0.05**2)[:, None, None]
        return Score(fractional=wrapped_normal_score(state.fractional - centre, sigma))

    ends = State(fractional=torch.tensor([[[0.93, 0.48, 0.07]], [[0.98, 0.52, 0.03]]]).double())
    path = pathway(score_fn, composition, ends, anchored_context(1), SETTINGS).fractional
    apart = path[[0, -1]] - ends.fractional
    assert (apart - torch.round(apart)).abs().max() < 1e-3
    steps = path.diff(dim=0)
    assert (steps - torch.round(steps)).abs().max() < 0.02
    round_the_wall = interpolated(State(fractional=torch.tensor([[[0.9]], [[0.1]]])), 3, Way.LINEAR).fractional
    assert round_the_wall.flatten().tolist() == pytest.approx([0.9, 0.0, 0.1], abs=1e-6)


def test_great_circles_keep_the_length_of_latents_and_straight_lines_do_not() -> None:
    ends = State(torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(2)).double())
    lengths = {way: interpolated(ends, 5, way).positions.flatten(1).norm(dim=1) for way in Way}
    assert lengths[Way.SPHERICAL].min() > 0.98 * lengths[Way.SPHERICAL][[0, -1]].min()
    assert lengths[Way.LINEAR][2] < 0.8 * lengths[Way.LINEAR][0]
    same = State(ends.positions[[0, 0]])
    assert torch.allclose(interpolated(same, 3, Way.SPHERICAL).positions, ends.positions[[0, 0, 0]])
    assert torch.isfinite(interpolated(State(torch.zeros(2, 4, 3)), 3, Way.SPHERICAL).positions).all()


@pytest.mark.parametrize("kind", ["molecule", "protein"])
def test_the_second_structure_is_laid_on_the_first_with_its_frames(kind: str) -> None:
    found = case(kind)
    turn = rotations.exp(torch.tensor([0.4, -1.1, 2.0]).double())
    arrays = {"positions": torch.stack([found.frames["positions"][0], found.frames["positions"][0] @ turn.mT + 3.0])}
    if "rotations" in found.frames:
        arrays["rotations"] = torch.stack([found.frames["rotations"][0], turn @ found.frames["rotations"][0]])
    for value in superposed(arrays, found.context).values():
        assert torch.allclose(value[0], value[1], atol=1e-9)


def test_what_stands_about_anchors_is_not_moved() -> None:
    found = case("pocket")
    arrays = {"positions": found.frames["positions"][:2]}
    assert torch.equal(superposed(arrays, found.context)["positions"], arrays["positions"])


def test_paths_without_two_ends_are_refused() -> None:
    toy = toy_system(two_modes(1), SCHEDULE)
    with pytest.raises(UserError, match="two ends"):
        pathway(toy.score_fn, toy.composition, State(torch.zeros(3, 1, 3)), toy.context)
    with pytest.raises(UserError, match="2 or more"):
        PathSettings(frames=1)


TINY = Model(layers=1, width=16, heads=2, feed_forward=16, radial_kernels=16, vector_channels=4)


def test_the_command_writes_a_trajectory_between_two_files(tmp_path: Path) -> None:
    system = alanine_dipeptide_heavy()
    weights = lively_model(TINY).state_dict()
    recipe = Recipe(name="random", model=TINY, diffusion=Diffusion(noise_min=0.2, noise_max=5.0))
    content = Checkpoint(weights, {name: tensor.clone() for name, tensor in weights.items()}, recipe, (system,), 0, {})
    model = save_checkpoint(tmp_path / "model" / "model.safetensors", content)
    turn = np.asarray(rotations.exp(torch.tensor([0.5, 1.0, -0.7])))
    other = system.reference_positions.copy()
    other[9] += [0.4, 0.3, -0.2]
    files = [tmp_path / "a.pdb", tmp_path / "b.pdb"]
    for file, positions in zip(files, (system.reference_positions, other @ turn.T + 5.0), strict=True):
        write_pdb(file, system, positions)
    words = ["interpolate", *map(str, files), "--model", str(model), "--frames", "3", "--steps", "60"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "path")], catch_exceptions=False)
    assert "3 frames, ends 0.0" in done.output, done.output
    path = read_ensemble(tmp_path / "path")
    assert max(path.provenance["pathway"]["end_rmsd"]) < 0.1
    assert aligned_rmsd(path.positions[-1], other) < 0.1
    assert mdtraj.load(tmp_path / "path" / "samples.xtc", top=str(tmp_path / "path" / "topology.pdb")).n_frames == 3
