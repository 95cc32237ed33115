"""Surfaces with adsorbates: built by ASE or read from files -> System of kind CATALYST and its Frames.

In: a SurfaceSpec, or a file (extended XYZ, ASE trajectory or database, POSCAR, CIF, LMDB of the Open Catalyst project) with
one or many structures. Out: a System whose roles are SUBSURFACE (does not move), SURFACE and ADSORBATE, whose vacuum
lies along the third cell vector, and Frames whose atoms are the images nearest to the reference structure. Bonds are
those inside the adsorbate, by distance. What decided the roles is said in the System's origin. Knows no dynamics.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dig_scale.errors import UserError
from dig_scale.importers.slab import Roles, Snapshot, heights, roles_of, whole_adsorbates, with_vacuum_on_top
from dig_scale.system import SMALLEST_CELL, Frames, SiteRole, System, SystemKind

if TYPE_CHECKING:
    from ase import Atoms

    from dig_scale.config import SurfaceSpec

_PERIODIC = (True, True, False)
_CELL_TOLERANCE = 1e-3
_LARGEST_FIXED_MOVE = 0.2
_LATTICE_RANGE = (0.9, 1.1)


class TagMeaning(enum.StrEnum):
    """What integer tags of atoms in a file mean; AUTO tells them apart by which tags lie higher."""

    AUTO = "auto"
    OC20 = "oc20"
    """0 below the surface, 1 surface, 2 adsorbate."""
    LAYERS = "layers"
    """As ASE's builders set them: layers counted from 1 at the top, 0 for adsorbates."""
    NONE = "none"
    """Tags are not looked at."""


@dataclass(frozen=True)
class CatalystOptions:
    """What the files do not say.

    tags: their meaning. fixed_layers: layers at the bottom that do not move (default: ASE's constraints, else half of the
    layers). adsorbate: indices of its atoms, where there are no tags; empty for a clean slab. frame_spacing_ps of a
    trajectory; without it frames are numbered 1 ps apart.
    """

    tags: TagMeaning = TagMeaning.AUTO
    fixed_layers: int | None = None
    adsorbate: tuple[int, ...] | None = None
    frame_spacing_ps: float = 1.0


def surface_system(name: str, spec: SurfaceSpec) -> System:
    """The System of a slab with its adsorbate as ASE builds it; raises UserError naming the field that does not fit."""
    constant, source = _lattice_constant(name, spec)
    atoms = _slab(name, spec, constant)
    n_slab, layer = len(atoms), np.asarray(atoms.get_tags())
    if spec.fixed_layers > spec.size[2]:
        raise UserError(f"system {name!r}: fixed_layers {spec.fixed_layers}, but the slab has {spec.size[2]} layers")
    if spec.adsorbate is not None:
        _adsorb(name, spec, atoms)
    values = np.full(len(atoms), int(SiteRole.ADSORBATE))
    fixed = layer > spec.size[2] - spec.fixed_layers
    values[:n_slab] = np.where(fixed, int(SiteRole.SUBSURFACE), int(SiteRole.SURFACE))
    snapshot = Snapshot(np.array(atoms.numbers), np.array(atoms.positions), np.array(atoms.cell), f"system {name!r}")
    origin = {"source": "built", "surface": spec.model_dump(mode="json"), "lattice_constant": source | {"a": constant}}
    return _system(name, snapshot, Roles(values, "as built"), origin)


def read_catalyst(name: str, path: Path, options: CatalystOptions | None = None) -> tuple[System, Frames]:
    """The one surface of a file with all its structures; raises UserError naming file and frame, also for two surfaces."""
    found = list(itertools.islice(read_catalysts(path, options), 2))
    if len(found) > 1:
        place = found[1][0].origin["first"]
        raise UserError(f"{place}: another surface than before (elements, cell or sid); import its surfaces one by one")
    system, frames = found[0]
    return replace(system, name=name), frames


