"""Triton kernels of packed attention with a pair bias: forward, dQ (with delta and bias gradient), dK and dV.

Notation: S = scale q k^T + b, P = exp(S - LSE), delta_i = dO_i . O_i, dS = P (dO v^T - delta); dQ = scale dS k,
dK = scale dS^T q, dV = P^T dO, db = dS. One program per (head, tile of rows) or (head, tile of keys), heads fastest, so that
neighbours share cache lines. Tiles are numbered so that no host knowledge of the lengths is needed: those of sample b
start at cu_seqlens[b] // TILE + b, which leaves at most two of a sample empty. No atomics; sums in fp32.

Tuples that kernels take: `source` = (dense, table, scalar, types, gain, shift, static, n_types, n_pieces, start, 1/step),
`packing` = (cu_seqlens, pair_offsets, system, static_offsets).
"""

from __future__ import annotations

import triton
import triton.language as tl

from dig_kernels.pair_tile import channel_value, load_position, locate

MASKED = tl.constexpr(-1e30)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
DENSE = tl.constexpr(1)
GIVEN = tl.constexpr(2)
GEOMETRY = tl.constexpr(3)
STORE = tl.constexpr(1)
ADD = tl.constexpr(2)
LANES = tl.constexpr(128)
VARYING = ["batch", "sites"]
"""Arguments that change with every batch: kernels are not compiled anew for special values of them."""


