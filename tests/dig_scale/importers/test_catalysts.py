"""Slabs with adsorbates: what ASE builds, what files say of roles and frames, and what is refused by file and frame."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc111, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.db import connect
from ase.io import write

from dig_scale.config import SurfaceSpec
from dig_scale.errors import UserError
from dig_scale.importers.catalyst import (
    CatalystOptions,
    TagMeaning,
    emt_lattice_constant,
    read_catalyst,
    read_catalysts,
    surface_system,
)
from dig_scale.system import SiteRole, System, SystemKind

N_SLAB = 16


def _slab(**changes: Any) -> Atoms:
    atoms = fcc111("Cu", (2, 2, 4), a=3.6, vacuum=7.0)
    add_adsorbate(atoms, "O", 1.2, "fcc")
    atoms.pbc = True
    for name, value in changes.items():
        setattr(atoms, name, value)
    return atoms


def _oc20_tags(atoms: Atoms) -> np.ndarray:
    layer = np.asarray(atoms.get_tags())
    return np.where(layer == 0, 2, np.where(layer > 2, 0, 1))


def _with_results(atoms: Atoms, energy: float) -> Atoms:
    copy = atoms.copy()
    copy.calc = SinglePointCalculator(copy, energy=energy, forces=np.full((len(copy), 3), energy))
    return copy


def _assert_usual_roles(system: System) -> None:
    assert system.kind is SystemKind.CATALYST and system.periodic == (True, True, False)
    assert system.roles.tolist() == [SiteRole.SUBSURFACE] * 8 + [SiteRole.SURFACE] * 8 + [SiteRole.ADSORBATE]
    assert (system.mobile == (system.roles != SiteRole.SUBSURFACE)).all()


def test_lattice_constant_of_emt_is_where_its_energy_is_lowest() -> None:
    constant = emt_lattice_constant("Pt")

    def energy(a: float) -> float:
        atoms = bulk("Pt", "fcc", a=a)
        atoms.calc = EMT()
        return float(atoms.get_potential_energy())

    assert energy(constant) < min(energy(constant - 2e-3), energy(constant + 2e-3))


def test_built_surface_has_roles_and_its_adsorbate_above_the_site() -> None:
    system = surface_system("cu-o", SurfaceSpec(metal="Cu", lattice_constant=3.6))
    _assert_usual_roles(system)
    above = system.reference_positions[-1] - system.reference_positions[15]
    assert above[2] == pytest.approx(1.2)
    assert system.origin["lattice_constant"] == {"from": "recipe", "a": 3.6}


@pytest.mark.parametrize(
    ("facet", "metal", "site"),
    [("fcc100", "Ni", "hollow"), ("fcc110", "Ag", "longbridge"), ("bcc110", "Fe", "hollow"), ("hcp0001", "Ru", "hcp")],
)
def test_other_facets_are_built(facet: Any, metal: str, site: str) -> None:
    system = surface_system("s", SurfaceSpec(metal=metal, facet=facet, site=site, fixed_layers=1))
    assert (system.roles == SiteRole.SUBSURFACE).sum() == 4


def test_molecule_stands_on_its_lowest_atom_and_is_bonded() -> None:
    system = surface_system("pt-co", SurfaceSpec(metal="Pt", adsorbate="CO", site="ontop", height=1.85))
    assert system.elements[-2:].tolist() == [8, 6] and system.bonds.tolist() == [[16, 17]]
    height = system.reference_positions[:, 2]
    assert height[17] - height[15] == pytest.approx(1.85) and height[16] > height[17]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"metal": "Xx"}, "no element"),
        ({"site": "hollow"}, "it has bridge, fcc, hcp, ontop"),
        ({"adsorbate": "unobtainium"}, "neither an element nor a molecule"),
        ({"fixed_layers": 5}, "the slab has 4 layers"),
        ({"metal": "Fe"}, "give surface.lattice_constant"),
    ],
)
def test_what_cannot_be_built_is_refused_by_field(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=rf"'s'.*{problem}"):
        surface_system("s", SurfaceSpec.model_validate({"metal": "Cu"} | changes))


@pytest.mark.parametrize("suffix", [".extxyz", ".traj", ".db"])
def test_frames_keep_energies_forces_and_tags_of_any_format(tmp_path: Path, suffix: str) -> None:
    atoms, path = _slab(), tmp_path / f"run{suffix}"
    atoms.set_tags(_oc20_tags(atoms))
    frames = []
    for k in range(3):
        atoms.positions[-1, 0] += 0.1 * k
        frames.append(_with_results(atoms, -1.5 * k))
    if suffix == ".db":
        for frame in frames:
            connect(path).write(frame)
    else:
        write(path, frames)
    system, read = read_catalyst("cu-o", path, CatalystOptions(frame_spacing_ps=0.5))
    _assert_usual_roles(system)
    assert read.energy is not None and read.forces is not None
    assert read.energy.tolist() == [0.0, -1.5, -3.0] and read.time_ps.tolist() == [0.0, 0.5, 1.0]
    assert read.forces[2, 0, 0] == -3.0
    assert np.allclose(read.positions[2], frames[2].positions, atol=1e-6)
    assert system.origin["roles"].startswith("tags")


def test_tags_of_ase_builders_are_told_from_those_of_open_catalyst(tmp_path: Path) -> None:
    atoms = _slab()
    write(tmp_path / "layers.traj", atoms)
    system, _ = read_catalyst("s", tmp_path / "layers.traj")
    _assert_usual_roles(system)
    assert "layers" in system.origin["roles"]
    thin = fcc111("Cu", (2, 2, 2), a=3.6, vacuum=7.0)
    add_adsorbate(thin, "O", 1.2, "fcc")
    write(tmp_path / "thin.traj", thin)
    roles = read_catalyst("s", tmp_path / "thin.traj")[0].roles.tolist()
    assert roles == [SiteRole.SUBSURFACE] * 4 + [SiteRole.SURFACE] * 4 + [SiteRole.ADSORBATE]


def test_roles_without_tags_come_from_constraints_or_layers_and_that_is_said(tmp_path: Path) -> None:
    atoms = _slab(constraints=FixAtoms(range(4)))
    atoms.set_tags(np.zeros(len(atoms)))
    write(tmp_path / "a.poscar", atoms, format="vasp")
    (tmp_path / "a.poscar").rename(tmp_path / "POSCAR")
    constrained, _ = read_catalyst("s", tmp_path / "POSCAR")
    assert (constrained.roles == SiteRole.SUBSURFACE).sum() == 4
    assert "constraints" in constrained.origin["roles"]
    atoms.set_constraint()
    write(tmp_path / "s.cif", atoms)
    layered, _ = read_catalyst("s", tmp_path / "s.cif")
    assert (layered.roles == SiteRole.SUBSURFACE).sum() == 8 and layered.roles[-1] == SiteRole.ADSORBATE
    assert "lower 2 of 4 layers" in layered.origin["roles"]
    given, _ = read_catalyst("s", tmp_path / "s.cif", CatalystOptions(fixed_layers=3, tags=TagMeaning.NONE))
    assert (given.roles == SiteRole.SUBSURFACE).sum() == 12


def test_slab_cut_by_the_cells_top_is_put_together(tmp_path: Path) -> None:
    atoms = _slab()
    thickness = np.ptp(atoms.positions[:, 2])
    atoms.positions[:, 2] += 9.0
    atoms.wrap()
    write(tmp_path / "cut.traj", atoms)
    system, frames = read_catalyst("s", tmp_path / "cut.traj")
    assert np.ptp(system.reference_positions[:, 2]) == pytest.approx(thickness)
    assert np.allclose(frames.positions[0], system.reference_positions)


def test_frames_are_the_images_nearest_to_the_first(tmp_path: Path) -> None:
    first, second = _slab(), _slab()
    second.positions[-1] += 0.3 + second.cell[0] - second.cell[1]
    write(tmp_path / "w.traj", [first, second])
    _, frames = read_catalyst("s", tmp_path / "w.traj")
    assert np.allclose(frames.positions[1, -1] - frames.positions[0, -1], 0.3)


def test_molecule_cut_by_a_wall_is_made_whole_with_its_bonds(tmp_path: Path) -> None:
    atoms = fcc111("Cu", (3, 3, 4), a=3.6, vacuum=9.0)
    guest = molecule("H2O")
    add_adsorbate(atoms, guest, 2.2, (0.0, 0.0), mol_index=0)
    atoms.pbc = True
    atoms.wrap()
    write(tmp_path / "water.traj", atoms)
    system, _ = read_catalyst("s", tmp_path / "water.traj")
    bonds = system.reference_positions[system.bonds[:, 1]] - system.reference_positions[system.bonds[:, 0]]
    assert system.bonds.tolist() == [[36, 37], [36, 38]]
    assert np.linalg.norm(bonds, axis=1).max() < 1.0
    assert set(system.residue_names[-3:]) == {"ADS"}


class _Data:
    """Pickles under the name of torch_geometric's class, with what its generations hold."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


