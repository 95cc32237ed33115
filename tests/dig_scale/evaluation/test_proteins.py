"""Proteins as residue frames: published distances between states come out, and unsound samples are named."""

from __future__ import annotations

from pathlib import Path

import mdtraj
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from dig_scale.errors import UserError
from dig_scale.evaluation.proteins import (
    PhysicalLimits,
    backbone_of,
    ca_rmsd,
    contact_map,
    distance_divergence,
    distant_pairs,
    radius_of_gyration,
    soundness,
    state_visits,
    tm_score,
)
from dig_scale.geometry.rotations import frames_from_backbone
from dig_scale.system import System, SystemKind

Samples = tuple[System, np.ndarray, np.ndarray]


def _residues(names: tuple[str, ...]) -> System:
    n = len(names)
    return System(
        name="protein",
        kind=SystemKind.PROTEIN,
        elements=np.zeros(n),
        atom_names=("CA",) * n,
        residue_names=names,
        residue_index=np.arange(n),
        chain_index=np.zeros(n),
        bonds=np.stack([np.arange(n - 1), np.arange(1, n)], axis=1),
        bond_orders=np.ones(n - 1),
        formal_charges=np.zeros(n),
        stereocentres=np.zeros((0, 4)),
        mobile=np.ones(n),
        reference_positions=np.arange(3.0 * n).reshape(n, 3),
    )


def _samples(trajectory: mdtraj.Trajectory) -> Samples:
    topology = trajectory.topology
    found = {(atom.residue.index, atom.name): atom.index for atom in topology.atoms}
    columns = [[found[r, name] for r in range(topology.n_residues)] for name in ("N", "CA", "C")]
    n, ca, c = (torch.as_tensor(trajectory.xyz[:, column].astype(float) * 10) for column in columns)
    rotations, positions = frames_from_backbone(n, ca, c)
    system = _residues(tuple(residue.name for residue in topology.residues))
    return system, positions.numpy(), rotations.numpy()


@pytest.fixture(scope="module")
def adk(shared_data: Path) -> dict[str, Samples]:
    folder = shared_data / "adk_transition"
    path = mdtraj.load(str(folder / "adk_dims.dcd"), top=str(folder / "adk.psf"), stride=7)
    states = {name: _samples(mdtraj.load(str(folder / f"adk_{name}.pdb"))) for name in ("closed", "open")}
    return states | {"path": _samples(path)}


def test_two_states_of_adenylate_kinase_are_as_far_apart_as_published(adk: dict[str, Samples]) -> None:
    closed, opened = adk["closed"][1], adk["open"][1]
    assert ca_rmsd(closed, opened[0]) == pytest.approx([6.91], abs=0.01)
    # 0.6899 by TM-align's superposition in Zheng et al. 2024; a search may miss the last digits.
    assert tm_score(closed, opened[0]) == pytest.approx([0.690], abs=0.002)
    assert tm_score(opened, closed[0]) == pytest.approx(tm_score(closed, opened[0]), abs=1e-3)
    assert radius_of_gyration(opened) > radius_of_gyration(closed) + 2.0


def test_a_path_visits_both_ends(adk: dict[str, Samples]) -> None:
    states = {name: adk[name][1][0] for name in ("closed", "open")}
    visits = state_visits(adk["path"][1], states, within=2.0)
    assert visits["closed"].rmsd[0] < 1.0 and visits["open"].rmsd[-1] < 1.0
    assert 0.0 < visits["closed"].fraction < 0.5 and 0.0 < visits["open"].fraction < 0.9
    assert visits["closed"].tm_score[0] > 0.95 > 0.75 > visits["closed"].tm_score[-1]


def test_tm_score_finds_the_common_core_wherever_the_rest_goes() -> None:
    generator = np.random.default_rng(0)
    chain = np.cumsum(generator.normal(size=(80, 3)), axis=0) * 3.8
    moved = chain @ Rotation.random(random_state=1).as_matrix().T + 11.0
    assert tm_score(moved[None], chain) == pytest.approx([1.0])
    half = chain.copy()
    half[40:] += 500.0
    assert 0.5 <= tm_score(half[None], chain)[0] < 0.52
    sites = np.arange(40)
    assert ca_rmsd(half[None], chain, sites) == pytest.approx([0.0], abs=1e-6)


