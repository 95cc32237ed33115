"""Device code of the contraction: gradients of the pair scalar, the table, positions and the static bias.

A slot is the place of one (query, copy of a key) in buffers that hold all of them, or a window of them: without images
it is the pair's place in a flat pair tensor. One writer per element everywhere; nothing is atomic.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from dig_kernels.pair_bias_kernels import image_offset, image_run, pair_scalar, query_site
from dig_kernels.pair_tile import channel_slope, channel_value, inside, load_position, locate


@triton.jit(do_not_specialize=["first_site", "offset", "window"])
def pair_gradient_kernel(
    du,
    keys,
    fractions,
    queries,
    rows,
    codes,
    distances,
    d_bias,
    d_node,
    bias_start,
    bias_row,
    bias_head,
    pieces,
    u,
    positions,
    types,
    gain,
    shift,
    image_starts,
    image_offsets,
    key_mask,
    sample_of,
    cu_seqlens,
    pair_offsets,
    slot_start,
    slot_stride,
    origin,
    offset,
    window,
    first_site,
    start,
    inverse_step,
    n_pieces,
    n_types,
    biased,
    summed,
    table_width,
    GIVEN: tl.constexpr,
    IMAGES: tl.constexpr,
    MASKED: tl.constexpr,
    BIAS: tl.constexpr,
    NODE: tl.constexpr,
    PLACES: tl.constexpr,
    PIECES: tl.constexpr,
    MAPS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Of one query's slots in the window: du (PLACES), piece, fraction and gradient row (PIECES), code and distance (MAPS)."""
    site = first_site + tl.program_id(0)
    sample = tl.load(sample_of + site)
    begin = tl.load(cu_seqlens + sample)
    length = tl.load(cu_seqlens + sample + 1) - begin
    row = (site - begin).to(tl.int64)
    stride = tl.load(slot_stride + sample)
    low = tl.load(origin) + offset
    slot_row = tl.load(slot_start + sample) + row * stride - low
    pair_row = tl.load(pair_offsets + sample) + row * ((length + 7) // 8 * 8)
    x, y, z, kind = query_site(site, positions, types, GIVEN)
    head = tl.arange(0, BLOCK_HEADS)
    if BIAS:
        gradient_row = d_bias + tl.load(bias_start + sample) + row * tl.load(bias_row + sample)
        gradient_head = head.to(tl.int64)[None, :] * tl.load(bias_head + sample)
    if (slot_row < window) & (slot_row + stride > 0):
        for first in range(0, length, BLOCK_KEYS):
            local = first + tl.arange(0, BLOCK_KEYS)
            here = local < length
            key = begin + local
            image, count, most = image_run(image_starts, key, here, IMAGES)
            if IMAGES:
                slot_key = slot_row + image - tl.load(image_starts + begin)
            else:
                slot_key = slot_row + local
            counted = here
            if MASKED:
                counted = here & (tl.load(key_mask + key, mask=here, other=0) != 0)
            if BIAS:
                heads_here = here[:, None] & (head < biased)[None, :]
                gradient = tl.load(gradient_row + gradient_head + local[:, None], mask=heads_here, other=0.0).to(
                    tl.float32
                )
                if IMAGES:
                    top = tl.full((BLOCK_KEYS, BLOCK_HEADS), -float("inf"), dtype=tl.float32)
                    weight = tl.zeros((BLOCK_KEYS, BLOCK_HEADS), dtype=tl.float32)
                    for copy in range(most):
                        present = here & (copy < count)
                        ox, oy, oz = image_offset(image_offsets, image + copy, present, IMAGES)
                        scalar, _, _ = pair_scalar(
                            u,
                            local,
                            positions,
                            types,
                            gain,
                            shift,
                            n_types,
                            x,
                            y,
                            z,
                            kind,
                            key,
                            ox,
                            oy,
                            oz,
                            here,
                            GIVEN,
                        )
                        piece, f = locate(scalar, start, inverse_step, n_pieces)
                        value = channel_value(pieces, piece[:, None], f[:, None], head[None, :], table_width)
                        value = tl.where((copy < count)[:, None], value, -float("inf"))
                        higher = tl.maximum(top, value)
                        weight = weight * tl.exp(top - higher) + tl.exp(value - higher)
                        top = higher
            for copy in range(most):
                present = here & (copy < count)
                ox, oy, oz = image_offset(image_offsets, image + copy, present, IMAGES)
                scalar, distance, code = pair_scalar(
                    u,
                    pair_row + local,
                    positions,
                    types,
                    gain,
                    shift,
                    n_types,
                    x,
                    y,
                    z,
                    kind,
                    key,
                    ox,
                    oy,
                    oz,
                    here,
                    GIVEN,
                )
                piece, f = locate(scalar, start, inverse_step, n_pieces)
                slot = slot_key + copy
                stored = present & (slot >= 0) & (slot < window)
                slope = tl.zeros((BLOCK_KEYS,), dtype=tl.float32)
                if BIAS:
                    row_share = gradient
                    if IMAGES:
                        value = channel_value(pieces, piece[:, None], f[:, None], head[None, :], table_width)
                        row_share = gradient * (tl.exp(value - top) / weight)
                    if PIECES:
                        tl.store(
                            rows + slot[:, None] * biased + head[None, :], row_share, mask=stored[:, None] & heads_here
                        )
                    if PLACES:
                        rise = channel_slope(
                            pieces, piece[:, None], f[:, None], head[None, :], table_width, inverse_step
                        )
                        slope += tl.sum(row_share * rise, 1)
                if NODE and PLACES:
                    pull = tl.zeros((BLOCK_KEYS, BLOCK_CHANNELS), dtype=tl.float32)
                    for first_channel in range(0, summed, BLOCK_CHANNELS):
                        channel = first_channel + tl.arange(0, BLOCK_CHANNELS)
                        at = d_node + site.to(tl.int64) * summed + channel
                        share = tl.load(at, mask=channel < summed, other=0.0).to(tl.float32)[None, :]
                        column = BLOCK_HEADS + channel[None, :]
                        rise = channel_slope(pieces, piece[:, None], f[:, None], column, table_width, inverse_step)
                        pull += share * rise
                    slope += tl.where(counted, tl.sum(pull, 1), 0.0)
                if PLACES:
                    slope = tl.where(inside(scalar, start, inverse_step, n_pieces), slope, 0.0)
                    if GIVEN:
                        tl.store(du + low + slot, slope, mask=stored)
                    else:
                        tl.store(du + slot, slope, mask=stored)
                if PIECES:
                    tl.store(keys + slot, piece.to(keys.dtype.element_ty), mask=stored)
                    tl.store(fractions + slot, f, mask=stored)
                    tl.store(queries + slot, tl.where(counted, site, -1), mask=stored)
                if MAPS:
                    tl.store(codes + slot, code.to(codes.dtype.element_ty), mask=stored)
                    tl.store(distances + slot, distance, mask=stored)


@triton.jit
def pull_of(
    du, slot, window, positions, types, gain, n_types, x, y, z, kind, other, ox, oy, oz, present, KEY: tl.constexpr
):
    """Gradient that pairs with sites `other` displaced by o exert on the site at (x, y, z); KEY: the site is their key."""
    xo, yo, zo = load_position(positions, other, present)
    dx = x - xo - ox
    dy = y - yo - oy
    dz = z - zo - oz
    squared = dx * dx + dy * dy + dz * dz
    other_kind = tl.load(types + other, mask=present, other=0).to(tl.int32)
    if KEY:
        code = other_kind * n_types + kind
    else:
        code = kind * n_types + other_kind
    present = present & (slot >= 0) & (slot < window) & (squared > 0)
    slope = tl.load(du + slot, mask=present, other=0.0) * tl.load(gain + code, mask=present, other=0.0)
    slope = slope / tl.sqrt(tl.where(present, squared, 1.0))
    return slope * dx, slope * dy, slope * dz


@triton.jit(do_not_specialize=["first_site", "n_sites", "offset", "window"])
def position_gradient_kernel(
    d_positions,
    du,
    positions,
    types,
    gain,
    image_starts,
    image_offsets,
    sample_of,
    cu_seqlens,
    slot_start,
    slot_stride,
    origin,
    offset,
    window,
    first_site,
    n_sites,
    n_types,
    IMAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """d_positions of one site += what the window's slots give it, as query of its row and as key of its column."""
    site = tl.program_id(0)
    sample = tl.load(sample_of + site)
    begin = tl.load(cu_seqlens + sample)
    length = tl.load(cu_seqlens + sample + 1) - begin
    stride = tl.load(slot_stride + sample)
    base = tl.load(slot_start + sample) - tl.load(origin) - offset
    row = (site - begin).to(tl.int64)
    x, y, z, kind = query_site(site, positions, types, False)
    gx = tl.zeros((BLOCK,), dtype=tl.float32)
    gy = tl.zeros((BLOCK,), dtype=tl.float32)
    gz = tl.zeros((BLOCK,), dtype=tl.float32)
    own_image = 0
    own_count = 1
    image_begin = 0
    if IMAGES:
        image_begin = tl.load(image_starts + begin)
        own_image = tl.load(image_starts + site)
        own_count = tl.load(image_starts + site + 1) - own_image
    slot_row = base + row * stride
    as_query = (site >= first_site) & (site < first_site + n_sites) & (slot_row < window) & (slot_row + stride > 0)
    for first in range(0, tl.where(as_query, length, 0), BLOCK):
        local = first + tl.arange(0, BLOCK)
        here = local < length
        key = begin + local
        image, count, most = image_run(image_starts, key, here, IMAGES)
        if IMAGES:
            slot = slot_row + image - image_begin
        else:
            slot = slot_row + local
        for copy in range(most):
            present = here & (copy < count)
            ox, oy, oz = image_offset(image_offsets, image + copy, present, IMAGES)
            px, py, pz = pull_of(
                du, slot + copy, window, positions, types, gain, n_types, x, y, z, kind, key, ox, oy, oz, present, False
            )
            gx += px
            gy += py
            gz += pz
    # only the rows that lie in the window and among the sites asked for
    low = tl.maximum(tl.maximum(0 - base, 0) // stride, tl.maximum(first_site - begin, 0)).to(tl.int32)
    high = (tl.maximum(window - base, 0) + stride - 1) // stride
    high = tl.minimum(high, tl.minimum(length, first_site + n_sites - begin)).to(tl.int32)
    own_slot = base + row
    if IMAGES:
        own_slot = base + own_image - image_begin
    for first in range(low, high, BLOCK):
        local = first + tl.arange(0, BLOCK)
        here = local < high
        for copy in range(own_count):
            ox = 0.0
            oy = 0.0
            oz = 0.0
            if IMAGES:
                ox = -tl.load(image_offsets + 3 * (own_image + copy))
                oy = -tl.load(image_offsets + 3 * (own_image + copy) + 1)
                oz = -tl.load(image_offsets + 3 * (own_image + copy) + 2)
            slot = own_slot + local * stride + copy
            px, py, pz = pull_of(
                du, slot, window, positions, types, gain, n_types, x, y, z, kind, begin + local, ox, oy, oz, here, True
            )
            gx += px
            gy += py
            gz += pz
    out = d_positions + 3 * site
    tl.store(out, tl.load(out) + tl.sum(gx, 0))
    tl.store(out + 1, tl.load(out + 1) + tl.sum(gy, 0))
    tl.store(out + 2, tl.load(out + 2) + tl.sum(gz, 0))


@triton.jit(do_not_specialize=["first_site", "n_sites"])
def static_gradient_kernel(
    d_static,
    d_bias,
    bias_start,
    bias_row,
    bias_head,
    samples,
    sample_bounds,
    cu_seqlens,
    static_offsets,
    first_site,
    n_sites,
    rows_per_system,
    BLOCK: tl.constexpr,
):
    """One row of one head of a system's static gradient += the sum of that row over the system's samples, in order."""
    group = tl.program_id(0) // rows_per_system
    local_row = tl.program_id(0) % rows_per_system
    head = tl.program_id(1)
    biased = tl.num_programs(1)
    first_member = tl.load(sample_bounds + group)
    last_member = tl.load(sample_bounds + group + 1)
    sample = tl.load(samples + first_member)
    length = tl.load(cu_seqlens + sample + 1) - tl.load(cu_seqlens + sample)
    pitch = (length + 7) // 8 * 8
    out = d_static + biased * tl.load(static_offsets + group) + (head.to(tl.int64) * length + local_row) * pitch
    for first in range(0, tl.where(local_row < length, pitch, 0), BLOCK):
        local = first + tl.arange(0, BLOCK)
        total = tl.load(out + local, mask=local < pitch, other=0.0).to(tl.float32)
        for member in range(first_member, last_member):
            sample = tl.load(samples + member)
            site = tl.load(cu_seqlens + sample) + local_row
            taken = (site >= first_site) & (site < first_site + n_sites) & (local < length)
            at = tl.load(bias_start + sample) + local_row.to(tl.int64) * tl.load(bias_row + sample)
            at += head.to(tl.int64) * tl.load(bias_head + sample)
            total += tl.load(d_bias + at + local, mask=taken, other=0.0).to(tl.float32)
        tl.store(out + local, total.to(d_static.dtype.element_ty), mask=local < pitch)
