"""State (what diffuses), Score (its tangent), Context (what conditions), Batch, and the type of a score function.

Shapes: B samples, N sites. Positions of a State count from the anchors of its Context (the origin for free molecules) and
its lattice is in the coordinates of a unit cell's logarithm, so that both are plain vectors; diffusion.composition turns
arrays of Frames into a State and back, and shows the network absolute positions and cells. A Context has leading axis b:
1 where the whole batch is one system (its static features are then computed and read once), else B. Two masks only:
`present` (not padding) and `mobile` (diffuses).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from dig_scale.tree import tree_to


@dataclass(frozen=True)
class State:
    """Fields that diffuse, or None: positions [B,N,3] Å, rotations [B,N,3,3], fractional [B,N,3] in [0,1), lattice [B,6]."""

    positions: Tensor | None = None
    rotations: Tensor | None = None
    fractional: Tensor | None = None
    lattice: Tensor | None = None


@dataclass(frozen=True)
class Score:
    """Tangent of a State: one vector field per diffusing field, in the inverse unit of the field; rotations [B,N,3] in the
    local frames, in 1/rad."""

    positions: Tensor | None = None
    rotations: Tensor | None = None
    fractional: Tensor | None = None
    lattice: Tensor | None = None


def fields_of(state: State | Score) -> dict[str, Tensor]:
    """The fields that are there, by name, in the order of State."""
    return {f.name: value for f in fields(state) if (value := getattr(state, f.name)) is not None}


@dataclass(frozen=True)
class Geometry:
    """Noised structures as the network sees them, in Å on the scale of the data: positions [B,N,3], rotations [B,N,3,3] of
    residue frames, cell [B,3,3] (rows) that came with the state."""

    positions: Tensor
    rotations: Tensor | None = None
    cell: Tensor | None = None


@dataclass(frozen=True)
class Context:
    """Static features of the system(s), the same at every noise level.

    present, mobile [b,N]; element, degree, environment, role, place [b,N] integer codes (place: 1 + number along the
    chain, 0 where there is none); pair_segment, path_length, bond_order [b,N,N] integer codes; pair_reference [b,N,N]
    reference distances in Å; anchor [b,N,3] Å, where the noise of a site reverts to; extent [b,N] in Å, the
    root-mean-square coordinate of a site about its anchor; free [b], whether translations are no degree of freedom;
    cell [b,3,3] Å of a fixed cell and periodic [b,3] its periodic directions (zeros where there is none); condition
    [b,C] wanted properties in units of their spread, and known [b,C], which of them are given; site_features [b,N,F] and
    pair_features [b,N,N,P] of other networks, of width 0 where there are none.
    """

    present: Tensor
    mobile: Tensor
    element: Tensor
    degree: Tensor
    environment: Tensor
    role: Tensor
    place: Tensor
    pair_segment: Tensor
    path_length: Tensor
    bond_order: Tensor
    pair_reference: Tensor
    anchor: Tensor
    extent: Tensor
    free: Tensor
    cell: Tensor
    periodic: Tensor
    condition: Tensor
    known: Tensor
    site_features: Tensor
    pair_features: Tensor

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
    padded = [with_sites(context, n_max) for context in contexts]
    return Context(**{f.name: torch.cat([getattr(c, f.name) for c in padded]) for f in fields(Context)})


def padded_to(contexts: Sequence[Context], n_sites: int) -> tuple[Context, ...]:
    """The contexts, each padded to n_sites."""
    return tuple(with_sites(context, n_sites) for context in contexts)


_SITE_AXES = {"pair_segment": 2, "path_length": 2, "bond_order": 2, "pair_reference": 2, "pair_features": 2}
_NO_SITE_AXIS = ("free", "cell", "periodic", "condition", "known")


def with_sites(context: Context, n_sites: int) -> Context:
    """The context padded to n_sites, or without the padding beyond them."""
    missing = n_sites - context.n_sites
    found = {}
    for f in fields(Context):
        value, axes = getattr(context, f.name), 0 if f.name in _NO_SITE_AXIS else _SITE_AXES.get(f.name, 1)
        after = [0, 0] * (value.dim() - 1 - axes)
        found[f.name] = pad(value, (*after, *[0, missing] * axes))
    return Context(**found)


def first_sites(state: State, n_sites: int) -> State:
    """The state without the padding beyond n_sites."""
    kept = {name: value[:, :n_sites] for name, value in fields_of(state).items() if name != "lattice"}
    return replace(state, **kept)
