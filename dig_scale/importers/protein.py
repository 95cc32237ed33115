"""Peptides and proteins -> System with all atoms, hydrogens at pH 7, and a minimised reference geometry.

In: a sequence, or a PDB/mmCIF file. Out: a System in Å. Water and simple ions are dropped, selenomethionine becomes
methionine; both are said in the System's origin. Any other residue that is not one of the twenty (or ACE, NME), and a
gap inside a chain, is refused by name. OpenMM's nm and kJ/mol stay inside this file.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dig_scale.config import Simulate
from dig_scale.errors import InvalidSystemError, UserError
from dig_scale.importers import residues
from dig_scale.importers.atoms import bonds_of, system_of_atoms
from dig_scale.importers.completion import complete_heavy_atoms
from dig_scale.importers.sequence import backbone, parse_sequence
from dig_scale.system import System
from dig_scale.units import ANGSTROM_PER_NM

if TYPE_CHECKING:
    from openmm.app import Topology
    from pdbfixer import PDBFixer

_PH = 7.0
_LONGEST_PEPTIDE_BOND = 2.0
_SMALL_SYSTEM = 500
_REPLACED = {"MSE": "MET"}


def system_from_sequence(name: str, sequence: str, simulate: Simulate | None = None) -> System:
    """All-atom L peptide with trans peptide bonds from `ACE-ALA-NME` or `GYDPETGTWG`; raises UserError on a bad code."""
    names = parse_sequence(sequence)
    fixer = _open(io.StringIO(_backbone_pdb(names)), ".pdb")
    origin = {"source": "sequence", "sequence": "-".join(names)}
    system = _complete(name, fixer, simulate or Simulate(), origin)
    residues.require_natural_chirality(name, _named(system), system.reference_positions)
    return system


def system_from_structure(name: str, path: Path, simulate: Simulate | None = None) -> System:
    """System of a PDB or mmCIF file with missing atoms and hydrogens added; raises UserError naming file and residue."""
    fixer = _read_structure(path)
    origin: dict[str, Any] = {"source": path.name}
    origin |= _drop_solvent(fixer)
    origin |= _replace_known(fixer)
    _refuse_unknown(fixer, path)
    _refuse_chain_breaks(fixer, path)
    return _complete(name, fixer, simulate or Simulate(), origin)


def _complete(name: str, fixer: PDBFixer, simulate: Simulate, origin: dict[str, Any]) -> System:
    from openmm import app

    topology, placed = complete_heavy_atoms(fixer, origin["source"])
    modeller = app.Modeller(topology, placed / ANGSTROM_PER_NM)
    with repeatable_random():
        modeller.addHydrogens(pH=_PH, platform=_platform())
    positions = _minimised(name, modeller, simulate)
    system = _to_system(name, modeller.topology, positions, origin)
    _require_same_chirality(system, topology, placed)
    return system


def _require_same_chirality(system: System, topology: Topology, placed: np.ndarray) -> None:
    """Minimisation from a clash can push a centre through its mirror plane; that must not pass unseen."""
    index = {(a.residue.index, a.name): a.index for a in topology.atoms()}
    of_site = [index.get((int(r), n), -1) for r, n in zip(system.residue_index, system.atom_names, strict=True)]
    before = residues.signed_volumes(placed, np.array(of_site)[system.stereocentres])
    if (before <= 0).any():
        label = system.site_label(int(system.stereocentres[int(np.argmin(before)), 0]))
        raise InvalidSystemError(
            f"system {system.name!r}: {label} changed its configuration while clashes were relaxed; repair the "
            f"structure around it"
        )


def _to_system(name: str, topology: Topology, positions: np.ndarray, origin: dict[str, Any]) -> System:
    bonds = bonds_of((bond[0], bond[1]) for bond in topology.bonds())
    return system_of_atoms(name, list(topology.atoms()), bonds, positions, origin)


def _minimised(name: str, modeller: Any, simulate: Simulate) -> np.ndarray:
    """Positions [N, 3] Å after a minimisation in the recipe's force field without charges and solvent."""
    import openmm
    from openmm import app, unit

    try:
        force_field = app.ForceField(*_files(simulate))
        method = app.NoCutoff if modeller.topology.getNumAtoms() < _SMALL_SYSTEM else app.CutoffNonPeriodic
        system = force_field.createSystem(
            modeller.topology, nonbondedMethod=method, nonbondedCutoff=1.0 * unit.nanometer
        )
    except ValueError as error:
        raise InvalidSystemError(
            f"system {name!r}: the force field {simulate.force_field} cannot describe it: {error}"
        ) from error
    _discharge(system)
    integrator = openmm.VerletIntegrator(0.001)
    context = openmm.Context(system, integrator, _platform())
    context.setPositions(modeller.positions)
    openmm.LocalEnergyMinimizer.minimize(context, tolerance=5.0, maxIterations=500)
    state = context.getState(getPositions=True)
    positions = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer) * ANGSTROM_PER_NM
    return np.round(positions - positions.mean(axis=0), 3)


