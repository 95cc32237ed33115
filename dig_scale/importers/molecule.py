"""Small molecules -> System: SDF and MOL2 records, or a SMILES, with all hydrogens or as a ligand's heavy atoms.

In: an SDF/MOL/MOL2 file or SMILES text. Out: a System of kind MOLECULE in Å; atoms keep the file's order, added hydrogens
follow. Three-dimensional coordinates of a file are kept; otherwise they come from ETKDG and MMFF94. A stereocentre must
be specified, by coordinates or in the SMILES: it is part of what the molecule is. A Ligand is a heavy-atom System whose
geometry is a computed conformer, beside the pose that its file holds. Knows no force field for dynamics.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dig_scale.errors import UserError
from dig_scale.importers.residues import signed_volumes
from dig_scale.system import System, SystemKind

_AROMATIC_ORDER = 4
_RESIDUE_NAME = "LIG"
_SEED = 1
_MAX_RING_HYDROGENS = 3


@dataclass(frozen=True)
class Ligand:
    """A ligand without hydrogens: `system` in a computed conformer centred on the origin, and its pose [N, 3] Å, if known.

    The System's origin holds `ligand_smiles`, a SMILES whose atom map numbers are site numbers, counted from 1.
    """

    system: System
    pose: np.ndarray | None


def system_from_sdf(name: str, path: Path) -> System:
    """System of the one molecule in an SDF, MOL or MOL2 file; raises UserError naming file and atom."""
    with _quiet_rdkit():
        records = _records(path)
        if len(records) != 1:
            raise UserError(f"{path}: {len(records)} molecules, expected 1; split the file, one system each")
        molecule = _sanitised(_parsed(records[0], str(path)), str(path))
        return _to_system(name, _with_geometry(name, molecule), {"source": path.name})


def systems_from_file(path: Path) -> list[System]:
    """System of every molecule of an SDF, MOL or MOL2 file, named after it; raises UserError naming file, record and atom."""
    with _quiet_rdkit():
        molecules = read_molecules(path)
        names = molecule_names(molecules)
        solids = [_with_geometry(name, molecule) for name, molecule in zip(names, molecules, strict=True)]
        return [_to_system(name, solid, {"source": path.name}) for name, solid in zip(names, solids, strict=True)]


def read_molecules(path: Path) -> list[Any]:
    """Sanitised RDKit molecules of an SDF, MOL or MOL2 file, hydrogens kept; raises UserError naming file, record, reason."""
    with _quiet_rdkit():
        molecules = []
        for number, record in enumerate(_records(path), 1):
            title = record.GetProp("_Name") if record is not None and record.HasProp("_Name") else ""
            where = f"{path}, molecule {number}" + (f" ({title})" if title else "")
            molecules.append(_sanitised(_parsed(record, where), where))
        return molecules


def molecule_names(molecules: list[Any]) -> tuple[str, ...]:
    """Titles of RDKit molecules; where one is empty or not unique, `ligand-<number>` counted from 1."""
    titles = [molecule.GetProp("_Name").strip() if molecule.HasProp("_Name") else "" for molecule in molecules]
    return tuple(
        title if title and titles.count(title) == 1 else f"ligand-{number}" for number, title in enumerate(titles, 1)
    )


def ligand_from_molecule(name: str, molecule: Any, origin: dict[str, Any]) -> Ligand:
    """Ligand of a sanitised RDKit molecule with a pose; its conformer does not depend on the pose beyond stereochemistry.

    Raises UserError where the molecule has no 3D coordinates, is in several pieces, or cannot be embedded.
    """
    from rdkit import Chem

    with _quiet_rdkit():
        if not molecule.GetNumConformers() or not _is_three_dimensional(molecule):
            raise UserError(
                f"ligand {name!r}: no three-dimensional pose; dock it, or give a SMILES and the pocket's place"
            )
        solid = _with_geometry(name, molecule)
        pose = np.array(solid.GetConformer().GetPositions())
        relaxed = Chem.Mol(solid)
        relaxed.RemoveAllConformers()
        _embed(name, relaxed)
        system = _heavy_ligand(name, relaxed, origin)
    heavy_pose = pose[[atom.GetAtomicNum() != 1 for atom in solid.GetAtoms()]]
    if (signed_volumes(heavy_pose, system.stereocentres) <= 0).any():
        raise UserError(
            f"ligand {name!r}: the computed conformer is not the stereoisomer of the pose; check the pose's geometry"
        )
    return Ligand(system, heavy_pose)


def ligand_from_smiles(name: str, smiles: str) -> Ligand:
    """Ligand of a SMILES, without a pose; raises UserError naming the text and the atom."""
    with _quiet_rdkit():
        solid = _with_geometry(name, _parsed_smiles(name, smiles))
        return Ligand(_heavy_ligand(name, solid, {"source": "smiles", "smiles": smiles}), None)


def system_from_smiles(name: str, smiles: str) -> System:
    """System of a SMILES with an ETKDG geometry; raises UserError naming the text and the atom."""
    with _quiet_rdkit():
        solid = _with_geometry(name, _parsed_smiles(name, smiles))
        return _to_system(name, solid, {"source": "smiles", "smiles": smiles})


def molecule_from_atoms(elements: np.ndarray, positions: np.ndarray, smiles: str | None, where: str) -> Any:
    """Sanitised RDKit molecule of atoms [N] at positions [N, 3] Å, with the bond orders and charges of a SMILES.

    With a SMILES hydrogens are dropped; without one they must be there, and the molecule neutral. Raises UserError.
    """
    from rdkit import Chem
    from rdkit.Chem import rdDetermineBonds

    with _quiet_rdkit():
        if smiles is not None:
            template = _parsed_smiles(where, smiles)
            return _with_template(
                _connected(elements[elements != 1], positions[elements != 1]), template, smiles, where
            )
        if not (elements == 1).any():
            raise UserError(f"{where}: without hydrogens its bond orders are not known; give its SMILES")
        molecule = _connected(elements, positions)
        try:
            rdDetermineBonds.DetermineBondOrders(molecule, charge=0)
        except ValueError as error:
            raise UserError(f"{where}: no bond orders fit its atoms as a neutral molecule; give its SMILES") from error
        return _sanitised(Chem.Mol(molecule), where)


def rdkit_molecule(system: System) -> Any:
    """RDKit molecule with the sites of a molecular System, in their order and without a conformer.

    Hydrogens are implicit where the System has none. Raises UserError where its bonds make no molecule.
    """
    with _quiet_rdkit():
        recorded = _from_recorded_smiles(system)
        return recorded if recorded is not None else _from_bonds(system)


def _quiet_rdkit() -> Any:
    """RDKit prints what we raise."""
    from rdkit import rdBase

    return rdBase.BlockLogs()


def _records(path: Path) -> list[Any]:
    """Unsanitised RDKit molecules of a file, None for each record that cannot be parsed."""
    from rdkit import Chem

    if not path.is_file():
        raise UserError(f"no molecule file at {path}")
    if path.suffix.lower() == ".mol2":
        blocks = re.split(r"(?m)^(?=@<TRIPOS>MOLECULE)", path.read_text())
        try:
            return [_mol2_record(text) for text in blocks if text.startswith("@")]
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    return list(Chem.SDMolSupplier(str(path), sanitize=False, removeHs=False))


def _mol2_record(text: str) -> Any | None:
    """The molecule of one MOL2 block; raises UserError where hydrogens are left out, since then its charges are not known."""
    from rdkit import Chem

    molecule = Chem.MolFromMol2Block(text, sanitize=False, removeHs=False)
    if molecule is None:
        return None
    whole = Chem.Mol(molecule)
    if Chem.SanitizeMol(whole, catchErrors=True) == Chem.SanitizeFlags.SANITIZE_NONE:
        bare = [atom for atom in whole.GetAtoms() if atom.GetNumRadicalElectrons()]
        if bare:
            name, symbol = text.splitlines()[1].strip(), bare[0].GetSymbol()
            raise UserError(
                f"MOL2 molecule {name!r}: atom {bare[0].GetIdx() + 1} ({symbol}) lacks hydrogens; a MOL2 file must list all,"
                " an SDF file need not"
            )
    return molecule


def _parsed(record: Any, where: str) -> Any:
    if record is None or record.GetNumAtoms() == 0:
        raise UserError(f"{where}: the record cannot be parsed as a molecule; write it again with RDKit or Open Babel")
    return record


def _parsed_smiles(name: str, smiles: str) -> Any:
    from rdkit import Chem

    parsed = Chem.MolFromSmiles(smiles, sanitize=False)
    if parsed is None or parsed.GetNumAtoms() == 0:
        raise UserError(f"system {name!r}: {smiles!r} is not a SMILES; write one such as CC(=O)O")
    molecule = _sanitised(parsed, f"SMILES {smiles!r}")
    Chem.AssignStereochemistry(molecule, cleanIt=True, force=True)
    return molecule


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


def _heavy_ligand(name: str, solid: Any, origin: dict[str, Any]) -> System:
    from rdkit import Chem

    if len(Chem.GetMolFrags(solid)) != 1:
        raise UserError(f"ligand {name!r}: {len(Chem.GetMolFrags(solid))} pieces, expected 1; remove salts and solvent")
    whole = _to_system(name, solid, origin)
    heavy = whole.select(whole.heavy_sites())
    bare = Chem.RemoveAllHs(solid)
    for atom in bare.GetAtoms():
        atom.SetAtomMapNum(atom.GetIdx() + 1)
    smiles = Chem.MolToSmiles(bare)
    positions = np.round(heavy.reference_positions - heavy.reference_positions.mean(axis=0), 4)
    return replace(heavy, reference_positions=positions, origin=origin | {"ligand_smiles": smiles})


def _to_system(name: str, solid: Any, origin: dict[str, Any]) -> System:
    """System of a molecule with hydrogens and a conformer."""
    positions = np.array(solid.GetConformer().GetPositions())
    positions = np.round(positions - positions.mean(axis=0), 4)
    atoms = list(solid.GetAtoms())
    pairs, orders = _bonds(solid)
    return System(
        name=name,
        kind=SystemKind.MOLECULE,
        elements=np.array([atom.GetAtomicNum() for atom in atoms]),
        atom_names=tuple(f"{atom.GetSymbol()}{atom.GetIdx() + 1}" for atom in atoms),
        residue_names=(_RESIDUE_NAME,) * len(atoms),
        residue_index=np.zeros(len(atoms)),
        chain_index=np.zeros(len(atoms)),
        bonds=np.array(pairs, dtype=np.int64).reshape(-1, 2),
        bond_orders=np.array(orders, dtype=np.int64),
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


def _bonds(molecule: Any) -> tuple[list[list[int]], list[int]]:
    """Pairs i < j in lexical order, and their orders."""
    rows = sorted((sorted((b.GetBeginAtomIdx(), b.GetEndAtomIdx())), _order(b)) for b in molecule.GetBonds())
    return [pair for pair, _ in rows], [order for _, order in rows]


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


def _connected(elements: np.ndarray, positions: np.ndarray) -> Any:
    """RDKit molecule with single bonds where atoms are near."""
    from rdkit import Chem
    from rdkit.Chem import rdDetermineBonds

    editable = Chem.RWMol()
    for element in elements.tolist():
        editable.AddAtom(Chem.Atom(element))
    conformer = Chem.Conformer(len(elements))
    conformer.SetPositions(np.ascontiguousarray(positions, np.float64))
    conformer.Set3D(True)
    editable.AddConformer(conformer)
    rdDetermineBonds.DetermineConnectivity(editable)
    return editable.GetMol()


def _with_template(single: Any, template: Any, smiles: str, where: str) -> Any:
    from rdkit import Chem
    from rdkit.Chem import AllChem

    for atom in single.GetAtoms():
        atom.SetNoImplicit(False)
    single.UpdatePropertyCache(strict=False)
    try:
        molecule = AllChem.AssignBondOrdersFromTemplate(Chem.RemoveAllHs(template), single)
    except ValueError as error:
        raise UserError(
            f"{where}: its {single.GetNumAtoms()} heavy atoms do not match the SMILES {smiles!r}"
        ) from error
    if molecule.GetNumAtoms() != template.GetNumHeavyAtoms():
        raise UserError(
            f"{where}: {molecule.GetNumAtoms()} heavy atoms, the SMILES {smiles!r} has {template.GetNumHeavyAtoms()}"
        )
    Chem.AssignStereochemistryFrom3D(molecule)
    if not molecule.HasSubstructMatch(Chem.RemoveAllHs(template), useChirality=True):
        raise UserError(f"{where}: its pose is another stereoisomer than the SMILES {smiles!r}")
    return molecule


def _from_recorded_smiles(system: System) -> Any | None:
    """The molecule of `ligand_smiles`, which knows its hydrogens; None where there is none or it is of other sites."""
    from rdkit import Chem

    mapped = Chem.MolFromSmiles(system.origin.get("ligand_smiles", ""), sanitize=True)
    if mapped is None or mapped.GetNumAtoms() != system.n_sites:
        return None
    order = np.argsort([atom.GetAtomMapNum() for atom in mapped.GetAtoms()])
    molecule = Chem.RenumberAtoms(mapped, order.tolist())
    for atom in molecule.GetAtoms():
        atom.SetAtomMapNum(0)
    same = [atom.GetAtomicNum() for atom in molecule.GetAtoms()] == system.elements.tolist()
    return molecule if same and _bonds(molecule)[0] == system.bonds.tolist() else None


def _from_bonds(system: System) -> Any:
    from rdkit import Chem

    kinds = {1: Chem.BondType.SINGLE, 2: Chem.BondType.DOUBLE, 3: Chem.BondType.TRIPLE, 4: Chem.BondType.AROMATIC}
    editable = Chem.RWMol()
    for element, charge in zip(system.elements.tolist(), system.formal_charges.tolist(), strict=True):
        atom = Chem.Atom(element)
        atom.SetFormalCharge(charge)
        atom.SetNoImplicit(bool((system.elements == 1).any()))
        editable.AddAtom(atom)
    for (i, j), order in zip(system.bonds.tolist(), system.bond_orders.tolist(), strict=True):
        editable.AddBond(i, j, kinds.get(order, Chem.BondType.UNSPECIFIED))
        if order == _AROMATIC_ORDER:
            for site in (i, j):
                editable.GetAtomWithIdx(site).SetIsAromatic(True)
    return _first_sanitisable(system, editable.GetMol())


def _first_sanitisable(system: System, molecule: Any) -> Any:
    """The molecule, with a hydrogen on as few aromatic nitrogens as its rings need: heavy atoms alone do not say which."""
    from rdkit import Chem

    nitrogens = [
        atom.GetIdx()
        for atom in molecule.GetAtoms()
        if atom.GetAtomicNum() == 7 and atom.GetIsAromatic() and atom.GetDegree() == 2 and not atom.GetNoImplicit()
    ]
    for count in range(min(len(nitrogens), _MAX_RING_HYDROGENS) + 1):
        for chosen in itertools.combinations(nitrogens, count):
            candidate = Chem.Mol(molecule)
            for index in chosen:
                candidate.GetAtomWithIdx(index).SetNumExplicitHs(1)
            if Chem.SanitizeMol(candidate, catchErrors=True) == Chem.SanitizeFlags.SANITIZE_NONE:
                return candidate
    problems = Chem.DetectChemistryProblems(molecule)
    reason = _describe(problems[0], molecule) if problems else "its rings cannot be given double bonds"
    raise UserError(
        f"system {system.name!r}: its bonds make no molecule: {reason}; import it again from its SDF or SMILES"
    )