@triton.jit
def find_tile(cu_seqlens, tile, batch, TILE: tl.constexpr):
    """Sample, its first site, its length and the tile's first local row (past the length where the tile is empty)."""
    before = 0
    for first in range(0, batch, LANES):
        index = first + tl.arange(0, LANES)
        starts = tl.load(cu_seqlens + index, mask=index < batch, other=0)
        before += tl.sum(((index < batch) & (starts // TILE + index <= tile)).to(tl.int32))
    sample = before - 1
    begin = tl.load(cu_seqlens + sample)
    length = tl.load(cu_seqlens + sample + 1) - begin
    return sample, begin.to(tl.int64), length, (tile - begin // TILE - sample) * TILE


@triton.jit
def row_pitch(length):
    """Elements from one row of a pair block to the next (layout.py)."""
    return (length + 7) // 8 * 8


@triton.jit
def load_rows(base, rows, stride, length, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows [n, PADDED] of a [*, WIDTH] matrix; 0 past `length` and past WIDTH."""
    columns = tl.arange(0, PADDED)
    here = (rows < length)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=here, other=0.0)


@triton.jit
def store_rows(base, rows, stride, values, length, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Writes what load_rows would read."""
    columns = tl.arange(0, PADDED)
    here = (rows < length)[:, None] & (columns < WIDTH)[None, :]
    tl.store(base + rows[:, None] * stride + columns[None, :], values.to(base.dtype.element_ty), mask=here)


@triton.jit
def product(a, b, UPCAST: tl.constexpr):
    """a b in fp32. UPCAST: the interpreter has no bf16 product; products of bf16 are exact in fp32, so it loses nothing."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def usable_keys(key_mask, begin, keys, length, HAS_MASK: tl.constexpr):
    """Which keys take part."""
    usable = keys < length
    if HAS_MASK:
        usable = usable & (tl.load(key_mask + begin + keys, mask=usable, other=0) != 0)
    return usable


@triton.jit
def block_start(offsets, index, head, heads, length, first_row):
    """Offset of row `first_row` of a head's pair block."""
    start = tl.multiple_of(tl.load(offsets + index), 8)
    return start * heads + (head * length + first_row).to(tl.int64) * row_pitch(length)


@triton.jit
def bias_tile(
    source, packing, sample, begin, length, head, heads, first_row, rows, keys, KIND: tl.constexpr, STATIC: tl.constexpr
):
    """Bias at rows first_row + rows and at keys, two index tiles that broadcast; fp32. Anything at keys past the length."""
    pitch = row_pitch(length)
    here = (first_row + rows < length) & (keys < pitch)
    spot = rows * pitch + keys
    if KIND == DENSE:
        block = source[0] + block_start(packing[1], sample, head, heads, length, first_row)
        return tl.load(block + spot, mask=here, other=0.0).to(tl.float32)
    if KIND == GIVEN:
        block = source[2] + block_start(packing[1], sample, 0, 1, length, first_row)
        u = tl.load(block + spot, mask=here & (keys < length), other=0.0)
    else:
        u = pair_scalar_tile(source, begin, length, first_row + rows, keys)
    n_pieces = source[8]
    piece, f = locate(u, source[9], source[10], n_pieces)
    bias = channel_value(source[1] + head * n_pieces * 4, piece, f, 0, 1)
    if STATIC:
        block = source[6] + block_start(packing[3], tl.load(packing[2] + sample), head, heads, length, first_row)
        bias += tl.load(block + spot, mask=here, other=0.0).to(tl.float32)
    return bias


@triton.jit
def pair_scalar_tile(source, begin, length, rows, keys):
    """u = gain d + shift for a tile of pairs."""
    row_here, key_here = rows < length, keys < length
    xi, yi, zi = load_position(source[2], begin + rows, row_here)
    xj, yj, zj = load_position(source[2], begin + keys, key_here)
    kind_i = tl.load(source[3] + begin + rows, mask=row_here, other=0)
    kind_j = tl.load(source[3] + begin + keys, mask=key_here, other=0)
    pair = kind_i * source[7] + kind_j
    x, y, z = xi - xj, yi - yj, zi - zj
    return tl.load(source[4] + pair) * tl.sqrt(x * x + y * y + z * z) + tl.load(source[5] + pair)


@triton.jit
def log2_sum(lse):
    """LSE in base 2; where a row has no key, so large that every weight becomes 0."""
    return tl.where(lse <= MASKED * 0.5, 1e35, lse * LOG2E)


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    q, k, v, out, lse, source, key_mask, packing, q_row, q_head, k_row, k_head, v_row, v_head, batch, heads, sites, scale,
    KIND: tl.constexpr, STATIC: tl.constexpr, HAS_MASK: tl.constexpr, UPCAST: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """O and LSE of one tile of rows."""
    head = tl.program_id(0) % heads
    sample, begin, length, first_row = find_tile(packing[0], tl.program_id(0) // heads, batch, TILE)
    if first_row >= length:
        return
    lane = tl.arange(0, TILE)
    rows = first_row + lane
    q_tile = load_rows(q + begin * q_row + head * q_head, rows, q_row, length, WIDTH, PADDED)
    top = tl.full([TILE], MASKED * LOG2E, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    mixed = tl.zeros([TILE, PADDED], tl.float32)
    for start in range(0, length, TILE):
        keys = start + lane
        k_tile = load_rows(k + begin * k_row + head * k_head, keys, k_row, length, WIDTH, PADDED)
        v_tile = load_rows(v + begin * v_row + head * v_head, keys, v_row, length, WIDTH, PADDED)
        logits = product(q_tile, tl.trans(k_tile), UPCAST) * scale
        if KIND:
            logits += bias_tile(
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
        logits = tl.where(usable_keys(key_mask, begin, keys, length, HAS_MASK)[None, :], logits, MASKED)
        risen = tl.maximum(top, tl.max(logits, 1) * LOG2E)
        weights = tl.exp2(logits * LOG2E - risen[:, None])
        shrink = tl.exp2(top - risen)
        total = total * shrink + tl.sum(weights, 1)
        mixed = mixed * shrink[:, None] + product(weights.to(v_tile.dtype), v_tile, UPCAST)
        top = risen
    empty = (top <= MASKED * 0.5) & (total == total)  # a GPU's maximum passes over NaN
    mixed = tl.where(empty[:, None], 0.0, mixed / total[:, None])
    store_rows(out + (begin * heads + head) * WIDTH, rows, heads * WIDTH, mixed, length, WIDTH, PADDED)
    log_sum = tl.where(empty, MASKED, (top + tl.log2(total)) * LN2)
    tl.store(lse + head.to(tl.int64) * sites + begin + rows, log_sum, mask=rows < length)


@triton.jit(do_not_specialize=VARYING)
def query_gradient_kernel(
    q, k, v, out, lse, d_out, d_q, delta, d_bias, source, key_mask, packing,
    q_row, q_head, k_row, k_head, v_row, v_head, batch, heads, sites, scale,
    KIND: tl.constexpr, STATIC: tl.constexpr, HAS_MASK: tl.constexpr, UPCAST: tl.constexpr, BIAS_GRADIENT: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """delta and dQ of one tile of rows; dS where wanted."""
    head = tl.program_id(0) % heads
    sample, begin, length, first_row = find_tile(packing[0], tl.program_id(0) // heads, batch, TILE)
    if first_row >= length:
        return
    lane = tl.arange(0, TILE)
    rows = first_row + lane
    q_tile = load_rows(q + begin * q_row + head * q_head, rows, q_row, length, WIDTH, PADDED)
    own = (begin * heads + head) * WIDTH
    d_out_tile = load_rows(d_out + own, rows, heads * WIDTH, length, WIDTH, PADDED)
    out_tile = load_rows(out + own, rows, heads * WIDTH, length, WIDTH, PADDED)
    row_delta = tl.sum(d_out_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    statistics = head.to(tl.int64) * sites + begin
    tl.store(delta + statistics + rows, row_delta, mask=rows < length)
    row_lse = log2_sum(tl.load(lse + statistics + rows, mask=rows < length, other=0.0))
    gathered = tl.zeros([TILE, PADDED], tl.float32)
    for start in range(0, length, TILE):
        keys = start + lane
        k_tile = load_rows(k + begin * k_row + head * k_head, keys, k_row, length, WIDTH, PADDED)
        v_tile = load_rows(v + begin * v_row + head * v_head, keys, v_row, length, WIDTH, PADDED)
        logits = product(q_tile, tl.trans(k_tile), UPCAST) * scale
        if KIND:
            logits += bias_tile(
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
        logits = tl.where(usable_keys(key_mask, begin, keys, length, HAS_MASK)[None, :], logits, MASKED)
        weights = tl.exp2(logits * LOG2E - row_lse[:, None])
        d_logits = weights * (product(d_out_tile, tl.trans(v_tile), UPCAST) - row_delta[:, None])
        gathered += product(d_logits.to(k_tile.dtype), k_tile, UPCAST)
        if BIAS_GRADIENT:
            pitch = row_pitch(length)
            block = d_bias + block_start(packing[1], sample, head, heads, length, first_row)
            spot = lane[:, None] * pitch + keys[None, :]
            here = (rows < length)[:, None] & (keys < pitch)[None, :]
            if BIAS_GRADIENT == ADD:
                d_logits += tl.load(block + spot, mask=here, other=0.0)
            tl.store(block + spot, d_logits.to(d_bias.dtype.element_ty), mask=here)
    store_rows(d_q + own, rows, heads * WIDTH, gathered * scale, length, WIDTH, PADDED)


@triton.jit(do_not_specialize=VARYING)
def key_gradient_kernel(
    q, k, v, lse, d_out, delta, d_k, d_v, source, key_mask, packing,
    q_row, q_head, k_row, k_head, v_row, v_head, batch, heads, sites, scale,
    KIND: tl.constexpr, STATIC: tl.constexpr, HAS_MASK: tl.constexpr, UPCAST: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys."""
    head = tl.program_id(0) % heads
    sample, begin, length, first_key = find_tile(packing[0], tl.program_id(0) // heads, batch, TILE)
    if first_key >= length:
        return
    lane = tl.arange(0, TILE)
    keys = first_key + lane
    k_tile = load_rows(k + begin * k_row + head * k_head, keys, k_row, length, WIDTH, PADDED)
    v_tile = load_rows(v + begin * v_row + head * v_head, keys, v_row, length, WIDTH, PADDED)
    usable = usable_keys(key_mask, begin, keys, length, HAS_MASK)
    own = (begin * heads + head) * WIDTH
    statistics = head.to(tl.int64) * sites + begin
    k_sum = tl.zeros([TILE, PADDED], tl.float32)
    v_sum = tl.zeros([TILE, PADDED], tl.float32)
    for start in range(0, length, TILE):
        rows = start + lane
        q_tile = load_rows(q + begin * q_row + head * q_head, rows, q_row, length, WIDTH, PADDED)
        d_out_tile = load_rows(d_out + own, rows, heads * WIDTH, length, WIDTH, PADDED)
        row_lse = log2_sum(tl.load(lse + statistics + rows, mask=rows < length, other=0.0))
        row_delta = tl.load(delta + statistics + rows, mask=rows < length, other=0.0)
        logits = product(k_tile, tl.trans(q_tile), UPCAST) * scale
        if KIND:
            logits += bias_tile(
                source, packing, sample, begin, length, head, heads, start, lane[None, :], keys[:, None], KIND, STATIC
            )
        logits = tl.where(usable[:, None], logits, MASKED)
        weights = tl.exp2(logits * LOG2E - row_lse[None, :])
        v_sum += product(weights.to(d_out_tile.dtype), d_out_tile, UPCAST)
        d_logits = weights * (product(v_tile, tl.trans(d_out_tile), UPCAST) - row_delta[None, :])
        k_sum += product(d_logits.to(q_tile.dtype), q_tile, UPCAST)
    store_rows(d_k + own, keys, heads * WIDTH, k_sum * scale, length, WIDTH, PADDED)
    store_rows(d_v + own, keys, heads * WIDTH, v_sum, length, WIDTH, PADDED)
