"""What an attention contender is: its leaves, its arrangement of rows, and attention over layers that share a bias.

A contender has variants (padded head widths, library backends, element types of the bias); a variant builds a Setup of a
number of layers. Every bias is a leaf with a gradient unless the contender's name says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bench.gpu_problem import Problem, random_rows
from bench.gpu_timing import Bench, Computation
from torch import Tensor

Layer = Sequence[Tensor]
"""q, k, v."""
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Place = Callable[[Tensor], Tensor]


class UnavailableError(RuntimeError):
    """What a contender needs is not there."""


@dataclass(frozen=True)
class Arrangement:
    """Rows [T, H, d] -> a contender's tensor, and the checked slice [h, L, d] out of it."""

    place: Place
    cut: Place


@dataclass(frozen=True)
class Setup:
    """A contender ready to run: q, k, v by layer, leaves of the bias, seeds, and attention over some of the layers."""

    layers: Sequence[Layer]
    shared: Sequence[Tensor]
    seeds: Sequence[Tensor]
    attend: Callable[[Sequence[Layer]], Sequence[Tensor]]
    scale: float
    cut: Place
    bias: Callable[[], Tensor]
    """The checked slice [h, L, L] of the bias as this contender has it."""
    cut_bias: Place | None = None
    """The slice of the gradient of shared[0], where that is dense."""

    @property
    def computation(self) -> Computation:
        """All layers."""
        leaves = [tensor for layer in self.layers for tensor in layer]
        return Computation(lambda: self.attend(self.layers), [*leaves, *self.shared], self.seeds)


Build = Callable[[int], Setup]
"""Setup of this many layers."""


Variants = Callable[[Problem, Bench], Mapping[str, Build]]
"""A contender's variants for a problem; raises UnavailableError or ImportError where it cannot run at all."""


def arranged(problem: Problem, arrangement: Arrangement, layers: int) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Leaves q, k, v of each layer, and seeds."""
    placed = [[arrangement.place(row) for row in random_rows(problem, layer)] for layer in range(layers)]
    return [[row.requires_grad_() for row in rows[:3]] for rows in placed], [rows[3] for rows in placed]
