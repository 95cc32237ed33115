"""Packed attention with a pair bias in plain PyTorch, one sample at a time: the form for processors.

Same functions and notation as the Triton launches (attention_kernels.py): nothing of size L² is kept between forward and
backward. Arithmetic in fp32, or fp64 where the inputs are. Knows no autograd.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dig_kernels.attention_call import Call, LayerTensors, Saved, Writing
from dig_kernels.bias_source import SourceKind, pair_block, sample_biases, sample_scalar
from dig_kernels.layout import pitch_of
from dig_kernels.reference import MASKED, attention, locate


def wide(tensor: Tensor) -> Tensor:
    """At least fp32."""
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def launch_forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Output [T, H, d] and log-sum-exp [H, T]."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=wide(q[:0]).dtype, device=q.device)
    for _, sites, bias in _samples(call, q.shape[1]):
        rows = [_head_first(tensor, sites) for tensor in (q, k, v)]
        mixed, log_sum = attention(rows[0], rows[1], rows[2], _wide_or_none(bias), call.scale, _mask(call, sites))
        out[sites] = mixed.transpose(0, 1).to(out.dtype)
        lse[:, sites] = log_sum
    return out, lse


def launch_backward(
    saved: Saved, call: Call, d_bias: Tensor | None, writing: Writing
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and delta [H, T]; stores dS in `d_bias` (flat as the bias) or adds it there."""
    heads = saved.q.shape[1]
    grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (saved.q, saved.k, saved.v)]
    delta = (wide(saved.d_out) * wide(saved.out)).sum(-1).transpose(0, 1).contiguous()
    for start, sites, bias in _samples(call, heads):
        q, k, v, d_out = (_head_first(tensor, sites) for tensor in (saved.q, saved.k, saved.v, saved.d_out))
        weights = _weights(q, k, bias, saved.lse[:, sites], call, sites)
        d_logits = weights * (d_out @ v.transpose(1, 2) - delta[:, sites, None])
        parts = (call.scale * d_logits @ k, call.scale * d_logits.transpose(1, 2) @ q, weights.transpose(1, 2) @ d_out)
        for grad, part in zip(grads, parts, strict=True):
            grad[sites] = part.transpose(0, 1).to(grad.dtype)
        if d_bias is not None:
            block = _block(d_bias, heads * start, heads, sites.stop - sites.start)
            _write(block, block[..., : d_logits.shape[-1]] + d_logits if writing is Writing.ADD else d_logits)
    return grads[0], grads[1], grads[2], delta


def launch_deferred(layers: LayerTensors, call: Call, d_bias: Tensor, sites: range | None) -> None:
    """Writes dS summed over layers into `d_bias`: flat as the bias, or, for query sites given, as a block [H, rows, width]."""
    heads = layers.q[0].shape[1]
    for start, own, bias in _samples(call, heads):
        summed = sum(_logit_gradient(layer, bias, call, own) for layer in zip(*layers.groups, strict=True))
        if not isinstance(summed, Tensor):
            continue
        if sites is None:
            _write(_block(d_bias, heads * start, heads, own.stop - own.start), summed)
            continue
        first, stop = max(own.start, sites.start), min(own.stop, sites.stop)
        if first < stop:
            rows = summed[:, first - own.start : stop - own.start]
            d_bias[:, first - sites.start : stop - sites.start, : rows.shape[-1]] = rows


def table_gradient(layers: LayerTensors, call: Call) -> list[Tensor]:
    """Gradients of the tensors of a tabulated source (`Source.flat`), from dS summed over layers, one sample at a time."""
    heads, source = layers.q[0].shape[1], call.source
    grads = [torch.zeros_like(tensor, dtype=wide_or_integer(tensor)) for tensor in source.flat]
    bounds, starts, system, static_starts = (tensor.tolist() for tensor in call.packing)
    biases = sample_biases(source, call.packing, heads)
    for sample, (begin, end, bias) in enumerate(zip(bounds[:-1], bounds[1:], biases, strict=True)):
        if end == begin:
            continue
        own = slice(begin, end)
        summed = torch.stack(
            [_logit_gradient(layer, bias, call, own) for layer in zip(*layers.groups, strict=True)]
        ).sum(0)
        u = sample_scalar(source, begin, end, starts[sample])
        d_table, d_u = _lookup_gradient(source.tensors[0], u, summed, source.start, source.step)
        grads[0] += d_table
        if source.kind is SourceKind.GIVEN:
            pair_block(grads[1], starts[sample], end - begin, 1)[0].copy_(d_u)
        else:
            _add_geometry_gradient(grads, source.tensors, own, d_u)
        if source.static is not None:
            pair_block(grads[-1], heads * static_starts[system[sample]], end - begin, heads).add_(summed)
    return [grad.to(tensor.dtype) for grad, tensor in zip(grads, source.flat, strict=True)]


