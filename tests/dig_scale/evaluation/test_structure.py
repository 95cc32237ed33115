"""Geometry against mdtraj on real files, against brute force, and under mirror reflection."""

from __future__ import annotations

import mdtraj
import numpy as np
import pytest

from dig_scale.evaluation import structure
from dig_scale.system import System, SystemKind
from tests.dig_scale.evaluation.conftest import RealTrajectory
from tests.molecules import alanine_dipeptide_heavy, five_beads


def test_torsion_values_equal_mdtraj(alanine: RealTrajectory) -> None:
    sites = np.array([torsion.sites for torsion in structure.torsions_of(alanine.system)])
    ours = structure.dihedrals(alanine.positions, sites)
    theirs = mdtraj.compute_dihedrals(alanine.trajectory, sites, periodic=False)
    assert np.abs(np.angle(np.exp(1j * (ours - theirs)))).max() < 2e-3  # mdtraj works in float32


def test_bonds_and_angles_equal_mdtraj(alanine: RealTrajectory) -> None:
    bonds, triples = alanine.system.bonds, structure.angles_of(alanine.system)
    lengths = 10 * mdtraj.compute_distances(alanine.trajectory, bonds, periodic=False)
    angles = mdtraj.compute_angles(alanine.trajectory, triples, periodic=False)
    np.testing.assert_allclose(structure.bond_lengths(alanine.positions, bonds), lengths, atol=1e-5)
    np.testing.assert_allclose(structure.bend_angles(alanine.positions, triples), angles, atol=1e-3)
    assert len(triples) == 36


def test_backbone_and_side_chains_of_a_protein_are_those_of_mdtraj(bpti: RealTrajectory) -> None:
    torsions = structure.torsions_of(bpti.system)
    computed = {"φ": mdtraj.compute_phi, "ψ": mdtraj.compute_psi, "χ1": mdtraj.compute_chi1, "χ2": mdtraj.compute_chi2}
    for symbol, compute in computed.items():
        ours = {torsion.sites for torsion in torsions if torsion.symbol == symbol}
        theirs = {tuple(sites) for sites in compute(bpti.trajectory)[0].tolist()}
        in_rings = {
            sites for sites in theirs if bpti.system.residue_names[sites[1]] == "PRO" and symbol.startswith("χ")
        }
        assert ours == theirs - in_rings, symbol
    assert len(structure.torsion_pairs(torsions)) == 56  # 58 residues less the two ends


def test_trans_is_pi_and_a_clockwise_turn_is_positive() -> None:
    quadruple = np.array([[0, 1, 2, 3]])
    for degrees in (180.0, 60.0, -120.0, 0.0):
        turn = np.radians(degrees)
        last = [np.cos(turn), np.sin(turn), 1.0]
        frame = np.array([[[1, 0, 0], [0, 0, 0], [0, 0, 1], last]], dtype=np.float64)
        assert structure.dihedrals(frame, quadruple)[0, 0] == pytest.approx(turn, abs=1e-6)


@pytest.mark.parametrize("build", [alanine_dipeptide_heavy, five_beads])
def test_every_alanine_model_has_one_ramachandran_pair(build) -> None:
    torsions = structure.torsions_of(build())
    (pair,) = structure.torsion_pairs(torsions)
    assert pair.is_ramachandran
    assert [torsions[pair.first].label, torsions[pair.second].label] == ["φ ALA2", "ψ ALA2"]


def test_beads_measure_phi_on_the_first_four_and_psi_on_the_last_four() -> None:
    assert [torsion.sites for torsion in structure.torsions_of(five_beads())] == [(0, 1, 2, 3), (1, 2, 3, 4)]


def test_all_atom_alanine_has_no_methyl_torsion(alanine: RealTrajectory) -> None:
    labels = {torsion.label for torsion in structure.torsions_of(alanine.system)}
    assert labels == {"ω ACE1–ALA2", "φ ALA2", "ψ ALA2", "ω ALA2–NME3"}


def test_peptide_bonds_of_real_frames_are_trans(alanine: RealTrajectory) -> None:
    omega = [torsion.sites for torsion in structure.torsions_of(alanine.system) if torsion.symbol == "ω"]
    assert (np.abs(structure.dihedrals(alanine.positions, np.array(omega))) > np.radians(120)).all()


def test_bonds_of_rings_have_no_torsion_and_neighbouring_rotors_make_a_pair() -> None:
    ring = [(i, (i + 1) % 6) for i in range(6)]
    system = _carbons(10, [*ring, (0, 6), (6, 7), (7, 8), (8, 9)])
    in_ring = {tuple(bond) for bond in system.bonds[structure.ring_bonds(system)].tolist()}
    assert in_ring == {tuple(sorted(bond)) for bond in ring}
    torsions = structure.torsions_of(system)
    assert {torsion.sites[1:3] for torsion in torsions} == {(0, 6), (6, 7), (7, 8)}
    pairs = structure.torsion_pairs(torsions)
    assert len(pairs) == 2
    assert not any(pair.is_ramachandran for pair in pairs)


def test_mirror_image_flips_every_stereocentre(alanine: RealTrajectory) -> None:
    centres = alanine.system.stereocentres
    volumes = structure.signed_volumes(alanine.positions, centres)
    mirrored = structure.signed_volumes(alanine.positions * np.array([1, 1, -1]), centres)
    assert (volumes > 0).all()
    np.testing.assert_allclose(mirrored, -volumes, rtol=1e-5)


def test_clashes_equal_brute_force() -> None:
    generator = np.random.default_rng(4)
    system = _carbons(9, [(i, i + 1) for i in range(8)])
    positions = generator.uniform(0, 5, size=(300, 9, 3))
    expected = [
        sum(np.linalg.norm(x[i] - x[j]) < 2 * 0.6 * 1.70 for i in range(9) for j in range(i + 4, 9)) for x in positions
    ]
    assert structure.clash_counts(positions, system).tolist() == expected
    assert 0 < np.mean(expected) < 5


def test_real_frames_have_no_clash_and_a_collapsed_one_has(alanine: RealTrajectory) -> None:
    assert structure.clash_counts(alanine.positions, alanine.system).sum() == 0
    assert (structure.clash_counts(alanine.positions * 0.4, alanine.system) > 0).all()


def test_many_frames_are_measured_like_few() -> None:
    generator = np.random.default_rng(5)
    positions = generator.normal(size=(3, 4, 3))
    many = np.tile(positions, (3000, 1, 1))
    quadruples = np.tile([[0, 1, 2, 3]], (200, 1))  # 1.8 million terms: several chunks
    values = structure.dihedrals(many, quadruples)
    np.testing.assert_array_equal(values, np.tile(structure.dihedrals(positions, quadruples), (3000, 1)))


def _carbons(n: int, bonds: list[tuple[int, int]]) -> System:
    return System(
        name="carbons",
        kind=SystemKind.MOLECULE,
        elements=[6] * n,
        atom_names=tuple(f"C{i}" for i in range(n)),
        residue_names=("LIG",) * n,
        residue_index=[0] * n,
        chain_index=[0] * n,
        bonds=sorted(tuple(sorted(bond)) for bond in bonds),
        bond_orders=[1] * len(bonds),
        formal_charges=[0] * n,
        stereocentres=np.zeros((0, 4)),
        mobile=[True] * n,
        reference_positions=np.arange(3 * n).reshape(n, 3),
    )
