"""Poses: symmetry is seen and nothing is moved; clashes and impossible molecules are found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from dig_scale.errors import UserError
from dig_scale.evaluation.poses import (
    CheckDepth,
    conformer_rmsd,
    expected_best,
    pocket_clashes,
    pose_accuracy,
    pose_rmsd,
    posebusters_checks,
    symmetries,
)
from dig_scale.importers.molecule import ligand_from_smiles
from dig_scale.importers.pocket import PocketOptions, pocket_system
from dig_scale.outputs.molecules import ligand_sites, pocket_sites
from dig_scale.system import Frames, System


@pytest.fixture(scope="module")
def posed(shared_data: Path) -> tuple[System, Frames]:
    folder = shared_data / "fep_pockets" / "hif2a"
    protein, ligands = folder / "01_protein" / "crd" / "protein.pdb", folder / "02_ligands" / "ligands.sdf"
    return pocket_system(protein, ligands, "lig_231", PocketOptions(name="hif2a", shell=6.0))


def _with_ligand(frames: Frames, system: System, ligand: np.ndarray) -> np.ndarray:
    sample = frames.positions[0].copy()
    sample[ligand_sites(system)] = ligand
    return sample


@pytest.mark.parametrize("smiles", ["c1ccccc1", "CC(C)(C)c1ccc(C(F)(F)F)cc1", "O=S(=O)([O-])CCC(=O)[O-]", "OCC(N)=O"])
def test_rmsd_agrees_with_spyrmsd_in_place(smiles: str) -> None:
    spyrmsd = pytest.importorskip("spyrmsd.rmsd")
    system = ligand_from_smiles("m", smiles).system
    generator = np.random.default_rng(0)
    shuffled = system.reference_positions[symmetries(system)[-1]]
    poses = np.stack([shuffled, shuffled + generator.normal(size=shuffled.shape), shuffled + 3.0])
    adjacency = np.zeros((system.n_sites,) * 2)
    adjacency[tuple(system.bonds.T)] = adjacency[tuple(system.bonds.T[::-1])] = 1
    expected = spyrmsd.symmrmsd(
        system.reference_positions, list(poses), system.elements, system.elements, adjacency, adjacency
    )
    assert pose_rmsd(poses, system.reference_positions, symmetries(system)) == pytest.approx(expected, abs=1e-6)


def test_swapped_equivalent_atoms_cost_nothing_and_a_shift_costs_its_length() -> None:
    system = ligand_from_smiles("m", "c1ccccc1").system
    ring = system.reference_positions
    assert len(symmetries(system)) == 12
    poses = np.stack([np.roll(ring, 1, axis=0), ring[::-1], ring + np.array([0.0, 2.0, 0.0])])
    assert pose_rmsd(poses, ring, symmetries(system)) == pytest.approx([0.0, 0.0, 2.0], abs=1e-6)
    turned = poses @ Rotation.random(random_state=0).as_matrix().T
    assert conformer_rmsd(turned, ring, symmetries(system)) == pytest.approx([0.0] * 3, abs=1e-6)


def test_accuracy_of_known_displacements(posed: tuple[System, Frames]) -> None:
    system, frames = posed
    truth = frames.positions[0]
    pose = truth[ligand_sites(system)]
    samples = np.stack(
        [truth, _with_ligand(frames, system, pose + np.array([0.0, 0.0, 3.0])), system.reference_positions]
    )
    samples[1, pocket_sites(system)] += [0.5, 0.0, 0.0]
    accuracy = pose_accuracy(system, samples, truth)
    assert accuracy.rmsd[0] == pytest.approx(0.0, abs=1e-9) and 2.0 < accuracy.rmsd[1] <= 3.0
    assert accuracy.conformer_rmsd[:2] == pytest.approx([0.0, 0.0], abs=1e-6)
    assert accuracy.centroid_distance[1] == pytest.approx(3.0)
    assert accuracy.pocket_rmsd == pytest.approx([0.0, 0.5, 0.0])
    assert accuracy.clashes[0] == 0 and accuracy.clashes[2] > 0
    assert accuracy.found() == pytest.approx(1 / 3)
    assert accuracy.best_of(3) == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(UserError, match="expected"):
        pose_accuracy(system, samples[:, :5], truth)


def test_best_of_n_is_the_mean_over_all_subsets() -> None:
    from itertools import combinations

    values = np.random.default_rng(1).random(7)
    for n in (1, 3, 7):
        assert expected_best(values, n) == pytest.approx(np.mean([min(chosen) for chosen in combinations(values, n)]))
    with pytest.raises(ValueError, match="best of 8 from 7"):
        expected_best(values, 8)


def test_clashes_count_pairs_below_two_angstrom(posed: tuple[System, Frames]) -> None:
    system, frames = posed
    touching = frames.positions[0].copy()
    touching[0] = touching[pocket_sites(system)[0]] + [1.9, 0.0, 0.0]
    pocket = touching[pocket_sites(system)]
    expected = (np.linalg.norm(pocket - touching[0], axis=-1) < 2.0).sum()
    assert pocket_clashes(system, np.stack([frames.positions[0], touching])).tolist() == [0, expected]
    assert expected >= 1


def test_posebusters_passes_the_crystal_and_names_what_fails(posed: tuple[System, Frames]) -> None:
    pytest.importorskip("posebusters")
    system, frames = posed
    truth = frames.positions[0]
    pose = truth[ligand_sites(system)]
    centre = pose.mean(axis=0)
    mirrored = _with_ligand(frames, system, (pose - centre) * [1.0, 1.0, -1.0] + centre)
    swollen = _with_ligand(frames, system, (pose - centre) * 1.5 + centre)
    samples = np.stack([truth, mirrored, swollen])
    checks = posebusters_checks(system, samples, truth, CheckDepth.FAST)
    outcome = dict(zip(checks.names, checks.passed.T.tolist(), strict=True))
    assert checks.valid.tolist() == [True, False, False]
    assert outcome["tetrahedral_chirality"][:2] == [True, False]
    assert outcome["bond_lengths"] == [True, True, False]
    assert checks.fractions()["mol_pred_loaded"] == 1.0
    alone = posebusters_checks(
        system.select(ligand_sites(system)), samples[:, ligand_sites(system)], depth=CheckDepth.FAST
    )
    assert "bond_lengths" in alone.names and "minimum_distance_to_protein" not in alone.names


def test_too_many_symmetries_are_refused() -> None:
    star = ligand_from_smiles("m", "C").system
    many = replace(
        star,
        elements=np.array([6] + [9] * 9),
        atom_names=tuple("ABCDEFGHIJ"),
        residue_names=("LIG",) * 10,
        residue_index=np.zeros(10),
        chain_index=np.zeros(10),
        bonds=np.array([(0, k) for k in range(1, 10)]),
        bond_orders=np.ones(9),
        formal_charges=np.zeros(10),
        mobile=np.ones(10),
        reference_positions=np.zeros((10, 3)),
        roles=np.zeros(10),
    )
    with pytest.raises(UserError, match="symmetries"):
        symmetries(many)
