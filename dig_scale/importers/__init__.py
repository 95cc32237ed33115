"""Public formats -> System. `system_from_spec` is the door; each format has a module of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dig_scale.errors import UserError

if TYPE_CHECKING:
    from dig_scale.config import Simulate, SystemSpec
    from dig_scale.system import System

STRUCTURE_FILES = (".pdb", ".ent", ".cif", ".mmcif", ".pdbx")
"""Endings of files of proteins and peptides."""
MOLECULE_FILES = (".sdf", ".mol", ".mol2")
"""Endings of files of other molecules."""


def system_from_spec(spec: SystemSpec, simulate: Simulate | None = None) -> System:
    """System of a recipe's entry, its geometry relaxed in the force field of `simulate`; raises UserError."""
    if spec.sequence is not None:
        from dig_scale.importers.protein import system_from_sequence

        return system_from_sequence(spec.name, spec.sequence, simulate)
    if spec.smiles is not None:
        from dig_scale.importers.molecule import system_from_smiles

        return system_from_smiles(spec.name, spec.smiles)
    return _system_from_file(spec.name, Path(spec.file or ""), simulate)


def _system_from_file(name: str, path: Path, simulate: Simulate | None) -> System:
    if "$" in str(path):
        raise UserError(f"system {name!r}: {path} names an environment variable that is not set")
    suffix = path.suffix.lower()
    if suffix in MOLECULE_FILES:
        from dig_scale.importers.molecule import system_from_sdf

        return system_from_sdf(name, path)
    if suffix not in STRUCTURE_FILES:
        known = ", ".join(STRUCTURE_FILES + MOLECULE_FILES)
        raise UserError(f"system {name!r}: {path} has no known format; expected a file ending in {known}")
    from dig_scale.importers.protein import system_from_structure

    return system_from_structure(name, path, simulate)
