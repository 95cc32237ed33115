"""Triton kernel of the sampler update: one program per (chunk of coordinates, sample); four coordinates share a Philox block."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.random import philox_impl

WORD = tl.constexpr(0xFFFFFFFF)


@triton.jit
def normals(seed, index, step, n):
    """Standard normals number n of a walker: Philox4x32-10 and Box-Muller in fp64, as reference_heads.counter_normal."""
    zero = n * 0
    c0 = (n // 4).to(tl.uint32)
    c1 = ((step & WORD) + zero).to(tl.uint32)
    c2 = ((index & WORD) + zero).to(tl.uint32)
    c3 = ((index >> 32) + zero).to(tl.uint32)
    k0 = ((seed & WORD) + zero).to(tl.uint32)
    k1 = (((seed >> 32) & WORD) + zero).to(tl.uint32)
    w0, w1, w2, w3 = philox_impl(c0, c1, c2, c3, k0, k1)
    lane = n % 4
    odd = (lane % 2) == 1
    radial, angular = tl.where(odd, w2, w0).to(tl.float64), tl.where(odd, w3, w1).to(tl.float64)
    radius = tl.sqrt(-2.0 * tl.log((radial + 0.5) * 2.3283064365386963e-10))
    angle = 6.283185307179586 * ((angular + 0.5) * 2.3283064365386963e-10)
    return (radius * tl.where(lane < 2, tl.cos(angle), tl.sin(angle))).to(tl.float32)


@triton.jit
def update(
    x, score, noise, a, c, e, mobile, seed, index, step, cu, out, chunks,
    BLOCK: tl.constexpr, HAS_MOBILE: tl.constexpr, COUNTER: tl.constexpr,
):  # fmt: skip
    """out = a x + c score + e noise over the 3 L coordinates of a sample."""
    b = tl.program_id(0) // chunks
    begin = tl.load(cu + b)
    n = tl.program_id(0) % chunks * BLOCK + tl.arange(0, BLOCK)
    here = n < 3 * (tl.load(cu + b + 1) - begin)
    at = 3 * begin.to(tl.int64) + n
    old = tl.load(x + at, mask=here, other=0.0)
    if COUNTER:
        random = normals(tl.load(seed + b), tl.load(index + b), tl.load(step + b), n)
    else:
        random = tl.load(noise + at, mask=here, other=0.0)
    moved = tl.load(a + b) * old + tl.load(c + b) * tl.load(score + at, mask=here, other=0.0) + tl.load(e + b) * random
    if HAS_MOBILE:
        moved = tl.where(tl.load(mobile + begin + n // 3, mask=here, other=0) != 0, moved, old)
    tl.store(out + at, moved, mask=here)
