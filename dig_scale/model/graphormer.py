"""The trunk: pre-norm Graphormer blocks with pair-biased attention, geometric filters and time conditioning.

Tokens [B, N, D], condition [B, D]; pair bias and geometric filters are shared by all blocks and reached through
`PairOperators`, whose ledgers travel with the tokens; Guides are what a site brings of its own: a vector, a frame.
Every block is modulated by the condition (adaLN, Peebles & Xie 2023). No chemistry and no diffusion here.

A geometric filter gathers vectors V_im = sum_j w_ijm b_jm (r_i - r_j)/|r_i - r_j| and returns invariants of them:
dot products, and triple products a·(b×c), which change sign under reflection. So the trunk tells a molecule from its
mirror image wherever three directions span space, stereocentre or not. Sites with frames also read V, and vectors that
other sites hold in their frames, in their own frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dig_scale.config import Model
from dig_scale.model.leaves import ChannelMix, Modulation
from dig_scale.model.pair_operators import Ledgers, PairOperators


@dataclass(frozen=True)
class Guides:
    """What sites bring besides pairs: vectors [B, 3, G, N] of order 1, and frames [B, N, 3, 3] with axes in columns."""

    vector: Tensor | None = None
    frames: Tensor | None = None


def soft_unit(vectors: Tensor) -> Tensor:
    """Vectors [B, 3, M, N] bounded to length 1, smooth at 0."""
    return vectors * torch.rsqrt(1 + (vectors * vectors).sum(1, keepdim=True))


def cross(b: Tensor, c: Tensor) -> Tensor:
    """b × c of vectors [B, 3, M, N]."""
    return b.roll(-1, 1) * c.roll(-2, 1) - b.roll(-2, 1) * c.roll(-1, 1)


def in_frames(vectors: Tensor, frames: Tensor) -> Tensor:
    """Components [B, N, 3 M] of vectors [B, 3, M, N] along the axes of each site's frame."""
    return torch.einsum("bnca,bcmn->bnam", frames, vectors).flatten(2)


class GeometricFilter(nn.Module):
    """Tokens -> tokens [B, N, D] from dot and triple products of gathered vectors, and what frames see of them."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        m, framed = config.vector_channels, config.sites == "residues"
        self.keys = nn.Linear(config.width, m)
        self.mix = ChannelMix(m + config.guide_vectors, 3 * m)
        self.values = nn.Linear(config.width, 3 * m) if framed else None
        self.out = nn.Linear((10 if framed else 4) * m, config.width)

    def forward(self, tokens: Tensor, pairs: PairOperators, guides: Guides, ledgers: Ledgers) -> tuple[Tensor, Ledgers]:
        """Update [B, N, D] to be added to the tokens, and the ledgers."""
        vectors, ledgers = pairs.gather(self.keys(tokens), ledgers)
        invariants, ledgers = self._framed(tokens, vectors, pairs, guides, ledgers)
        if guides.vector is not None:
            vectors = torch.cat([vectors, guides.vector], dim=2)
        mixed = soft_unit(self.mix(vectors))
        a, b, c = mixed.chunk(3, dim=2)
        with_a = torch.cat([cross(b, c), b, a], dim=2) * a.repeat(1, 1, 3, 1)
        free = torch.cat([with_a.sum(1), (b * c).sum(1)], dim=1).transpose(1, 2)
        return self.out(torch.cat([free, *invariants], dim=2) if invariants else free), ledgers

    def _framed(
        self, tokens: Tensor, vectors: Tensor, pairs: PairOperators, guides: Guides, ledgers: Ledgers
    ) -> tuple[list[Tensor], Ledgers]:
        if self.values is None or guides.frames is None:
            return [], ledgers
        held = self.values(tokens).unflatten(2, (-1, 3)).to(guides.frames.dtype)
        carried, ledgers = pairs.gather_vectors(torch.einsum("bnca,bnma->bnmc", guides.frames, held), ledgers)
        return [in_frames(soft_unit(both), guides.frames) for both in (vectors, carried)], ledgers


class Attention(nn.Module):
    """Multi-head attention with an additive pair bias."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, tokens: Tensor, pairs: PairOperators, ledgers: Ledgers) -> tuple[Tensor, Ledgers]:
        """[B, N, D] from tokens [B, N, D], and the ledgers."""
        mixed, ledgers = pairs.attend(self.qkv(tokens), self.heads, ledgers)
        return self.out(mixed), ledgers


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

    def forward(
        self, tokens: Tensor, condition: Tensor, pairs: PairOperators, guides: Guides, ledgers: Ledgers
    ) -> tuple[Tensor, Ledgers]:
        """Tokens [B, N, D] -> tokens, and the ledgers; condition [B, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        inner = torch.addcmul(shift1, self.norm(tokens), 1 + scale1)
        attended, ledgers = self.attention(inner, pairs, ledgers)
        filtered, ledgers = self.geometric(inner, pairs, guides, ledgers)
        tokens = torch.addcmul(tokens, gate1, attended + filtered)
        inner = torch.addcmul(shift2, self.norm(tokens), 1 + scale2)
        return torch.addcmul(tokens, gate2, self.feed_forward(inner)), ledgers


class Trunk(nn.Module):
    """A stack of blocks."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(
        self, tokens: Tensor, condition: Tensor, pairs: PairOperators, guides: Guides
    ) -> tuple[Tensor, Ledgers]:
        """Tokens [B, N, D] -> normalised tokens [B, N, D], and the ledgers."""
        ledgers = pairs.open()
        for block in self.blocks:
            tokens, ledgers = block(tokens, condition, pairs, guides, ledgers)
        return self.norm(tokens), ledgers
