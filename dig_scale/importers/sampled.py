"""A file of the user -> the System that a trained model samples: its descriptor alone, whatever structure the file holds.

In: a file and what the model reads (config.Model.sites, the kinds of its training systems). Out: a System: all atoms of a
molecule or peptide, the residue chain of a protein, the composition of a crystal, the initial structure of a slab. Knows
neither models nor recipes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from dig_scale.config import Simulate, SystemSpec
from dig_scale.errors import UserError
from dig_scale.importers import MOLECULE_FILES, STRUCTURE_FILES, system_from_spec
from dig_scale.system import System, SystemKind

_CRYSTAL_FILES = (".cif", ".xyz", ".extxyz", ".vasp", ".poscar", ".csv")
_SLAB_FILES = (".xyz", ".extxyz", ".traj", ".db", ".vasp", ".poscar", ".cif", ".lmdb")
_FILES = frozenset((*STRUCTURE_FILES, *MOLECULE_FILES, *_CRYSTAL_FILES, *_SLAB_FILES, ".json", ".gz"))


@dataclass(frozen=True)
class Reading:
    """What a model reads: config.Model.sites, the kinds of its training systems, and the force field of its molecules."""

    sites: str
    kinds: Collection[str]
    simulate: Simulate | None = None


def is_file_name(text: str) -> bool:
    """Whether a text is meant as a file: it is there, or ends as files of structures do."""
    return Path(text).is_file() or Path(text).suffix.lower() in _FILES


def system_from_file(path: Path, reading: Reading) -> System:
    """The System of a file as a model reads it; a System written as .json is taken as it is. Raises UserError naming the file."""
    if not path.is_file():
        raise UserError(f"no file at {path}")
    if path.suffix.lower() == ".json":
        return _written(path)
    if reading.sites == "residues":
        return _residues(path)
    if reading.sites == "crystal":
        return _composition(path)
    if reading.sites == "anchored":
        return _anchored(path, reading.kinds)
    return system_from_spec(SystemSpec(name=path.stem, file=path), reading.simulate)


def _written(path: Path) -> System:
    try:
        return System.from_json(path.read_text())
    except (UserError, UnicodeDecodeError, AttributeError, TypeError) as error:  # what is no object, or no text
        raise UserError(f"{path}: {error}") from error


def _residues(path: Path) -> System:
    from dig_scale.importers.backbone import read_backbone

    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    if not suffixes or suffixes[-1] not in STRUCTURE_FILES:
        raise UserError(f"{path}: the model's sites are residues; expected a protein in {', '.join(STRUCTURE_FILES)}")
    return read_backbone(path.name.split(".")[0], [path])[0]


def _composition(path: Path) -> System:
    from dig_scale.importers.crystal import CrystalOptions, load_crystals

    groups, _ = load_crystals([path], CrystalOptions(labels=(), similarity=None))
    if len(groups) > 1:
        listed = ", ".join(system.name for system, _ in groups[:5])
        raise UserError(
            f"{path}: holds crystals of {len(groups)} compositions ({listed}); give a file with one of them"
        )
    return groups[0][0]


def _anchored(path: Path, kinds: Collection[str]) -> System:
    from dig_scale.importers.catalyst import read_catalyst

    if SystemKind.CATALYST not in kinds:
        raise UserError(
            f"{path}: the model samples ligands in pockets, and one file does not say which atoms are the ligand, which the "
            "pocket; name a training system, or give a System as .json"
        )
    is_known = path.suffix.lower() in _SLAB_FILES or path.name.upper().startswith(("POSCAR", "CONTCAR"))
    if not is_known:
        raise UserError(
            f"{path}: the model samples slabs with adsorbates; expected a POSCAR or {', '.join(_SLAB_FILES)}"
        )
    return read_catalyst(path.stem, path)[0]
