"""System, what a molecular system is, and Frames, where its atoms are over physical time. Frozen, numpy, no torch.

A System is DiG's descriptor D before featurisation: elements, residues, bonds, stereocentres, which sites move, and one
reference geometry. It is validated once, at construction, and travels as JSON. Units: Å, eV, e, ps.
"""

from __future__ import annotations

import base64
import enum
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dig_scale.errors import InvalidSystemError

COARSE_GRAINED_BEAD = 0
"""Atomic number of a site that is not an atom."""
FORMAT_VERSION = 2
SMALLEST_CELL = 0.1
"""Å³; a cell below it is taken for a mistake."""


class SystemKind(enum.StrEnum):
    """The four kinds of system that DiG was shown on; another is a name with features and a diffusion process."""

    PROTEIN = "protein"
    """Sites are residues: a C-alpha and the frame of the backbone."""
    MOLECULE = "molecule"
    """Sites are atoms or beads: small molecules and peptides in atomic detail, ligands in pockets."""
    CATALYST = "catalyst"
    """Sites are atoms of a slab, periodic in two directions, and of adsorbates on it."""
    CRYSTAL = "crystal"
    """Sites are the atoms of a unit cell whose shape diffuses with them."""


class SiteRole(enum.IntEnum):
    """What a site is to the system."""

    PLAIN = 0
    SUBSURFACE = 1
    SURFACE = 2
    ADSORBATE = 3
    POCKET = 4
    LIGAND = 5


