"""System, what a molecular system is, and Frames, where its atoms are over physical time. Frozen, numpy, no torch.

A System is DiG's descriptor D before featurisation: elements, residues, bonds, stereocentres, which sites move, and one
reference geometry. It is validated once, at construction, and travels as JSON. Units: Å, eV, e, ps.
"""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dig_scale.errors import InvalidSystemError

COARSE_GRAINED_BEAD = 0
"""Atomic number of a site that is not an atom."""


class SystemKind(enum.StrEnum):
    """The four kinds of system that DiG was shown on."""

    PROTEIN = "protein"
    MOLECULE = "molecule"
    CATALYST = "catalyst"
    CRYSTAL = "crystal"


@dataclass(frozen=True)
class System:
    """A molecular system without its conformation.

    elements [N] atomic numbers (0 = coarse-grained bead), residue_index and chain_index [N] 0-based, bonds [E, 2] with i < j,
    bond_orders [E] (1, 2, 3, 4 = aromatic, 0 = unknown), formal_charges [N] in e, stereocentres [C, 4] as (centre, a, b, c)
    whose signed volume (a-centre)·((b-centre)×(c-centre)) is positive in every valid conformation, mobile [N] sites that
    diffuse, reference_positions [N, 3] Å (one plausible geometry: bond lengths and angles are meaningful, torsions are not).
    Raises InvalidSystemError naming system, field and atom.
    """

    name: str
    kind: SystemKind
    elements: np.ndarray
    atom_names: tuple[str, ...]
    residue_names: tuple[str, ...]
    residue_index: np.ndarray
    chain_index: np.ndarray
    bonds: np.ndarray
    bond_orders: np.ndarray
    formal_charges: np.ndarray
    stereocentres: np.ndarray
    mobile: np.ndarray
    reference_positions: np.ndarray
    origin: dict[str, Any] = field(default_factory=dict)
    """Where it came from: {"source": "sequence" | file name, ...}; never part of the identity."""

    def __post_init__(self) -> None:
        for name, dtype in _ARRAY_FIELDS.items():
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype=dtype))
        _validate(self)

    @property
    def n_sites(self) -> int:
        """Number of sites (atoms or beads)."""
        return len(self.elements)

    @property
    def system_id(self) -> str:
        """16 hex digits that identify the descriptor (topology, mobile sites, reference geometry to 1e-3 Å)."""
        content = self.to_dict()
        content.pop("origin")
        content["reference_positions"] = np.round(self.reference_positions, 3).tolist()
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready content."""
        content: dict[str, Any] = {
            "format_version": 1,
            "name": self.name,
            "kind": str(self.kind),
            "origin": self.origin,
        }
        content |= {"atom_names": list(self.atom_names), "residue_names": list(self.residue_names)}
        return content | {name: getattr(self, name).tolist() for name in _ARRAY_FIELDS}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> System:
        """Inverse of to_dict; raises InvalidSystemError on missing fields or an unknown format version."""
        if content.get("format_version") != 1:
            raise InvalidSystemError(f"system format version {content.get('format_version')!r}, expected 1")
        missing = sorted(({"name", "kind", "atom_names", "residue_names"} | set(_ARRAY_FIELDS)) - set(content))
        if missing:
            raise InvalidSystemError(f"system {content.get('name')!r}: fields missing: {', '.join(missing)}")
        arrays: dict[str, np.ndarray] = {
            name: np.asarray(content[name], dtype) for name, dtype in _ARRAY_FIELDS.items()
        }
        arrays["bonds"] = arrays["bonds"].reshape(-1, 2)
        arrays["stereocentres"] = arrays["stereocentres"].reshape(-1, 4)
        try:
            kind = SystemKind(content["kind"])
        except ValueError:
            kinds = ", ".join(SystemKind)
            raise InvalidSystemError(
                f"system {content['name']!r}: kind {content['kind']!r}, expected one of {kinds}"
            ) from None
        return cls(
            name=content["name"],
            kind=kind,
            atom_names=tuple(content["atom_names"]),
            residue_names=tuple(content["residue_names"]),
            origin=content.get("origin", {}),
            **arrays,
        )

    def to_json(self) -> str:
        """Compact JSON of to_dict."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> System:
        """Inverse of to_json."""
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise InvalidSystemError(f"not a system in JSON: {error}") from error

    def site_label(self, index: int) -> str:
        """Human name of a site, as in 'ALA2:CA (atom 8)'."""
        residue = int(self.residue_index[index]) + 1
        return f"{self.residue_names[index]}{residue}:{self.atom_names[index]} (atom {index})"

    def select(self, sites: Sequence[int] | np.ndarray) -> System:
        """The subsystem of `sites` [M] in that order: bonds and stereocentres among them are kept, others dropped."""
        chosen = np.asarray(sites, dtype=np.int64)
        new_index = np.full(self.n_sites, -1)
        new_index[chosen] = np.arange(len(chosen))
        kept_bonds = (new_index[self.bonds] >= 0).all(axis=1)
        kept_centres = (new_index[self.stereocentres] >= 0).all(axis=1)
        bonds = np.sort(new_index[self.bonds[kept_bonds]], axis=1)
        return replace(
            self,
            elements=self.elements[chosen],
            atom_names=tuple(self.atom_names[i] for i in chosen),
            residue_names=tuple(self.residue_names[i] for i in chosen),
            residue_index=self.residue_index[chosen],
            chain_index=self.chain_index[chosen],
            bonds=bonds,
            bond_orders=self.bond_orders[kept_bonds],
            formal_charges=self.formal_charges[chosen],
            stereocentres=new_index[self.stereocentres[kept_centres]],
            mobile=self.mobile[chosen],
            reference_positions=self.reference_positions[chosen],
        )

    def heavy_sites(self) -> np.ndarray:
        """Indices [M] of sites that are not hydrogen; beads count as heavy."""
        return np.flatnonzero(self.elements != 1)


