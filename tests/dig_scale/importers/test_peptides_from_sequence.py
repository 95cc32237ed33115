"""Peptides built from sequences are what nature makes, and what the force field expects."""

from __future__ import annotations

import numpy as np
import pytest
from rdkit import Chem

from dig_scale.config import Simulate, SystemSpec
from dig_scale.errors import UserError
from dig_scale.importers import residues, system_from_spec
from dig_scale.importers.completion import proper_superposition
from dig_scale.importers.protein import system_from_sequence
from dig_scale.importers.sequence import parse_sequence
from dig_scale.simulation.openmm_engine import build_openmm_system
from dig_scale.system import System, SystemKind


@pytest.fixture(scope="module")
def all_twenty() -> dict[str, System]:
    names = sorted(residues.AMINO_ACIDS)
    return {name: system_from_sequence(name.lower(), f"ACE-{name}-NME") for name in names}


def _torsion(points: np.ndarray) -> float:
    a, b, c = np.diff(points, axis=0)
    normal_one, normal_two = np.cross(a, b), np.cross(b, c)
    return float(
        np.degrees(np.arctan2(np.dot(np.cross(normal_one, normal_two), b / np.linalg.norm(b)), normal_one @ normal_two))
    )


def _index(system: System, residue: int, name: str) -> int:
    wanted = [i for i in range(system.n_sites) if system.residue_index[i] == residue and system.atom_names[i] == name]
    assert len(wanted) == 1
    return wanted[0]


def _rdkit(system: System) -> Chem.Mol:
    """The System's own graph and reference geometry; RDKit then says, by itself, how each centre is configured."""
    kinds = {1: Chem.BondType.SINGLE, 2: Chem.BondType.DOUBLE, 3: Chem.BondType.TRIPLE, 4: Chem.BondType.AROMATIC}
    molecule = Chem.RWMol()
    for element, charge in zip(system.elements, system.formal_charges, strict=True):
        atom = Chem.Atom(int(element))
        atom.SetFormalCharge(int(charge))
        atom.SetNoImplicit(True)
        molecule.AddAtom(atom)
    for (i, j), order in zip(system.bonds, system.bond_orders, strict=True):
        molecule.AddBond(int(i), int(j), kinds[int(order)])
        if order == 4:
            for k in (i, j):
                molecule.GetAtomWithIdx(int(k)).SetIsAromatic(True)
    conformer = Chem.Conformer(system.n_sites)
    for i, position in enumerate(system.reference_positions):
        conformer.SetAtomPosition(i, position.tolist())
    molecule.AddConformer(conformer)
    Chem.SanitizeMol(molecule)
    Chem.AssignStereochemistryFrom3D(molecule)
    return molecule


def test_every_amino_acid_is_l_with_natural_side_chain(all_twenty: dict[str, System]) -> None:
    for name, system in all_twenty.items():
        codes = dict(Chem.FindMolChiralCenters(_rdkit(system), useLegacyImplementation=False))
        expected = {} if name == "GLY" else {"CA": "R" if name == "CYS" else "S"}
        expected |= {"THR": {"CB": "R"}, "ILE": {"CB": "S"}}.get(name, {})
        assert {system.atom_names[i]: code for i, code in codes.items()} == expected, name


def test_every_amino_acid_has_the_atoms_bonds_and_charge_of_the_force_field(all_twenty: dict[str, System]) -> None:
    charges = {"ASP": -1, "GLU": -1, "LYS": 1, "ARG": 1}
    for name, system in all_twenty.items():
        model = build_openmm_system(system, Simulate(constraints="none"))
        bonded = next(f for f in model.getForces() if f.getName() == "HarmonicBondForce")
        assert bonded.getNumBonds() == len(system.bonds), name
        nonbonded = next(f for f in model.getForces() if f.getName() == "NonbondedForce")
        total = sum(nonbonded.getParticleParameters(i)[0]._value for i in range(system.n_sites))
        assert system.formal_charges.sum() == charges.get(name, 0) == pytest.approx(total, abs=1e-3), name


def test_stereocentres_outlive_the_loss_of_hydrogens(all_twenty: dict[str, System]) -> None:
    for name, system in all_twenty.items():
        heavy = system.select(system.heavy_sites())
        assert len(heavy.stereocentres) == {"GLY": 0, "THR": 2, "ILE": 2}.get(name, 1)
        assert (residues.signed_volumes(heavy.reference_positions, heavy.stereocentres) > 1.0).all(), name


def test_hydrogen_at_c_alpha_lies_opposite_to_the_side_chain(all_twenty: dict[str, System]) -> None:
    for name, system in all_twenty.items():
        if name != "GLY":
            row = [_index(system, 1, atom) for atom in ("CA", "N", "C", "HA")]
            assert residues.signed_volumes(system.reference_positions, np.array([row]))[0] < 0, name


def test_peptide_bonds_are_trans_and_bonds_have_sane_lengths() -> None:
    system = system_from_sequence("chignolin", "GYDPETGTWG")
    for residue in range(9):
        atoms = [_index(system, residue + (k > 1), name) for k, name in enumerate(("CA", "C", "N", "CA"))]
        assert abs(_torsion(system.reference_positions[atoms])) > 150
    lengths = np.linalg.norm(np.subtract(*system.reference_positions[system.bonds.T]), axis=-1)
    assert lengths.min() > 0.93
    assert lengths.max() < 1.65
    assert system.n_sites == 138
    assert system.formal_charges.sum() == -2


def test_longer_peptide_of_all_residues_stays_l_through_minimisation() -> None:
    system = system_from_sequence("twenty", "ARNDCQEGHILKMFPSTWYV")
    assert len(system.stereocentres) == 19 + 2
    assert (residues.signed_volumes(system.reference_positions, system.stereocentres) > 1.0).all()


def test_same_sequence_gives_the_same_system() -> None:
    spec = SystemSpec(name="ala2", sequence="ACE-ALA-NME")
    one, two = system_from_spec(spec), system_from_spec(spec)
    assert one.system_id == two.system_id
    assert one.kind is SystemKind.MOLECULE
    assert one.n_sites == 22


def test_capped_and_plain_spellings_are_read() -> None:
    assert parse_sequence("ace-ala-nme") == ("ACE", "ALA", "NME")
    assert parse_sequence("GY") == ("GLY", "TYR")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("GYX", "residue 3 is 'X'"),
        ("ACE-FOO-NME", "'FOO'"),
        ("ALA-ACE", "ACE may only come first"),
        ("ACE-NME", "no amino acid"),
        ("", "empty"),
    ],
)
def test_wrong_sequence_names_the_residue(text: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        parse_sequence(text)


def test_superposition_never_reflects() -> None:
    generator = np.random.default_rng(0)
    flat = generator.normal(size=(5, 3)) * [1, 1, 1e-4]
    mirrored = flat * [1, 1, -1]
    rotation, _ = proper_superposition(flat, mirrored)
    assert np.linalg.det(rotation) == pytest.approx(1.0)
    turn = np.linalg.qr(generator.normal(size=(3, 3)))[0]
    turn *= np.sign(np.linalg.det(turn))
    rotation, shift = proper_superposition(flat, flat @ turn.T + 2.0)
    np.testing.assert_allclose(flat @ rotation.T + shift, flat @ turn.T + 2.0, atol=1e-9)
