"""What crosses between the attention operators and their implementations: a call's settings, its results, layers' leavings.

Values only; the Triton launches (attention_kernels.py, deferred_kernels.py) and the processor form (attention_cpu.py) take
the same ones. Shapes: T sites, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor

from dig_kernels.bias_source import Source


class Writing(IntEnum):
    """What a backward does with dS at the place of the bias gradient, as the kernels number it."""

    STORE = 1
    ADD = 2


@dataclass(frozen=True)
class Call:
    """One call's bias, packing tensors, optional key mask [T] bool, logit scale, longest sample and tile (0: chosen)."""

    source: Source
    packing: Sequence[Tensor]
    key_mask: Tensor | None
    scale: float
    max_length: int
    tile: int = 0

    @property
    def batch(self) -> int:
        """Number of samples."""
        return len(self.packing[0]) - 1


@dataclass(frozen=True)
class Saved:
    """Inputs and results of a forward call and the output's gradient: q, k, v, out, d_out [T, H, d], lse [H, T]."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    d_out: Tensor


@dataclass(frozen=True)
class LayerTensors:
    """What layers left for the deferred gradient: q, k, v, dO [T, H, d] and LSE, delta [H, T] of each."""

    q: Sequence[Tensor]
    k: Sequence[Tensor]
    v: Sequence[Tensor]
    d_out: Sequence[Tensor]
    lse: Sequence[Tensor]
    delta: Sequence[Tensor]

    @property
    def groups(self) -> tuple[Sequence[Tensor], ...]:
        """The six lists in this order."""
        return self.q, self.k, self.v, self.d_out, self.lse, self.delta
