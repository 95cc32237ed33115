"""Triton kernels of point attention: one program per (tile of sites, sample, head), no atomics, fp32 accumulation.

Query and key points come transposed, [H, 3 P, T], so that one coordinate of neighbouring sites is one wide load; their
distances are formed from fp32 differences, point by point, in a loop that is not unrolled: a dozen coordinates at once do not
fit the registers. Value points [T, H, 3 Pv] enter as columns of matrix products in three TF32 terms, which keep fp32
accuracy. Index tensors are two-dimensional as in vector_head_kernels.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from dig_kernels.vector_head_kernels import MASKED, biased, extent, load_rows, store_rows, taken


@triton.jit
def point_differences(q_points, k_points, point, i, in_i, j, in_j, sites):
    """q_i - k_j of one point for a tile; the pointers begin at the sample and head."""
    qp, kp = q_points + 3 * point * sites, k_points + 3 * point * sites
    dx = tl.load(qp + i, mask=in_i, other=0.0) - tl.load(kp + j, mask=in_j, other=0.0)
    dy = tl.load(qp + sites + i, mask=in_i, other=0.0) - tl.load(kp + sites + j, mask=in_j, other=0.0)
    dz = tl.load(qp + 2 * sites + i, mask=in_i, other=0.0) - tl.load(kp + 2 * sites + j, mask=in_j, other=0.0)
    return dx, dy, dz


@triton.jit
def point_sum(q_points, k_points, i, in_i, j, in_j, sites, n_points, epsilon, SQUARED: tl.constexpr):
    """Sum over points of |q_i - k_j| (or its square) for a tile."""
    total = (i + j).to(tl.float32) * 0.0
    for point in range(n_points):
        dx, dy, dz = point_differences(q_points, k_points, point, i, in_i, j, in_j, sites)
        apart = dx * dx + dy * dy + dz * dz
        total += apart if SQUARED else tl.sqrt(apart + epsilon)
    return total


@triton.jit
def point_gradient(
    acc, slope, q_points, k_points, i, in_i, j, in_j, sites, n_points, epsilon, columns, SQUARED: tl.constexpr
):
    """acc [rows, 3 P] plus, summed over the tile's columns, slope times the gradient of point_sum by the query points."""
    for point in range(n_points):
        dx, dy, dz = point_differences(q_points, k_points, point, i, in_i, j, in_j, sites)
        pull = 2.0 * slope if SQUARED else slope / tl.sqrt(dx * dx + dy * dy + dz * dz + epsilon)
        acc += tl.where(columns[None, :] == 3 * point, tl.sum(pull * dx, 1)[:, None], 0.0)
        acc += tl.where(columns[None, :] == 3 * point + 1, tl.sum(pull * dy, 1)[:, None], 0.0)
        acc += tl.where(columns[None, :] == 3 * point + 2, tl.sum(pull * dz, 1)[:, None], 0.0)
    return acc


