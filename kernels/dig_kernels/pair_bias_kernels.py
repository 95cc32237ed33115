"""Device code of the pair bias generator: the pair scalar with periodic copies, and the forward kernel.

One program per query site, so no result depends on what else is in the batch. A tile is BLOCK_KEYS keys of the site's
sample times a power of two of channels: channels lie side by side in the table, keys in the pair blocks. The table's rows
are padded (pair_source.padded_table): heads first, in BLOCK_HEADS columns, then summed channels in blocks, so that a
tile reads aligned vectors without a mask.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from dig_kernels.pair_tile import channel_value, load_position, locate


@dataclass(frozen=True)
class ChannelsLaunch:
    """Keys of a tile, summed channels of a block (of which one launch takes up to 4), warps."""

    keys: int = 32
    channels: int = 32
    warps: int = 4


LAUNCH = ChannelsLaunch()


def tile_keys(keys: int, heads: int) -> int:
    """Keys of a tile with so many heads (a power of two): fewer where there are many heads, so that registers suffice."""
    return max(1, min(keys, 2048 // heads))


ARGUMENT_TYPES = {
    **dict.fromkeys(("u", "positions", "gain", "shift", "image_offsets", "node", "pieces", "d_node"), "*fp32"),
    **dict.fromkeys(("du", "fractions", "rows", "distances", "d_positions"), "*fp32"),
    **dict.fromkeys(("bias", "static", "d_bias", "d_static"), "*bf16"),
    **dict.fromkeys(("types", "image_starts", "sample_of", "cu_seqlens", "system", "queries", "sample_bounds"), "*i32"),
    **dict.fromkeys(("pair_offsets", "static_offsets", "bias_start", "bias_row", "bias_head", "samples"), "*i64"),
    **dict.fromkeys(("slot_start", "slot_stride", "origin"), "*i64"),
    **dict.fromkeys(("keys", "codes"), "*i16"),
    **dict.fromkeys(("start", "inverse_step"), "fp32"),
    **dict.fromkeys(
        ("n_pieces", "n_types", "biased", "summed", "table_width", "first_summed", "window", "offset"), "i32"
    ),
    **dict.fromkeys(("first_site", "n_sites", "rows_per_system"), "i32"),
    "key_mask": "*i1",
}
"""Types of the kernels' arguments in a usual launch, for compiling without one."""
GIVEN_ARGUMENTS = dict.fromkeys(("positions", "types", "gain", "shift", "image_starts", "image_offsets"))
GEOMETRY_ARGUMENTS = dict.fromkeys(("u", "image_starts", "image_offsets"))
IMAGES_ARGUMENTS: dict[str, None] = {"u": None}
"""What is None under each source."""


def compile_signature(names: list[str], constants: dict[str, object]) -> dict[str, str]:
    """Signature of a kernel with these arguments, of which `constants` are known."""
    return {name: "constexpr" if name in constants else ARGUMENT_TYPES[name] for name in names}


@triton.jit
def pair_scalar(
    u, pair, positions, types, gain, shift, n_types, x, y, z, kind, key, ox, oy, oz, here, GIVEN: tl.constexpr
):
    """u, distance and type code of the site at (x, y, z) of type `kind` with sites `key` displaced by (ox, oy, oz)."""
    if GIVEN:
        value = tl.load(u + pair, mask=here, other=0.0).to(tl.float32)
        distance = value
        code = key
    else:
        xj, yj, zj = load_position(positions, key, here)
        dx = x - xj - ox
        dy = y - yj - oy
        dz = z - zj - oz
        distance = tl.sqrt(dx * dx + dy * dy + dz * dz)
        code = kind * n_types + tl.load(types + key, mask=here, other=0).to(tl.int32)
        value = tl.load(gain + code, mask=here, other=0.0) * distance + tl.load(shift + code, mask=here, other=0.0)
    return value, distance, code


@triton.jit
def query_site(site, positions, types, GIVEN: tl.constexpr):
    """Position and type of one site; zeros where u is given."""
    if GIVEN:
        x = 0.0
        y = 0.0
        z = 0.0
        kind = 0
    else:
        x = tl.load(positions + 3 * site)
        y = tl.load(positions + 3 * site + 1)
        z = tl.load(positions + 3 * site + 2)
        kind = tl.load(types + site).to(tl.int32)
    return x, y, z, kind


@triton.jit
def image_run(image_starts, key, here, IMAGES: tl.constexpr):
    """First copy of each key, its number of copies (1 where not `here`), and the most copies any key of the tile has."""
    if IMAGES:
        image = tl.load(image_starts + key, mask=here, other=0)
        count = tl.load(image_starts + key + 1, mask=here, other=1) - image
        most = tl.max(count, 0)
    else:
        image = tl.zeros_like(key)
        count = image + 1
        most = 1
    return image, count, most


@triton.jit
def image_offset(image_offsets, image, here, IMAGES: tl.constexpr):
    """Displacement of copies `image`; 0 where not `here`."""
    if IMAGES:
        x, y, z = load_position(image_offsets, image, here)
    else:
        x = 0.0
        y = 0.0
        z = 0.0
    return x, y, z


@triton.jit
def taken_value(pieces, piece, f, column, table_width, taken):
    """Channel values of a tile, 0 where not `taken`."""
    value = channel_value(pieces, piece[:, None], f[:, None], column, table_width)
    return tl.where(taken, value, 0.0)


