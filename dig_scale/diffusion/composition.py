"""SystemKind -> {state field: Process}, and the preconditioning that makes a network a score.

The network sees positions in the frame of the data, y = x_t/alpha (Å), with noise_std = sigma/alpha, and answers with
vectors F of order 1. The clean positions it implies follow Karras et al. 2022 (eq. 7, table 1) with the system's own
extent s for sigma_data: D = s²/(s² + n²) y + s n/sqrt(s² + n²) F, and score = (alpha D - x_t)/sigma².
Molecules whose sites are all mobile are kept, noise included, in the subspace of zero centre of mass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dig_scale.batch import Context, Score, ScoreFn, State
from dig_scale.config import Diffusion
from dig_scale.diffusion.euclidean import VariancePreserving, centred, per_sample, vp
from dig_scale.diffusion.process import Process
from dig_scale.diffusion.schedule import schedule_from
from dig_scale.errors import UserError
from dig_scale.system import SystemKind

Network = Callable[[State, Context, Tensor], Score]
"""(state in Å in the frame of the data, context, noise_std [B] Å) -> vectors of order 1."""


@dataclass(frozen=True)
class Composition:
    """The processes of one kind of system, by state field."""

    processes: Mapping[str, Process]

    @property
    def positions(self) -> VariancePreserving:
        """The process on positions."""
        process = self.processes["positions"]
        assert isinstance(process, VariancePreserving)
        return process

    def standard_normal(self, like: State, context: Context, generator: torch.Generator) -> State:
        """Noise of the shape of `like`: standard normal on mobile sites, centre-of-mass-free for free molecules."""
        assert like.positions is not None
        shape, device, dtype = like.positions.shape, like.positions.device, like.positions.dtype
        return self.constrained(State(torch.randn(shape, generator=generator, device=device, dtype=dtype)), context)

    def constrained(self, noise: State, context: Context) -> State:
        """Noise restricted to what may move."""
        assert noise.positions is not None
        return State(positions=constrain(noise.positions, context))

    def perturb(self, state: State, context: Context, t: Tensor, noise: State) -> State:
        """Noised state at t [B]; free molecules are centred first, fixed sites stay where they are in the data frame."""
        clean = self.centred(state, context)
        assert clean.positions is not None and noise.positions is not None
        return State(positions=self.positions.perturb(clean.positions, t, noise.positions))

    def centred(self, state: State, context: Context) -> State:
        """Free molecules with their centre of mass (unit masses) at the origin."""
        assert state.positions is not None
        free = is_free(context)[:, None, None]
        return State(positions=torch.where(free, centred(state.positions, context.present), state.positions))

    def prior(self, noise: State) -> State:
        """State at t = 1 from standard noise."""
        assert noise.positions is not None
        return State(positions=self.positions.sample_prior(noise.positions))

    def denoised(self, network: Network, state: State, context: Context, t: Tensor) -> State:
        """The network's estimate of the clean state, E[x_0 | x_t]."""
        noise_std = self.positions.schedule.noise_std(t)
        scaled = in_data_frame(state, noise_std)
        skip, out = preconditioning(noise_std, context.extent)
        vectors = network(scaled, context, noise_std).positions
        assert vectors is not None and scaled.positions is not None
        update = per_sample(out, vectors) * constrain(vectors, context)
        free = is_free(context)[:, None, None]
        kept = torch.where(free, per_sample(skip, vectors) * scaled.positions, scaled.positions)
        return State(positions=kept + update)

    def as_score_fn(self, network: Network) -> ScoreFn:
        """The score function of a network."""

        def score_fn(state: State, context: Context, t: Tensor) -> Score:
            clean = self.denoised(network, state, context, t)
            assert clean.positions is not None and state.positions is not None
            return Score(positions=self.positions.target(clean.positions, state.positions, t))

        return score_fn


def composition_for(kind: SystemKind, config: Diffusion) -> Composition:
    """The processes of a kind of system under a recipe's schedule."""
    if kind not in (SystemKind.MOLECULE, SystemKind.PROTEIN):
        raise UserError(f"no diffusion process for systems of kind {kind} yet; expected molecule or protein")
    return Composition({"positions": vp(schedule_from(config))})


def is_free(context: Context) -> Tensor:
    """Which systems [b] have every present site mobile, so that translations are no degree of freedom."""
    return (context.mobile | ~context.present).all(dim=1)


def constrain(vectors: Tensor, context: Context) -> Tensor:
    """Vectors [B, N, 3] with fixed and absent sites at 0 and, for free molecules, zero mean."""
    zero = torch.zeros((), dtype=vectors.dtype, device=vectors.device)
    moving = torch.where((context.mobile & context.present).unsqueeze(-1), vectors, zero)
    return torch.where(is_free(context)[:, None, None], centred(moving, context.present), moving)


def in_data_frame(state: State, noise_std: Tensor) -> State:
    """x_t/alpha: positions on the scale of the data, Å."""
    assert state.positions is not None
    return State(positions=state.positions * per_sample(torch.sqrt(1 + noise_std**2), state.positions))


def preconditioning(noise_std: Tensor, extent: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out [B] of Karras et al. 2022, table 1."""
    total = extent**2 + noise_std**2
    return extent**2 / total, extent * noise_std * torch.rsqrt(total)
