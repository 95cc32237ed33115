"""Denoising score matching: the squared error of the network's vectors F, of order 1 at every noise level.

With the preconditioning of diffusion.composition this is E[sigma² weight |s_theta - s|²] with the weight of Karras et al.
2022 (eq. 8, lambda = 1/c_out²); DiG's unit-weight noise loss (eq. A6) is the same where noise is small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dig_scale.batch import Batch, State
from dig_scale.diffusion.composition import Composition, Network, constrain, in_data_frame, preconditioning
from dig_scale.diffusion.euclidean import per_sample


def draw_times(n: int, sampling: str, generator: torch.Generator) -> Tensor:
    """t [n] in [0, 1]: `uniform` draws, or `antithetic` ones (the second half mirrors the first, as in DiG)."""
    if sampling == "uniform":
        return torch.rand(n, generator=generator)
    half = torch.rand(n // 2 + 1, generator=generator)
    return torch.cat([half, 1 - half])[:n]


def denoising_loss(network: Network, composition: Composition, batch: Batch, t: Tensor, noise: State) -> Tensor:
    """Loss [B] of every sample: mean over its mobile sites and coordinates."""
    clean = composition.centred(batch.state, batch.context).positions
    noised = composition.perturb(batch.state, batch.context, t, noise)
    noise_std = composition.positions.schedule.noise_std(t)
    scaled = in_data_frame(noised, noise_std)
    skip, out = preconditioning(noise_std, batch.context.extent)
    predicted = network(scaled, batch.context, noise_std).positions
    assert clean is not None and predicted is not None and scaled.positions is not None
    target = (clean - per_sample(skip, clean) * scaled.positions) / per_sample(out, clean)
    error = constrain(predicted - target, batch.context)
    sites = (batch.context.mobile & batch.context.present).sum(1).clamp(min=1)
    return (error**2).flatten(1).sum(1) / (3 * sites)