@triton.jit
def pair_channels_kernel(
    bias,
    node,
    pieces,
    u,
    positions,
    types,
    gain,
    shift,
    image_starts,
    image_offsets,
    static,
    key_mask,
    sample_of,
    cu_seqlens,
    pair_offsets,
    system,
    static_offsets,
    start,
    inverse_step,
    n_pieces,
    n_types,
    biased,
    summed,
    table_width,
    first_summed,
    GIVEN: tl.constexpr,
    IMAGES: tl.constexpr,
    STATIC: tl.constexpr,
    MASKED: tl.constexpr,
    BIAS: tl.constexpr,
    NODE_BLOCKS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Bias row of one query (all heads), and NODE_BLOCKS (0 to 4) blocks of its summed channels from first_summed on."""
    site = tl.program_id(0)
    sample = tl.load(sample_of + site)
    begin = tl.load(cu_seqlens + sample)
    length = tl.load(cu_seqlens + sample + 1) - begin
    pitch = (length + 7) // 8 * 8
    row = (site - begin).to(tl.int64) * pitch
    pair_start = tl.load(pair_offsets + sample)
    x, y, z, kind = query_site(site, positions, types, GIVEN)
    head = tl.arange(0, BLOCK_HEADS)
    channel = tl.arange(0, BLOCK_CHANNELS)
    column = BLOCK_HEADS + first_summed + channel[None, :]
    sum0 = tl.zeros((BLOCK_KEYS, BLOCK_CHANNELS), dtype=tl.float32)
    sum1 = tl.zeros((BLOCK_KEYS, BLOCK_CHANNELS), dtype=tl.float32)
    sum2 = tl.zeros((BLOCK_KEYS, BLOCK_CHANNELS), dtype=tl.float32)
    sum3 = tl.zeros((BLOCK_KEYS, BLOCK_CHANNELS), dtype=tl.float32)
    for first in range(0, pitch, BLOCK_KEYS):
        local = first + tl.arange(0, BLOCK_KEYS)
        here = local < length
        key = begin + local
        image, count, most = image_run(image_starts, key, here, IMAGES)
        counted = here
        if MASKED:
            counted = here & (tl.load(key_mask + key, mask=here, other=0) != 0)
        top = tl.full((BLOCK_KEYS, BLOCK_HEADS), -float("inf"), dtype=tl.float32)
        weight = tl.zeros((BLOCK_KEYS, BLOCK_HEADS), dtype=tl.float32)
        for copy in range(most):
            present = copy < count
            ox, oy, oz = image_offset(image_offsets, image + copy, here & present, IMAGES)
            pair = pair_start + row + local
            scalar, _, _ = pair_scalar(
                u, pair, positions, types, gain, shift, n_types, x, y, z, kind, key, ox, oy, oz, here, GIVEN
            )
            piece, f = locate(scalar, start, inverse_step, n_pieces)
            if BIAS:
                value = channel_value(pieces, piece[:, None], f[:, None], head[None, :], table_width)
                if IMAGES:
                    value = tl.where(present[:, None], value, -float("inf"))
                    higher = tl.maximum(top, value)
                    weight = weight * tl.exp(top - higher) + tl.exp(value - higher)
                    top = higher
                else:
                    top = value
            taken = (counted & present)[:, None]
            if NODE_BLOCKS > 0:
                sum0 += taken_value(pieces, piece, f, column, table_width, taken)
            if NODE_BLOCKS > 1:
                sum1 += taken_value(pieces, piece, f, column + BLOCK_CHANNELS, table_width, taken)
            if NODE_BLOCKS > 2:
                sum2 += taken_value(pieces, piece, f, column + 2 * BLOCK_CHANNELS, table_width, taken)
            if NODE_BLOCKS > 3:
                sum3 += taken_value(pieces, piece, f, column + 3 * BLOCK_CHANNELS, table_width, taken)
        if BIAS:
            if IMAGES:
                top += tl.log(weight)
            address = head.to(tl.int64)[None, :] * (length.to(tl.int64) * pitch) + (row + local)[:, None]
            heads_here = (head < biased)[None, :]
            if STATIC:
                added = static + biased * tl.load(static_offsets + tl.load(system + sample)) + address
                top += tl.load(added, mask=here[:, None] & heads_here, other=0.0).to(tl.float32)
            top = tl.where(here[:, None], top, 0.0).to(bias.dtype.element_ty)
            tl.store(bias + biased * pair_start + address, top, mask=(local < pitch)[:, None] & heads_here)
    out = node + site.to(tl.int64) * summed + first_summed + channel
    left = summed - first_summed
    if NODE_BLOCKS > 0:
        tl.store(out, tl.sum(sum0, 0), mask=channel < left)
    if NODE_BLOCKS > 1:
        tl.store(out + BLOCK_CHANNELS, tl.sum(sum1, 0), mask=channel + BLOCK_CHANNELS < left)
    if NODE_BLOCKS > 2:
        tl.store(out + 2 * BLOCK_CHANNELS, tl.sum(sum2, 0), mask=channel + 2 * BLOCK_CHANNELS < left)
    if NODE_BLOCKS > 3:
        tl.store(out + 3 * BLOCK_CHANNELS, tl.sum(sum3, 0), mask=channel + 3 * BLOCK_CHANNELS < left)
