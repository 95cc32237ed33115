"""How a network's answer F of order 1 becomes the score of a field, and what it is trained to answer.

CleanEstimate, for plain vectors: the network sees y = x_t/alpha with noise n = sigma/alpha; the clean value it implies
follows Karras et al. 2022 (eq. 7, table 1) with the extent s of the site for sigma_data,
D = s²/(s² + n²) y + s n/sqrt(s² + n²) F, and score = (alpha D - x_t)/sigma².
ScaledScore, for rotations and wrapped coordinates: score = F sqrt(E|score|²), as in DiG (its score_norm).
CellCoordinates: a unit cell as six numbers of order 1, the logarithm of its symmetric form about a cube of typical volume.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dig_scale.batch import Context
from dig_scale.diffusion.euclidean import centred, per_sample
from dig_scale.diffusion.process import Process
from dig_scale.geometry.lattice import cell_from_log, cell_to_symmetric, log_cell, wrap

FARTHEST = 8.0
"""Spreads; a cell farther from the typical one is none that a sampler should follow: it has no room, or no neighbours."""


class Parametrisation(Protocol):
    """Between a network's answer and a score; x [B, ...] is the noised field, t [B]."""

    def seen(self, x: Tensor, process: Process, t: Tensor) -> Tensor:
        """The field on the scale of the data."""
        ...

    def score(self, answer: Tensor, x: Tensor, process: Process, t: Tensor, context: Context) -> Tensor:
        """The score that an answer means."""
        ...

    def target(self, x0: Tensor, x: Tensor, process: Process, t: Tensor, context: Context) -> Tensor:
        """The answer that the clean value x0 calls for."""
        ...


@dataclass(frozen=True)
class CleanEstimate:
    """See the module's header; cells, [B, 6], have extent 1 and are shown as they are, which keeps them cells."""

    def seen(self, x: Tensor, process: Process, t: Tensor) -> Tensor:
        """x_t/alpha of positions, x_t of a cell's coordinates."""
        return x if x.dim() == 2 else x / per_sample(process.coefficients(t).alpha, x)

    def score(self, answer: Tensor, x: Tensor, process: Process, t: Tensor, context: Context) -> Tensor:
        """(alpha D - x_t)/sigma²; sites that do not move have none."""
        y, skip, out = self._scaled(x, process, t, context)
        clean = skip * y + out * answer
        if x.dim() == 3:
            free, still = context.free[:, None, None], ~(context.mobile & context.present).unsqueeze(-1)
            clean = torch.where(free, skip * y + out * centred(answer, context.present), clean)
            clean = torch.where(still, y, clean)
        return process.target(clean, x, t)

    def target(self, x0: Tensor, x: Tensor, process: Process, t: Tensor, context: Context) -> Tensor:
        """(x_0 - c_skip y)/c_out."""
        y, skip, out = self._scaled(x, process, t, context)
        return (x0 - skip * y) / out

    def _scaled(self, x: Tensor, process: Process, t: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        level = process.coefficients(t)
        noise = per_sample(level.sigma / level.alpha, x)
        extent = context.extent.unsqueeze(-1).to(x.dtype) if x.dim() == 3 else x.new_ones(())
        total = extent**2 + noise**2
        return x / per_sample(level.alpha, x), extent**2 / total, extent * noise * torch.rsqrt(total)


@dataclass(frozen=True)
class ScaledScore:
    """See the module's header; `scale` gives sqrt(E|score|²) of the process at t [B]."""

    scale: Callable[[Tensor], Tensor]

    def seen(self, x: Tensor, process: Process, t: Tensor) -> Tensor:
        """The field itself."""
        return x

    def score(self, answer: Tensor, x: Tensor, process: Process, t: Tensor, context: Context) -> Tensor:
        """F sqrt(E|score|²)."""
        return answer * per_sample(self.scale(t), answer)

    def target(self, x0: Tensor, x: Tensor, process: Process, t: Tensor, context: Context) -> Tensor:
        """Conditional score over its size."""
        score = process.target(x0, x, t)
        return score / per_sample(self.scale(t), score)


@dataclass(frozen=True)
class CellCoordinates:
    """Unit cells [B, 3, 3] Å <-> coordinates [B, 6]: (log of the symmetric cell - log of a cube of the typical volume)/spread.

    volume_per_site in Å³; spread is the standard deviation of the logarithms over the data.
    """

    volume_per_site: float
    spread: float

    def of_crystal(self, positions: Tensor, cell: Tensor, present: Tensor) -> dict[str, Tensor]:
        """fractional [B, N, 3] in [0, 1) and lattice [B, 6] of a crystal; its orientation is forgotten."""
        fractional = wrap(positions @ torch.linalg.inv(cell))
        kept = torch.where(present.unsqueeze(-1), fractional, fractional.new_zeros(()))
        logarithm = log_cell(cell_to_symmetric(cell))
        return {"fractional": kept, "lattice": (logarithm - self._typical(present, cell)) / self.spread}

    def cell(self, lattice: Tensor, present: Tensor) -> Tensor:
        """Symmetric cells [B, 3, 3] Å of coordinates, which count for at most FARTHEST."""
        held = lattice.clamp(-FARTHEST, FARTHEST)
        return cell_from_log(held * self.spread + self._typical(present, lattice))

    def _typical(self, present: Tensor, like: Tensor) -> Tensor:
        edge = (present.sum(1) * self.volume_per_site).to(like.dtype) ** (1 / 3)
        return log_cell(torch.eye(3, dtype=like.dtype, device=like.device) * edge[:, None, None])
