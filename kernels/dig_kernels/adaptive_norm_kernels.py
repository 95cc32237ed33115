"""Triton kernels of the adaptive norm: one program per (chunk of sites, sample), which loads the sample's condition once.

A site's D channels lie across the program; the backward leaves one partial sum of the condition's gradient per chunk, added
up afterwards in a fixed order.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def forward(
    x, update, gate, shift, scale, cu, residual, out, mean, inverse, chunks, epsilon,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, HAS_UPDATE: tl.constexpr,
):  # fmt: skip
    """residual and out [T, D], mean and inverse standard deviation [T], for ROWS sites of a sample."""
    b, start = tl.program_id(0) // chunks, tl.program_id(0) % chunks * ROWS
    begin = tl.load(cu + b)
    length = tl.load(cu + b + 1) - begin
    if start >= length:
        return
    columns = tl.arange(0, BLOCK_D)
    here = columns < WIDTH
    condition = b.to(tl.int64) * WIDTH + columns
    gain = 1.0 + tl.load(scale + condition, mask=here, other=0.0).to(tl.float32)
    offset = tl.load(shift + condition, mask=here, other=0.0).to(tl.float32)
    if HAS_UPDATE:
        opened = tl.load(gate + condition, mask=here, other=0.0).to(tl.float32)
    for site in range(begin + start, begin + tl.minimum(start + ROWS, length)):
        row = tl.cast(site, tl.int64) * WIDTH + columns
        value = tl.load(x + row, mask=here, other=0.0).to(tl.float32)
        if HAS_UPDATE:
            value += opened * tl.load(update + row, mask=here, other=0.0).to(tl.float32)
            tl.store(residual + row, value, mask=here)
            value = value.to(residual.dtype.element_ty).to(tl.float32)
        centre = tl.sum(value, 0) / WIDTH
        apart = tl.where(here, value - centre, 0.0)
        narrow = 1.0 / tl.sqrt(tl.sum(apart * apart, 0) / WIDTH + epsilon)
        tl.store(out + row, apart * narrow * gain + offset, mask=here)
        tl.store(mean + site, centre)
        tl.store(inverse + site, narrow)


@triton.jit
def backward(
    d_residual, d_out, residual, update, gate, scale, cu, mean, inverse, dx, d_update, partials, chunks,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, HAS_UPDATE: tl.constexpr,
):  # fmt: skip
    """dx and d_update [T, D]; partials [B, chunks, 3, D], each chunk's sums for shift, scale and gate."""
    b, start = tl.program_id(0) // chunks, tl.program_id(0) % chunks * ROWS
    begin = tl.load(cu + b)
    length = tl.load(cu + b + 1) - begin
    columns = tl.arange(0, BLOCK_D)
    here = columns < WIDTH
    condition = b.to(tl.int64) * WIDTH + columns
    gain = 1.0 + tl.load(scale + condition, mask=here, other=0.0).to(tl.float32)
    d_shift, d_scale = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    d_gate = tl.zeros([BLOCK_D], tl.float32)
    if HAS_UPDATE:
        opened = tl.load(gate + condition, mask=here, other=0.0).to(tl.float32)
    for site in range(begin + start, begin + tl.minimum(start + ROWS, length)):
        row = tl.cast(site, tl.int64) * WIDTH + columns
        narrow = tl.load(inverse + site)
        value = tl.load(residual + row, mask=here, other=0.0).to(tl.float32)
        normal = tl.where(here, (value - tl.load(mean + site)) * narrow, 0.0)
        dy = tl.load(d_out + row, mask=here, other=0.0).to(tl.float32)
        d_shift += dy
        d_scale += dy * normal
        dn = dy * gain
        flow = narrow * (dn - tl.sum(dn, 0) / WIDTH - normal * (tl.sum(dn * normal, 0) / WIDTH))
        if HAS_UPDATE:
            flow += tl.load(d_residual + row, mask=here, other=0.0).to(tl.float32)
            d_gate += flow * tl.load(update + row, mask=here, other=0.0).to(tl.float32)
            tl.store(d_update + row, flow * opened, mask=here)
        tl.store(dx + row, flow, mask=here)
    partial = partials + tl.program_id(0).to(tl.int64) * 3 * WIDTH + columns
    tl.store(partial, d_shift, mask=here)
    tl.store(partial + WIDTH, d_scale, mask=here)
    tl.store(partial + 2 * WIDTH, d_gate, mask=here)
