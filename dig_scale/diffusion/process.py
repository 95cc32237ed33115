"""Process: noise on one field's manifold, in six verbs. Solvers and objectives know fields only through it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Coefficients:
    """At t [B]: x_t = alpha x_0 + sigma noise, dx = drift·x dt + sqrt(diffusion) dW; all [B], t in [0, 1]."""

    alpha: Tensor
    sigma: Tensor
    drift: Tensor
    diffusion: Tensor


class Process(Protocol):
    """Noise on one field; values are [B, ...], t is [B]."""

    def perturb(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Sample of x_t given x_0 and standard noise."""
        ...

    def target(self, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """Conditional score grad log p(x_t | x_0)."""
        ...

    def coefficients(self, t: Tensor) -> Coefficients:
        """Schedule at t."""
        ...

    def move(self, x: Tensor, tangent: Tensor) -> Tensor:
        """Step from x along a tangent, on the manifold."""
        ...

    def sample_prior(self, noise: Tensor) -> Tensor:
        """Sample at t = 1 from standard noise."""
        ...

    def prior_log_density(self, x: Tensor, degrees: Tensor) -> Tensor:
        """log p_1(x) [B] with `degrees` [B] of freedom."""
        ...
