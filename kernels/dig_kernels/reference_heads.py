"""The oracle of the read-outs: vector head, point attention, pair values, adaptive norm, sampler update, from their formulas.

Plain PyTorch, unfused, in any floating dtype, differentiable any number of times. Shapes: T sites of all samples, L sites
of one, P keys of one (P = L without periodic images), H heads, d head width, D width, C pair channels, B samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dig_kernels.layout import Packing, blocks_from_dense, dense_from_blocks, pitch_of

if TYPE_CHECKING:
    from dig_kernels.vector_head import ImageKeys

UNIT_EPSILON = 1e-5
"""Å added to a distance before a displacement is divided by it, as in the published head."""
_WORD = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)


def masked_softmax(logits: Tensor, key_mask: Tensor | None) -> Tensor:
    """Weights over the last axis; keys outside key_mask weigh exactly 0, and so does every key of a row without any."""
    if logits.shape[-1] == 0:
        return logits
    taken = key_mask if key_mask is not None else logits.new_ones(logits.shape[-1], dtype=torch.bool)
    logits = torch.where(taken, logits, -1e30)
    weights = torch.exp(logits - logits.detach().amax(-1, keepdim=True)) * taken
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, 1.0, total)


def bias_blocks(bias: Tensor | None, packing: Packing, images: ImageKeys | None, heads: int) -> list[Tensor | None]:
    """One dense [H, L_b, P_b] per sample of a flat bias over sites or, with images, over their copies."""
    if bias is None:
        return [None] * packing.batch
    if images is None:
        return list(dense_from_blocks(bias, packing, heads))
    lengths, counts = packing.cu_seqlens.diff().tolist(), images.bounds.diff().tolist()
    blocks: list[Tensor | None] = []
    for start, length, count in zip((images.pair_offsets * heads).tolist(), lengths, counts, strict=False):
        pitch = pitch_of(count)
        blocks.append(bias[start : start + heads * length * pitch].view(heads, length, pitch)[..., :count])
    return blocks


def unit_vectors(displacement: Tensor) -> Tensor:
    """displacement [..., 3] over its length + UNIT_EPSILON; 0 with gradient 0 where it is 0."""
    squared = (displacement**2).sum(-1, keepdim=True)
    together = squared == 0
    length = torch.sqrt(torch.where(together, 1.0, squared))
    return torch.where(together, 0.0, displacement / (length + UNIT_EPSILON))


def vector_head(
    q: Tensor,
    k: Tensor,
    s: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    packing: Packing,
    scale: float,
    sign: float,
    key_mask: Tensor | None = None,
    images: ImageKeys | None = None,
) -> Tensor:
    """sign * sum over heads and keys of p_hij s_hj unit(x_i - x_j), [T, 3]; the arguments are those of vector_head.py."""
    cu, blocks = packing.cu_seqlens.tolist(), bias_blocks(bias, packing, images, q.shape[1])
    bounds = images.bounds.tolist() if images is not None else cu
    outs = [positions[:0]]
    for b, block in enumerate(blocks):
        rows = slice(cu[b], cu[b + 1])
        keys = torch.arange(cu[b], cu[b + 1], device=q.device)
        displacement = positions[rows].unsqueeze(1) - positions[keys]
        if images is not None:
            copies = slice(bounds[b], bounds[b + 1])
            keys = images.sources[copies].long()
            displacement = positions[rows].unsqueeze(1) - positions[keys] - images.offsets[copies]
        logits = scale * torch.einsum("ihd,jhd->hij", q[rows], k[keys])
        logits = logits if block is None else logits + block
        weights = masked_softmax(logits, key_mask[keys] if key_mask is not None else None)
        signed = weights * s[keys].transpose(0, 1).unsqueeze(1)
        outs.append(sign * (signed.unsqueeze(-1) * unit_vectors(displacement)).sum((0, 2)))
    return torch.cat(outs)


def point_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_points: Tensor,
    k_points: Tensor,
    v_points: Tensor,
    head_weights: Tensor,
    bias: Tensor | None,
    packing: Packing,
    scale: float,
    bias_scale: float,
    epsilon: float,
    power: int,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Values [T, H, d], points [T, H, Pv, 3] and weights flat [H * pairs]; distances of points to this power, 1 or 2."""
    cu, blocks = packing.cu_seqlens.tolist(), bias_blocks(bias, packing, None, q.shape[1])
    values, points, weights = [v[:0]], [v_points[:0]], [torch.zeros(1, 0, 0, dtype=q.dtype, device=q.device)]
    for b, block in enumerate(blocks):
        rows = slice(cu[b], cu[b + 1])
        displacement = q_points[rows].unsqueeze(1) - k_points[rows]
        apart = (displacement**2).sum(-1)
        distance = (apart if power == 2 else torch.sqrt(apart + epsilon)).sum(-1)
        logits = scale * torch.einsum("ihd,jhd->hij", q[rows], k[rows])
        logits = logits if block is None else logits + bias_scale * block
        logits = logits - (head_weights * distance).permute(2, 0, 1)
        share = masked_softmax(logits, key_mask[rows] if key_mask is not None else None)
        values.append(torch.einsum("hij,jhd->ihd", share.to(v.dtype), v[rows]))
        points.append(torch.einsum("hij,jhpc->ihpc", share.to(v_points.dtype), v_points[rows]))
        weights.append(share)
    return torch.cat(values), torch.cat(points), blocks_from_dense(weights)


