"""Counter-based Gaussian noise: a pure function of (seed, walker index, step), by Philox4x32-10 and Box-Muller.

So a sample does not depend on who shared its batch, on the batch size, or on the order of work. Source: Salmon et al. 2011.
Integers are kept in int64 tensors; 32-bit words in their low halves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four 32-bit words per counter (four words) and key (two words); all int64 tensors that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def counter_normal(seed: Tensor, index: Tensor, step: Tensor, n: int) -> Tensor:
    """Standard normals [B, n] float32 for seed, index, step [B] int64 (non-negative)."""
    block = torch.arange((n + 3) // 4, device=index.device)[None]
    column = lambda values: values[:, None]  # noqa: E731
    counter = (block, column(step), column(index & _MASK), column(index >> 32))
    key = (column(seed & _MASK), column((seed >> 32) & _MASK))
    words = torch.stack(torch.broadcast_tensors(*philox(counter, key)))
    uniform = (words.double() + 0.5) / 2**32
    radius = torch.sqrt(-2 * torch.log(uniform[0::2]))
    angle = 2 * math.pi * uniform[1::2]
    normals = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])
    return normals.permute(1, 2, 0).flatten(1)[:, :n].float()
