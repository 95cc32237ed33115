"""Samples of residue frames as backbones that MDTraj and gemmi read."""

from __future__ import annotations

from pathlib import Path

import gemmi
import mdtraj
import numpy as np
import pytest

from dig_scale.ensemble import Ensemble
from dig_scale.importers.backbone import read_backbone
from dig_scale.outputs.ensembles import write_ensemble_folder


@pytest.fixture(scope="module")
def folder(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both states of adenylate kinase as two samples."""
    structures = [shared_data / "adk_transition" / f"adk_{state}.pdb" for state in ("closed", "open")]
    system, frames = read_backbone("adk", structures)
    assert frames.rotations is not None
    positions, rotations = frames.positions.astype(np.float32), frames.rotations.astype(np.float32)
    ensemble = Ensemble(system, positions, np.arange(2), 1, rotations=rotations)
    return write_ensemble_folder(ensemble, tmp_path_factory.mktemp("adk"))


def test_mdtraj_reads_the_atoms_of_the_real_backbone(folder: Path, shared_data: Path) -> None:
    samples = mdtraj.load(str(folder / "samples.xtc"), top=str(folder / "topology.pdb"))
    for number, state in enumerate(("closed", "open")):
        real = mdtraj.load(str(shared_data / "adk_transition" / f"adk_{state}.pdb"))
        for name, near in (("CA", 0.02), ("C", 0.15), ("N", 0.15), ("CB", 0.4)):
            # the last residue's carbonyl has no neighbour to place it, hence C of all but it
            ours, theirs = (one.topology.select(f"name {name}") for one in (samples, real))
            away = 10 * np.linalg.norm(samples.xyz[number, ours] - real.xyz[0, theirs], axis=-1)
            assert np.median(away) < near, name


def test_gemmi_reads_the_sequence_and_no_beta_carbon_in_glycine(folder: Path) -> None:
    model = gemmi.read_structure(str(folder / "topology.pdb"))[0]
    residues = [residue for chain in model for residue in chain]
    assert len(residues) == 214
    assert all(residue.name != "GLY" or "CB" not in [atom.name for atom in residue] for residue in residues)
    assert {len(residue) for residue in residues} == {4, 5}
