"""The trunk that DiG's protein model and BioEmu share: attention with points in residue frames, and two read-outs.

In: residue tokens, the pair representation of ONE protein, noised frames of B samples of it. Out: one vector per residue
for the translation and one for the rotation, both in the residue's own frame. Attribute names are those of the published
state dicts, so that these load strictly. Knows no noise level, no sequence. Attention logits (Zheng et al. 2023, app. B.3):

    q_i . k_j / sqrt(3 d) + b_ij / sqrt(3) - 0.5 softplus(gamma_h) / sqrt(3 * 4 * 9 / 2) sum_p |q_ip - k_jp|

with distances, not their squares. Shapes: B samples, N residues, D width, C pair width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from dig_kernels.layout import Packing, blocks_from_dense, uniform_packing
from dig_kernels.pair_value import SystemRun, packed_pair_value, system_runs
from dig_kernels.point_attention import Coefficients, point_attention_with_weights
from torch import Tensor, nn
from torch.nn import functional

from dig_scale.geometry.rotations import to_global, to_local

SINGLE_WIDTH, PAIR_WIDTH = 384, 128
"""Widths of the single and pair representations of AlphaFold2's Evoformer."""
QUERY_POINTS, VALUE_POINTS = 4, 8


@dataclass(frozen=True)
class StructureSizes:
    """Sizes of a published protein network: D, C, layers, H, width of the feed-forward, buckets of sequence offsets."""

    width: int = 768
    pair_width: int = 256
    layers: int = 12
    heads: int = 32
    hidden: int = 1024
    buckets: int = 64
    longest_offset: int = 128


@dataclass(frozen=True)
class Pose:
    """Noised frames of B samples: positions [B, N, 3], rotations [B, N, 3, 3] (columns are the axes), known [B, N] or None.

    Residues that are not known are seen by no other.
    """

    positions: Tensor
    rotations: Tensor
    known: Tensor | None = None

    def to_global(self, points: Tensor) -> Tensor:
        """Points [B, N, P, 3] of each residue's frame in the common one."""
        return to_global(self.rotations, self.positions, points)

    def turned(self, vectors: Tensor) -> Tensor:
        """Vectors [B, N, P, 3] of each residue's frame along the common axes."""
        return vectors @ self.rotations.mT

    def to_local(self, points: Tensor) -> Tensor:
        """The inverse of `to_global`."""
        return to_local(self.rotations, self.positions, points)


@dataclass(frozen=True)
class PairWork:
    """What every layer needs beside tokens: the frames, and how B equal samples lie end to end."""

    pose: Pose
    packing: Packing
    runs: tuple[SystemRun, ...]

    @classmethod
    def of(cls, pose: Pose) -> PairWork:
        """The work on these frames."""
        batch, residues = pose.positions.shape[:2]
        packing = uniform_packing(batch, residues, pose.positions.device)
        return cls(pose, packing, system_runs(packing))