def _files(simulate: Simulate) -> tuple[str, ...]:
    """The recipe's force field where it is made of OpenMM's files; MMFF, which has none, relaxes no geometry here."""
    named = any(name.lower().startswith("mmff") for name in simulate.force_field)
    return Simulate().force_field if named else simulate.force_field


def _discharge(system: Any) -> None:
    """In place, on a System this module has just built: charges without solvent would fold the chain onto itself."""
    import openmm

    for force in system.getForces():
        if isinstance(force, openmm.NonbondedForce):
            for i in range(force.getNumParticles()):
                _, sigma, epsilon = force.getParticleParameters(i)
                force.setParticleParameters(i, 0.0, sigma, epsilon)
            for k in range(force.getNumExceptions()):
                i, j, _, sigma, epsilon = force.getExceptionParameters(k)
                force.setExceptionParameters(k, i, j, 0.0, sigma, epsilon)


def _platform() -> Any:
    """The platform whose results are the same on every machine."""
    import openmm

    return openmm.Platform.getPlatformByName("Reference")


@contextmanager
def repeatable_random() -> Iterator[None]:
    """Modeller places hydrogens with Python's own generator: the same input must give the same System."""
    state = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(state)


def _open(stream: io.StringIO, suffix: str) -> PDBFixer:
    from pdbfixer import PDBFixer

    return PDBFixer(pdbxfile=stream) if suffix in (".cif", ".mmcif", ".pdbx") else PDBFixer(pdbfile=stream)


def _read_structure(path: Path) -> PDBFixer:
    if not path.is_file():
        raise UserError(f"no structure file at {path}")
    try:
        fixer = _open(io.StringIO(path.read_text()), path.suffix.lower())
    except (ValueError, KeyError, IndexError, AssertionError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a PDB or mmCIF file: {error}") from error
    if fixer.topology.getNumAtoms() == 0:
        raise UserError(f"{path}: holds no atoms")
    return fixer


def _drop_solvent(fixer: PDBFixer) -> dict[str, Any]:
    dropped = [r for r in fixer.topology.residues() if r.name in residues.WATER | residues.IONS]
    if not dropped:
        return {}
    _delete(fixer, dropped)
    counts = {name: sum(r.name == name for r in dropped) for name in sorted({r.name for r in dropped})}
    return {"dropped": counts}


def _replace_known(fixer: PDBFixer) -> dict[str, Any]:
    fixer.nonstandardResidues = [(r, _REPLACED[r.name]) for r in fixer.topology.residues() if r.name in _REPLACED]
    replaced = [f"{r.name} {r.chain.id}{r.id} -> {new}" for r, new in fixer.nonstandardResidues]
    fixer.replaceNonstandardResidues()
    return {"replaced": replaced} if replaced else {}


def _refuse_unknown(fixer: PDBFixer, path: Path) -> None:
    unknown = [r for r in fixer.topology.residues() if not residues.is_peptide([r.name])]
    if unknown:
        listed = ", ".join(f"{r.name} (chain {r.chain.id}, residue {r.id})" for r in unknown[:10])
        more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        raise UserError(
            f"{path}: residues that are no standard amino acid: {listed}{more}. Remove or rename them in the file; "
            f"give a ligand as a system of its own, from SDF or SMILES"
        )
    if fixer.topology.getNumAtoms() == 0:
        raise UserError(f"{path}: nothing but water and ions")


def _refuse_chain_breaks(fixer: PDBFixer, path: Path) -> None:
    positions = np.array([[p.x, p.y, p.z] for p in fixer.positions]) * ANGSTROM_PER_NM
    for bond in fixer.topology.bonds():
        one, two = sorted((bond[0], bond[1]), key=lambda atom: atom.index)
        length = float(np.linalg.norm(positions[one.index] - positions[two.index]))
        if {one.name, two.name} == {"C", "N"} and length > _LONGEST_PEPTIDE_BOND:
            raise UserError(
                f"{path}: chain {two.residue.chain.id} is broken between {one.residue.name}{one.residue.id} and "
                f"{two.residue.name}{two.residue.id} ({length:.1f} Å apart); model the missing residues or split the chain"
            )


def _delete(fixer: PDBFixer, unwanted: list[Any]) -> None:
    from openmm import app

    modeller = app.Modeller(fixer.topology, fixer.positions)
    modeller.delete(unwanted)
    fixer.topology, fixer.positions = modeller.topology, modeller.positions


def _named(system: System) -> residues.NamedAtoms:
    return residues.NamedAtoms(
        system.elements, system.atom_names, system.residue_names, system.residue_index, system.bonds
    )


def _backbone_pdb(names: tuple[str, ...]) -> str:
    lines = []
    for serial, (atom, residue, position) in enumerate(backbone(names), 1):
        x, y, z = position
        lines.append(
            f"ATOM  {serial % 100_000:5d}  {atom:<3s} {names[residue]:>3s} A{(residue + 1) % 10_000:4d}    "
            f"{x:8.3f}{y:8.3f}{z:8.3f}  1.00  0.00           {atom[0]:>1s}"
        )
    return "\n".join([*lines, "TER", "END", ""])