class _Store(_Data):
    pass


_Data.__module__, _Data.__qualname__ = "torch_geometric.data.data", "Data"
_Store.__module__, _Store.__qualname__ = "torch_geometric.data.storage", "GlobalStorage"


def _pickled(value: Any) -> bytes:
    """Pickle with stand-ins where pickle looks for the classes; they are gone again when this returns."""
    packages = [ModuleType(name) for name in ("torch_geometric", "torch_geometric.data")]
    data, storage = ModuleType("torch_geometric.data.data"), ModuleType("torch_geometric.data.storage")
    data.Data, storage.GlobalStorage = _Data, _Store  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        for module in (*packages, data, storage):
            patch.setitem(sys.modules, module.__name__, module)
        return pickle.dumps(value)


def _fields(atoms: Atoms, sid: int, **more: Any) -> dict[str, Any]:
    tensors = {
        "pos": torch.tensor(atoms.positions, dtype=torch.float32),
        "atomic_numbers": torch.tensor(atoms.numbers, dtype=torch.float32),
        "tags": torch.tensor(_oc20_tags(atoms)),
        "cell": torch.tensor(np.array(atoms.cell), dtype=torch.float32)[None],
    }
    return tensors | {"natoms": len(atoms), "sid": sid, "edge_index": None} | more


