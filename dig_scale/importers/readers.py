"""The [[imports]] of a recipe -> trajectory stores: one reader per public format of a kind of system.

In: an Import of a recipe. Out: stores OUT/<name>/*.zarr, the same that `simulate` writes. Adding a kind of system means
one function here; its options are those of the importer behind it, and an unknown one is an error.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from dig_scale.config import Import
from dig_scale.errors import UserError
from dig_scale.importers.stores import imported, write_store
from dig_scale.system import System

Options = TypeVar("Options")


def run_import(entry: Import, out: Path) -> list[Path]:
    """The stores of one entry below `out`: all of them, or none beside those that were there.

    Raises UserError naming file and place.
    """
    filled = entry.model_copy(update={"files": tuple(map(_filled, entry.files)), "options": _filled_options(entry)})
    with all_or_nothing(out):
        return READERS[entry.reader](filled, out)


@contextmanager
def all_or_nothing(out: Path) -> Iterator[None]:
    """Removes the stores below `out` that were not there before, where what is done in it fails."""
    before = _stores(out)
    try:
        yield
    except Exception:
        _remove(_stores(out) - before)
        raise


def _stores(out: Path) -> set[Path]:
    return set(out.glob("*/*.zarr"))


def _remove(stores: set[Path]) -> None:
    """Remove stores, and their folders where these are empty then."""
    for store in stores:
        shutil.rmtree(store)
    for folder in {store.parent for store in stores}:
        if not any(folder.iterdir()):
            folder.rmdir()


def _filled(path: Path) -> Path:
    filled = _expanded(str(path))
    if not Path(filled).is_file():
        raise UserError(f"imports: there is no file {filled}")
    return Path(filled)


def _filled_options(entry: Import) -> dict[str, Any]:
    given = entry.options.get("representations")
    return entry.options | ({"representations": _expanded(given)} if isinstance(given, str) else {})


def _expanded(text: str) -> str:
    filled = os.path.expandvars(text)
    if "$" in filled:
        raise UserError(f"imports: {text} names an environment variable that is not set")
    return filled


def _options(kind: Callable[..., Options], entry: Import) -> Options:
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(entry.options) - known)
    if unknown:
        listed = ", ".join(sorted(known))
        raise UserError(f"imports, reader {entry.reader!r}: no option {unknown[0]!r}; options are {listed}")
    hints = get_type_hints(kind)
    return kind(**{name: _typed(entry, name, hints[name], value) for name, value in entry.options.items()})


def _typed(entry: Import, name: str, kind: Any, value: Any) -> Any:
    """The value of an option as what the importer takes: tuples, enumerations and nested options from plain data."""
    place = f"imports, reader {entry.reader!r}, option {name!r}"
    nested = [one for one in (kind, *get_args(kind)) if is_dataclass(one)]
    unknown = (
        sorted(set(value) - {field.name for one in nested for field in fields(one)})
        if isinstance(value, Mapping)
        else []
    )
    if nested and unknown:
        raise UserError(f"{place}: no entry {unknown[0]!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{place}: {value} is not a finite number")
    try:
        return TypeAdapter(kind).validate_python(value)
    except PydanticSchemaGenerationError:
        raise UserError(f"{place}: cannot be given in a recipe") from None
    except ValidationError as error:
        raise UserError(f"{place}: {value!r}: {error.errors()[0]['msg']}") from None


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
    system, frames = backbone_of_trajectory(name, topology, trajectories, **_along_trajectories(entry))
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


def _along_trajectories(entry: Import) -> dict[str, Any]:
    known = {"frame_spacing_ps": float, "representations": str}
    unknown = sorted(set(entry.options) - set(known))
    if unknown:
        raise UserError(f"imports, reader {entry.reader!r}: no option {unknown[0]!r}; options are {', '.join(known)}")
    return {name: _typed(entry, name, known[name], value) for name, value in entry.options.items()}


READERS: dict[str, Callable[[Import, Path], list[Path]]] = {
    "backbone": backbone,
    "backbone-trajectory": backbone_trajectory,
    "pocket": pocket,
    "catalyst": catalyst,
    "crystals": crystals,
    "trajectory": trajectory,
}