def read_catalysts(path: Path, options: CatalystOptions | None = None) -> Iterator[tuple[System, Frames]]:
    """Surface after surface of a file: neighbouring structures with equal sid, elements and cell are frames of one.

    Names are the file's stem and the sid or a number. Raises UserError naming file and frame.
    """
    chosen = options or CatalystOptions()
    groups = itertools.groupby(_snapshots(path), key=Snapshot.identity)
    empty = True
    for number, (_, members) in enumerate(groups):
        empty = False
        snapshots = list(members)
        label = snapshots[0].group or str(number)
        yield _assembled(f"{path.stem}-{label}", path, snapshots, chosen)
    if empty:
        raise UserError(f"{path}: holds no structures")


# --- building -------------------------------------------------------------------------------------------------------


def _lattice_constant(name: str, spec: SurfaceSpec) -> tuple[float, dict[str, Any]]:
    from ase.calculators.emt import parameters
    from ase.data import atomic_numbers, reference_states

    if spec.metal not in atomic_numbers:
        raise UserError(f"system {name!r}: metal {spec.metal!r} is no element")
    if spec.lattice_constant is not None:
        return spec.lattice_constant, {"from": "recipe"}
    if spec.facet.startswith("fcc") and spec.metal in parameters:
        return emt_lattice_constant(spec.metal), {"from": "equilibrium of ASE EMT"}
    tabulated: dict[str, Any] = dict(reference_states[atomic_numbers[spec.metal]] or {})
    if tabulated.get("symmetry") != spec.facet[:3]:
        raise UserError(
            f"system {name!r}: no {spec.facet[:3]} lattice constant of {spec.metal} is known; give surface.lattice_constant"
        )
    return float(tabulated["a"]), {"from": "ASE reference states"}


def emt_lattice_constant(metal: str) -> float:
    """Lattice constant in Å of the fcc metal at the energy minimum of effective medium theory."""
    from ase.build import bulk
    from ase.calculators.emt import EMT
    from scipy.optimize import minimize_scalar

    def energy(constant: float) -> float:
        atoms = bulk(metal, "fcc", a=constant)
        atoms.calc = EMT()
        return float(atoms.get_potential_energy())

    guess = float(bulk(metal, "fcc").cell.cellpar()[0] * np.sqrt(2))
    bounds = (guess * _LATTICE_RANGE[0], guess * _LATTICE_RANGE[1])
    return round(float(minimize_scalar(energy, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x), 5)


def _slab(name: str, spec: SurfaceSpec, constant: float) -> Atoms:
    import ase.build

    hcp = {"c": spec.lattice_constant_c} if spec.facet.startswith("hcp") else {}
    try:
        build = getattr(ase.build, spec.facet)
        atoms = build(spec.metal, size=spec.size, a=constant, vacuum=spec.vacuum / 2, **hcp)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"system {name!r}: ASE cannot build {spec.facet} of {spec.metal}: {error}") from error
    atoms.pbc = _PERIODIC
    return atoms


def _adsorb(name: str, spec: SurfaceSpec, atoms: Atoms) -> None:
    """Adds the adsorbate to `atoms`, its lowest atom above the site."""
    from ase.build import add_adsorbate

    sites = sorted(atoms.info["adsorbate_info"]["sites"])
    if spec.site not in sites:
        raise UserError(f"system {name!r}: no site {spec.site!r} on {spec.facet}; it has {', '.join(sites)}")
    guest = _molecule(name, str(spec.adsorbate))
    add_adsorbate(atoms, guest, spec.height, spec.site, mol_index=int(np.argmin(guest.positions[:, 2])))


def _molecule(name: str, what: str) -> Atoms:
    from ase import Atoms
    from ase.build import molecule
    from ase.data import atomic_numbers

    if what in atomic_numbers:
        return Atoms(what)
    try:
        return molecule(what)
    except KeyError:
        raise UserError(
            f"system {name!r}: adsorbate {what!r} is neither an element nor a molecule of ase.build.molecule"
        ) from None


# --- reading --------------------------------------------------------------------------------------------------------


def _snapshots(path: Path) -> Iterator[Snapshot]:
    if not path.exists():
        raise UserError(f"no file at {path}")
    is_lmdb = path.suffix == ".lmdb" or (path.is_dir() and (path / "data.mdb").is_file())
    for snapshot in _oc20_snapshots(path) if is_lmdb else _ase_snapshots(path):
        yield _checked(snapshot)