@dataclass(frozen=True)
class System:
    """A molecular system without its conformation.

    kind names what reads and diffuses it (a SystemKind, or a name that an extension has registered for both),
    elements [N] atomic numbers (0 = coarse-grained bead), residue_index and chain_index [N] 0-based, bonds [E, 2] with i < j,
    bond_orders [E] (1, 2, 3, 4 = aromatic, 0 = unknown), formal_charges [N] in e, stereocentres [C, 4] as (centre, a, b, c)
    whose signed volume (a-centre)·((b-centre)×(c-centre)) is positive in every valid conformation, mobile [N] sites that
    diffuse, reference_positions [N, 3] Å (one plausible geometry: bond lengths and angles are meaningful, torsions are not;
    of anchored sites - slabs, adsorbates, pocket atoms - the place that their noise reverts to). roles [N] of SiteRole.
    cell [3, 3] Å (rows are the vectors) where the system has a fixed one, and its `periodic` directions.
    Raises InvalidSystemError naming system, field and atom.
    """

    name: str
    kind: str
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
    roles: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Empty at construction: all PLAIN."""
    cell: np.ndarray | None = None
    periodic: tuple[bool, bool, bool] = (False, False, False)
    site_features: np.ndarray | None = None
    """[N, C], what another network says of each site, such as a language model of its residues; exact in half precision."""
    pair_features: np.ndarray | None = None
    """[N, N, P], the same of ordered pairs of sites."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Where it came from: {"source": "sequence" | file name, ...}; never part of the identity."""

    def __post_init__(self) -> None:
        if not len(self.roles):
            object.__setattr__(self, "roles", np.zeros(len(self.elements), np.int64))
        for name, dtype in _ARRAY_FIELDS.items():
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype=dtype))
        if self.cell is not None:
            object.__setattr__(self, "cell", np.ascontiguousarray(self.cell, dtype=np.float64))
        for name in _FEATURE_FIELDS:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _halved(getattr(self, name)))
        if self.kind in list(SystemKind):
            object.__setattr__(self, "kind", SystemKind(self.kind))
        object.__setattr__(self, "periodic", tuple(bool(value) for value in self.periodic))
        _validate(self)

    @property
    def n_sites(self) -> int:
        """Number of sites (atoms or beads)."""
        return len(self.elements)

    @property
    def system_id(self) -> str:
        """16 hex digits that identify the descriptor (topology, mobile sites, features, reference geometry to 1e-3 Å)."""
        content = self.to_dict()
        content.pop("origin")
        content["reference_positions"] = np.round(self.reference_positions, 3).tolist()
        if self.cell is not None:
            content["cell"] = np.round(self.cell, 3).tolist()
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready content."""
        content: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "kind": str(self.kind),
            "origin": self.origin,
        }
        content |= {"atom_names": list(self.atom_names), "residue_names": list(self.residue_names)}
        content |= {"cell": None if self.cell is None else self.cell.tolist(), "periodic": list(self.periodic)}
        given = {name: value for name in _FEATURE_FIELDS if (value := getattr(self, name)) is not None}
        content |= {name: _packed(value) for name, value in given.items()}
        return content | {name: getattr(self, name).tolist() for name in _ARRAY_FIELDS}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> System:
        """Inverse of to_dict; raises InvalidSystemError on missing fields or an unknown format version."""
        if content.get("format_version") != FORMAT_VERSION:
            found = content.get("format_version")
            raise InvalidSystemError(f"system format version {found!r}, expected {FORMAT_VERSION}; make it again")
        missing = sorted(({"name", "kind", "atom_names", "residue_names"} | set(_ARRAY_FIELDS)) - set(content))
        if missing:
            raise InvalidSystemError(f"system {content.get('name')!r}: fields missing: {', '.join(missing)}")
        arrays: dict[str, np.ndarray] = {
            name: np.asarray(content[name], dtype) for name, dtype in _ARRAY_FIELDS.items()
        }
        arrays["bonds"] = arrays["bonds"].reshape(-1, 2)
        arrays["stereocentres"] = arrays["stereocentres"].reshape(-1, 4)
        return cls(
            name=content["name"],
            kind=content["kind"],
            atom_names=tuple(content["atom_names"]),
            residue_names=tuple(content["residue_names"]),
            cell=None if content.get("cell") is None else np.asarray(content["cell"]),
            periodic=tuple(content.get("periodic", (False, False, False))),
            origin=content.get("origin", {}),
            **{name: _unpacked(content, name) for name in _FEATURE_FIELDS if content.get(name) is not None},
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
            roles=self.roles[chosen],
            reference_positions=self.reference_positions[chosen],
            site_features=None if self.site_features is None else self.site_features[chosen],
            pair_features=None if self.pair_features is None else self.pair_features[np.ix_(chosen, chosen)],
        )

    def heavy_sites(self) -> np.ndarray:
        """Indices [M] of sites that are not hydrogen; beads count as heavy."""
        return np.flatnonzero(self.elements != 1)


@dataclass(frozen=True)
class Frames:
    """Conformations over physical time, or independent structures: positions [F, N, 3] Å, time_ps [F], energy [F] eV,
    forces [F, N, 3] eV/Å; rotations [F, N, 3, 3] of residue frames (columns are their axes); cell [F, 3, 3] Å where it
    varies; noised [F, N, 3] Å, where positions are means given noised structures; labels: name -> property [F] (in the unit
    that the name of the property implies to its user).
    """

    positions: np.ndarray
    time_ps: np.ndarray
    energy: np.ndarray | None = None
    forces: np.ndarray | None = None
    rotations: np.ndarray | None = None
    cell: np.ndarray | None = None
    noised: np.ndarray | None = None
    labels: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.positions.ndim != 3 or self.positions.shape[-1] != 3:
            raise InvalidSystemError(f"frames: positions have shape {self.positions.shape}, expected (F, N, 3) in Å")
        given = {name: getattr(self, name) for name in ("time_ps", "energy", "forces", "rotations", "cell", "noised")}
        for name, values in (given | {f"label {key!r}": value for key, value in self.labels.items()}).items():
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
    "roles": np.int64,
    "reference_positions": np.float64,
}
_FEATURE_FIELDS: dict[str, int] = {"site_features": 1, "pair_features": 2}
"""Number of axes that run over sites."""


def _halved(values: Any) -> np.ndarray:
    """float32 of half precision, so that what is stored is what was there."""
    with np.errstate(over="ignore"):  # validation names the site
        return np.ascontiguousarray(np.asarray(values, np.float32).astype("<f2"), dtype=np.float32)


def _packed(values: np.ndarray) -> dict[str, Any]:
    """JSON of an array of half precision."""
    return {"shape": list(values.shape), "float16": base64.b64encode(values.astype("<f2").tobytes()).decode()}


def _unpacked(content: dict[str, Any], name: str) -> np.ndarray:
    try:
        values = np.frombuffer(base64.b64decode(content[name]["float16"], validate=True), "<f2")
        return values.reshape([int(size) for size in content[name]["shape"]])
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidSystemError(
            f"system {content['name']!r}, {name}: expected a shape and base64 of its float16 values ({error})"
        ) from None


def _validate(system: System) -> None:
    n = system.n_sites
    fail = _Failure(system.name)
    if not isinstance(system.kind, str) or not system.kind:
        fail("kind", f"{system.kind!r}, expected a name such as {SystemKind.MOLECULE}")
    if n == 0:
        fail("elements", "the system has no sites")
    for name in ("atom_names", "residue_names", "residue_index", "chain_index", "formal_charges", "mobile", "roles"):
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
    _validate_cell(system, fail)
    _validate_features(system, fail)
    if system.stereocentres.shape[1:] != (4,) or (len(system.stereocentres) and not _in_range(system.stereocentres, n)):
        fail("stereocentres", f"expected rows (centre, a, b, c) of indices below {n}")


def _validate_cell(system: System, fail: _Failure) -> None:
    bad = np.flatnonzero(~np.isin(system.roles, [int(role) for role in SiteRole]))
    if len(bad):
        fail("roles", f"no role {system.roles[bad[0]]} (at {system.site_label(int(bad[0]))})")
    if len(system.periodic) != 3:
        fail("periodic", f"{len(system.periodic)} directions, expected 3")
    if system.cell is None:
        return
    if system.cell.shape != (3, 3) or not np.isfinite(system.cell).all():
        fail("cell", f"expected 3 finite vectors in Å, found {system.cell.tolist()}")
    if abs(np.linalg.det(system.cell)) < SMALLEST_CELL:
        fail("cell", f"its volume is {abs(np.linalg.det(system.cell)):.3g} Å³, expected at least {SMALLEST_CELL:g}")


def _validate_features(system: System, fail: _Failure) -> None:
    for name, axes in _FEATURE_FIELDS.items():
        values = getattr(system, name)
        if values is None:
            continue
        if values.ndim != axes + 1 or values.shape[:-1] != (system.n_sites,) * axes or not values.shape[-1]:
            expected = ", ".join([str(system.n_sites)] * axes)
            fail(name, f"shape {values.shape}, expected ({expected}, features) with at least one feature")
        bad = np.argwhere(~np.isfinite(values).all(axis=-1))
        if len(bad):
            places = " and ".join(system.site_label(int(site)) for site in bad[0])
            fail(name, f"not finite, or beyond 65504, at {places}")


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
