"""Trajectories of others come in with their numbers, their units and their bonds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mdtraj
import numpy as np
import pytest

from dig_scale.errors import UserError
from dig_scale.importers.trajectory import ForceUnit, ImportOptions, LengthUnit, Sites, import_trajectory
from dig_scale.records import read_trajectory_frames, trajectory_origin, write_topology_pdb, write_xtc
from dig_scale.units import EV_PER_KCAL_MOL


def _beads(data: Path) -> tuple[Path, Path, ImportOptions]:
    folder = data / "ala2_cg"
    options = ImportOptions(
        temperature=300.0,
        sites=Sites.BEADS,
        length_unit=LengthUnit.ANGSTROM,
        forces=(folder / "ala2_forces.npy",),
        force_unit=ForceUnit.KCAL_PER_MOL_ANGSTROM,
        frame_spacing_ps=10.0,
        chunk_frames=700,
    )
    return folder / "ala2_cg.pdb", folder / "ala2_coordinates.npy", options


def test_beads_keep_every_frame_names_and_forces(shared_data: Path, tmp_path: Path) -> None:
    topology, coordinates, options = _beads(shared_data)
    (store,) = import_trajectory(topology, [coordinates], tmp_path, options)
    system, frames = read_trajectory_frames(store)
    assert system.elements.tolist() == [0] * 5
    assert system.atom_names == ("C", "N", "CA", "C", "N")
    assert system.residue_names == ("ACE", "ALA", "ALA", "ALA", "NME")
    assert system.bonds.tolist() == [[0, 1], [1, 2], [2, 3], [3, 4]]
    assert frames.n_frames == 10_000
    assert frames.time_ps[-1] == pytest.approx(99_990.0)
    np.testing.assert_allclose(frames.positions, np.load(coordinates), atol=6e-5)
    assert frames.forces is not None
    np.testing.assert_allclose(frames.forces, np.load(options.forces[0]) * EV_PER_KCAL_MOL, rtol=1e-5, atol=1e-6)
    assert trajectory_origin(store)["temperature_K"] == 300.0


def test_second_import_changes_nothing_and_another_one_is_refused(shared_data: Path, tmp_path: Path) -> None:
    topology, coordinates, options = _beads(shared_data)
    (store,) = import_trajectory(topology, [coordinates], tmp_path, options)
    before = (store / "zarr.json").stat().st_mtime_ns
    assert import_trajectory(topology, [coordinates], tmp_path, options) == [store]
    assert (store / "zarr.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="another import"):
        import_trajectory(topology, [coordinates], tmp_path, replace(options, temperature=310.0))


def test_array_without_unit_is_refused(shared_data: Path, tmp_path: Path) -> None:
    topology, coordinates, options = _beads(shared_data)
    with pytest.raises(UserError, match=r"ala2_coordinates\.npy.*unit"):
        import_trajectory(topology, [coordinates], tmp_path, replace(options, length_unit=None))
    with pytest.raises(UserError, match=r"ala2_forces\.npy.*unit"):
        import_trajectory(topology, [coordinates], tmp_path, replace(options, force_unit=None))


def test_array_of_another_system_is_refused(shared_data: Path, tmp_path: Path) -> None:
    topology, _, options = _beads(shared_data)
    np.save(tmp_path / "six.npy", np.zeros((3, 6, 3)))
    with pytest.raises(UserError, match=r"six\.npy.*expected \(frames, 5, 3\)"):
        import_trajectory(topology, [tmp_path / "six.npy"], tmp_path, replace(options, forces=()))


def test_frame_that_is_not_finite_is_named(shared_data: Path, tmp_path: Path) -> None:
    topology, coordinates, options = _beads(shared_data)
    array = np.load(coordinates)[:50].copy()
    array[17, 2, 1] = np.nan
    np.save(tmp_path / "bad.npy", array)
    with pytest.raises(UserError, match=r"bad\.npy.*frame 17"):
        import_trajectory(topology, [tmp_path / "bad.npy"], tmp_path, replace(options, forces=()))


def test_xtc_has_template_bonds_charges_and_its_own_times(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "mdtraj_tests"
    (store,) = import_trajectory(
        folder / "native.pdb", [folder / "frame0.xtc"], tmp_path, ImportOptions(temperature=300.0)
    )
    system, frames = read_trajectory_frames(store)
    expected = mdtraj.load(str(folder / "frame0.xtc"), top=str(folder / "native.pdb"))
    assert len(system.bonds) == 21
    assert set(system.bond_orders.tolist()) == {1, 2}
    assert len(system.stereocentres) == 1
    np.testing.assert_allclose(frames.positions, expected.xyz * 10, atol=1e-4)
    np.testing.assert_allclose(np.diff(frames.time_ps), np.diff(expected.time), rtol=1e-3)


def test_bonds_of_unknown_residues_come_from_distances(shared_data: Path, tmp_path: Path) -> None:
    source = (shared_data / "mdtraj_tests" / "native.pdb").read_text()
    odd = "\n".join(line for line in source.replace("ALA", "XAA").splitlines() if not line.startswith("CONECT"))
    (tmp_path / "odd.pdb").write_text(odd + "\n")
    options = ImportOptions(temperature=300.0, frame_spacing_ps=1.0)
    (store,) = import_trajectory(tmp_path / "odd.pdb", [tmp_path / "odd.pdb"], tmp_path, options)
    system, _ = read_trajectory_frames(store)
    inside = (np.array(system.residue_names)[system.bonds] == "XAA").all(axis=1)
    assert inside.sum() == 9


def test_selection_drops_water_and_makes_the_molecule_whole(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "mdtraj_tests"
    options = ImportOptions(temperature=300.0, frame_spacing_ps=1.0, selection="not water")
    dcd = folder / "alanine-dipeptide-explicit.dcd"
    (store,) = import_trajectory(folder / "alanine-dipeptide-explicit.pdb", [dcd], tmp_path, options)
    system, frames = read_trajectory_frames(store)
    assert system.n_sites == 22
    lengths = np.linalg.norm(frames.positions[:, system.bonds[:, 0]] - frames.positions[:, system.bonds[:, 1]], axis=-1)
    assert lengths.max() < 2.0


def test_format_without_times_asks_for_the_spacing(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "adk_transition"
    with pytest.raises(UserError, match=r"adk_dims\.dcd.*frame spacing"):
        import_trajectory(folder / "adk.psf", [folder / "adk_dims.dcd"], tmp_path, ImportOptions(temperature=300.0))


def test_models_of_a_pdb_file_are_frames(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "mdtraj_tests" / "2EQQ.pdb"
    (store,) = import_trajectory(path, [path], tmp_path, ImportOptions(temperature=300.0, frame_spacing_ps=1.0))
    assert read_trajectory_frames(store)[1].n_frames == 20


def test_written_topology_and_xtc_come_back(shared_data: Path, tmp_path: Path) -> None:
    topology, coordinates, options = _beads(shared_data)
    (store,) = import_trajectory(topology, [coordinates], tmp_path, options)
    system, frames = read_trajectory_frames(store)
    pdb = write_topology_pdb(system, frames.positions[0], tmp_path / "topology.pdb")
    xtc = write_xtc(system, frames.positions[:100], tmp_path / "samples.xtc")
    back = mdtraj.load(str(xtc), top=str(pdb))
    assert tuple(atom.name for atom in back.topology.atoms) == system.atom_names
    np.testing.assert_allclose(back.xyz * 10, frames.positions[:100], atol=6e-3)