def _checked(snapshot: Snapshot) -> Snapshot:
    volume = abs(float(np.linalg.det(snapshot.cell)))
    if not np.isfinite(snapshot.cell).all() or volume < SMALLEST_CELL:
        raise UserError(
            f"{snapshot.place}: its cell has a volume of {volume:.3g} Å³; a surface needs three cell vectors, the third "
            f"through the vacuum"
        )
    for what, values in (("position", snapshot.positions), ("force", snapshot.forces)):
        bad = np.flatnonzero(~np.isfinite(np.zeros((0, 3)) if values is None else values).all(axis=1))
        if len(bad):
            raise UserError(f"{snapshot.place}: the {what} of atom {bad[0]} is not finite; drop that frame")
    if snapshot.energy is not None and not np.isfinite(snapshot.energy):
        raise UserError(f"{snapshot.place}: its energy is {snapshot.energy} eV; drop that frame")
    return snapshot


def _ase_snapshots(path: Path) -> Iterator[Snapshot]:
    from ase.io import iread

    frames = enumerate(iread(str(path), index=":"))
    while True:
        try:
            number, atoms = next(frames)
        except StopIteration:
            return
        except Exception as error:  # readers of a dozen formats raise what they like
            raise UserError(f"{path}: ASE cannot read it as a structure: {type(error).__name__}: {error}") from error
        yield _from_ase(atoms, f"{path}, frame {number}")


def _from_ase(atoms: Atoms, place: str) -> Snapshot:
    results = atoms.calc.results if atoms.calc is not None else {}
    tags = np.asarray(atoms.get_tags()) if atoms.has("tags") else None
    return Snapshot(
        elements=np.array(atoms.numbers),
        positions=np.array(atoms.positions),
        cell=np.array(atoms.cell),
        place=place,
        tags=tags if tags is not None and tags.any() else None,
        fixed=_constrained(atoms),
        energy=results.get("energy"),
        forces=results.get("forces"),
    )


def _constrained(atoms: Atoms) -> np.ndarray | None:
    from ase.constraints import FixAtoms, FixCartesian, FixScaled

    fixed = np.zeros(len(atoms), bool)
    for constraint in atoms.constraints:
        whole = isinstance(constraint, (FixCartesian, FixScaled)) and bool(np.all(constraint.mask))
        if whole or isinstance(constraint, FixAtoms):
            fixed[np.asarray(constraint.index)] = True
    return fixed if fixed.any() else None


def _oc20_snapshots(path: Path) -> Iterator[Snapshot]:
    from dig_scale.importers.oc20 import read_entries

    for key, entry in read_entries(path):
        yield from _from_oc20(entry, f"{path}, entry {key!r}")


def _from_oc20(entry: dict[str, Any], place: str) -> Iterator[Snapshot]:
    """A relaxed entry gives its relaxed structure with the initial one as reference; `all_poses` is a trajectory."""
    missing = sorted({"pos", "atomic_numbers", "cell", "tags"} - set(entry))
    if missing:
        raise UserError(
            f"{place}: has no {', '.join(missing)}; an Open Catalyst entry holds pos, atomic_numbers, cell and tags"
        )
    initial = np.asarray(entry["pos"], float).reshape(-1, 3)
    poses = np.asarray(entry.get("all_poses", entry.get("pos_relaxed", initial)), float).reshape(-1, len(initial), 3)
    energy = entry.get("y_relaxed") if "pos_relaxed" in entry else entry.get("y", entry.get("energy"))
    forces = None if "pos_relaxed" in entry else entry.get("force", entry.get("forces"))
    single = len(poses) == 1
    for pose in poses:
        yield Snapshot(
            elements=np.asarray(entry["atomic_numbers"]).astype(np.int64).reshape(-1),
            positions=pose,
            cell=np.asarray(entry["cell"], float).reshape(3, 3),
            place=place,
            tags=np.asarray(entry["tags"]).astype(np.int64).reshape(-1),
            energy=float(np.asarray(energy).reshape(-1)[0]) if energy is not None and single else None,
            forces=np.asarray(forces, float).reshape(-1, 3) if forces is not None and single else None,
            initial=initial,
            group=str(entry.get("sid", "")),
            tags_are_oc20=True,
        )


