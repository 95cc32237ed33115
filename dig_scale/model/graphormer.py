"""The trunk: pre-norm Graphormer blocks with pair-biased attention, geometric filters and time conditioning.

Tokens [B, N, D], pair bias [B, H, N, N] shared by all blocks, geometric filters shared by all blocks, condition [B, D].
Every block is modulated by the condition (adaLN, Peebles & Xie 2023). No chemistry and no diffusion here.

A geometric filter gathers vectors V_im = sum_j w_ijm b_jm (r_i - r_j)/|r_i - r_j| and returns invariants of them:
dot products, and triple products a·(b×c), which change sign under reflection. So the trunk tells a molecule from its
mirror image wherever three directions span space, stereocentre or not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dig_scale.config import Model
from dig_scale.model.leaves import ChannelMix, Modulation


@dataclass(frozen=True)
class Geometry:
    """What blocks know of space: attention bias [B,H,N,N], filter weights over distance [B,M,N,N] in 1/Å, sites [B,N,3] Å."""

    bias: Tensor
    filters: Tensor
    sites: Tensor


def gather_vectors(keys: Tensor, geometry: Geometry) -> Tensor:
    """V [B, 3, M, N], component first, with V_im = sum_j filters_mij keys_jm (r_i - r_j), from keys [B, N, M].

    Rotates with the sites. In the precision of the sites even under autocast: the two sums cancel.
    """
    with torch.autocast(keys.device.type, enabled=False):
        sites = geometry.sites.transpose(1, 2)
        weights = geometry.filters * keys.to(sites.dtype).transpose(1, 2).unsqueeze(2)
        corners = torch.cat([sites, torch.ones_like(sites[:, :1])], dim=1)
        summed = (corners @ weights.flatten(1, 2).transpose(1, 2)).unflatten(2, weights.shape[1:3])
        return summed[:, 3:] * sites.unsqueeze(2) - summed[:, :3]


def soft_unit(vectors: Tensor) -> Tensor:
    """Vectors [B, 3, M, N] bounded to length 1, smooth at 0."""
    return vectors * torch.rsqrt(1 + (vectors * vectors).sum(1, keepdim=True))


def cross(b: Tensor, c: Tensor) -> Tensor:
    """b × c of vectors [B, 3, M, N]."""
    return b.roll(-1, 1) * c.roll(-2, 1) - b.roll(-2, 1) * c.roll(-1, 1)


class GeometricFilter(nn.Module):
    """Tokens -> tokens [B, N, D] from dot and triple products of gathered vectors."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        m = config.vector_channels
        self.keys = nn.Linear(config.width, m)
        self.mix = ChannelMix(m, 3 * m)
        self.out = nn.Linear(4 * m, config.width)

    def forward(self, tokens: Tensor, geometry: Geometry) -> Tensor:
        """Update [B, N, D] to be added to the tokens."""
        mixed = soft_unit(self.mix(gather_vectors(self.keys(tokens), geometry)))
        a, b, c = mixed.chunk(3, dim=2)
        with_a = torch.cat([cross(b, c), b, a], dim=2) * a.repeat(1, 1, 3, 1)
        invariants = torch.cat([with_a.sum(1), (b * c).sum(1)], dim=1)
        return self.out(invariants.transpose(1, 2))


class Attention(nn.Module):
    """Multi-head attention with an additive pair bias."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, tokens: Tensor, bias: Tensor) -> Tensor:
        """[B, N, D] from tokens [B, N, D] and bias [B, H, N, N] (masked keys carry a large negative number)."""
        batch, n, width = tokens.shape
        heads = self.qkv(tokens).view(batch, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        logits = torch.baddbmm(
            bias.reshape(-1, n, n),
            q.reshape(-1, n, q.shape[-1]),
            k.reshape(-1, n, k.shape[-1]).transpose(1, 2),
            alpha=q.shape[-1] ** -0.5,
        )
        mixed = torch.bmm(torch.softmax(logits, dim=-1), v.reshape(-1, n, v.shape[-1]))
        return self.out(mixed.view(batch, self.heads, n, -1).transpose(1, 2).reshape(batch, n, width))


class Block(nn.Module):
    """Geometric filter, attention and feed-forward, each on a normalised, time-modulated copy of the tokens."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        width = config.width
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = Modulation(width)
        self.geometric = GeometricFilter(config)
        self.attention = Attention(config)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, config.feed_forward), nn.GELU(), nn.Linear(config.feed_forward, width)
        )

    def forward(self, tokens: Tensor, condition: Tensor, geometry: Geometry) -> Tensor:
        """Tokens [B, N, D] -> tokens; condition [B, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        inner = torch.addcmul(shift1, self.norm(tokens), 1 + scale1)
        update = self.attention(inner, geometry.bias) + self.geometric(inner, geometry)
        tokens = torch.addcmul(tokens, gate1, update)
        inner = torch.addcmul(shift2, self.norm(tokens), 1 + scale2)
        return torch.addcmul(tokens, gate2, self.feed_forward(inner))


class Trunk(nn.Module):
    """A stack of blocks."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, tokens: Tensor, condition: Tensor, geometry: Geometry) -> Tensor:
        """Tokens [B, N, D] -> normalised tokens [B, N, D]."""
        for block in self.blocks:
            tokens = block(tokens, condition, geometry)
        return self.norm(tokens)