class PointAttention(nn.Module):
    """Attention with scalars, a pair bias and points; values from tokens, points, their norms and the pair tensor."""

    def __init__(self, sizes: StructureSizes) -> None:
        super().__init__()
        width, pair, heads = sizes.width, sizes.pair_width, sizes.heads
        self.heads, self.head_width = heads, width // heads
        self.scalar_query = nn.Linear(width, width, bias=False)
        self.scalar_key = nn.Linear(width, width, bias=False)
        self.scalar_value = nn.Linear(width, width, bias=False)
        self.pair_bias = nn.Linear(pair, heads, bias=False)
        self.point_query = nn.Linear(width, heads * QUERY_POINTS * 3, bias=False)
        self.point_key = nn.Linear(width, heads * QUERY_POINTS * 3, bias=False)
        self.point_value = nn.Linear(width, heads * VALUE_POINTS * 3, bias=False)
        self.trained_point_weight = nn.Parameter(torch.rand(heads))
        self.pair_value = nn.Linear(pair, width, bias=False)
        self.fc_out = nn.Linear(2 * width + heads * VALUE_POINTS * 4, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, pair: Tensor, work: PairWork) -> Tensor:
        """[B, N, D] from tokens [B, N, D] and pair [N, N, C]."""
        q, k, v = (layer(x).flatten(0, 1).unflatten(-1, (self.heads, -1)) for layer in self._scalar_layers())
        point_layers = (self.point_query, self.point_key, self.point_value)
        q_points, k_points, v_points = (self._points(layer(x), work.pose) for layer in point_layers)
        head_weights = 0.5 * functional.softplus(self.trained_point_weight) / math.sqrt(3 * QUERY_POINTS * 9 / 2)
        bias = blocks_from_dense([self.pair_bias(pair).permute(2, 0, 1)] * len(x))
        values, found, weights = point_attention_with_weights(
            q,
            k,
            v,
            q_points,
            k_points,
            v_points,
            head_weights,
            bias,
            work.packing,
            Coefficients(scale=(3 * self.head_width) ** -0.5, bias_scale=3**-0.5),
            key_mask=work.pose.known.flatten() if work.pose.known is not None else None,
        )
        projection = self.pair_value.weight.view(self.heads, self.head_width, -1)
        of_pairs = packed_pair_value(weights, [pair], projection, work.runs)
        local = work.pose.to_local(found.flatten(1, 2).unflatten(0, x.shape[:2]))
        parts = [
            values.flatten(1),
            local.flatten(2).flatten(0, 1),
            of_pairs.flatten(1),
            local.norm(dim=-1).flatten(0, 1),
        ]
        return self.dropout(self.fc_out(torch.cat(parts, -1))).view_as(x)

    def _scalar_layers(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.scalar_query, self.scalar_key, self.scalar_value

    def _points(self, local: Tensor, pose: Pose) -> Tensor:
        everywhere = pose.to_global(local.float().unflatten(-1, (-1, 3)))
        return everywhere.flatten(0, 1).unflatten(1, (self.heads, -1))


class FeedForward(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.ff = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Dropout(0.1), nn.Linear(hidden, width), nn.Dropout(0.1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., D]."""
        return self.ff(x)


class StructureLayer(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, sizes: StructureSizes) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(sizes.width)
        self.attn = PointAttention(sizes)
        self.norm2 = nn.LayerNorm(sizes.width)
        self.ffn = FeedForward(sizes.width, sizes.hidden)

    def forward(self, x: Tensor, pair: Tensor, residues: Tensor | None, work: PairWork) -> Tensor:
        """[B, N, D]; the residue types are not looked at here."""
        x = x + self.attn(self.norm1(x), pair, work)
        return x + self.ffn(self.norm2(x))


class ReadOut(nn.Module):
    """Residue tokens -> (translation, rotation) vectors [B, N, 3], each in the residue's frame."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc_t = _three_numbers(width)
        self.fc_eps = _three_numbers(width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both vectors."""
        return self.fc_t(x), self.fc_eps(x)


def _three_numbers(width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))


class Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, sizes: StructureSizes, layer: Callable[[StructureSizes], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(sizes) for _ in range(sizes.layers))

    def forward(self, x: Tensor, pair: Tensor, residues: Tensor | None, work: PairWork) -> Tensor:
        """[B, N, D] after all layers."""
        for layer in self.layers:
            x = layer(x, pair, residues, work)
        return x


class StructureModule(nn.Module):
    """Encoder and read-out."""

    def __init__(self, sizes: StructureSizes, layer: Callable[[StructureSizes], nn.Module] = StructureLayer) -> None:
        super().__init__()
        self.encoder = Encoder(sizes, layer)
        self.diff_head = ReadOut(sizes.width)

    def forward(self, x: Tensor, pair: Tensor, pose: Pose, residues: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Translation and rotation vectors [B, N, 3] in residue frames, of tokens [B, N, D] and pair [N, N, C]."""
        return self.diff_head(self.encoder(x, pair, residues, PairWork.of(pose)))


class SequenceOffset(nn.Module):
    """Embedding of i - j in buckets that widen with distance (T5): half of them for negative offsets."""

    def __init__(self, sizes: StructureSizes) -> None:
        super().__init__()
        self.buckets, self.longest = sizes.buckets, sizes.longest_offset
        self.relative_attention_bias = nn.Embedding(sizes.buckets, sizes.pair_width)

    def forward(self, residues: int) -> Tensor:
        """[N, N, C] for a chain of N residues."""
        index = torch.arange(residues, device=self.relative_attention_bias.weight.device)
        offset = index.unsqueeze(1) - index
        half = self.buckets // 2
        exact = half // 2
        away = offset.abs()
        growth = torch.log(away.clamp(min=1) / exact) / math.log(self.longest / exact) * (half - exact)
        far = (exact + growth.long()).clamp(max=half - 1)
        return self.relative_attention_bias(torch.where(away < exact, away, far) + (offset < 0) * half)


class StepEmbedding(nn.Module):
    """Sines and cosines of a step number [B]; `dummy` (no entries) stands in the published files."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.dummy = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, step: Tensor) -> Tensor:
        """[B, D]."""
        return sinusoids(step, self.width)


def sinusoids(step: Tensor, width: int) -> Tensor:
    """Half sines, half cosines [B, width] of step numbers [B], frequencies from 1 down to 1e-4."""
    half = width // 2
    exponent = torch.arange(half, device=step.device, dtype=torch.float32) * (-math.log(10000) / (half - 1))
    angle = step.to(torch.float32).unsqueeze(1) * torch.exp(exponent)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def evoformer_projection(from_width: int, to_width: int) -> nn.Sequential:
    """LayerNorm and a linear map without bias, from an Evoformer representation to the network's width."""
    return nn.Sequential(nn.LayerNorm(from_width), nn.Linear(from_width, to_width, bias=False))