@triton.jit
def forward(
    q, k, v, q_points, k_points, v_points, head_weights, bias, mask, cu, pair_offsets, values, points, lse,
    q_site, q_head, k_site, k_head, v_site, v_head, heads, sites, tiles, scale, bias_scale, n_points, epsilon,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, SQUARED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """values [T, H, d], points [T, H, 3 Pv] and lse [H, T], for a tile of queries."""
    b, h = tl.program_id(0) // tiles, tl.program_id(1)
    begin, length, _first, _count, pitch, block = extent(cu, cu, pair_offsets, b, h, heads)
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    if tl.program_id(0) % tiles * BLOCK_M >= length:
        return
    here, columns, value_columns = rows < length, tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    site, i, in_i = begin.to(tl.int64), rows[:, None], here[:, None]
    at = h.to(tl.int64) * 3 * n_points * sites + begin
    weight = tl.load(head_weights + h)
    queries = load_rows(q + site * q_site + h * q_head, q_site, rows, here, columns, WIDTH)
    top = tl.full([BLOCK_M], MASKED, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc, point_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32), tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for start in range(0, length, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        there, j, in_j = keys < length, keys[None, :], (keys < length)[None, :]
        take = in_i & taken(mask, begin, j, in_j, HAS_MASK)
        kt = load_rows(k + site * k_site + h * k_head, k_site, keys, there, columns, WIDTH)
        distance = point_sum(q_points + at, k_points + at, i, in_i, j, in_j, sites, n_points, epsilon, SQUARED)
        products = scale * tl.dot(queries, tl.trans(kt), input_precision="ieee") - weight * distance
        logits = biased(products, bias + block, i, in_i, j, pitch, take, 1.0, bias_scale, HAS_BIAS)
        new_top = tl.maximum(top, tl.max(logits, 1))
        p = tl.where(take, tl.exp(logits - new_top[:, None]), 0.0)
        fade = tl.exp(top - new_top)
        vt = load_rows(v + site * v_site + h * v_head, v_site, keys, there, columns, WIDTH)
        acc = acc * fade[:, None] + tl.dot(p.to(vt.dtype), vt, input_precision="ieee")
        vp = load_rows(
            v_points + (site * heads + h) * VALUE_WIDTH, heads * VALUE_WIDTH, keys, there, value_columns, VALUE_WIDTH
        )
        point_acc = point_acc * fade[:, None] + tl.dot(p, vp, input_precision=PRECISION)
        total = total * fade + tl.sum(p, 1)
        top = new_top
    empty = total == 0.0
    norm = 1.0 / tl.where(empty, 1.0, total)
    store_rows(values + (site * heads + h) * WIDTH, heads * WIDTH, rows, here, columns, acc * norm[:, None], WIDTH)
    store_rows(
        points + (site * heads + h) * VALUE_WIDTH, heads * VALUE_WIDTH, rows, here, value_columns,
        point_acc * norm[:, None], VALUE_WIDTH,
    )  # fmt: skip
    lse_tile = tl.where(empty, MASKED, top + tl.log(tl.where(empty, 1.0, total)))
    tl.store(lse + h.to(tl.int64) * sites + begin + rows, lse_tile, mask=here)


@triton.jit
def write_weights(
    q, k, q_points, k_points, head_weights, bias, mask, cu, pair_offsets, lse, weights,
    q_site, q_head, k_site, k_head, heads, sites, tiles, scale, bias_scale, n_points, epsilon,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, SQUARED: tl.constexpr,
):  # fmt: skip
    """The weights, flat [H * pairs] with padding columns 0, for a tile of queries."""
    b, h = tl.program_id(0) // tiles, tl.program_id(1)
    begin, length, _first, _count, pitch, block = extent(cu, cu, pair_offsets, b, h, heads)
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    if tl.program_id(0) % tiles * BLOCK_M >= length:
        return
    here, columns, site = rows < length, tl.arange(0, BLOCK_D), begin.to(tl.int64)
    i, in_i = rows[:, None], here[:, None]
    at = h.to(tl.int64) * 3 * n_points * sites + begin
    weight = tl.load(head_weights + h)
    queries = load_rows(q + site * q_site + h * q_head, q_site, rows, here, columns, WIDTH)
    row_lse = tl.load(lse + h.to(tl.int64) * sites + begin + i, mask=in_i, other=0.0)
    for start in range(0, length, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        j, in_j = keys[None, :], (keys < length)[None, :]
        take = in_i & taken(mask, begin, j, in_j, HAS_MASK)
        kt = load_rows(k + site * k_site + h * k_head, k_site, keys, keys < length, columns, WIDTH)
        distance = point_sum(q_points + at, k_points + at, i, in_i, j, in_j, sites, n_points, epsilon, SQUARED)
        products = scale * tl.dot(queries, tl.trans(kt), input_precision="ieee") - weight * distance
        logits = biased(products, bias + block, i, in_i, j, pitch, take, 1.0, bias_scale, HAS_BIAS)
        tl.store(
            weights + block + i * pitch + j,
            tl.where(take, tl.exp(logits - row_lse), 0.0),
            mask=in_i & (j < pitch),
        )


@triton.jit
def row_dot(
    weights, d_weights, cu, pair_offsets, delta, heads, sites, tiles, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Adds sum_j weights d_weights to each row of delta [H, T]."""
    b, h = tl.program_id(0) // tiles, tl.program_id(1)
    begin, length, _first, _count, pitch, block = extent(cu, cu, pair_offsets, b, h, heads)
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    if tl.program_id(0) % tiles * BLOCK_M >= length:
        return
    here = rows < length
    out = delta + h.to(tl.int64) * sites + begin + rows
    total = tl.load(out, mask=here, other=0.0)
    for start in range(0, length, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)[None, :]
        at, inside = block + rows[:, None] * pitch + j, here[:, None] & (j < length)
        product = tl.load(weights + at, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(product * tl.load(d_weights + at, mask=inside, other=0.0).to(tl.float32), 1)
    tl.store(out, total, mask=here)


@triton.jit
def tile_gradients(
    products, value_products, weight, q_points, k_points, bias, d_weights, mask, lse, delta, begin, pitch, sites,
    scale, bias_scale, n_points, epsilon, i, in_i, j, in_j, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, SQUARED: tl.constexpr,
):  # fmt: skip
    """p, dlogits and the point distance of a tile, from q.k and dO.v; lse and delta begin at the sample and head."""
    take = in_i & taken(mask, begin, j, in_j, HAS_MASK)
    distance = point_sum(q_points, k_points, i, in_i, j, in_j, sites, n_points, epsilon, SQUARED)
    logits = biased(scale * products - weight * distance, bias, i, in_i, j, pitch, take, 1.0, bias_scale, HAS_BIAS)
    p = tl.where(take, tl.exp(logits - tl.load(lse + i, mask=in_i, other=0.0)), 0.0)
    if HAS_WEIGHTS:
        value_products += tl.load(d_weights + i * pitch + j, mask=in_i & in_j, other=0.0).to(tl.float32)
    return p, p * (value_products - tl.load(delta + i, mask=in_i, other=0.0)), distance


@triton.jit
def query_gradient(
    q, k, v, q_points, k_points, v_points, head_weights, bias, mask, cu, pair_offsets, d_values, d_points, d_weights,
    lse, delta, dq, dq_points, d_head, dbias, q_site, q_head, k_site, k_head, v_site, v_head, heads, sites, tiles,
    scale, bias_scale, n_points, epsilon,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    SQUARED: tl.constexpr, PRECISION: tl.constexpr, HAS_WEIGHTS: tl.constexpr, BIAS_GRADIENT: tl.constexpr,
):  # fmt: skip
    """dq [T, H, d], dq_points [T, H, 3 P], d_head [H, T] (summed later) and dbias as bias, for a tile of queries."""
    b, h = tl.program_id(0) // tiles, tl.program_id(1)
    begin, length, _first, _count, pitch, block = extent(cu, cu, pair_offsets, b, h, heads)
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    if tl.program_id(0) % tiles * BLOCK_M >= length:
        return
    here, columns, value_columns = rows < length, tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    site, i, in_i, point_columns = begin.to(tl.int64), rows[:, None], here[:, None], tl.arange(0, BLOCK_P)
    at, row_at = h.to(tl.int64) * 3 * n_points * sites + begin, h.to(tl.int64) * sites + begin
    mine, mine_points = (site * heads + h) * WIDTH, (site * heads + h) * VALUE_WIDTH
    weight = tl.load(head_weights + h)
    queries = load_rows(q + site * q_site + h * q_head, q_site, rows, here, columns, WIDTH)
    grads = load_rows(d_values + mine, heads * WIDTH, rows, here, columns, WIDTH)
    grads_p = load_rows(d_points + mine_points, heads * VALUE_WIDTH, rows, here, value_columns, VALUE_WIDTH)
    acc, point_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32), tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
    # sum_j dlogits is 0 but for the rounding of delta; taking it out keeps that from adding up over all distances
    head_acc, residual, mean = (
        tl.zeros([BLOCK_M], tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
    )
    for start in range(0, length, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        there, j, in_j = keys < length, keys[None, :], (keys < length)[None, :]
        kt = load_rows(k + site * k_site + h * k_head, k_site, keys, there, columns, WIDTH)
        vt = load_rows(v + site * v_site + h * v_head, v_site, keys, there, columns, WIDTH)
        vp = load_rows(v_points + mine_points, heads * VALUE_WIDTH, keys, there, value_columns, VALUE_WIDTH)
        value_products = tl.dot(grads, tl.trans(vt), input_precision="ieee")
        value_products += tl.dot(grads_p, tl.trans(vp), input_precision=PRECISION)
        p, dlogits, distance = tile_gradients(
            tl.dot(queries, tl.trans(kt), input_precision="ieee"), value_products, weight, q_points + at, k_points + at,
            bias + block, d_weights + block, mask, lse + row_at, delta + row_at, begin, pitch, sites, scale, bias_scale,
            n_points, epsilon, i, in_i, j, in_j, HAS_BIAS, HAS_MASK, HAS_WEIGHTS, SQUARED,
        )  # fmt: skip
        if BIAS_GRADIENT:
            tl.store(dbias + block + i * pitch + j, bias_scale * dlogits, mask=in_i & (j < pitch))
        acc += tl.dot(dlogits.to(kt.dtype), kt, input_precision="ieee")
        head_acc += tl.sum(dlogits * distance, 1)
        residual += tl.sum(dlogits, 1)
        mean += tl.sum(p * distance, 1)
        point_acc = point_gradient(
            point_acc, -weight * dlogits, q_points + at, k_points + at, i, in_i, j, in_j, sites, n_points,
            epsilon, point_columns, SQUARED,
        )  # fmt: skip
    store_rows(dq + mine, heads * WIDTH, rows, here, columns, acc * scale, WIDTH)
    out = dq_points + (site * heads + h) * 3 * n_points
    store_rows(out, heads * 3 * n_points, rows, here, point_columns, point_acc, 3 * n_points)
    tl.store(d_head + row_at + rows, residual * mean - head_acc, mask=here)


@triton.jit
def key_gradient(
    q, k, v, q_points, k_points, v_points, head_weights, bias, mask, cu, pair_offsets, d_values, d_points, d_weights,
    lse, delta, dk, dv, dk_points, dv_points, q_site, q_head, k_site, k_head, v_site, v_head, heads, sites, tiles,
    scale, bias_scale, n_points, epsilon,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    SQUARED: tl.constexpr, PRECISION: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """dk, dv [T, H, d], dk_points [T, H, 3 P] and dv_points [T, H, 3 Pv], for a tile of BLOCK_N keys."""
    b, h = tl.program_id(0) // tiles, tl.program_id(1)
    begin, length, _first, _count, pitch, block = extent(cu, cu, pair_offsets, b, h, heads)
    keys = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    if tl.program_id(0) % tiles * BLOCK_N >= length:
        return
    here, columns, value_columns = keys < length, tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    site, j, in_j, point_columns = begin.to(tl.int64), keys[:, None], here[:, None], tl.arange(0, BLOCK_P)
    at, row_at = h.to(tl.int64) * 3 * n_points * sites + begin, h.to(tl.int64) * sites + begin
    mine, mine_points = (site * heads + h) * WIDTH, (site * heads + h) * VALUE_WIDTH
    weight = tl.load(head_weights + h)
    kt = load_rows(k + site * k_site + h * k_head, k_site, keys, here, columns, WIDTH)
    vt = load_rows(v + site * v_site + h * v_head, v_site, keys, here, columns, WIDTH)
    vp = load_rows(v_points + mine_points, heads * VALUE_WIDTH, keys, here, value_columns, VALUE_WIDTH)
    k_acc, v_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    point_acc, vp_acc = tl.zeros([BLOCK_N, BLOCK_P], tl.float32), tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for start in range(0, length, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        there, i, in_i = rows < length, rows[None, :], (rows < length)[None, :]
        queries = load_rows(q + site * q_site + h * q_head, q_site, rows, there, columns, WIDTH)
        grads = load_rows(d_values + mine, heads * WIDTH, rows, there, columns, WIDTH)
        grads_p = load_rows(d_points + mine_points, heads * VALUE_WIDTH, rows, there, value_columns, VALUE_WIDTH)
        value_products = tl.dot(vt, tl.trans(grads), input_precision="ieee")
        value_products += tl.dot(vp, tl.trans(grads_p), input_precision=PRECISION)
        p, dlogits, _ = tile_gradients(
            tl.dot(kt, tl.trans(queries), input_precision="ieee"), value_products, weight, q_points + at, k_points + at,
            bias + block, d_weights + block, mask, lse + row_at, delta + row_at, begin, pitch, sites, scale, bias_scale,
            n_points, epsilon, i, in_i, j, in_j, HAS_BIAS, HAS_MASK, HAS_WEIGHTS, SQUARED,
        )  # fmt: skip
        v_acc += tl.dot(p.to(grads.dtype), grads, input_precision="ieee")
        vp_acc += tl.dot(p, grads_p, input_precision=PRECISION)
        k_acc += tl.dot(dlogits.to(queries.dtype), queries, input_precision="ieee")
        point_acc = point_gradient(
            point_acc, weight * dlogits, q_points + at, k_points + at, i, in_i, j, in_j, sites, n_points,
            epsilon, point_columns, SQUARED,
        )  # fmt: skip
    store_rows(dk + mine, heads * WIDTH, keys, here, columns, k_acc * scale, WIDTH)
    store_rows(dv + mine, heads * WIDTH, keys, here, columns, v_acc, WIDTH)
    store_rows(dv_points + mine_points, heads * VALUE_WIDTH, keys, here, value_columns, vp_acc, VALUE_WIDTH)
    out = dk_points + (site * heads + h) * 3 * n_points
    store_rows(out, heads * 3 * n_points, keys, here, point_columns, point_acc, 3 * n_points)
