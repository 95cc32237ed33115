"""Collective variables: properties of structures that guide, steer or divide samples, differentiable in torch.

Each is a Property, (Geometry, Context) -> values [B]: distances in Å, angles in rad on [-pi, pi]; of the structure as it
stands, without periodic images. Site numbers count from 0. `property_from` reads one from a line of text, or takes the
user's own function.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from dig_scale.batch import Context, Geometry
from dig_scale.config_properties import PREDICTOR
from dig_scale.errors import UserError
from dig_scale.geometry.rotations import nearest_rotations
from dig_scale.sampling.guidance import Property

_TINY = 1e-12
"""Å²; keeps the gradient of a length finite where it is 0."""


@dataclass(frozen=True)
class Distance:
    """Distance in Å between two sites."""

    sites: tuple[int, int]

    def __call__(self, geometry: Geometry, context: Context) -> Tensor:
        """[B]."""
        i, j = _points(geometry, self.sites)
        return _length(j - i)


@dataclass(frozen=True)
class Angle:
    """Angle in rad on [0, pi] at the middle of three sites."""

    sites: tuple[int, int, int]

    def __call__(self, geometry: Geometry, context: Context) -> Tensor:
        """[B]."""
        i, j, k = _points(geometry, self.sites)
        u, v = i - j, k - j
        return torch.atan2(_length(torch.linalg.cross(u, v)), (u * v).sum(-1))


@dataclass(frozen=True)
class Dihedral:
    """Torsion in rad about the two middle ones of four sites; IUPAC sign, pi is trans."""

    sites: tuple[int, int, int, int]

    def __call__(self, geometry: Geometry, context: Context) -> Tensor:
        """[B]."""
        i, j, k, m = _points(geometry, self.sites)
        b1, b2, b3 = j - i, k - j, m - k
        first, second = torch.linalg.cross(b1, b2), torch.linalg.cross(b2, b3)
        sine = _length(b2) * (b1 * second).sum(-1)
        cosine = (first * second).sum(-1)
        # at 0, 0 a torsion has no value, and its gradient is taken as 0
        return torch.atan2(sine, torch.where((sine == 0) & (cosine == 0), torch.ones_like(cosine), cosine))


@dataclass(frozen=True)
class Coordination:
    """Contacts between two groups of sites: the sum over pairs of 1/(1 + (r/radius)^6), radius in Å."""

    first: tuple[int, ...]
    second: tuple[int, ...]
    radius: float

    def __call__(self, geometry: Geometry, context: Context) -> Tensor:
        """[B]."""
        x = geometry.positions
        apart = x[:, list(self.first)].unsqueeze(2) - x[:, list(self.second)].unsqueeze(1)
        squared = (apart**2).sum(-1) / self.radius**2
        different = torch.tensor([[i != j for j in self.second] for i in self.first], device=x.device)
        return (different / (1 + squared**3)).flatten(1).sum(-1)


@dataclass(frozen=True)
class RadiusOfGyration:
    """Radius of gyration in Å of some sites, or all that are present, alike."""

    sites: tuple[int, ...] | None = None

    def __call__(self, geometry: Geometry, context: Context) -> Tensor:
        """[B]."""
        x, weight = _chosen(geometry, context, self.sites)
        mean = (weight * x).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        return _root((weight * (x - mean) ** 2).flatten(1).sum(-1) / weight.flatten(1).sum(-1))


@dataclass(frozen=True)
class Rmsd:
    """Root-mean-square distance in Å from a reference [N, 3] after superposition, over some sites or all that are present."""

    reference: Tensor
    sites: tuple[int, ...] | None = None

    def __call__(self, geometry: Geometry, context: Context) -> Tensor:
        """[B]."""
        x, weight = _chosen(geometry, context, self.sites)
        target = self.reference.to(x)
        target = (target if self.sites is None else target[list(self.sites)]).expand_as(x)
        total = weight.sum(1, keepdim=True)
        ours, theirs = (points - (weight * points).sum(1, keepdim=True) / total for points in (x, target))
        apart = ours @ _best_rotation(ours.detach(), theirs, weight) - theirs
        return _root((weight * apart**2).flatten(1).sum(-1) / weight.flatten(1).sum(-1))


def property_from(text: str) -> Property:
    """A collective variable from NAME:i,j,... (distance, angle, dihedral, gyration), else the user's function from
    MODULE:FUNCTION or FILE.py:FUNCTION; raises UserError with what is wrong.

    The function takes (geometry, context) and gives one number per sample, in torch.
    """
    name, separator, rest = text.partition(":")
    if not separator or not rest:
        raise UserError(f"property {text!r}: expected one such as dihedral:4,6,8,10, or MODULE:FUNCTION")
    if name in _NAMED:
        return _named(name, rest, text)
    if text.startswith(PREDICTOR):
        raise UserError(
            f"property {text!r}: a predictor guides samples (--guide), and is no property of clean structures"
        )
    found = getattr(_module(name, text), rest, None)
    if not callable(found):
        raise UserError(f"property {text!r}: {name} has no function {rest!r}")
    function: Property = found
    return function


def counts_sites(text: str) -> bool:
    """Whether a property is one of numbered sites, so that it means something of systems with the same sites alone."""
    return text.partition(":")[0] in _NAMED


def require_sites(prop: Property, n_sites: int, system: str) -> None:
    """Raises UserError where a collective variable names a site that a system does not have."""
    for field in ("sites", "first", "second"):
        for site in getattr(prop, field, None) or ():
            if not 0 <= site < n_sites:
                raise UserError(
                    f"{type(prop).__name__.lower()} of site {site}: {system!r} has sites 0 to {n_sites - 1}"
                )


_NAMED: dict[str, tuple[Callable[[tuple[int, ...]], Property], int | None]] = {
    "distance": (lambda sites: Distance(sites[:2]), 2),  # type: ignore[arg-type]
    "angle": (lambda sites: Angle(sites[:3]), 3),  # type: ignore[arg-type]
    "dihedral": (lambda sites: Dihedral(sites[:4]), 4),  # type: ignore[arg-type]
    "gyration": (lambda sites: RadiusOfGyration(sites), None),
}
"""Name -> what makes it of sites, and of how many."""


def _named(name: str, listed: str, text: str) -> Property:
    make, wanted = _NAMED[name]
    try:
        sites = tuple(int(part) for part in listed.split(","))
    except ValueError:
        raise UserError(f"property {text!r}: {listed!r} is no list of site numbers such as 4,6,8,10") from None
    if wanted is not None and len(sites) != wanted:
        raise UserError(f"property {text!r}: {len(sites)} sites, a {name} takes {wanted}")
    return make(sites)


def _module(name: str, text: str) -> ModuleType:
    if not name.endswith(".py"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UserError(f"property {text!r}: {error}; a file is given as FILE.py:FUNCTION") from error
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    if spec is None or spec.loader is None or not Path(name).is_file():
        raise UserError(f"property {text!r}: no file {name}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _points(geometry: Geometry, sites: tuple[int, ...]) -> list[Tensor]:
    return [geometry.positions[:, site] for site in sites]


def _chosen(geometry: Geometry, context: Context, sites: tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
    """Positions [B, M, 3] of the sites and their weights [B, M, 1], 0 or 1."""
    x = geometry.positions
    if sites is not None:
        return x[:, list(sites)], x.new_ones(len(x), len(sites), 1)
    return x, context.present.to(x.dtype).unsqueeze(-1).expand(len(x), -1, -1)


def _best_rotation(mobile: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Proper rotations [B, 3, 3] for which mobile @ R lies best on target.

    At the best rotation the distance does not change with it to first order, so no gradient passes through here.
    """
    return nearest_rotations((weight * mobile).mT @ target)


def _length(vectors: Tensor) -> Tensor:
    return _root((vectors**2).sum(-1))


def _root(squared: Tensor) -> Tensor:
    return torch.sqrt(squared + _TINY)
