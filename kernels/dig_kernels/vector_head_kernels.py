"""Triton kernels of the vector head: one program per (tile of sites, sample, head), no atomics, fp32 throughout.

Index tensors are made two-dimensional by the kernel ([rows, 1] and [1, columns], or the other way round), so that the device
functions serve both orientations of a tile. `row` is a key's site within its sample; keys are sites, or copies of sites.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from dig_kernels.pair_tile import load_position

MASKED = tl.constexpr(-1e30)
UNIT_EPSILON = tl.constexpr(1e-5)


@triton.jit
def extent(cu, bounds, pair_offsets, b, h, heads):
    """Of sample b: first site, sites, first key, keys, row pitch, and where head h's block of pairs starts (int64)."""
    begin = tl.load(cu + b)
    length = tl.load(cu + b + 1) - begin
    first = tl.load(bounds + b)
    count = tl.load(bounds + b + 1) - first
    pitch = (count + 7) // 8 * 8
    block = heads * tl.load(pair_offsets + b) + h.to(tl.int64) * length * pitch
    return begin, length, first, count, pitch, tl.multiple_of(block, 8)


@triton.jit
def load_rows(matrix, stride, rows, here, columns, WIDTH: tl.constexpr):
    """Tile [rows, columns] of a matrix with unit inner stride; 0 outside."""
    inside = here[:, None] & (columns < WIDTH)[None, :]
    return tl.load(matrix + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(matrix, stride, rows, here, columns, tile, WIDTH):
    """Stores a tile [rows, columns]."""
    inside = here[:, None] & (columns < WIDTH)[None, :]
    tl.store(matrix + rows[:, None] * stride + columns[None, :], tile, mask=inside)


@triton.jit
def taken(mask, begin, row, here, HAS_MASK: tl.constexpr):
    """Which keys take part."""
    if HAS_MASK:
        here = here & (tl.load(mask + begin + row, mask=here, other=0) != 0)
    return here


@triton.jit
def biased(products, bias, i, in_i, j, pitch, take, scale, bias_scale, HAS_BIAS: tl.constexpr):
    """Logits of a tile, MASKED where not `take`. Rows are read to their pitch, a multiple of 8, to keep loads wide."""
    logits = products * scale
    if HAS_BIAS:
        logits += bias_scale * tl.load(bias + i * pitch + j, mask=in_i & (j < pitch), other=0.0).to(tl.float32)
    return tl.where(take, logits, MASKED)


@triton.jit
def key_rows(sources, begin, first, j, here, IMAGES: tl.constexpr):
    """Site within the sample of keys j."""
    row = j
    if IMAGES:
        row = tl.load(sources + first + j, mask=here, other=0) - begin
    return row


@triton.jit
def displacement(positions, offsets, begin, first, i, in_i, j, row, in_j, IMAGES: tl.constexpr):
    """x_i - x_j of a tile in fp32, the difference of sites first; also |.| and 1 / (|.| + UNIT_EPSILON)."""
    xi, yi, zi = load_position(positions + 3 * begin, i, in_i)
    xj, yj, zj = load_position(positions + 3 * begin, row, in_j)
    dx, dy, dz = xi - xj, yi - yj, zi - zj
    if IMAGES:
        ox, oy, oz = load_position(offsets + 3 * first, j, in_j)
        dx, dy, dz = dx - ox, dy - oy, dz - oz
    r = tl.sqrt(dx * dx + dy * dy + dz * dz)
    return dx, dy, dz, r, 1.0 / (r + UNIT_EPSILON)


@triton.jit
def forward(
    q, k, s, bias, positions, mask, cu, bounds, pair_offsets, sources, offsets, parts, lse,
    q_site, q_head, k_site, k_head, heads, sites, tiles, scale, sign,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    """parts [H, T, 3], the contribution of each head, and lse [H, T], for a tile of queries."""
    b, h = tl.program_id(0) // tiles, tl.program_id(1)
    begin, length, first, count, pitch, block = extent(cu, bounds, pair_offsets, b, h, heads)
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    if tl.program_id(0) % tiles * BLOCK_M >= length:
        return
    here, columns = rows < length, tl.arange(0, BLOCK_D)
    i, in_i = rows[:, None], here[:, None]
    queries = load_rows(q + begin.to(tl.int64) * q_site + h * q_head, q_site, rows, here, columns, WIDTH)
    top = tl.full([BLOCK_M], MASKED, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    ax, ay, az = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, count, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        site = key_rows(sources, begin, first, keys, keys < count, IMAGES)
        kt = load_rows(k + begin.to(tl.int64) * k_site + h * k_head, k_site, site, keys < count, columns, WIDTH)
        j, row, in_j = keys[None, :], site[None, :], (keys < count)[None, :]
        take = in_i & taken(mask, begin, row, in_j, HAS_MASK)
        products = tl.dot(queries, tl.trans(kt), input_precision="ieee")
        logits = biased(products, bias + block, i, in_i, j, pitch, take, scale, 1.0, HAS_BIAS)
        new_top = tl.maximum(top, tl.max(logits, 1))
        weights = tl.where(take, tl.exp(logits - new_top[:, None]), 0.0)
        fade = tl.exp(top - new_top)
        dx, dy, dz, _, inverse = displacement(positions, offsets, begin, first, i, in_i, j, row, in_j, IMAGES)
        signed = weights * inverse * tl.load(s + (begin + row) * heads + h, mask=in_j, other=0.0).to(tl.float32)
        ax = ax * fade + tl.sum(signed * dx, 1)
        ay = ay * fade + tl.sum(signed * dy, 1)
        az = az * fade + tl.sum(signed * dz, 1)
        total = total * fade + tl.sum(weights, 1)
        top = new_top
    empty = total == 0.0
    norm = sign / tl.where(empty, 1.0, total)
    at = h.to(tl.int64) * sites + begin + rows
    tl.store(parts + 3 * at, ax * norm, mask=here)
    tl.store(parts + 3 * at + 1, ay * norm, mask=here)
    tl.store(parts + 3 * at + 2, az * norm, mask=here)
    tl.store(lse + at, tl.where(empty, MASKED, top + tl.log(tl.where(empty, 1.0, total))), mask=here)


@triton.jit
def tile_gradients(
    products, bias, s, positions, offsets, mask, grad, lse, delta, begin, first, pitch, heads, h, scale,
    i, in_i, j, row, in_j, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    """Of a tile: dlogits, p g.u (the gradient of s), and the gradient of x_i - x_j; grad, lse, delta begin at the sample."""
    take = in_i & taken(mask, begin, row, in_j, HAS_MASK)
    logits = biased(products, bias, i, in_i, j, pitch, take, scale, 1.0, HAS_BIAS)
    p = tl.where(take, tl.exp(logits - tl.load(lse + i, mask=in_i, other=0.0)), 0.0)
    dx, dy, dz, r, inverse = displacement(positions, offsets, begin, first, i, in_i, j, row, in_j, IMAGES)
    gx, gy, gz = load_position(grad, i, in_i)
    along = (gx * dx + gy * dy + gz * dz) * inverse
    signed = tl.load(s + (begin + row) * heads + h, mask=in_j, other=0.0).to(tl.float32)
    dlogits = p * (signed * along - tl.load(delta + i, mask=in_i, other=0.0))
    apart = r > 0.0
    pull = tl.where(apart, p * signed * inverse, 0.0)
    radial = along / tl.where(apart, r, 1.0)
    return dlogits, p * along, pull * (gx - radial * dx), pull * (gy - radial * dy), pull * (gz - radial * dz)


@triton.jit
def query_gradient(
    q, k, s, bias, positions, mask, cu, bounds, pair_offsets, sources, offsets, grad, lse, delta, dq, dbias, dx_query,
    q_site, q_head, k_site, k_head, heads, sites, tiles, scale,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, IMAGES: tl.constexpr, BIAS_GRADIENT: tl.constexpr,
):  # fmt: skip
    """dq [T, H, d], dbias as bias (padding columns 0) and dx_query [H, T, 3], for a tile of queries."""
    b, h = tl.program_id(0) // tiles, tl.program_id(1)
    begin, length, first, count, pitch, block = extent(cu, bounds, pair_offsets, b, h, heads)
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    if tl.program_id(0) % tiles * BLOCK_M >= length:
        return
    here, columns, at = rows < length, tl.arange(0, BLOCK_D), h.to(tl.int64) * sites + begin
    i, in_i = rows[:, None], here[:, None]
    queries = load_rows(q + begin.to(tl.int64) * q_site + h * q_head, q_site, rows, here, columns, WIDTH)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    ax, ay, az = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, count, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        site = key_rows(sources, begin, first, keys, keys < count, IMAGES)
        kt = load_rows(k + begin.to(tl.int64) * k_site + h * k_head, k_site, site, keys < count, columns, WIDTH)
        j = keys[None, :]
        dlogits, _, tx, ty, tz = tile_gradients(
            tl.dot(queries, tl.trans(kt), input_precision="ieee"), bias + block, s, positions, offsets, mask,
            grad + 3 * begin, lse + at, delta + at, begin, first, pitch, heads, h, scale,
            i, in_i, j, site[None, :], j < count, HAS_BIAS, HAS_MASK, IMAGES,
        )  # fmt: skip
        if BIAS_GRADIENT:
            tl.store(dbias + block + i * pitch + j, dlogits, mask=in_i & (j < pitch))
        acc += tl.dot(dlogits.to(kt.dtype), kt, input_precision="ieee")
        ax += tl.sum(tx, 1)
        ay += tl.sum(ty, 1)
        az += tl.sum(tz, 1)
    store_rows(dq + (begin.to(tl.int64) * heads + h) * WIDTH, heads * WIDTH, rows, here, columns, acc * scale, WIDTH)
    tl.store(dx_query + 3 * (at + rows), ax, mask=here)
    tl.store(dx_query + 3 * (at + rows) + 1, ay, mask=here)
    tl.store(dx_query + 3 * (at + rows) + 2, az, mask=here)


@triton.jit
def key_gradient(
    q, k, s, bias, positions, mask, cu, bounds, pair_offsets, sources, offsets, grad, lse, delta, dk, ds, dx_key,
    q_site, q_head, k_site, k_head, heads, sites, all_keys, tiles, scale,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    """dk [E, H, d], ds [E, H] and dx_key [H, E, 3] over the E keys of the batch, for a tile of BLOCK_N keys."""
    b, h = tl.program_id(0) // tiles, tl.program_id(1)
    begin, length, first, count, pitch, block = extent(cu, bounds, pair_offsets, b, h, heads)
    keys = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    if tl.program_id(0) % tiles * BLOCK_N >= count:
        return
    here, columns, at = keys < count, tl.arange(0, BLOCK_D), h.to(tl.int64) * sites + begin
    site = key_rows(sources, begin, first, keys, here, IMAGES)
    kt = load_rows(k + begin.to(tl.int64) * k_site + h * k_head, k_site, site, here, columns, WIDTH)
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    ax, ay, az = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    scalar = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, length, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        queries = load_rows(q + begin.to(tl.int64) * q_site + h * q_head, q_site, rows, rows < length, columns, WIDTH)
        dlogits, dscalar, tx, ty, tz = tile_gradients(
            tl.dot(kt, tl.trans(queries), input_precision="ieee"), bias + block, s, positions, offsets, mask,
            grad + 3 * begin, lse + at, delta + at, begin, first, pitch, heads, h, scale,
            rows[None, :], (rows < length)[None, :], keys[:, None], site[:, None], here[:, None],
            HAS_BIAS, HAS_MASK, IMAGES,
        )  # fmt: skip
        acc += tl.dot(dlogits.to(queries.dtype), queries, input_precision="ieee")
        scalar += tl.sum(dscalar, 1)
        ax -= tl.sum(tx, 1)
        ay -= tl.sum(ty, 1)
        az -= tl.sum(tz, 1)
    store_rows(dk + (first.to(tl.int64) * heads + h) * WIDTH, heads * WIDTH, keys, here, columns, acc * scale, WIDTH)
    tl.store(ds + (first.to(tl.int64) + keys) * heads + h, scalar, mask=here)
    out = h.to(tl.int64) * all_keys + first + keys
    tl.store(dx_key + 3 * out, ax, mask=here)
    tl.store(dx_key + 3 * out + 1, ay, mask=here)
    tl.store(dx_key + 3 * out + 2, az, mask=here)
