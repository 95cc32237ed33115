"""Public formats -> System. `system_from_spec` is the door; each format has a module of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dig_scale.errors import UserError

if TYPE_CHECKING:
    from dig_scale.config import Simulate, SystemSpec
    from dig_scale.system import System

_STRUCTURES = (".pdb", ".ent", ".cif", ".mmcif", ".pdbx")
_MOLECULES = (".sdf", ".mol", ".mol2")


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
    suffix = path.suffix.lower()
    if suffix in _MOLECULES:
        from dig_scale.importers.molecule import system_from_sdf

        return system_from_sdf(name, path)
    if suffix not in _STRUCTURES:
        known = ", ".join(_STRUCTURES + _MOLECULES)
        raise UserError(f"system {name!r}: {path} has no known format; expected a file ending in {known}")
    from dig_scale.importers.protein import system_from_structure

    return system_from_structure(name, path, simulate)
