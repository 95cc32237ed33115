"""The oracle: every operator of this package from its formula, in plain PyTorch, for any floating dtype.

Unfused and differentiable any number of times; the fused kernels are tested against it in fp64. Shapes: L queries,
P keys (P = L unless periodic images are appended), H heads, d head width, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dig_kernels.layout import Packing, blocks_from_dense, dense_from_blocks, static_from_blocks

MASKED = -1e30
"""Logit of a masked key: finite, so that a row without any key left is well defined."""


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T + bias) v and the log-sum-exp of the logits, [H, L, d] and [H, L], from q [H,L,d], k, v [H,P,d].

    bias [H, L, P]; key_mask [P] is True where a key takes part. A row without keys gives 0 and a log-sum-exp of MASKED.
    """
    logits = scale * q @ k.transpose(-1, -2)
    if bias is not None:
        logits = logits + bias
    if key_mask is None:
        key_mask = torch.ones(k.shape[-2], dtype=torch.bool, device=k.device)
    logits = torch.where(key_mask, logits, MASKED)
    top = logits.detach().amax(-1, keepdim=True) if k.shape[-2] else logits.new_zeros(*logits.shape[:-1], 1)
    weights = torch.exp(logits - top) * key_mask
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    out = (weights / torch.where(empty, 1.0, total)) @ v
    lse = torch.where(empty, MASKED, top + torch.log(torch.where(empty, 1.0, total)))
    return out, lse.squeeze(-1)


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, packing: Packing, scale: float, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention within each sample of a packed batch: out [T,H,d] and lse [H,T] from q, k, v [T,H,d] and bias flat [H*pairs]."""
    heads = q.shape[1]
    bounds = packing.cu_seqlens.tolist()
    blocks = dense_from_blocks(bias, packing, heads) if bias is not None else [None] * packing.batch
    outs, lses = [], []
    for begin, end, block in zip(bounds[:-1], bounds[1:], blocks, strict=True):
        rows = [tensor[begin:end].transpose(0, 1) for tensor in (q, k, v)]
        mask = key_mask[begin:end] if key_mask is not None else None
        out, lse = attention(rows[0], rows[1], rows[2], block, scale, mask)
        outs.append(out.transpose(0, 1))
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, dim=1)


def distances(queries: Tensor, keys: Tensor) -> Tensor:
    """|x_i - x_j| [L, P] with gradient 0 where two sites coincide, from [L, 3] and [P, 3]."""
    squared = ((queries.unsqueeze(-2) - keys.unsqueeze(-3)) ** 2).sum(-1)
    together = squared == 0
    return torch.where(together, 0.0, torch.sqrt(torch.where(together, 1.0, squared)))


def pair_scalar(distance: Tensor, types_i: Tensor, types_j: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """u = gain[t_i, t_j] d + shift[t_i, t_j], [L, P], from distance [L, P], types [L], [P] and per-type-pair maps [n, n]."""
    pair = (types_i.unsqueeze(-1), types_j.unsqueeze(-2))
    return gain[pair] * distance + shift[pair]


def locate(u: Tensor, start: float, step: float, n_pieces: int) -> tuple[Tensor, Tensor]:
    """Piece (int64) and fraction in [0, 1] of u on uniform knots; beyond the ends the end values hold, NaN stays one."""
    place = ((u - start) / step).clamp(0, n_pieces)
    piece = place.detach().nan_to_num(0.0).floor().clamp(max=n_pieces - 1)
    return piece.long(), place - piece


def hermite(pieces: Tensor, u: Tensor, start: float, step: float) -> Tensor:
    """C channels [..., C] at u [...] from cubic pieces [K-1, 4, C] on uniform knots; beyond the ends the end values hold."""
    piece, fraction = locate(u, start, step, len(pieces))
    f = fraction.unsqueeze(-1)
    c0, c1, c2, c3 = pieces[piece].unbind(-2)
    return c0 + f * (c1 + f * (c2 + f * c3))


def fold_images(bias: Tensor, source: Tensor, sites: int) -> Tensor:
    """log-sum-exp over the periodic copies of each key: [C, L, sites] from bias [C, L, P], source [P] the site copied.

    Copies of a key share q, k and v, so attention over P keys equals attention over `sites` keys with this bias.
    """
    index = source.expand_as(bias)
    top = bias.new_full((*bias.shape[:-1], sites), -torch.inf).scatter_reduce(-1, index, bias.detach(), "amax")
    total = bias.new_zeros(top.shape).scatter_add(-1, index, torch.exp(bias - top.gather(-1, index)))
    return top + torch.log(total)


def pair_channels_from_scalar(
    u: Tensor, pieces: Tensor, static: Tensor | None, packing: Packing, start: float, step: float, biased: int
) -> tuple[Tensor, Tensor]:
    """Bias flat [biased * pairs] and summed channels [T, C - biased], from u flat [pairs] and pieces [K-1, 4, C].

    The first `biased` channels become the bias, plus the static block [biased, L, pitch] of the sample's system; the
    others are summed over all keys.
    """
    blocks = dense_from_blocks(u, packing, 1)
    statics: list[Any] = static_from_blocks(static, packing, biased) if static is not None else [0.0] * packing.batch
    biases, sums = [], []
    for block, added in zip(blocks, statics, strict=True):
        channels = hermite(pieces, block[0], start, step).permute(2, 0, 1)
        biases.append(channels[:biased] + added)
        sums.append(channels[biased:].sum(-1).transpose(0, 1))
    return blocks_from_dense(biases), torch.cat(sums)