def test_real_structures_are_sound(adk: dict[str, Samples], shared_data: Path) -> None:
    for samples in (*adk.values(), _samples(mdtraj.load(str(shared_data / "bioemu_tests" / "chignolin.pdb")))):
        found = soundness(*samples)
        assert found.sound.all()
        assert (found.ca_clashes == 0).all() and (found.atom_clashes == 0).all()
    assert soundness(*adk["closed"]).ca_steps_near[0] > 0.98


def test_deliberately_bad_sample_is_flagged(shared_data: Path) -> None:
    found = soundness(*_samples(mdtraj.load(str(shared_data / "bioemu_tests" / "cln_bad_sample.pdb"))))
    assert found.sound.tolist() == [False]
    assert found.shortest_ca_step[0] < 2.6 and found.ca_steps_near[0] < 0.5


def test_each_kind_of_damage_is_told_apart(adk: dict[str, Samples]) -> None:
    system, positions, rotations = adk["closed"]
    torn, clashing = positions.copy(), positions.copy()
    torn[0, 100:] += [60.0, 0.0, 0.0]
    clashing[0, 10] = positions[0, 150] + [0.1, 0.0, 0.0]
    turned = rotations.copy()
    turned[0, 50] = turned[0, 50] @ Rotation.from_euler("z", 180, degrees=True).as_matrix()
    broken = {name: soundness(system, x, r) for name, (x, r) in
              {"torn": (torn, rotations), "clash": (clashing, rotations), "turned": (positions, turned)}.items()}  # fmt: skip
    assert not any(found.sound[0] for found in broken.values())
    assert broken["torn"].longest_ca_step[0] > 40 and broken["torn"].atom_clashes[0] == 0
    assert broken["clash"].ca_clashes[0] >= 1 and broken["clash"].atom_clashes[0] >= 1
    assert broken["turned"].longest_ca_step[0] < 4.5 and broken["turned"].longest_peptide_bond[0] > 2.0
    lenient = PhysicalLimits(ca_step=100.0, peptide_bond=100.0)
    assert soundness(system, torn, rotations, lenient).sound[0]


def test_backbone_of_frames_lies_on_the_atoms_they_came_from(shared_data: Path) -> None:
    trajectory = mdtraj.load(str(shared_data / "adk_transition" / "adk_closed.pdb"))
    system, positions, rotations = _samples(trajectory)
    nitrogen = trajectory.topology.select("name N")
    rebuilt = backbone_of(system, positions, rotations)
    assert rebuilt.shape == (1, 214, 5, 3)
    assert np.linalg.norm(rebuilt[0, :, 0] - trajectory.xyz[0, nitrogen] * 10, axis=-1).max() < 0.1


def test_divergence_of_distances_vanishes_for_the_same_frames_and_sees_a_shift(adk: dict[str, Samples]) -> None:
    system = _residues(("ALA",) * 12)
    generator = np.random.default_rng(2)
    md = generator.normal(size=(4000, 12, 3))
    pairs = distant_pairs(system)
    assert len(pairs) == 9 * 10 // 2
    same = distance_divergence(md, md, np.zeros(4000, int), pairs)
    assert same.divergence == pytest.approx(np.zeros(len(pairs)), abs=1e-12)
    # 50 bins, 2,000 frames each: (50 - 1)/8 · (2/2000) = 0.006 nat at most.
    assert 0.001 < same.mean_floor < 0.01
    shifted = distance_divergence(md * 1.5, md, np.zeros(4000, int), pairs)
    assert shifted.mean > 10 * shifted.mean_floor
    with pytest.raises(UserError, match="two halves"):
        distance_divergence(md, md[:1], np.zeros(1, int), pairs)


def test_contact_map_is_the_fraction_of_samples_in_contact() -> None:
    line = np.stack([np.arange(5.0) * spacing for spacing in (1.0, 3.0)])
    positions = np.stack([line, np.zeros_like(line), np.zeros_like(line)], axis=-1)
    contacts = contact_map(positions, cutoff=3.5)
    assert contacts[0].tolist() == [1.0, 1.0, 0.5, 0.5, 0.0]
    assert np.array_equal(contacts, contacts.T)


def test_samples_of_other_residues_are_refused(adk: dict[str, Samples]) -> None:
    system, positions, rotations = adk["closed"]
    with pytest.raises(UserError, match="one N"):
        ca_rmsd(positions, positions[0, :-1])
    with pytest.raises(UserError, match="rotations"):
        soundness(system, positions, rotations[:, :-1])
