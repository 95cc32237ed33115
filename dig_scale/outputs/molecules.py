"""Molecules as the files that other tools read: PDB for viewers, SDF for docking and chemistry tools.

In: a System and positions in Å. Out: files, each whole or absent. A ligand in a pocket is written with the chains and residue
numbers of the structure it came from, the ligand as HETATM with its bonds as CONECT records, so that it can be laid over
that structure. Atoms stand in the System's order in all files. Knows no model and no statistics.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from dig_shards.durable import replace_durably

from dig_scale.errors import UserError
from dig_scale.importers import residues
from dig_scale.importers.molecule import rdkit_molecule
from dig_scale.system import COARSE_GRAINED_BEAD, SiteRole, System

if TYPE_CHECKING:
    import gemmi

_CHAIN_NAMES = string.ascii_uppercase + string.ascii_lowercase + string.digits


def ligand_sites(system: System) -> np.ndarray:
    """Sites [M] of the ligand; all sites where the system has no pocket."""
    found = np.flatnonzero(system.roles == SiteRole.LIGAND)
    return found if len(found) else np.arange(system.n_sites)


def pocket_sites(system: System) -> np.ndarray:
    """Sites [M] of the pocket; none where the system is a molecule alone."""
    return np.flatnonzero(system.roles == SiteRole.POCKET)


def is_small_molecule(system: System) -> bool:
    """Whether the ligand, or the molecule, is one that an SDF file can hold: all atoms, and no peptide."""
    sites = ligand_sites(system)
    atoms = bool((system.elements[sites] != COARSE_GRAINED_BEAD).all())
    return atoms and not residues.is_peptide([system.residue_names[i] for i in sites])


def write_sdf(path: Path, system: System, positions: np.ndarray, properties: Mapping[str, Sequence[Any]]) -> Path:
    """Write the ligand (or molecule) of samples, positions [S, N, 3] Å, one record each with its properties [S]."""
    for name, values in properties.items():
        if len(values) != len(positions):
            raise UserError(f"{path}: property {name!r} has {len(values)} values for {len(positions)} samples")
    blocks = []
    for number, molecule in enumerate(molecules_of(system, positions)):
        fields = "".join(f">  <{name}>\n{_text(values[number])}\n\n" for name, values in properties.items())
        blocks.append(f"{_mol_block(molecule)}{fields}$$$$\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_durably(path, "".join(blocks).encode())
    return path


def molecules_of(system: System, positions: np.ndarray) -> list[Any]:
    """RDKit molecules of the ligand (or the molecule), one conformer each, from positions [S, N, 3] Å of all sites."""
    from rdkit import Chem

    if positions.ndim != 3 or positions.shape[1:] != (system.n_sites, 3):
        raise UserError(f"{system.name!r}: positions {positions.shape}, expected (samples, {system.n_sites}, 3) in Å")
    sites = ligand_sites(system)
    bare = rdkit_molecule(system.select(sites))
    bare.SetProp("_Name", system.name)
    molecules = []
    for sample in np.asarray(positions, np.float64)[:, sites]:
        conformer = Chem.Conformer(len(sites))
        conformer.SetPositions(np.ascontiguousarray(sample))
        conformer.Set3D(True)
        molecule = Chem.Mol(bare)
        molecule.AddConformer(conformer, assignId=True)
        molecules.append(molecule)
    return molecules


def write_pdb(path: Path, system: System, positions: np.ndarray) -> Path:
    """Write one conformation, positions [N, 3] Å, as PDB; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_durably(path, pdb_text(system, positions).encode())
    return path


def pdb_text(system: System, positions: np.ndarray) -> str:
    """One conformation, positions [N, 3] Å, as PDB text; raises UserError where a coordinate has no room in it."""
    import gemmi

    if positions.shape != (system.n_sites, 3):
        raise UserError(f"{system.name!r}: positions {positions.shape}, expected ({system.n_sites}, 3) in Å")
    if not np.isfinite(positions).all() or np.abs(positions).max() >= 1e4 - 1:
        raise UserError(f"{system.name!r}: positions are not finite or beyond 9999 Å, which a PDB file cannot hold")
    structure = gemmi.Structure()
    structure.name = system.name
    structure.add_model(_model(system, positions))
    structure.shorten_chain_names()
    lines = structure.make_pdb_string(gemmi.PdbWriteOptions(minimal=True, ter_records=False)).splitlines()
    atoms = [line for line in lines if line.startswith(("ATOM", "HETATM"))]
    return "\n".join([*atoms, *_conect(system, atoms), "END", ""])


def _model(system: System, positions: np.ndarray) -> gemmi.Model:
    import gemmi

    model = gemmi.Model(1)
    labels = _residue_labels(system)
    changed = (np.diff(system.residue_index) != 0) | (np.diff(system.chain_index) != 0)
    starts = np.flatnonzero(np.r_[True, changed])
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), system.n_sites], strict=True):
        chain, number = labels[start]
        if not len(model) or model[-1].name != chain:
            model.add_chain(gemmi.Chain(chain))
        residue = gemmi.Residue()
        residue.name, residue.seqid = system.residue_names[start], gemmi.SeqId(number)
        residue.het_flag = "A" if residues.is_peptide([residue.name]) else "H"
        for site in range(start, stop):
            residue.add_atom(_atom(system, site, positions[site]))
        model[-1].add_residue(residue)
    return model


def _atom(system: System, site: int, position: np.ndarray) -> gemmi.Atom:
    import gemmi

    atom = gemmi.Atom()
    atom.name, atom.serial = system.atom_names[site], site + 1
    atom.element = gemmi.Element(int(system.elements[site]))
    atom.pos = gemmi.Position(*(float(x) for x in position))
    return atom


def _residue_labels(system: System) -> list[tuple[str, str]]:
    """Chain and number of every site: those of the file that a pocket was cut from, else counted from 1."""
    known: dict[str, str] = system.origin.get("pocket_residues", {})
    taken = {label.split(":")[0] for label in known.values()}
    free = [name for name in _CHAIN_NAMES if name not in taken]
    labels = []
    for i in range(system.n_sites):
        label = known.get(str(int(system.residue_index[i])))
        if label is None or system.roles[i] != SiteRole.POCKET:
            labels.append((free[int(system.chain_index[i]) % len(free)], str(int(system.residue_index[i]) % 9999 + 1)))
        else:
            chain, residue = label.split(":")
            labels.append((chain, residue.removeprefix(system.residue_names[i])))
    return labels


def _conect(system: System, atoms: Sequence[str]) -> list[str]:
    """CONECT records between atoms of which one is no amino acid's, and between beads."""
    beads = system.elements == COARSE_GRAINED_BEAD
    hetero = {i for i, line in enumerate(atoms) if line.startswith("HETATM") or beads[i]}
    partners: dict[int, list[int]] = {}
    for i, j in system.bonds.tolist():
        if hetero & {i, j}:
            partners.setdefault(i, []).append(j)
            partners.setdefault(j, []).append(i)
    serials = [line[6:11] for line in atoms]
    return [
        f"CONECT{serials[site]}" + "".join(serials[other] for other in partners[site][start : start + 4])
        for site in sorted(partners)
        for start in range(0, len(partners[site]), 4)
    ]


def _mol_block(molecule: Any) -> str:
    from rdkit import Chem

    return str(Chem.MolToMolBlock(molecule))


def _text(value: Any) -> str:
    return f"{value:.8g}" if isinstance(value, float) else str(value)
