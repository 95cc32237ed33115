"""Samplers of DiG's released networks of atoms (Zheng et al. 2023, appendix; microsoft/Graphormer), as functions of a network.

All diffuse the displacement y = x - reference, variance preserving with unit prior (1 Å): beta_k sigmoid in k, step 0 the
least noisy. Catalyst: reference = initial structure, sub-surface fixed, 5000 steps. Ligand: reference 0, positions about
the pocket's centre, every atom moves, 500 steps. Carbon: reference = the cube of cells, corners completed after each step.

ddpm              y <- (y - (1-a)/sqrt(1-abar) eps)/sqrt(a) + sigma z, the published way for catalysts and ligands
ddim              deterministic on a random subset of steps, the last one always in it
flow              y <- (2 - sqrt(1-beta)) y + beta/2 s, one Euler step per k, the published way for carbon

Noise comes from dig_scale's counters, so seeds do not mean what they mean to the published programs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dig_scale.errors import UserError
from dig_scale.sampling.noise import counter_normal
from dig_scale.sampling.released import Walk

AtomNetwork = Callable[[Tensor, Tensor], Tensor]
"""(positions [B,N,3] Å, step [B]) -> noise [B,N,3]."""

BETA_START = 1e-7


@dataclass(frozen=True)
class Betas:
    """beta and abar = prod(1 - beta) by step, [T] float32."""

    beta: Tensor
    kept: Tensor

    @property
    def steps(self) -> int:
        """Number of steps T."""
        return len(self.beta)


def sigmoid_betas(steps: int, end: float) -> Betas:
    """The published schedule, computed in fp64 and cast, its product in fp32."""
    beta = 1 / (1 + np.exp(-np.linspace(-6, 6, steps))) * (end - BETA_START) + BETA_START
    values = torch.from_numpy(beta).float()
    return Betas(values, (1 - values).cumprod(0))


def catalyst_betas() -> Betas:
    """5000 steps up to 2e-3."""
    return sigmoid_betas(5000, 2e-3)


def ligand_betas() -> Betas:
    """500 steps up to 2e-2; carbon has the same."""
    return sigmoid_betas(500, 2e-2)


def unchanged(positions: Tensor) -> Tensor:
    """The constraint of systems that have none."""
    return positions


@dataclass(frozen=True)
class AtomDiffusion:
    """What diffuses: schedule, reference [N, 3] Å, which atoms move [N], and the constraint put on positions after a step."""

    betas: Betas
    reference: Tensor
    moving: Tensor
    constraint: Callable[[Tensor], Tensor] = unchanged

    def prior(self, fixed: Tensor, walk: Walk) -> Tensor:
        """Start positions [B, N, 3]: reference plus unit noise where atoms move, `fixed` [N, 3] elsewhere."""
        return self.placed(self.reference + self.noise(walk, 0), fixed)

    def noise(self, walk: Walk, number: int) -> Tensor:
        """Standard normals [B, N, 3] of draw `number` (0 is the prior's)."""
        draw = torch.full_like(walk.index, number)
        flat = counter_normal(walk.seed, walk.index, draw, self.reference.numel())
        return flat.view(-1, *self.reference.shape).to(self.reference)

    def placed(self, positions: Tensor, before: Tensor) -> Tensor:
        """New positions where atoms move, the old ones elsewhere, under the constraint."""
        return self.constraint(torch.where(self.moving.unsqueeze(-1), positions, before))


def ddpm(network: AtomNetwork, start: Tensor, of: AtomDiffusion, walk: Walk) -> Tensor:
    """Positions [B, N, 3] after all T steps from `start`."""
    x, betas = start, of.betas
    for k in range(betas.steps - 1, -1, -1):
        kept = betas.kept[k]
        before = betas.kept[k - 1] if k else torch.ones(())
        ratio = kept / before
        spread = ((1 - before) / (1 - kept) * (1 - ratio)).sqrt()
        y = (x - of.reference - (1 - ratio) / (1 - kept).sqrt() * _at(network, x, k)) / ratio.sqrt()
        x = of.placed(of.reference + y + spread * of.noise(walk, betas.steps - k), x)
    return x


def ddim_steps(betas: Betas, count: int, seed: int) -> Tensor:
    """`count` step numbers in rising order, drawn as the published program does; the noisiest one is always there."""
    if not 2 <= count <= betas.steps - 1:
        raise UserError(f"{count} steps of DDIM, expected 2 to {betas.steps - 1}")
    drawn = torch.randperm(betas.steps - 2, generator=torch.Generator().manual_seed(seed))[: count - 1] + 1
    return torch.cat([drawn.sort().values, torch.tensor([betas.steps - 1])])


def ddim(network: AtomNetwork, start: Tensor, of: AtomDiffusion, steps: Tensor) -> Tensor:
    """Positions [B, N, 3] after the given steps (rising) from `start`; the last answer is the clean estimate itself."""
    x, numbers = start, steps.tolist()
    for k, following in zip(reversed(numbers), [*reversed(numbers[:-1]), None], strict=True):
        kept, y, noise = of.betas.kept[k], x - of.reference, _at(network, x, k)
        clean = (y - (1 - kept).sqrt() * noise) / kept.sqrt()
        if following is not None:
            after = of.betas.kept[following]
            clean = after.sqrt() * clean + (1 - after).sqrt() * noise
        x = of.placed(of.reference + clean, x)
    return x


def flow(network: AtomNetwork, start: Tensor, of: AtomDiffusion) -> Tensor:
    """Positions [B, N, 3] after all T Euler steps of the probability flow from `start`."""
    x = start
    for k in range(of.betas.steps - 1, -1, -1):
        beta, score = of.betas.beta[k], -_at(network, x, k) / (1 - of.betas.kept[k]).sqrt()
        y = (2 - (1 - beta).sqrt()) * (x - of.reference) + 0.5 * beta * score
        x = of.placed(of.reference + y, x)
    return x


def _at(network: AtomNetwork, positions: Tensor, step: int) -> Tensor:
    return network(positions, torch.full((len(positions),), step, device=positions.device))