def _write_lmdb(path: Path, values: list[bytes]) -> None:
    with lmdb.open(str(path), subdir=False, map_size=2**24) as environment, environment.begin(write=True) as writing:
        for k, value in enumerate(values):
            writing.put(str(k).encode(), value)
        writing.put(b"length", pickle.dumps(len(values)))


def test_open_catalyst_lmdb_is_read_without_torch_geometric(tmp_path: Path) -> None:
    atoms = _slab()
    relaxed = torch.tensor(atoms.positions + 0.05 * (_oc20_tags(atoms) > 0)[:, None], dtype=torch.float32)
    old = _Data(**_fields(atoms, 7, pos_relaxed=relaxed, y_init=-1.0, y_relaxed=-2.5))
    new = _Data(_store=_Store(_mapping=_fields(atoms, 8, y=-3.0, force=torch.zeros(len(atoms), 3))))
    path = tmp_path / "data.lmdb"
    _write_lmdb(path, [_pickled(old), _pickled(new), pickle.dumps(_fields(atoms, 8, y=-4.0, force=relaxed))])
    (first, relaxation), (second, dynamics) = read_catalysts(path)
    assert first.name == "data-7" and second.name == "data-8"
    _assert_usual_roles(first)
    assert relaxation.energy is not None and relaxation.energy.tolist() == [-2.5]
    # the initial structure is the reference, the relaxed one the frame
    assert np.allclose(first.reference_positions, atoms.positions, atol=1e-5)
    assert np.allclose(relaxation.positions[0] - first.reference_positions, 0.05 * first.mobile[:, None], atol=1e-5)
    assert dynamics.n_frames == 2 and dynamics.energy is not None and dynamics.energy.tolist() == [-3.0, -4.0]
    assert dynamics.forces is not None and np.allclose(dynamics.forces[1], relaxed)