# --- putting together -----------------------------------------------------------------------------------------------


def _assembled(name: str, path: Path, snapshots: Sequence[Snapshot], options: CatalystOptions) -> tuple[System, Frames]:
    first = snapshots[0]
    start = with_vacuum_on_top(replace(first, positions=first.positions if first.initial is None else first.initial))
    meaning = TagMeaning.OC20 if first.tags_are_oc20 else options.tags
    roles = roles_of(start, str(meaning), options.fixed_layers, options.adsorbate)
    origin = {"source": path.name, "first": first.place, "lattice_constant": {"from": "file"}}
    system = _system(name, start, roles, origin)
    positions = np.stack([_nearest(one.positions, system) for one in snapshots])
    _require_fixed(system, positions, snapshots)
    frames = Frames(
        positions=positions,
        time_ps=np.arange(len(snapshots)) * options.frame_spacing_ps,
        energy=_all_or_none(snapshots, "energy"),
        forces=_all_or_none(snapshots, "forces"),
    )
    return system, frames


def _system(name: str, snapshot: Snapshot, roles: Roles, origin: dict[str, Any]) -> System:
    from ase.data import chemical_symbols

    guest = roles.values == SiteRole.ADSORBATE
    positions, bonds, parts = whole_adsorbates(snapshot, guest)
    symbols = [chemical_symbols[z] for z in snapshot.elements]
    height = heights(positions, snapshot.cell)
    return System(
        name=name,
        kind=SystemKind.CATALYST,
        elements=snapshot.elements,
        atom_names=tuple(f"{symbol}{i + 1}" for i, symbol in enumerate(symbols)),
        residue_names=tuple("ADS" if one else "SLB" for one in guest),
        residue_index=parts,
        chain_index=np.zeros(len(symbols), np.int64),
        bonds=bonds,
        bond_orders=np.zeros(len(bonds), np.int64),
        formal_charges=np.zeros(len(symbols), np.int64),
        stereocentres=np.zeros((0, 4), np.int64),
        mobile=roles.values != SiteRole.SUBSURFACE,
        reference_positions=positions,
        roles=roles.values,
        cell=snapshot.cell,
        periodic=_PERIODIC,
        origin=origin | {"roles": roles.source, "extent_along_normal": round(float(np.ptp(height)), 4)},
    )


def _nearest(positions: np.ndarray, system: System) -> np.ndarray:
    """Every atom's image nearest to its reference, [N, 3] Å; the third direction counts too, as files wrap it."""
    import torch

    from dig_scale.geometry.lattice import minimum_image

    moves = torch.from_numpy(positions - system.reference_positions)
    nearest = minimum_image(moves, torch.from_numpy(np.array(system.cell))).numpy()
    return np.asarray(system.reference_positions + nearest)


def _require_fixed(system: System, positions: np.ndarray, snapshots: Sequence[Snapshot]) -> None:
    moves = np.linalg.norm(positions - system.reference_positions, axis=-1)[:, ~system.mobile]
    worst = int(np.argmax(moves.max(axis=1, initial=0.0)))
    if moves[worst].max(initial=0.0) > _LARGEST_FIXED_MOVE:
        raise UserError(
            f"{snapshots[worst].place}: an atom taken for fixed ({system.origin['roles']}) lies "
            f"{moves[worst].max():.2f} Å from its reference; give fixed_layers, the layers that do not move"
        )


def _all_or_none(snapshots: Sequence[Snapshot], what: str) -> np.ndarray | None:
    values = [getattr(one, what) for one in snapshots]
    given = [value is not None for value in values]
    if any(given) and not all(given):
        raise UserError(f"{snapshots[given.index(False)].place}: has no {what}, other frames have; make the file even")
    return np.asarray(values, float) if all(given) else None
