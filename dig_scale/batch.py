"""State (what diffuses), Score (its tangent), Context (what conditions), Batch, and the type of a score function.

Shapes: B samples, N sites. A Context has leading axis b: 1 where the whole batch is one system (its static features are
then computed and read once), else B. Two masks only: `present` (not padding) and `mobile` (diffuses).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import pad

from dig_scale.tree import tree_to


@dataclass(frozen=True)
class State:
    """Fields that diffuse, or None: positions [B,N,3] Å, rotations [B,N,3,3], fractional [B,N,3], lattice [B,3,3] Å."""

    positions: Tensor | None = None
    rotations: Tensor | None = None
    fractional: Tensor | None = None
    lattice: Tensor | None = None


@dataclass(frozen=True)
class Score:
    """Tangent of a State: one vector field per diffusing field, in the inverse unit of the field."""

    positions: Tensor | None = None
    rotations: Tensor | None = None
    fractional: Tensor | None = None
    lattice: Tensor | None = None


@dataclass(frozen=True)
class Context:
    """Static features of the system(s), the same at every noise level.

    present, mobile [b,N]; element, degree, environment [b,N] integer codes; pair_segment, path_length, bond_order
    [b,N,N] integer codes; pair_reference [b,N,N] reference distances in Å; extent [b] in Å, the root-mean-square
    coordinate of the reference.
    """

    present: Tensor
    mobile: Tensor
    element: Tensor
    degree: Tensor
    environment: Tensor
    pair_segment: Tensor
    path_length: Tensor
    bond_order: Tensor
    pair_reference: Tensor
    extent: Tensor

    def to(self, device: torch.device | str) -> Context:
        """A copy on `device`."""
        return tree_to(self, device)

    @property
    def n_sites(self) -> int:
        """Number of sites N, padding included."""
        return self.present.shape[1]


@dataclass(frozen=True)
class Batch:
    """Clean states with their context; `systems` names them for messages."""

    state: State
    context: Context
    systems: tuple[str, ...]


ScoreFn = Callable[[State, Context, Tensor], Score]
"""(noised state, context, t [B]) -> score of the noised distribution."""


def collate(contexts: Sequence[Context]) -> Context:
    """One context for several systems, padded to the largest; the very same context throughout stays b = 1."""
    first = contexts[0]
    if all(context is first for context in contexts):
        return first
    n_max = max(context.n_sites for context in contexts)
    padded = [_pad_context(context, n_max) for context in contexts]
    return Context(**{f.name: torch.cat([getattr(c, f.name) for c in padded]) for f in fields(Context)})


def _pad_context(context: Context, n_max: int) -> Context:
    missing = n_max - context.n_sites
    width = {2: (0, missing), 3: (0, missing, 0, missing)}
    values = {f.name: getattr(context, f.name) for f in fields(Context)}
    return Context(**{k: v if v.dim() == 1 else pad(v, width[v.dim()]) for k, v in values.items()})