class _Command:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


def test_lmdb_that_names_a_command_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    _write_lmdb(tmp_path / "bad.lmdb", [pickle.dumps({"pos": _Command(tmp_path / "made")})])
    with pytest.raises(UserError, match=r"bad\.lmdb, entry '0': its pickle names posix\.mkdir"):
        list(read_catalysts(tmp_path / "bad.lmdb"))
    assert not (tmp_path / "made").exists()


def test_lmdb_without_tags_is_refused_by_entry(tmp_path: Path) -> None:
    fields = _fields(_slab(), 1)
    _write_lmdb(tmp_path / "t.lmdb", [pickle.dumps({k: v for k, v in fields.items() if k != "tags"})])
    with pytest.raises(UserError, match=r"t\.lmdb, entry '0': has no tags"):
        list(read_catalysts(tmp_path / "t.lmdb"))


def _without_cell(atoms: Atoms) -> None:
    atoms.cell[:] = 0


def _not_finite(atoms: Atoms) -> None:
    atoms.positions[5, 1] = np.nan


def _another_element(atoms: Atoms) -> None:
    atoms.numbers[-1] = 7


def _fixed_atom_moved(atoms: Atoms) -> None:
    atoms.positions[0, 0] += 0.5


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (_without_cell, r"volume of 0 Å³"),
        (_not_finite, r"position of atom 5 is not finite"),
        (_another_element, r"another surface"),
        (_fixed_atom_moved, r"taken for fixed .* 0\.50 Å"),
    ],
)
def test_bad_frame_is_refused_by_file_and_number(tmp_path: Path, harm: Any, problem: str) -> None:
    good, bad = _slab(), _slab()
    harm(bad)
    write(tmp_path / "run.traj", [good, bad])
    with pytest.raises(UserError, match=rf"run\.traj, frame 1: .*{problem}"):
        read_catalyst("s", tmp_path / "run.traj")


def test_file_without_tags_and_without_a_strange_element_asks_which_atoms_adsorb(tmp_path: Path) -> None:
    clean = fcc111("Cu", (2, 2, 4), a=3.6, vacuum=7.0)
    clean.set_tags(np.zeros(N_SLAB))
    write(tmp_path / "clean.traj", clean)
    with pytest.raises(UserError, match=r"clean\.traj, frame 0: no tags"):
        read_catalyst("s", tmp_path / "clean.traj")
    system, _ = read_catalyst("s", tmp_path / "clean.traj", CatalystOptions(adsorbate=()))
    assert not (system.roles == SiteRole.ADSORBATE).any()


def test_bulk_crystal_and_unreadable_file_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "bulk.cif", bulk("Cu", cubic=True) * (2, 2, 2))
    with pytest.raises(UserError, match=r"bulk\.cif, frame 0: no vacuum"):
        read_catalyst("s", tmp_path / "bulk.cif")
    (tmp_path / "text.cif").write_text("not a crystal")
    with pytest.raises(UserError, match=r"text\.cif"):
        read_catalyst("s", tmp_path / "text.cif")
    with pytest.raises(UserError, match="no file"):
        read_catalyst("s", tmp_path / "absent.xyz")


def test_one_frame_without_energy_is_refused(tmp_path: Path) -> None:
    atoms = _slab()
    write(tmp_path / "e.traj", [_with_results(atoms, -1.0), atoms])
    with pytest.raises(UserError, match=r"e\.traj, frame 1: has no energy"):
        read_catalyst("s", tmp_path / "e.traj")
