"""Device functions shared by the kernels: distances, the pair scalar u and its tabulated channels for a tile of pairs.

All in fp32 (or fp64 where the inputs are). A tile is any shape of index and u tensors that broadcast together. Pieces are
[K-1, 4, C] row-major: coefficient m of channel c on piece k stands at (4 k + m) C + c.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_position(positions, site, here):
    """x, y, z of sites `site` of positions [T, 3]; 0 where not `here`."""
    x = tl.load(positions + 3 * site, mask=here, other=0.0)
    y = tl.load(positions + 3 * site + 1, mask=here, other=0.0)
    z = tl.load(positions + 3 * site + 2, mask=here, other=0.0)
    return x, y, z


@triton.jit
def locate(u, start, inverse_step, n_pieces):
    """Piece index (int32) and fraction in [0, 1] of u; beyond the ends the end values hold, a u that is NaN keeps NaN.

    The comparisons of a GPU drop NaN and would make it the start of the grid; here its fraction, so every value, is NaN.
    """
    place = tl.minimum(tl.maximum((tl.where(u == u, u, start) - start) * inverse_step, 0.0), n_pieces * 1.0)
    piece = tl.minimum(place.to(tl.int32), n_pieces - 1)
    return piece, tl.where(u == u, place - piece.to(place.dtype), u)


@triton.jit
def inside(u, start, inverse_step, n_pieces):
    """Where u lies on the grid, or is NaN: outside it the derivative is 0."""
    place = (u - start) * inverse_step
    return ((place >= 0) & (place <= n_pieces)) | (u != u)


@triton.jit
def channel_value(pieces, piece, f, channel, channels):
    """Value of `channel` at (piece, f)."""
    row = pieces + piece * (4 * channels) + channel
    c0 = tl.load(row)
    c1 = tl.load(row + channels)
    c2 = tl.load(row + 2 * channels)
    c3 = tl.load(row + 3 * channels)
    return c0 + f * (c1 + f * (c2 + f * c3))


@triton.jit
def channel_slope(pieces, piece, f, channel, channels, inverse_step):
    """Derivative d/du of `channel` at (piece, f), not yet 0 outside the grid."""
    row = pieces + piece * (4 * channels) + channel
    c1 = tl.load(row + channels)
    c2 = tl.load(row + 2 * channels)
    c3 = tl.load(row + 3 * channels)
    return (c1 + f * (2.0 * c2 + 3.0 * f * c3)) * inverse_step