def pair_value(weights: Tensor, pair: Tensor, projection: Tensor) -> Tensor:
    """sum_j a_hij (W_h z_ij), [G, L, H, c], projected first: weights [G, H, L, P], pair [L, P, C], projection [H, c, C]."""
    return torch.einsum("ghij,ijhc->gihc", weights, torch.einsum("ijk,hck->ijhc", pair, projection))


def sample_of_site(packing: Packing) -> Tensor:
    """Index [T] int64 of the sample that owns each site, without waiting for the device."""
    sites = torch.arange(packing.sites, device=packing.cu_seqlens.device, dtype=packing.cu_seqlens.dtype)
    return torch.searchsorted(packing.cu_seqlens[1:], sites, right=True)


def adaptive_norm(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    packing: Packing,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """Residual x + gate update and LayerNorm(residual) (1 + scale) + shift, [T, D]; gate, shift, scale [B, D]."""
    sample = sample_of_site(packing)
    residual = x if update is None or gate is None else x + gate[sample] * update
    mean = residual.mean(-1, keepdim=True)
    variance = ((residual - mean) ** 2).mean(-1, keepdim=True)
    return residual, (residual - mean) / torch.sqrt(variance + epsilon) * (1 + scale[sample]) + shift[sample]


def sampler_update(
    x: Tensor,
    score: Tensor,
    noise: Tensor,
    coefficients: tuple[Tensor, Tensor, Tensor],
    packing: Packing,
    mobile: Tensor | None,
) -> Tensor:
    """a x + c score + e noise per site, [T, 3]; a, c, e [B] are the coefficients of its sample; immobile sites keep x."""
    sample = sample_of_site(packing)
    a, c, e = (coefficient[sample].unsqueeze(-1) for coefficient in coefficients)
    moved = a * x + c * score + e * noise
    return moved if mobile is None else torch.where(mobile.unsqueeze(-1), moved, x)


def counter_normal(seed: Tensor, index: Tensor, step: Tensor, n: int) -> Tensor:
    """Standard normals [B, n] float32, a pure function of seed, index, step [B] int64 (0 or more): Philox4x32-10, Box-Muller."""
    block = torch.arange((n + 3) // 4, device=index.device)[None]
    column = [word[:, None] for word in (step, index & _WORD, index >> 32, seed & _WORD, (seed >> 32) & _WORD)]
    c0, c1, c2, c3, k0, k1 = torch.broadcast_tensors(block, *column)
    for _ in range(10):
        low, high = _PHILOX_MULTIPLIERS[0] * c0, _PHILOX_MULTIPLIERS[1] * c2
        c0, c1 = ((high >> 32) & _WORD) ^ c1 ^ k0, high & _WORD
        c2, c3 = ((low >> 32) & _WORD) ^ c3 ^ k1, low & _WORD
        k0, k1 = (k0 + _PHILOX_WEYL[0]) & _WORD, (k1 + _PHILOX_WEYL[1]) & _WORD
    uniform = [(word.double() + 0.5) / 2**32 for word in (c0, c1, c2, c3)]
    radii = [torch.sqrt(-2 * torch.log(uniform[0])), torch.sqrt(-2 * torch.log(uniform[2]))]
    angles = [2 * math.pi * uniform[1], 2 * math.pi * uniform[3]]
    pairs = [r * torch.cos(a) for r, a in zip(radii, angles, strict=True)]
    pairs += [r * torch.sin(a) for r, a in zip(radii, angles, strict=True)]
    return torch.stack(pairs, -1).flatten(1)[:, :n].float()


def gradients_through(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    cotangents: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """Vector-Jacobian product of a reference that can itself be differentiated, for the inputs that are `needed`.

    The function is evaluated in fp32 at least. An input passed in two places gets each place's own gradient.
    """
    with torch.enable_grad():
        own = [x.view_as(x) if x is not None and need else x for x, need in zip(inputs, needed, strict=True)]
        result = function(*[_at_least_fp32(x) for x in own])
        outputs = (result,) if isinstance(result, Tensor) else result
        targets = [x for x, need in zip(own, needed, strict=True) if x is not None and need]
        used = [(y, g.to(y.dtype)) for y, g in zip(outputs, cotangents, strict=True) if y.requires_grad]
        grads = torch.autograd.grad(
            [y for y, _ in used], targets, [g for _, g in used], create_graph=True, allow_unused=True
        )
    found = iter(grads)
    return tuple(next(found) if x is not None and need else None for x, need in zip(own, needed, strict=True))


def _at_least_fp32(x: Tensor | None) -> Tensor | None:
    return x.float() if x is not None and x.dtype in (torch.bfloat16, torch.float16) else x
