"""Small molecules -> System: one SDF record, or a SMILES, with all hydrogens.

In: an SDF/MOL file or SMILES text. Out: a System of kind MOLECULE in Å; atoms keep the file's order, added hydrogens
follow. Three-dimensional coordinates of a file are kept; otherwise they come from ETKDG and MMFF94. A stereocentre must
be specified, by coordinates or in the SMILES: it is part of what the molecule is. Knows no force field for dynamics.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dig_scale.errors import UserError
from dig_scale.importers.residues import signed_volumes
from dig_scale.system import System, SystemKind

_AROMATIC_ORDER = 4
_RESIDUE_NAME = "LIG"
_SEED = 1


def system_from_sdf(name: str, path: Path) -> System:
    """System of the one molecule in an SDF or MOL file; raises UserError naming file and atom."""
    from rdkit import Chem

    if not path.is_file():
        raise UserError(f"no molecule file at {path}")
    with _quiet_rdkit():
        records = list(Chem.SDMolSupplier(str(path), sanitize=False, removeHs=False))
        if len(records) != 1:
            raise UserError(f"{path}: {len(records)} molecules, expected 1; split the file, one system each")
        if records[0] is None:
            raise UserError(
                f"{path}: the record cannot be parsed as a molecule; write it again with RDKit or Open Babel"
            )
        molecule = _sanitised(records[0], str(path))
        return _to_system(name, molecule, {"source": path.name})


def system_from_smiles(name: str, smiles: str) -> System:
    """System of a SMILES with an ETKDG geometry; raises UserError naming the text and the atom."""
    from rdkit import Chem

    with _quiet_rdkit():
        parsed = Chem.MolFromSmiles(smiles, sanitize=False)
        if parsed is None or parsed.GetNumAtoms() == 0:
            raise UserError(f"system {name!r}: {smiles!r} is not a SMILES; write one such as CC(=O)O")
        molecule = _sanitised(parsed, f"SMILES {smiles!r}")
        Chem.AssignStereochemistry(molecule, cleanIt=True, force=True)
        return _to_system(name, molecule, {"source": "smiles", "smiles": smiles})


def _quiet_rdkit() -> Any:
    """RDKit prints what we raise."""
    from rdkit import rdBase

    return rdBase.BlockLogs()


def _sanitised(molecule: Any, source: str) -> Any:
    from rdkit import Chem

    problems = Chem.DetectChemistryProblems(molecule)
    if problems:
        raise UserError(f"{source}: {_describe(problems[0], molecule)}; correct its bonds or charges in the file")
    clean = Chem.Mol(molecule)
    Chem.SanitizeMol(clean)
    return clean


def _describe(problem: Any, molecule: Any) -> str:
    message = problem.Message()
    if hasattr(problem, "GetAtomIdx"):
        index = problem.GetAtomIdx()
        return f"atom {index + 1} ({molecule.GetAtomWithIdx(index).GetSymbol()}): {message}"
    if hasattr(problem, "GetAtomIndices"):
        return f"atoms {', '.join(str(i + 1) for i in problem.GetAtomIndices())}: {message}"
    return str(message)


def _to_system(name: str, molecule: Any, origin: dict[str, Any]) -> System:
    solid = _with_geometry(name, molecule)
    positions = np.array(solid.GetConformer().GetPositions())
    positions = np.round(positions - positions.mean(axis=0), 4)
    atoms = list(solid.GetAtoms())
    bonds = [(sorted((b.GetBeginAtomIdx(), b.GetEndAtomIdx())), _order(b)) for b in solid.GetBonds()]
    bonds.sort()
    return System(
        name=name,
        kind=SystemKind.MOLECULE,
        elements=np.array([atom.GetAtomicNum() for atom in atoms]),
        atom_names=tuple(f"{atom.GetSymbol()}{atom.GetIdx() + 1}" for atom in atoms),
        residue_names=(_RESIDUE_NAME,) * len(atoms),
        residue_index=np.zeros(len(atoms)),
        chain_index=np.zeros(len(atoms)),
        bonds=np.array([pair for pair, _ in bonds], dtype=np.int64).reshape(-1, 2),
        bond_orders=np.array([order for _, order in bonds], dtype=np.int64),
        formal_charges=np.array([atom.GetFormalCharge() for atom in atoms]),
        stereocentres=_stereocentres(solid, positions),
        mobile=np.ones(len(atoms), dtype=bool),
        reference_positions=positions,
        origin=origin,
    )


def _with_geometry(name: str, molecule: Any) -> Any:
    """The molecule with hydrogens and one conformer whose stereocentres are assigned."""
    from rdkit import Chem

    if molecule.GetNumConformers() and _is_three_dimensional(molecule):
        solid = Chem.AddHs(molecule, addCoords=True)
    else:
        if molecule.GetNumConformers():
            Chem.AssignChiralTypesFromBondDirs(molecule)
        solid = Chem.AddHs(molecule)
        Chem.AssignStereochemistry(solid, cleanIt=True, force=True)
        _require_specified_centres(name, solid)
        _embed(name, solid)
    Chem.AssignStereochemistryFrom3D(solid)
    return solid


def _is_three_dimensional(molecule: Any) -> bool:
    positions = molecule.GetConformer().GetPositions()
    return (
        molecule.GetNumAtoms() < 4
        or bool(np.linalg.svd(positions - positions.mean(axis=0))[1][2] > 0.1)
        or bool(molecule.GetConformer().Is3D())
    )


def _require_specified_centres(name: str, molecule: Any) -> None:
    from rdkit import Chem

    unspecified = [
        info.centeredOn
        for info in Chem.FindPotentialStereo(molecule)
        if info.type == Chem.StereoType.Atom_Tetrahedral and info.specified == Chem.StereoSpecified.Unspecified
    ]
    if unspecified:
        listed = ", ".join(f"{molecule.GetAtomWithIdx(i).GetSymbol()} (atom {i + 1})" for i in unspecified)
        raise UserError(f"system {name!r}: stereocentre without configuration: {listed}; write @ or @@ in the SMILES")


def _embed(name: str, molecule: Any) -> None:
    from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

    parameters: Any = rdDistGeom.ETKDGv3()
    parameters.randomSeed = _SEED
    if rdDistGeom.EmbedMolecule(molecule, parameters) != 0:
        parameters.useRandomCoords = True
        if rdDistGeom.EmbedMolecule(molecule, parameters) != 0:
            raise UserError(f"system {name!r}: no three-dimensional geometry found; give an SDF file with coordinates")
    if rdForceFieldHelpers.MMFFHasAllMoleculeParams(molecule):
        rdForceFieldHelpers.MMFFOptimizeMolecule(molecule, maxIters=2000)


def _order(bond: Any) -> int:
    if bond.GetIsAromatic():
        return _AROMATIC_ORDER
    order = bond.GetBondTypeAsDouble()
    return int(order) if order in (1.0, 2.0, 3.0) else 0


def _stereocentres(molecule: Any, positions: np.ndarray) -> np.ndarray:
    """Rows (centre, a, b, c): three neighbours, heavy ones first, ordered for a positive signed volume."""
    from rdkit import Chem

    rows = []
    for index, _ in Chem.FindMolChiralCenters(molecule, includeUnassigned=False, useLegacyImplementation=False):
        neighbours = [atom.GetIdx() for atom in molecule.GetAtomWithIdx(index).GetNeighbors()]
        neighbours.sort(key=lambda i: (molecule.GetAtomWithIdx(i).GetAtomicNum() == 1, i))
        rows.append([index, *neighbours[:3]])
    found = np.array(rows, dtype=np.int64).reshape(-1, 4)
    inverted = signed_volumes(positions, found) < 0
    found[inverted] = found[inverted][:, [0, 2, 1, 3]]
    return found