@dataclass(frozen=True)
class Frames:
    """Conformations over physical time: positions [F, N, 3] Å, time_ps [F], energy [F] eV, forces [F, N, 3] eV/Å."""

    positions: np.ndarray
    time_ps: np.ndarray
    energy: np.ndarray | None = None
    forces: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.positions.ndim != 3 or self.positions.shape[-1] != 3:
            raise InvalidSystemError(f"frames: positions have shape {self.positions.shape}, expected (F, N, 3) in Å")
        for name in ("time_ps", "energy", "forces"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.positions):
                raise InvalidSystemError(
                    f"frames: {name} has {len(values)} entries for {len(self.positions)} frames of positions"
                )

    @property
    def n_frames(self) -> int:
        """Number of frames F."""
        return len(self.positions)


_ARRAY_FIELDS: dict[str, type] = {
    "elements": np.int64,
    "residue_index": np.int64,
    "chain_index": np.int64,
    "bonds": np.int64,
    "bond_orders": np.int64,
    "formal_charges": np.int64,
    "stereocentres": np.int64,
    "mobile": np.bool_,
    "reference_positions": np.float64,
}


def _validate(system: System) -> None:
    n = system.n_sites
    fail = _Failure(system.name)
    if n == 0:
        fail("elements", "the system has no sites")
    for name in ("atom_names", "residue_names", "residue_index", "chain_index", "formal_charges", "mobile"):
        if len(getattr(system, name)) != n:
            fail(name, f"{len(getattr(system, name))} entries for {n} sites")
    if system.reference_positions.shape != (n, 3):
        fail("reference_positions", f"shape {system.reference_positions.shape}, expected ({n}, 3) in Å")
    bad = np.flatnonzero(~np.isfinite(system.reference_positions).all(axis=1))
    if len(bad):
        fail("reference_positions", f"not finite at {system.site_label(int(bad[0]))}")
    bad = np.flatnonzero((system.elements < 0) | (system.elements > 118))
    if len(bad):
        fail("elements", f"atomic number {system.elements[bad[0]]} at {system.site_label(int(bad[0]))}")
    _validate_bonds(system, fail)
    if system.stereocentres.shape[1:] != (4,) or (len(system.stereocentres) and not _in_range(system.stereocentres, n)):
        fail("stereocentres", f"expected rows (centre, a, b, c) of indices below {n}")


def _validate_bonds(system: System, fail: _Failure) -> None:
    bonds = system.bonds
    if bonds.shape[1:] != (2,) or (len(bonds) and not _in_range(bonds, system.n_sites)):
        fail("bonds", f"expected pairs of indices below {system.n_sites}, found shape {bonds.shape}")
    if len(bonds) and (bonds[:, 0] >= bonds[:, 1]).any():
        row = bonds[np.flatnonzero(bonds[:, 0] >= bonds[:, 1])[0]]
        fail("bonds", f"bond {row.tolist()} is not ordered as i < j ({system.site_label(int(row[0]))})")
    if len(np.unique(bonds, axis=0)) != len(bonds):
        fail("bonds", "a bond is listed twice")
    if len(system.bond_orders) != len(bonds):
        fail("bond_orders", f"{len(system.bond_orders)} entries for {len(bonds)} bonds")


@dataclass(frozen=True)
class _Failure:
    system_name: str

    def __call__(self, field_name: str, problem: str) -> None:
        raise InvalidSystemError(f"system {self.system_name!r}, {field_name}: {problem}")


def _in_range(indices: np.ndarray, n: int) -> bool:
    return bool(indices.min() >= 0 and indices.max() < n)
