"""The [[imports]] of a recipe -> trajectory stores: one reader per public format of a kind of system.

In: an Import of a recipe. Out: stores OUT/<name>/*.zarr, the same that `simulate` writes. Adding a kind of system means
one function here; its options are those of the importer behind it, and an unknown one is an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from dig_scale.config import Import
from dig_scale.errors import UserError
from dig_scale.importers.stores import imported, write_store
from dig_scale.system import System

Options = TypeVar("Options")


def run_import(entry: Import, out: Path) -> list[Path]:
    """The stores of one entry below `out`; raises UserError naming file and place."""
    return READERS[entry.reader](entry.model_copy(update={"files": tuple(map(_filled, entry.files))}), out)


def _filled(path: Path) -> Path:
    filled = os.path.expandvars(str(path))
    if "$" in filled:
        raise UserError(f"imports: {path} names an environment variable that is not set")
    if not Path(filled).is_file():
        raise UserError(f"imports: there is no file {filled}")
    return Path(filled)


def _options(kind: Callable[..., Options], entry: Import) -> Options:
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(entry.options) - known)
    if unknown:
        listed = ", ".join(sorted(known))
        raise UserError(f"imports, reader {entry.reader!r}: no option {unknown[0]!r}; options are {listed}")
    return kind(**entry.options)


def _name(entry: Import) -> str:
    return entry.name or entry.files[0].stem


def backbone(entry: Import, out: Path) -> list[Path]:
    """Residue frames of structures, or of a topology followed by trajectories."""
    from dig_scale.importers.backbone import read_backbone
    from dig_scale.importers.backbone_file import BackboneOptions

    name = _name(entry)
    system, frames = read_backbone(name, list(entry.files), _options(BackboneOptions, entry))
    return [write_store(out / name / f"{name}.zarr", system, frames, imported(list(entry.files)))]


def backbone_trajectory(entry: Import, out: Path) -> list[Path]:
    """Residue frames of the first file's topology along the trajectories that follow it."""
    from dig_scale.importers.backbone import backbone_of_trajectory

    name, (topology, *trajectories) = _name(entry), entry.files
    system, frames = backbone_of_trajectory(name, topology, trajectories, **_no_options(entry))
    return [write_store(out / name / f"{name}.zarr", system, frames, imported(list(entry.files)))]


def pocket(entry: Import, out: Path) -> list[Path]:
    """Ligands of an SDF (second file) in the pocket of a protein (first file), one system per ligand.

    The option `leave_out` names ligands that are not read, and that the pocket is not drawn around either.
    """
    from dig_scale.importers.molecule import molecule_names, read_molecules
    from dig_scale.importers.pocket import PocketOptions, pocket_systems

    if len(entry.files) != 2:
        raise UserError(f"imports, reader 'pocket': {len(entry.files)} files, expected a protein and its ligands")
    protein, ligands = entry.files
    given = dict(entry.options)
    left_out = set(given.pop("leave_out", ()))
    if left_out:
        names = molecule_names(read_molecules(ligands))
        unknown = sorted(left_out - set(names))
        if unknown:
            raise UserError(f"{ligands}: no ligand {unknown[0]!r} to leave out; it holds {', '.join(names)}")
        given.setdefault("defined_by", tuple(name for name in names if name not in left_out))
    target = _name(entry)
    options = _options(PocketOptions, entry.model_copy(update={"options": {"name": target} | given}))
    kept = [pair for pair in pocket_systems(protein, ligands, options) if _ligand(pair[0]) not in left_out]
    origin = imported(list(entry.files))
    return [write_store(out / target / f"{one.name}.zarr", one, frames, origin) for one, frames in kept]


def _ligand(system: System) -> str:
    """The ligand's name in its file."""
    return str(system.origin["ligand"])


def catalyst(entry: Import, out: Path) -> list[Path]:
    """Slabs with adsorbates, one system per distinct initial structure."""
    from dig_scale.importers.catalyst import CatalystOptions, read_catalysts

    options = _options(CatalystOptions, entry)
    found = [pair for path in entry.files for pair in read_catalysts(path, options)]
    origin = imported(list(entry.files))
    return [write_store(out / one.name / f"{one.name}.zarr", one, frames, origin) for one, frames in found]


def crystals(entry: Import, out: Path) -> list[Path]:
    """Crystals, one system per composition."""
    from dig_scale.importers.crystal import CrystalOptions, import_crystals

    report = import_crystals(list(entry.files), out, _options(CrystalOptions, entry))
    return [out / store for store in report.stores]


def trajectory(entry: Import, out: Path) -> list[Path]:
    """All atoms, or beads, of the first file's topology along the trajectories that follow it."""
    from dig_scale.importers.trajectory import ImportOptions, import_trajectory

    topology, *paths = entry.files
    return import_trajectory(topology, paths, out, _options(ImportOptions, entry))


def _no_options(entry: Import) -> dict[str, Any]:
    unknown = sorted(set(entry.options) - {"frame_spacing_ps"})
    if unknown:
        raise UserError(f"imports, reader {entry.reader!r}: no option {unknown[0]!r}; options are frame_spacing_ps")
    return entry.options


READERS: dict[str, Callable[[Import, Path], list[Path]]] = {
    "backbone": backbone,
    "backbone-trajectory": backbone_trajectory,
    "pocket": pocket,
    "catalyst": catalyst,
    "crystals": crystals,
    "trajectory": trajectory,
}
