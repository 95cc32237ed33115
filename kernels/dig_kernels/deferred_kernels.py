"""Triton kernel of the deferred bias gradient: dS summed over all layers that shared a bias, each element written once.

Notation as in attention_kernels.py. For a tile of pairs the bias is read once, then a loop over layers recomputes P and dP
from q, k, v, dO, LSE and delta of the layer; the sum stays in fp32 registers. Layers' tensors lie anywhere in memory: the
kernel gets those of layer 0 and the distances of the others from them. Deterministic, no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dig_kernels.attention_call import Call, LayerTensors
from dig_kernels.attention_kernels import (
    LOG2E,
    MASKED,
    VARYING,
    bias_tile,
    block_start,
    find_tile,
    load_rows,
    log2_sum,
    product,
    row_pitch,
    usable_keys,
)
from dig_kernels.attention_launch import SHAPES, case, kernel_source, mask_pointer, options, programs
from dig_kernels.compiling import CompileCase

VECTOR_BYTES = 16


@triton.jit
def layer_offset(offsets, tensor, layer, layers, VECTOR: tl.constexpr):
    """Elements from a tensor of layer 0 to the one of `layer`; all are multiples of VECTOR."""
    return tl.multiple_of(tl.load(offsets + tensor * layers + layer), VECTOR)


@triton.jit(do_not_specialize=[*VARYING, "layers", "first_site", "block_rows", "block_width"])
def deferred_kernel(
    q, k, v, d_out, lse, delta, offsets, d_bias, bounds, source, key_mask, packing,
    q_row, q_head, k_row, k_head, v_row, v_head, batch, heads, sites, scale, layers, first_site, block_rows, block_width,
    KIND: tl.constexpr, STATIC: tl.constexpr, HAS_MASK: tl.constexpr, UPCAST: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dS of one tile of rows and all keys, summed over the layers in registers."""
    head = tl.program_id(0) % heads
    sample, own_begin, own_rows, first = find_tile(bounds, tl.program_id(0) // heads, batch, TILE)
    if first >= own_rows:
        return
    begin = tl.load(packing[0] + sample)
    length = tl.load(packing[0] + sample + 1) - begin
    skipped = own_begin.to(tl.int32) + first_site - begin
    begin = begin.to(tl.int64)
    first_row = skipped + first
    lane = tl.arange(0, TILE)
    rows = first_row + lane
    stop = skipped + own_rows
    own = (begin * heads + head) * WIDTH
    statistics = head.to(tl.int64) * sites + begin
    if BLOCK:
        pitch = tl.multiple_of(block_width, 8)
        target = d_bias + (head.to(tl.int64) * block_rows + own_begin + first) * pitch
    else:
        pitch = row_pitch(length)
        target = d_bias + block_start(packing[1], sample, head, heads, length, first_row)
    for start in range(0, length, TILE):
        keys = start + lane
        usable = usable_keys(key_mask, begin, keys, length, HAS_MASK)
        if KIND:
            bias = bias_tile(
                source,
                packing,
                sample,
                begin,
                length,
                head,
                heads,
                first_row,
                lane[:, None],
                keys[None, :],
                KIND,
                STATIC,
            )
        else:
            bias = tl.zeros([TILE, TILE], tl.float32)
        bias = tl.where(usable[None, :], bias, MASKED)
        summed = tl.zeros([TILE, TILE], tl.float32)
        for layer in range(layers):
            q_base = q + layer_offset(offsets, 0, layer, layers, VECTOR) + begin * q_row + head * q_head
            k_base = k + layer_offset(offsets, 1, layer, layers, VECTOR) + begin * k_row + head * k_head
            v_base = v + layer_offset(offsets, 2, layer, layers, VECTOR) + begin * v_row + head * v_head
            g_base = d_out + layer_offset(offsets, 3, layer, layers, VECTOR) + own
            lse_base = lse + layer_offset(offsets, 4, layer, layers, 1) + statistics
            delta_base = delta + layer_offset(offsets, 5, layer, layers, 1) + statistics
            q_tile = load_rows(q_base, rows, q_row, stop, WIDTH, PADDED)
            k_tile = load_rows(k_base, keys, k_row, length, WIDTH, PADDED)
            v_tile = load_rows(v_base, keys, v_row, length, WIDTH, PADDED)
            g_tile = load_rows(g_base, rows, heads * WIDTH, stop, WIDTH, PADDED)
            row_lse = log2_sum(tl.load(lse_base + rows, mask=rows < stop, other=0.0))
            row_delta = tl.load(delta_base + rows, mask=rows < stop, other=0.0)
            logits = product(q_tile, tl.trans(k_tile), UPCAST) * scale + bias
            weights = tl.exp2(logits * LOG2E - row_lse[:, None])
            summed += weights * (product(g_tile, tl.trans(v_tile), UPCAST) - row_delta[:, None])
        here = (rows < stop)[:, None] & (keys < pitch)[None, :]
        tl.store(target + lane[:, None] * pitch + keys[None, :], summed.to(d_bias.dtype.element_ty), mask=here)


def layers_in_kernel_form(layers: LayerTensors) -> LayerTensors:
    """The same with layer 0's strides everywhere: copies only where a layer differs."""
    uniform = [
        list(group)
        if all(tensor.stride() == group[0].stride() and tensor.stride(-1) == 1 for tensor in group)
        else [tensor.contiguous() for tensor in group]
        for group in layers.groups[:3]
    ]
    return LayerTensors(*uniform, *([tensor.contiguous() for tensor in group] for group in layers.groups[3:]))


def offset_table(layers: LayerTensors) -> tuple[Tensor, int]:
    """Distances in elements [6, layers] from layer 0's tensors, and the power of two that divides those of the rows.

    Written by a kernel whose arguments they are, not copied from the host: so it may be captured in a CUDA graph.
    """
    distances = [
        (tensor.data_ptr() - group[0].data_ptr()) // tensor.element_size()
        for group in layers.groups
        for tensor in group
    ]
    table = torch.zeros(len(distances), dtype=torch.int64, device=layers.q[0].device)
    torch._foreach_add_(list(table.unbind()), distances)
    vector = VECTOR_BYTES // layers.q[0].element_size()
    aligned = all(distance % vector == 0 for distance in distances[: 4 * len(layers.q)])
    return table, vector if aligned else 1


def launch_deferred(layers: LayerTensors, call: Call, d_bias: Tensor, sites: range | None) -> None:
    """Writes the summed dS into `d_bias`: flat as the bias, or, for the query sites given, as a block [H, rows, width]."""
    layers = layers_in_kernel_form(layers)
    q, k, v = layers.q[0], layers.k[0], layers.v[0]
    total, heads, _ = q.shape
    if not q.numel() or not d_bias.numel():
        return
    offsets, vector = offset_table(layers)
    cu_seqlens = call.packing[0]
    own = range(total) if sites is None else sites
    bounds = cu_seqlens if sites is None else (cu_seqlens - own.start).clamp(0, len(own))
    width = 0 if sites is None else d_bias.shape[-1]
    deferred_kernel[programs(call, q, len(own))](
        q, k, v, layers.d_out[0], layers.lse[0], layers.delta[0], offsets, d_bias, bounds,
        kernel_source(call.source, offsets), mask_pointer(call), tuple(call.packing),
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], call.batch, heads, total, call.scale, len(layers.q),
        own.start, len(own), width, VECTOR=vector, BLOCK=sites is not None, **options(call, q, "deferred"),
    )  # fmt: skip


def compile_cases() -> list[CompileCase]:
    """Configurations in use: a streamed bias into the flat gradient, a table into blocks of rows."""
    return [case(deferred_kernel, "deferred", shape, {"VECTOR": 8, "BLOCK": shape.kind != "dense"}) for shape in SHAPES]