def wide_or_integer(tensor: Tensor) -> torch.dtype:
    """The dtype in which a tensor's gradient is summed; integers have none and keep theirs."""
    return wide(tensor[:0]).dtype if tensor.dtype.is_floating_point else tensor.dtype


def _lookup_gradient(table: Tensor, u: Tensor, d_bias: Tensor, start: float, step: float) -> tuple[Tensor, Tensor]:
    """Gradients of table [H, K-1, 4] and u [L, L] from d_bias [H, L, L]."""
    pieces = table.shape[1]
    piece, f = locate(u, start, step, pieces)
    place, index = (u - start) / step, piece.flatten()
    powers = torch.stack([d_bias * f**m for m in range(4)], dim=-1).flatten(1, 2)
    d_table = torch.zeros_like(table, dtype=d_bias.dtype).index_add_(1, index, powers)
    _, c1, c2, c3 = table[:, index].unflatten(1, u.shape).unbind(-1)
    slopes = (c1 + f * (2 * c2 + 3 * f * c3)) / step
    return d_table, (d_bias * slopes).sum(0) * ((place >= 0) & (place <= pieces))


def _add_geometry_gradient(grads: list[Tensor], tensors: tuple[Tensor, ...], own: slice, d_u: Tensor) -> None:
    """Adds what d_u [L, L] of one sample gives to positions, gain and shift."""
    _, positions, types, gain, _ = tensors
    kinds, n = types[own].long(), len(gain)
    pair = (kinds.unsqueeze(-1) * n + kinds).flatten()
    away = positions[own].unsqueeze(1) - positions[own]
    distance = away.norm(dim=-1)
    grads[3].view(-1).index_add_(0, pair, (d_u * distance).flatten())
    grads[4].view(-1).index_add_(0, pair, d_u.flatten())
    pull = d_u * gain.flatten()[pair].view_as(d_u) / torch.where(distance > 0, distance, torch.inf)
    push = pull.unsqueeze(-1) * away
    grads[1][own] += push.sum(1) - push.sum(0)


def _samples(call: Call, heads: int) -> Iterator[tuple[int, slice, Tensor | None]]:
    """Start of its pair block, sites and bias of each sample that has any site."""
    bounds, starts = call.packing[0].tolist(), call.packing[1].tolist()
    biases = sample_biases(call.source, call.packing, heads)
    for start, begin, end, bias in zip(starts[:-1], bounds[:-1], bounds[1:], biases, strict=True):
        if end > begin:
            yield start, slice(begin, end), bias


def _head_first(tensor: Tensor, sites: slice) -> Tensor:
    return wide(tensor[sites].transpose(0, 1))


def _wide_or_none(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else wide(tensor)


def _mask(call: Call, sites: slice) -> Tensor | None:
    return None if call.key_mask is None else call.key_mask[sites]


def _weights(q: Tensor, k: Tensor, bias: Tensor | None, lse: Tensor, call: Call, sites: slice) -> Tensor:
    logits = call.scale * q @ k.transpose(1, 2)
    if bias is not None:
        logits = logits + bias
    mask = _mask(call, sites)
    if mask is not None:
        logits = torch.where(mask, logits, -torch.inf)
    return torch.exp(logits - torch.where(lse <= MASKED / 2, torch.inf, lse).unsqueeze(-1))


def _logit_gradient(layer: tuple[Tensor, ...], bias: Tensor | None, call: Call, sites: slice) -> Tensor:
    q, k, v, d_out = (_head_first(tensor, sites) for tensor in layer[:4])
    weights = _weights(q, k, bias, layer[4][:, sites], call, sites)
    return weights * (d_out @ v.transpose(1, 2) - layer[5][:, sites, None])


def _block(flat: Tensor, start: int, heads: int, length: int) -> Tensor:
    pitch = pitch_of(length)
    return flat[start : start + heads * length * pitch].view(heads, length, pitch)


def _write(block: Tensor, values: Tensor) -> None:
    width = values.shape[-1]
    block[..., :width] = values.to(block.dtype)
    block[..., width:] = 0
