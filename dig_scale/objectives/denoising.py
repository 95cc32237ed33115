"""Denoising score matching: the squared error of the network's answers F, of order 1 at every noise level.

With the parametrisations of the diffusion package this is E[weight |s_theta - s|²] with the weight of Karras et al. 2022
(eq. 8, lambda = 1/c_out²) for plain vectors and 1/E|s|² for rotations and wrapped coordinates, as in DiG; fields of one
system add up with weight 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dig_scale.batch import Batch, State
from dig_scale.diffusion.composition import Composition, Network


def draw_times(n: int, sampling: str, generator: torch.Generator) -> Tensor:
    """t [n] in [0, 1]: `uniform` draws, or `antithetic` ones (the second half mirrors the first, as in DiG)."""
    if sampling == "uniform":
        return torch.rand(n, generator=generator)
    half = torch.rand(n // 2 + 1, generator=generator)
    return torch.cat([half, 1 - half])[:n]


def denoising_loss(network: Network, composition: Composition, batch: Batch, t: Tensor, noise: State) -> Tensor:
    """Loss [B] of every sample of clean states: mean over what moves, summed over fields."""
    errors = composition.errors(network, batch.state, batch.context, t, noise)
    return torch.stack(list(errors.values())).sum(0)
