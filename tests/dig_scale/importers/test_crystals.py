"""Crystal files become Systems and Frames: the same structure in any setting, every refusal with its place, no repeats."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, make_supercell
from ase.calculators.singlepoint import SinglePointCalculator

from dig_scale import records
from dig_scale.errors import UserError
from dig_scale.geometry import lattice
from dig_scale.importers.crystal import CrystalOptions, import_crystals, load_crystals
from dig_scale.importers.crystal_duplicates import Shape, Similarity, first_of_each
from dig_scale.system import Frames, SystemKind

ROCK_SALT = """data_salt
_symmetry_space_group_name_H-M 'F m -3 m'
_cell_length_a 5.64
_cell_length_b 5.64
_cell_length_c 5.64
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
Na1 Na 0 0 0
Cl1 Cl 0.5 0.5 0.5
"""


def distances(frames: Frames, frame: int, cutoff: float = 4.5) -> np.ndarray:
    cell = torch.from_numpy(frames.cell[frame : frame + 1])
    places = lattice.fractional(torch.from_numpy(frames.positions[frame : frame + 1]), cell)
    return np.sort(
        lattice.periodic_edges(places, cell, torch.ones(places.shape[:2], dtype=torch.bool), cutoff).distances
    )


def cif_text(atoms: Atoms, tmp_path: Path) -> str:
    path = tmp_path / "one.cif"
    ase.io.write(path, atoms)
    return path.read_text()


def write_table(path: Path, rows: list[dict[str, object]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def silicon(strain: float = 0.0, seed: int = 0) -> Atoms:
    atoms = bulk("Si", "diamond", 5.43, cubic=True)
    atoms.set_cell(atoms.cell.array * (1 + strain), scale_atoms=True)
    if seed:
        atoms.rattle(0.5, seed=seed)
    return atoms


def test_symmetry_of_a_cif_is_expanded_and_sites_are_sorted(tmp_path: Path) -> None:
    path = tmp_path / "salt.cif"
    path.write_text(ROCK_SALT)
    ((system, frames),), report = load_crystals([path])
    assert system.kind is SystemKind.CRYSTAL and system.name == "Na4Cl4"
    assert system.elements.tolist() == [11] * 4 + [17] * 4 and system.atom_names[:2] == ("Na", "Na")
    assert system.cell is None and system.periodic == (True, True, True) and system.mobile.all()
    near = distances(frames, 0, 3.0)
    assert len(near) == 48 and near == pytest.approx(2.82)
    assert report.read == report.kept == 1 and not report.rejected


def test_a_structure_is_the_same_in_any_setting_rotation_and_handedness(tmp_path: Path) -> None:
    atoms = silicon(seed=3)
    other = make_supercell(atoms, [[1, 2, 0], [0, 1, 0], [-1, 0, 1]])
    other.rotate(37, "z", rotate_cell=True)
    other.rotate(11, "x", rotate_cell=True)
    mirrored = other.copy()
    mirrored.set_cell(mirrored.cell.array[[1, 0, 2]])
    mirrored.translate([0.3, 11.0, -7.0])
    path = tmp_path / "all.extxyz"
    ase.io.write(path, [atoms, other, mirrored])
    ((_, frames),), report = load_crystals([path], CrystalOptions(similarity=None))
    assert report.kept == 3 and frames.cell is not None
    for k in range(3):
        np.testing.assert_allclose(frames.cell[k], frames.cell[k].T, atol=1e-12)
        assert np.linalg.det(frames.cell[k]) == pytest.approx(atoms.get_volume())
        places = frames.positions[k] @ np.linalg.inv(frames.cell[k])
        assert (places > -1e-9).all() and (places < 1 + 1e-9).all()
        np.testing.assert_allclose(distances(frames, k), distances(frames, 0), atol=1e-6)
    logs = lattice.log_cell(torch.from_numpy(frames.cell))
    torch.testing.assert_close(logs[1], logs[2], atol=1e-6, rtol=0)
    assert load_crystals([path])[1].duplicates == 2


def test_extended_xyz_and_poscar_bring_energies_and_labels(tmp_path: Path) -> None:
    atoms = silicon()
    atoms.info["gap"] = 1.1
    atoms.calc = SinglePointCalculator(atoms, energy=-43.5)
    ase.io.write(tmp_path / "one.extxyz", atoms)
    ((_, frames),), report = load_crystals([tmp_path / "one.extxyz"])
    assert frames.energy is not None and frames.energy.tolist() == [-43.5]
    assert frames.labels["gap"].tolist() == [1.1] and report.labels == ("gap",)
    ase.io.write(tmp_path / "POSCAR", bulk("Cu"), format="vasp")
    ((system, frames),), _ = load_crystals([tmp_path / "POSCAR"])
    assert system.name == "Cu" and frames.energy is None
    assert np.linalg.det(frames.cell[0]) == pytest.approx(bulk("Cu").get_volume())


def test_labels_of_a_table_are_its_numeric_columns_and_identifiers_are_not(tmp_path: Path) -> None:
    rows = [
        {
            "material_id": 7,
            "cif": cif_text(silicon(k * 0.1), tmp_path),
            "formula": "Si8",
            "energy_per_atom": -5.0 - k,
            "note": "a",
        }
        for k in range(2)
    ]
    path = write_table(tmp_path / "t.csv", rows)
    ((system, frames),), report = load_crystals([path])
    assert report.labels == ("energy_per_atom",) and system.name == "Si8"
    assert frames.labels["energy_per_atom"].tolist() == [-5.0, -6.0] and frames.energy.tolist() == [-40.0, -48.0]
    with pytest.raises(UserError, match=r"t\.csv: no column 'band_gap'"):
        load_crystals([path], CrystalOptions(labels=("band_gap",)))


def test_bad_rows_are_rejected_with_reason_row_and_identifier(tmp_path: Path) -> None:
    good = cif_text(silicon(), tmp_path)
    twice = silicon() + Atoms("Si", positions=[[0.1, 0, 0]])
    bad = {
        "flat": (re.sub(r"(_cell_length_a\s+)\S+", r"\g<1>0.001", good), "volume of 0.02"),
        "torn": (good[:-60] + "loop_ _x", "CIF cannot be read"),
        "nan": (good.replace("0.25", "nan"), "not finite"),
        "twice": (cif_text(twice, tmp_path), r"two sites are 0\.100 Å apart"),
        "empty": ("", "blocks"),
        "partial": (good.replace("1.0000\n", "0.5000\n", 1), "occupancy"),
    }
    rows = [{"material_id": "ok", "cif": good, "gap": "1.0"}]
    rows += [{"material_id": name, "cif": text, "gap": "1.0"} for name, (text, _) in bad.items()]
    rows += [{"material_id": "infinite", "cif": good, "gap": "inf"}, {"material_id": "no-gap", "cif": good, "gap": ""}]
    _, report = load_crystals([write_table(tmp_path / "t.csv", rows)])
    assert report.read == 9 and (report.kept, report.duplicates) == (1, 1)
    assert [one.source for one in report.rejected] == [
        f"t.csv row {k + 2} ({name})" for k, name in enumerate([*bad, "infinite"])
    ]
    for one, (_, reason) in zip(report.rejected, [*bad.values(), ("", "gap is 'inf'")], strict=True):
        assert re.search(reason, one.reason), one


def test_a_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path: Path) -> None:
    for name, text, message in [
        ("a.cif", "no cif at all", "not a CIF file"),
        ("a.csv", "x,y\n1,2\n", "no column 'cif'"),
        ("a.extxyz", "three\nlines\n", "ASE cannot read it"),
        ("POSCAR", "nothing", "ASE cannot read it"),
        ("a.pdb", "", "no known crystal format"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message) as caught:
            load_crystals([tmp_path / name])
        assert name in str(caught.value)
    with pytest.raises(UserError, match="no file"):
        load_crystals([tmp_path / "absent.cif"])
    molecule = tmp_path / "m.extxyz"
    ase.io.write(molecule, Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.7]]))
    with pytest.raises(UserError, match=r"no usable crystal structure.*periodic in 0 directions"):
        load_crystals([molecule])


def test_repeats_are_found_and_neighbours_in_volume_energy_or_shape_are_kept() -> None:
    def shape(atoms: Atoms, energy: float | None = None) -> Shape:
        return Shape(atoms.numbers, atoms.get_scaled_positions(), atoms.cell.array, energy)

    turned = silicon(0.003)
    turned.rotate(20, "y", rotate_cell=True)
    turned.translate([1.0, 0.2, 0.0])
    turned.rattle(0.02, seed=2)
    shapes = [shape(silicon()), shape(turned), shape(silicon(0.03)), shape(silicon(seed=5))]
    assert first_of_each(shapes, Similarity()) == [0, 0, 2, 3]
    assert first_of_each([shape(silicon(), -8.0), shape(turned, -7.0)], Similarity()) == [0, 1]
    assert first_of_each([shape(silicon(), -8.0), shape(turned, -7.96)], Similarity()) == [0, 0]


def test_stores_are_written_once_whole_and_read_back(tmp_path: Path) -> None:
    rows = [
        {"material_id": k, "cif": cif_text(silicon(seed=k + 1), tmp_path), "energy_per_atom": -5.0 - k}
        for k in range(3)
    ] + [{"material_id": 9, "cif": ROCK_SALT, "energy_per_atom": -3.0}]
    path, out = write_table(tmp_path / "t.csv", rows), tmp_path / "out"
    report = import_crystals([path], out, CrystalOptions(chunk_frames=2))
    assert report.stores == ("Na4Cl4/Na4Cl4.zarr", "Si8/Si8.zarr")
    groups, _ = load_crystals([path])
    for name, (system, frames) in zip(report.stores, groups, strict=True):
        held_system, held = records.read_trajectory_frames(out / name)
        assert held_system.system_id == system.system_id
        np.testing.assert_allclose(held.positions, frames.positions, atol=1e-4)
        np.testing.assert_array_equal(held.cell, frames.cell)
        np.testing.assert_array_equal(held.energy, frames.energy)
        np.testing.assert_array_equal(held.labels["energy_per_atom"], frames.labels["energy_per_atom"])
        assert "temperature_K" not in records.trajectory_origin(out / name)
    written = json.loads((out / "import.json").read_text())
    assert written["kept"] == 4 and written["volume_per_site"] == pytest.approx(report.volume_per_site)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("zarr.json")}
    assert import_crystals([path], out, CrystalOptions(chunk_frames=2)) == report
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("zarr.json")}
    write_table(path, rows[:2] + rows[3:])
    with pytest.raises(UserError, match="holds another import"):
        import_crystals([path], out)


def test_a_half_written_store_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "salt.cif"
    path.write_text(ROCK_SALT)
    store = tmp_path / "out" / import_crystals([path], tmp_path / "out").stores[0]
    root = store / "zarr.json"
    from dig_shards.trajectory import TrajectoryWriter

    attributes = records.trajectory_attributes(records.read_trajectory_system(store), records.trajectory_origin(store))
    specs = records.field_specs(8, ["positions", "cell"])
    shutil.rmtree(store)
    TrajectoryWriter.create(store, specs, attributes, 1).close()
    assert root.is_file()
    import_crystals([path], tmp_path / "out")
    assert records.read_trajectory_frames(store)[1].n_frames == 1


def test_real_carbon_structures_keep_their_physics(shared_data: Path, tmp_path: Path) -> None:
    with (shared_data / "carbon_24" / "val.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[:60]
    groups, report = load_crystals([write_table(tmp_path / "carbon.csv", rows)])
    assert report.read == 60 and not report.rejected and 0 < report.duplicates < 40
    assert sum(frames.n_frames for _, frames in groups) == report.kept
    assert 5.4 < report.volume_per_site < 9.1 and 0.1 < report.lattice_spread < 0.6
    for system, frames in groups:
        assert set(system.elements) == {6}
        for k in range(frames.n_frames):
            assert 1.2 < distances(frames, k)[0] < 1.7
        np.testing.assert_allclose(frames.energy, frames.labels["energy_per_atom"] * system.n_sites)
        assert (frames.labels["energy_per_atom"] < -154).all()


def test_perovskites_keep_all_their_labels(shared_data: Path, tmp_path: Path) -> None:
    with (shared_data / "perov_5" / "half.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[:40]
    groups, report = load_crystals([write_table(tmp_path / "perov.csv", rows)])
    assert report.labels == ("heat_all", "heat_ref", "dir_gap", "ind_gap")
    assert all(system.n_sites == 5 for system, _ in groups)
    kept = sorted(value for _, frames in groups for value in frames.labels["heat_all"])
    assert set(kept) <= {float(row["heat_all"]) for row in rows}
