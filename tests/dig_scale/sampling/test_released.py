"""The released protein sampler against the published program, and the two that use its noise rightly against exact scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from dig_scale.batch import Context, State
from dig_scale.diffusion.rotation import RotationProcess, dig_score_norm
from dig_scale.geometry.rotations import exp
from dig_scale.model.published.conditioned import FramesNetwork, frames_network
from dig_scale.model.published.protein import ProteinNet
from dig_scale.model.published.structure import Pose, StructureSizes
from dig_scale.sampling.released import (
    ProteinSampler,
    Walk,
    nearest_step,
    protein_score_fn,
    protein_step,
    released_prior,
    rotation_sigma,
    sample_protein,
    translation_sigma,
)
from tests.dig_scale.model.published.published_files import protein_inputs, structure_table, waves

RESIDUES = 7


def small_net() -> ProteinNet:
    net = ProteinNet(StructureSizes(width=64, pair_width=16, layers=2, heads=4, hidden=1024))
    net.load_state_dict(waves(structure_table(64, 16, 2, 4, 1024), 0.1))
    return net.eval()


def published_start() -> tuple[FramesNetwork, State, Tensor]:
    """A network bound to a protein, its start state, and the start's rot_mat in DiG's form."""
    single, pair, positions, inverse = protein_inputs(RESIDUES)
    start = State(positions=3.5 * positions.unsqueeze(0), rotations=inverse.mT.unsqueeze(0))
    return frames_network(small_net(), single, pair), start, inverse


@torch.no_grad()
def test_a_start_state_replays_the_published_sample() -> None:
    network, start, _ = published_start()
    final = sample_protein(network, start)
    assert final.positions is not None and final.rotations is not None
    expected = [[-3.794480, 4.272099, 16.181818], [-45.893822, -55.912197, 22.607807]]
    torch.testing.assert_close(final.positions[0, [0, 6]], torch.tensor(expected), atol=1e-3, rtol=0)
    rot_mat = [[0.968149, 0.249257, 0.023645], [-0.107872, 0.500472, -0.859004], [-0.225946, 0.829096, 0.511419]]
    torch.testing.assert_close(final.rotations[0, 0].T, torch.tensor(rot_mat), atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_same_start_gives_the_same_bits() -> None:
    network, start, _ = published_start()
    first = second = start
    for k in range(3):
        first = protein_step(network, first, torch.tensor([k]), ProteinSampler.RELEASED)
        second = protein_step(network, second, torch.tensor([k]), ProteinSampler.RELEASED)
    assert first.positions is not None and second.positions is not None
    assert torch.equal(first.positions, second.positions)


@torch.no_grad()
def test_steps_are_those_of_a_program_that_turns_inverse_rotations_from_the_left() -> None:
    network, state, inverse = published_start()
    single, pair, _, _ = protein_inputs(RESIDUES)
    net = small_net()
    protein = net.condition(single, pair)
    assert state.positions is not None
    tr, rot_mat = state.positions[0].double().numpy(), inverse.double().numpy()
    for k in range(30):
        t = 1 - k / 500
        sigma, angle = 0.1 ** (1 - t) * 35**t, 0.02 ** (1 - t) * 1.65**t
        pose = Pose(torch.from_numpy(tr).float()[None], torch.from_numpy(rot_mat).float().mT[None])
        a, b = net(pose, torch.tensor([k]), protein)
        left = -b[0].double().numpy() * float(dig_score_norm(torch.tensor([angle], dtype=torch.float64)))
        tr = tr + 2 * sigma**2 * math.log(350) * 0.002 * a[0].double().numpy() / sigma
        turn = Rotation.from_rotvec(4 * angle**2 * math.log(82.5) * 0.002 * left).as_matrix()
        rot_mat = turn @ rot_mat
        state = protein_step(network, state, torch.tensor([k]), ProteinSampler.RELEASED)
    assert state.positions is not None and state.rotations is not None
    np.testing.assert_allclose(state.positions[0].numpy(), tr, atol=1e-3)
    np.testing.assert_allclose(state.rotations[0].mT.numpy(), rot_mat, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("k", [0, 123, 250, 499])
def test_a_step_is_the_reverse_drift_of_the_score_function(k: int) -> None:
    network, state, _ = published_start()
    t, process, dt = torch.tensor([1 - k / 500], dtype=torch.float64), RotationProcess(), 0.002
    score = protein_score_fn(network)(state, no_context(), t)
    assert state.positions is not None and state.rotations is not None
    assert score.positions is not None and score.rotations is not None
    assert nearest_step(t).item() == k
    stepped = protein_step(network, state, torch.tensor([k]), ProteinSampler.RELEASED)
    rate = process.coefficients(t).diffusion.item()
    turned = process.move(state.rotations, rate * dt * score.rotations)
    moved = state.positions + 2 * math.log(350) * translation_sigma(t).item() ** 2 * dt * score.positions
    assert stepped.positions is not None and stepped.rotations is not None
    torch.testing.assert_close(stepped.rotations, turned, atol=1e-6, rtol=0)
    torch.testing.assert_close(stepped.positions, moved, atol=1e-4, rtol=1e-5)
    half = protein_step(network, state, torch.tensor([k]), ProteinSampler.PROBABILITY_FLOW)
    assert half.positions is not None and half.rotations is not None
    torch.testing.assert_close(half.positions, (state.positions + moved) / 2, atol=1e-4, rtol=1e-5)
    turned = process.move(state.rotations, 0.5 * rate * dt * score.rotations)
    torch.testing.assert_close(half.rotations, turned, atol=1e-6, rtol=0)


def no_context() -> Context:
    """A published network has features of its own: nothing may be read from what is passed here."""
    return None  # type: ignore[return-value]


def gaussian_network(spread: float) -> FramesNetwork:
    """The exact answers for positions N(0, spread^2) and one orientation, the identity."""
    process = RotationProcess()

    def network(positions: Tensor, rotations: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        t = 1 - step.double() / 500
        sigma = translation_sigma(t).float()[:, None, None]
        score = process.target(torch.eye(3).expand_as(rotations), rotations, t)
        norm = dig_score_norm(rotation_sigma(t)).float()[:, None, None]
        return -sigma * positions / (spread**2 + sigma**2), score / norm

    return network


def spread_and_angle(sampler: ProteinSampler) -> tuple[float, float]:
    """Standard deviation of positions (Å) and root-mean-square turn (rad) of 400 samples of one residue."""
    index = torch.arange(400)
    walk = Walk(torch.full_like(index, 11), index)
    start = released_prior(400, 1, 3)
    final = sample_protein(gaussian_network(5.0), start, sampler, walk)
    assert final.positions is not None and final.rotations is not None
    trace = final.rotations.diagonal(dim1=-2, dim2=-1).sum(-1)
    angle = torch.acos(((trace - 1) / 2).clamp(-1, 1))
    return final.positions.std().item(), angle.square().mean().sqrt().item()


def test_the_stochastic_sampler_draws_from_the_data() -> None:
    spread, angle = spread_and_angle(ProteinSampler.STOCHASTIC)
    assert spread == pytest.approx(5.0, rel=0.08)  # 1,200 numbers: 2 % of statistical error
    # The last step starts from 2 * 0.0202^2 rad^2 an axis and leaves noise of its own size.
    assert angle < 0.1


def test_the_probability_flow_carries_the_prior_to_the_data() -> None:
    spread, angle = spread_and_angle(ProteinSampler.PROBABILITY_FLOW)
    start = released_prior(400, 1, 3).positions
    assert start is not None
    # exactly, x_0 = x_1 s / sqrt(s^2 + 35^2), but for sigma(0) = 0.1 Å
    assert spread == pytest.approx(start.std().item() * 5 / math.hypot(5, 35), rel=0.02)
    assert angle < 0.1


def test_the_released_drift_without_noise_contracts_below_the_data() -> None:
    spread, _ = spread_and_angle(ProteinSampler.RELEASED)
    assert spread == pytest.approx(35 * 5**2 / (5**2 + 35**2), rel=0.1)


@torch.no_grad()
def test_a_walker_does_not_depend_on_its_batch() -> None:
    network, _, _ = published_start()
    start = released_prior(3, RESIDUES, 0)
    walk = Walk(torch.full((3,), 9), torch.arange(3))
    assert start.positions is not None and start.rotations is not None
    together = alone = start
    for k in range(5):
        together = protein_step(network, together, torch.full((3,), k), ProteinSampler.STOCHASTIC, walk)
    alone = State(positions=start.positions[2:], rotations=start.rotations[2:])
    last = Walk(walk.seed[2:], walk.index[2:])
    for k in range(5):
        alone = protein_step(network, alone, torch.tensor([k]), ProteinSampler.STOCHASTIC, last)
    assert together.positions is not None and alone.positions is not None
    torch.testing.assert_close(together.positions[2:], alone.positions, atol=1e-4, rtol=1e-5)


def test_start_states_are_those_of_the_published_program() -> None:
    prior = released_prior(2, 3, 5)
    assert prior.positions is not None and prior.rotations is not None
    expected = [[7.786050, -23.317884, 23.962477], [20.090055, -20.400894, 26.877953]]
    torch.testing.assert_close(prior.positions[1, :2], torch.tensor(expected), atol=1e-5, rtol=0)
    rot_mat = [-0.670276, -0.736245, 0.093129]
    torch.testing.assert_close(prior.rotations[1, 0].T[0], torch.tensor(rot_mat), atol=1e-5, rtol=0)


def test_noise_levels_are_the_published_ones() -> None:
    t = 1 - torch.tensor([250, 499], dtype=torch.float64) / 500
    torch.testing.assert_close(translation_sigma(t).tolist(), [1.8708287, 0.10117848], atol=1e-7, rtol=0)
    torch.testing.assert_close(rotation_sigma(t).tolist(), [0.1816590, 0.02017729], atol=1e-7, rtol=0)
    assert torch.allclose(exp(torch.zeros(1, 3)), torch.eye(3))
