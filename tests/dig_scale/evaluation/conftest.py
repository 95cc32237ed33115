"""Real molecules for the evaluation: alanine dipeptide as beads and with all atoms, BPTI for its side chains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import pytest
from scipy.signal import lfilter

from dig_scale.ensemble import Ensemble
from dig_scale.evaluation import ReferenceSet, reference_from_frames
from dig_scale.system import Frames, System, SystemKind


@dataclass(frozen=True)
class RealTrajectory:
    """A trajectory as mdtraj read it, and the same as System and positions [F, N, 3] Å."""

    trajectory: Any
    system: System
    positions: np.ndarray


@pytest.fixture(scope="session")
def alanine(shared_data: Path) -> RealTrajectory:
    """Alanine dipeptide, 22 atoms, 501 frames; its C-alpha is a stereocentre."""
    folder = shared_data / "mdtraj_tests"
    trajectory = mdtraj.load(str(folder / "frame0.xtc"), top=str(folder / "native.pdb"))
    system = system_of(trajectory, centres=[(8, 6, 10, 14)])
    return RealTrajectory(trajectory, system, 10 * trajectory.xyz)


@pytest.fixture(scope="session")
def bpti(shared_data: Path) -> RealTrajectory:
    """A protein of 58 residues, one frame."""
    trajectory = mdtraj.load(str(shared_data / "mdtraj_tests" / "bpti.pdb"))
    trajectory = trajectory.atom_slice(trajectory.topology.select("protein"))
    return RealTrajectory(trajectory, system_of(trajectory, centres=[]), 10 * trajectory.xyz)


@pytest.fixture(scope="session")
def beads(shared_data: Path) -> tuple[System, np.ndarray]:
    """Five beads of alanine dipeptide, and 10,000 frames of MD, every 10 ps, in Å."""
    positions = np.load(shared_data / "ala2_cg" / "ala2_coordinates.npy")
    system = System(
        name="ala2-beads",
        kind=SystemKind.MOLECULE,
        elements=[0] * 5,
        atom_names=("C", "N", "CA", "C", "N"),
        residue_names=("ACE", "ALA", "ALA", "ALA", "NME"),
        residue_index=[0, 1, 1, 1, 2],
        chain_index=[0] * 5,
        bonds=[(0, 1), (1, 2), (2, 3), (3, 4)],
        bond_orders=[1] * 4,
        formal_charges=[0] * 5,
        stereocentres=np.zeros((0, 4)),
        mobile=[True] * 5,
        reference_positions=positions[0],
    )
    return system, positions


def system_of(trajectory: Any, centres: list[tuple[int, int, int, int]]) -> System:
    """System of an mdtraj trajectory; each centre is ordered so that the first frame is right."""
    topology = trajectory.topology
    positions = 10 * trajectory.xyz[0]
    return System(
        name="real",
        kind=SystemKind.MOLECULE,
        elements=[atom.element.atomic_number for atom in topology.atoms],
        atom_names=tuple(atom.name for atom in topology.atoms),
        residue_names=tuple(atom.residue.name for atom in topology.atoms),
        residue_index=[atom.residue.index for atom in topology.atoms],
        chain_index=[atom.residue.chain.index for atom in topology.atoms],
        bonds=np.unique([sorted((a.index, b.index)) for a, b in topology.bonds], axis=0),
        bond_orders=[0] * len({tuple(sorted((a.index, b.index))) for a, b in topology.bonds}),
        formal_charges=[0] * topology.n_atoms,
        stereocentres=np.array([_right_handed(centre, positions) for centre in centres]).reshape(-1, 4),
        mobile=[True] * topology.n_atoms,
        reference_positions=positions,
    )


def ensemble_of(system: System, positions: np.ndarray, **known: Any) -> Ensemble:
    """Ensemble of given positions, with the provenance that a sampling run records."""
    provenance = {"solver": "heun", "steps": 20, "recipe": {"name": "test-recipe"}}
    return Ensemble(system, positions, np.arange(len(positions)), 1, provenance=provenance, **known)


def reference_of(system: System, *positions: np.ndarray, **known: Any) -> ReferenceSet:
    """Reference of one or more trajectories with 10 ps between frames."""
    return reference_from_frames(system, [Frames(x, 10.0 * np.arange(len(x))) for x in positions], **known)


def autoregressive(r: float, n: int, seed: int) -> np.ndarray:
    """A stationary AR(1) series [n] of unit variance and lag-one correlation r."""
    noise = np.random.default_rng(seed).normal(size=n) * np.sqrt(1 - r**2)
    noise[0] /= np.sqrt(1 - r**2)
    return lfilter([1.0], [1.0, -r], noise)


def _right_handed(centre: tuple[int, int, int, int], positions: np.ndarray) -> tuple[int, int, int, int]:
    site, a, b, c = centre
    u, v, w = (positions[k] - positions[site] for k in (a, b, c))
    return centre if u @ np.cross(v, w) > 0 else (site, a, c, b)
