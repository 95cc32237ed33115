"""DiG's released protein sampler (Zheng et al. 2023, algorithm 5; microsoft/Graphormer) and two that use its noise rightly.

A function of a network callable. Noise: sigma_tr(t) = 0.1^(1-t) 35^t Å on positions, IGSO(3) of parameter
sigma_rot(t) = 0.02^(1-t) 1.65^t on rotations. DiG's heat kernel has exp(-l(l+1) e^2) without 1/2, so the variance on SO(3)
is 2 sigma_rot^2; hence g_tr^2 = 2 sigma_tr^2 ln 350 and g_rot^2 = 4 sigma_rot^2 ln 82.5, in units of t. A step of dt = 1/500:

    positions += w g_tr^2 dt s_T      rotations <- rotations exp(w g_rot^2 dt s_R)      at t = 1, 0.998, ..., 0.002

RELEASED is w = 1 without noise: the drift of the reverse SDE with its noise left out, twice that of the probability flow.
It reproduces published samples; it integrates no equation whose densities are known. PROBABILITY_FLOW is w = 1/2,
STOCHASTIC w = 1 with sqrt(g^2 dt) z. All in this project's frames: DiG's rot_mat is the transpose of `rotations`, and its
update from the left, exp(u) IR, is R exp(-u); the network callable answers with -u's direction (see model.published).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from dig_scale.batch import Context, Score, ScoreFn, State
from dig_scale.diffusion.rotation import dig_score_norm
from dig_scale.geometry.rotations import exp
from dig_scale.sampling.noise import counter_normal

STEPS = 500
TRANSLATION_SIGMA = (0.1, 35.0)
ROTATION_SIGMA = (0.02, 1.65)
DT = 1 / STEPS

ProteinNetwork = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(positions [B,N,3] Å, rotations [B,N,3,3], step k [B]) -> sigma_tr x score of positions, score of rotations / its norm."""


class ProteinSampler(Enum):
    """How a step uses the score; see the module's header."""

    RELEASED = "released"
    PROBABILITY_FLOW = "probability-flow"
    STOCHASTIC = "stochastic"


@dataclass(frozen=True)
class Walk:
    """Which samples a batch holds: seed [B] and index [B] int64 identify each one's noise."""

    seed: Tensor
    index: Tensor


def translation_sigma(t: Tensor) -> Tensor:
    """sigma_tr at t, Å, float64."""
    return _geometric(TRANSLATION_SIGMA, t)


def rotation_sigma(t: Tensor) -> Tensor:
    """sigma_rot at t, the parameter e of DiG's tables, float64; the variance on SO(3) is twice its square."""
    return _geometric(ROTATION_SIGMA, t)


def _geometric(ends: tuple[float, float], t: Tensor) -> Tensor:
    t = t.double()
    return ends[0] ** (1 - t) * ends[1] ** t


def nearest_step(t: Tensor) -> Tensor:
    """The trained step k [B] nearest to t [B]: round(500 (1 - t)) within 0..499."""
    return torch.round((1 - t.double()) * STEPS).long().clamp(0, STEPS - 1)


def protein_score_fn(network: ProteinNetwork) -> ScoreFn:
    """The network as a score function: State(positions Å, rotations), t [B] in [0, 1] -> Score in local tangents.

    The network sees the nearest trained step, the scale is that of t itself. It has features of its protein of its own
    and looks at no context.
    """

    def score_fn(state: State, context: Context, t: Tensor) -> Score:
        positions, rotations = _frames(state)
        translation, rotation = network(positions, rotations, nearest_step(t))
        of_positions = _per_sample(1 / translation_sigma(t), translation) * translation
        return Score(of_positions, _per_sample(dig_score_norm(rotation_sigma(t)), rotation) * rotation)

    score_fn.__doc__ = "Score of DiG's noised protein distribution."
    return score_fn  # type: ignore[return-value]


def protein_step(
    network: ProteinNetwork, state: State, step: Tensor, sampler: ProteinSampler, walk: Walk | None = None
) -> State:
    """The state after step k [B] of 500 (0 is the first); `walk` is needed by the stochastic sampler alone."""
    positions, rotations = _frames(state)
    t = 1 - step.double() / STEPS
    sigma, angle_sigma = translation_sigma(t), rotation_sigma(t)
    translation, rotation = network(positions, rotations, step)
    weight = 0.5 if sampler is ProteinSampler.PROBABILITY_FLOW else 1.0
    g2, angle_g2 = 2 * math.log(350.0) * sigma**2, 4 * math.log(82.5) * angle_sigma**2
    shift = _per_sample(weight * DT * g2 / sigma, translation) * translation
    turn = _per_sample(weight * DT * angle_g2 * dig_score_norm(angle_sigma), rotation) * rotation
    if sampler is ProteinSampler.STOCHASTIC:
        assert walk is not None, "the stochastic sampler needs to know which samples these are"
        noise = counter_normal(walk.seed, walk.index, step + 1, 2 * positions[0].numel()).to(positions)
        kicks = noise.view(len(step), 2, *positions.shape[1:])
        shift = shift + _per_sample((g2 * DT).sqrt(), shift) * kicks[:, 0]
        turn = turn + _per_sample((angle_g2 * DT).sqrt(), turn) * kicks[:, 1]
    return State(positions=positions + shift, rotations=rotations @ exp(turn))


def sample_protein(
    network: ProteinNetwork, start: State, sampler: ProteinSampler = ProteinSampler.RELEASED, walk: Walk | None = None
) -> State:
    """The state after all 500 steps from `start`; a pure function of its arguments. No recentring, no last denoising."""
    positions, _ = _frames(start)
    state = start
    for k in range(STEPS):
        state = protein_step(network, state, torch.full((len(positions),), k, device=positions.device), sampler, walk)
    return state


def released_prior(samples: int, residues: int, seed: int) -> State:
    """Start states [B] as the released program draws them after seeding torch and numpy with `seed`.

    Its generators are drawn one sample after another (with one unused draw each), so a sample depends on those before it.
    """
    generator, angles = torch.Generator().manual_seed(seed), np.random.RandomState(seed)
    positions, rotations = [], []
    for _ in range(samples):
        positions.append(torch.zeros(residues, 3).normal_(0, TRANSLATION_SIGMA[1], generator=generator))
        torch.normal(0.0, TRANSLATION_SIGMA[1], size=(1, 3), generator=generator)
        drawn = Rotation.random(residues, random_state=angles).as_matrix()
        rotations.append(torch.from_numpy(drawn).float().transpose(-1, -2))
    return State(positions=torch.stack(positions), rotations=torch.stack(rotations))


def _frames(state: State) -> tuple[Tensor, Tensor]:
    assert state.positions is not None and state.rotations is not None, "a protein's state has positions and rotations"
    return state.positions, state.rotations


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like).view(-1, *([1] * (like.dim() - 1)))
