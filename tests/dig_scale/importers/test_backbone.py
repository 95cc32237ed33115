"""Structures and trajectories -> residue frames, and back to atoms that others can read. Real files where they stand."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import gemmi
import mdtraj
import numpy as np
import pytest
import torch

from dig_scale import records
from dig_scale.errors import InvalidSystemError, UserError
from dig_scale.geometry import rotations
from dig_scale.importers.backbone import backbone_of, backbone_of_trajectory, full_backbone, read_backbone
from dig_scale.importers.backbone_file import BackboneOptions, Differences, read_models
from dig_scale.importers.sequence import backbone, parse_sequence
from dig_scale.system import Frames, System, SystemKind

TWO_STATES = "bioemu_bench/multiconf_benchmark_0.1/domainmotion/reference"


def pdb_lines(sequence: str, first: int = 1, chain: str = "A") -> list[str]:
    names = parse_sequence(sequence)
    return [
        pdb_line(serial, atom, names[residue], chain, residue + first, place)
        for serial, (atom, residue, place) in enumerate(backbone(names), 1)
    ]


def pdb_line(serial: int, atom: str, residue: str, chain: str, number: int, place: np.ndarray) -> str:
    coordinates = "".join(f"{x:8.3f}" for x in place)
    return (
        f"ATOM  {serial:5d}  {atom:<3} {residue:>3} {chain}{number:4d}    {coordinates}  1.00  0.00           {atom[0]}"
    )


def written(path: Path, *parts: list[str]) -> Path:
    path.write_text("\n".join(line for part in parts for line in part) + "\n")
    return path


def torsions(atoms: np.ndarray) -> np.ndarray:
    """phi and psi [2, F, N - 1] in rad of N, CA, C [F, N, 3, 3]: psi of residue i and phi of residue i + 1."""
    n, ca, c = (atoms[:, :, k] for k in range(3))
    psi = dihedral(n[:, :-1], ca[:, :-1], c[:, :-1], n[:, 1:])
    return np.stack([dihedral(c[:, :-1], n[:, 1:], ca[:, 1:], c[:, 1:]), psi])


def dihedral(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    axis = (c - b) / np.linalg.norm(c - b, axis=-1, keepdims=True)
    before, after = np.cross(b - a, axis), np.cross(axis, d - c)
    return np.arctan2((np.cross(before, after) * axis).sum(-1), (before * after).sum(-1))


def turned(difference: np.ndarray) -> np.ndarray:
    return np.abs((difference + np.pi) % (2 * np.pi) - np.pi)


@pytest.fixture(scope="module")
def two_states(shared_data: Path) -> list[Path]:
    return sorted((shared_data / TWO_STATES / "P69441").glob("*.pdb"))


def test_frames_round_trip_every_pdb(
    shared_data: Path, record_testsuite_property: Callable[[str, object], None]
) -> None:
    files, ideal = sorted(shared_data.rglob("*.pdb")), {}
    assert len(files) > 50
    for path in files:
        system, frames = read_backbone(path.stem, [path])
        models = read_models(path)
        assert len(models) == frames.n_frames and system.kind is SystemKind.PROTEIN
        source = torch.from_numpy(np.stack([model.atoms for model in models]))
        turned_by, placed = torch.from_numpy(frames.rotations), torch.from_numpy(frames.positions)
        local = rotations.to_local(turned_by, placed, source)
        assert float((rotations.to_global(turned_by, placed, local) - source).abs().max()) < 1e-3, path
        np.testing.assert_allclose(np.linalg.det(frames.rotations), 1, atol=1e-9, err_msg=str(path))
        # In a residue's own frame CA is at 0, N on the first axis and C in the first plane.
        assert float(local[..., 1, :].abs().max()) < 1e-9 and float(local[..., 0, 1:].abs().max()) < 1e-9
        assert float(local[..., 2, 2].abs().max()) < 1e-9 and float(local[..., 2, 1].min()) > 0
        error = (rotations.backbone_from_frames(turned_by, placed)[..., :3, :] - source).norm(dim=-1)
        ideal[path.name] = (float((error**2).mean().sqrt()), float(error.max()))
    worst = max(ideal, key=lambda name: ideal[name][0])
    root_mean_square = float(np.sqrt(np.mean([value[0] ** 2 for value in ideal.values()])))
    record_testsuite_property("ideal_geometry_rms_angstrom", root_mean_square)
    record_testsuite_property(
        "ideal_geometry_worst_file", f"{worst}: rms {ideal[worst][0]:.3f}, max {ideal[worst][1]:.3f} Å"
    )
    assert root_mean_square < 0.1, ideal[worst]


def test_two_structures_of_one_sequence_are_two_frames(two_states: list[Path]) -> None:
    system, frames = read_backbone("adk", two_states)
    assert (system.n_sites, frames.n_frames, len(system.bonds)) == (214, 2, 213)
    assert set(system.atom_names) == {"CA"} and not system.elements.any() and system.mobile.all()
    assert system.residue_names[:4] == ("MET", "ARG", "ILE", "ILE")
    assert frames.rotations is not None and frames.rotations.shape == (2, 214, 3, 3)
    assert system.origin["left_out"] == [] and system.origin["source"] == [path.name for path in two_states]
    # Nothing of the fold is in the descriptor: neighbours 3.8 Å apart, the chain stretched.
    steps = np.linalg.norm(np.diff(system.reference_positions, axis=0), axis=1)
    np.testing.assert_allclose(steps, 3.8, atol=1e-6)
    assert np.ptp(system.reference_positions[:, 0]) == pytest.approx(3.4 * 213)
    assert System.from_dict(system.to_dict()).system_id == system.system_id


def test_residues_of_one_structure_alone_are_left_out_and_reported(shared_data: Path) -> None:
    paths = sorted((shared_data / TWO_STATES / "P0AEQ3").glob("*.pdb"))
    system, _ = read_backbone("gln", paths)
    assert system.n_sites == 220 and len(system.origin["left_out"]) == 3
    assert "1GGG_A.pdb: chain 1 LYS 1 (not in this structure)" in system.origin["left_out"]


def test_structures_that_differ_in_sequence_are_refused_by_name(shared_data: Path) -> None:
    paths = sorted((shared_data / TWO_STATES / "P0DP23").glob("*.pdb"))
    with pytest.raises(UserError, match=r"ASN 58 is ASP in 5GGM_A\.pdb"):
        read_backbone("calmodulin", paths)
    system, _ = read_backbone("calmodulin", paths, BackboneOptions(differences=Differences.AS_FIRST))
    assert system.origin["differences"] == ["chain 1 ASN 58 is ASP in 5GGM_A.pdb"]
    first, _ = read_backbone("calmodulin", paths[:1])
    assert system.residue_names == first.residue_names


def test_models_of_an_nmr_file_are_frames(shared_data: Path) -> None:
    system, frames = read_backbone("2EQQ", [shared_data / "mdtraj_tests" / "2EQQ.pdb"])
    assert (system.n_sites, frames.n_frames) == (28, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = mdtraj.load(str(shared_data / "mdtraj_tests" / "2EQQ.pdb"))
    centres = 10 * theirs.xyz[:, theirs.topology.select("name CA")]
    np.testing.assert_allclose(frames.positions, centres, atol=1e-3)


def test_mmcif_reads_as_pdb_does(two_states: list[Path], tmp_path: Path) -> None:
    gemmi.read_structure(str(two_states[0])).make_mmcif_document().write_file(str(tmp_path / "a.cif"))
    system, frames = read_backbone("adk", [tmp_path / "a.cif"])
    same, expected = read_backbone("adk", [two_states[0]])
    assert system.system_id == same.system_id
    np.testing.assert_allclose(frames.positions, expected.positions, atol=1e-3)


def test_a_gap_in_the_numbering_stays_and_carries_no_bond(tmp_path: Path) -> None:
    lines = [line for line in pdb_lines("GAVLIK") if int(line[22:26]) not in (3, 4)]
    system, _ = read_backbone("gap", [written(tmp_path / "a.pdb", lines)])
    assert system.residue_index.tolist() == [0, 1, 4, 5]
    assert system.bonds.tolist() == [[0, 1], [2, 3]]


def test_chains_are_chosen_by_name_and_matched_in_order(tmp_path: Path) -> None:
    first = written(tmp_path / "a.pdb", pdb_lines("GAVL"), ["TER"], pdb_lines("KKK", chain="B"), ["END"])
    second = written(tmp_path / "b.pdb", pdb_lines("GAVL", chain="X"), ["END"])
    both, _ = read_backbone("both", [first])
    assert both.chain_index.tolist() == [0] * 4 + [1] * 3 and len(both.bonds) == 5
    assert len(set(both.residue_index.tolist())) == 7
    system, frames = read_backbone("one", [first, second], BackboneOptions(chains=("A",), chains_of={"b.pdb": ("X",)}))
    assert (system.n_sites, frames.n_frames) == (4, 2)
    with pytest.raises(UserError, match=r"a\.pdb: no chain 'C'; its chains are 'A', 'B'"):
        read_backbone("none", [first], BackboneOptions(chains=("C",)))


def test_modified_residues_go_by_their_parent_and_others_are_refused_by_name(tmp_path: Path) -> None:
    lines = pdb_lines("GMV")
    system, _ = read_backbone("mse", [written(tmp_path / "a.pdb", [line.replace("MET", "MSE") for line in lines])])
    assert system.residue_names == ("GLY", "MET", "VAL") and system.origin["replaced"] == ["A MSE 2 -> MET"]
    strange = written(tmp_path / "b.pdb", [line.replace("MET", "UNK") for line in lines])
    with pytest.raises(UserError, match=r"b\.pdb: A UNK 2 has a backbone"):
        read_backbone("unk", [strange])
    system, _ = read_backbone("unk", [strange], BackboneOptions(leave_out=("UNK",)))
    assert system.residue_names == ("GLY", "VAL") and "UNK 2 (left out as asked)" in system.origin["left_out"][0]


def test_a_residue_without_its_backbone_is_left_out_and_reported(tmp_path: Path) -> None:
    lines = [line for line in pdb_lines("GAVL") if not (line[12:16].strip() == "C" and int(line[22:26]) == 2)]
    system, _ = read_backbone("x", [written(tmp_path / "a.pdb", lines, ["END"])])
    assert system.residue_names == ("GLY", "VAL", "LEU") and system.origin["left_out"] == ["a.pdb: A ALA 2 (no C)"]


def test_the_alternative_of_highest_occupancy_is_read(tmp_path: Path) -> None:
    lines = []
    for line in pdb_lines("GAV"):
        if int(line[22:26]) != 2:
            lines.append(line)
            continue
        for letter, occupancy, shift in (("A", 0.3, 0.0), ("B", 0.7, 1.0)):
            place = np.array([float(line[k : k + 8]) for k in (30, 38, 46)]) + shift
            moved = "".join(f"{x:8.3f}" for x in place)
            lines.append(f"{line[:16]}{letter}{line[17:30]}{moved}{occupancy:6.2f}{line[60:]}")
    _, frames = read_backbone("alt", [written(tmp_path / "a.pdb", lines)])
    _, plain = read_backbone("alt", [written(tmp_path / "b.pdb", pdb_lines("GAV"))])
    np.testing.assert_allclose(frames.positions - plain.positions, [[[0] * 3, [1] * 3, [0] * 3]], atol=1e-9)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda lines: [], r"bad\.pdb: the file is empty"),
        (lambda lines: ["HEADER"], r"bad\.pdb: holds no ATOM records"),
        (lambda lines: [*lines[:7], lines[7][:40]], r"bad\.pdb: line 8 \(O   ALA A   2\): coordinates"),
        (lambda lines: lines[:6], r"bad\.pdb: line 6 \(ALA A   2 \): the file is cut off"),
        (lambda lines: ["MODEL        1", *lines], r"bad\.pdb: line 17 .*cut off"),
        (lambda lines: [*lines[:5], f"{lines[5][:30]}     nan{lines[5][38:]}", *lines[6:]], r"line 6 \(CA  ALA A   2\)"),
        (lambda lines: [*lines[:5], f"{lines[5][:30]}********{lines[5][38:]}", *lines[6:]], r"line 6 .*three finite numbers"),
        (lambda lines: [*lines, *lines], r"stands twice in its chain"),
        (lambda lines: [line.replace("ATOM  ", "HETATM") for line in lines], r"no amino-acid residue"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_with_its_line_or_residue(broken, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_backbone("bad", [written(tmp_path / "bad.pdb", broken(pdb_lines("GAVL")))])


def test_a_damaged_mmcif_and_other_names_are_refused(tmp_path: Path, two_states: list[Path]) -> None:
    document = gemmi.read_structure(str(two_states[0])).make_mmcif_document().as_string()
    (tmp_path / "cut.cif").write_text(document[: document.index("_atom_site.id") + 20_000])
    with pytest.raises(UserError, match=r"cut\.cif: "):
        read_backbone("cut", [tmp_path / "cut.cif"])
    (tmp_path / "plain.txt").write_text("x")
    with pytest.raises(UserError, match=r"plain\.txt: no known format"):
        read_backbone("text", [tmp_path / "plain.txt"])
    with pytest.raises(UserError, match="no file at"):
        read_backbone("absent", [tmp_path / "absent.pdb"])


def test_an_all_atom_system_gives_the_frames_of_its_file(shared_data: Path) -> None:
    path = shared_data / "timewarp" / "implicit-2olx-traj-state0.pdb"
    direct, expected = read_backbone("nnqq", [path])
    topology = mdtraj.load(str(path))
    atoms = _system_of(topology)
    frames = Frames(
        10 * topology.xyz.astype(float), np.array([5.0]), energy=np.array([1.0]), labels={"a": np.array([2.0])}
    )
    system, found = backbone_of(atoms, frames)
    assert system.residue_names == direct.residue_names and system.bonds.tolist() == direct.bonds.tolist()
    np.testing.assert_allclose(found.rotations, expected.rotations, atol=2e-5)
    assert found.time_ps.tolist() == [5.0] and found.labels["a"].tolist() == [2.0] and found.energy is None


def _system_of(trajectory: mdtraj.Trajectory) -> System:
    atoms = list(trajectory.topology.atoms)
    n = len(atoms)
    return System(
        name="nnqq",
        kind=SystemKind.MOLECULE,
        elements=np.array([atom.element.atomic_number for atom in atoms]),
        atom_names=tuple(atom.name for atom in atoms),
        residue_names=tuple(atom.residue.name for atom in atoms),
        residue_index=np.array([atom.residue.index for atom in atoms]),
        chain_index=np.zeros(n),
        bonds=np.zeros((0, 2)),
        bond_orders=np.zeros(0),
        formal_charges=np.zeros(n),
        stereocentres=np.zeros((0, 4)),
        mobile=np.ones(n, dtype=bool),
        reference_positions=10 * trajectory.xyz[0].astype(float),
    )


def test_a_trajectory_gives_frames_of_its_residues(shared_data: Path) -> None:
    folder = shared_data / "adk_transition"
    system, frames = backbone_of_trajectory("adk", folder / "adk.psf", [folder / "adk_dims.dcd"], frame_spacing_ps=2.0)
    assert (system.n_sites, frames.n_frames, len(system.bonds)) == (214, 98, 213)
    assert frames.time_ps[:3].tolist() == [0.0, 2.0, 4.0] and "HIS" in system.residue_names
    closed, ends = read_backbone("adk", [folder / "adk_closed.pdb"])
    assert closed.residue_names == system.residue_names
    # The path starts 0.5 Å from the closed structure: neighbours' turns agree.
    assert frames.rotations is not None and ends.rotations is not None
    steps = [r[:, :-1].swapaxes(-1, -2) @ r[:, 1:] for r in (frames.rotations[:1], ends.rotations)]
    angle = rotations.log(torch.from_numpy(steps[0].swapaxes(-1, -2) @ steps[1])).norm(dim=-1)
    assert float(angle.median()) < 0.3


def test_a_molecule_across_a_periodic_wall_is_made_whole(shared_data: Path, tmp_path: Path) -> None:
    loaded = mdtraj.load(str(shared_data / "timewarp" / "implicit-2olx-traj-state0.pdb"))
    edge = 1.6
    loaded.unitcell_lengths, loaded.unitcell_angles = np.full((1, 3), edge), np.full((1, 3), 90.0)
    _, expected = _backbone_through_xtc(loaded, tmp_path / "whole")
    loaded.xyz = (loaded.xyz + 0.37) % edge
    system, found = _backbone_through_xtc(loaded, tmp_path / "wrapped")
    np.testing.assert_allclose(found.rotations, expected.rotations, atol=0.03)
    np.testing.assert_allclose(np.diff(found.positions, axis=1), np.diff(expected.positions, axis=1), atol=0.05)
    assert len(system.bonds) == 3


def _backbone_through_xtc(loaded: mdtraj.Trajectory, stem: Path) -> tuple[System, Frames]:
    loaded.save_pdb(str(stem.with_suffix(".pdb")))
    loaded.save_xtc(str(stem.with_suffix(".xtc")))
    return backbone_of_trajectory("x", stem.with_suffix(".pdb"), [stem.with_suffix(".xtc")])


def test_a_frame_that_is_not_finite_is_refused_by_number(shared_data: Path) -> None:
    loaded = mdtraj.load(str(shared_data / "timewarp" / "implicit-2olx-traj-state0.pdb"))
    positions = np.repeat(10 * loaded.xyz.astype(float), 3, axis=0)
    positions[2, loaded.topology.select("resid 1 and name CA")] = np.nan
    with pytest.raises(InvalidSystemError, match="frame 2: chain 1 ASN 2"):
        backbone_of(_system_of(loaded), Frames(positions, np.arange(3.0)))


def test_full_backbone_opens_in_other_programs_and_keeps_phi_and_psi(two_states: list[Path], tmp_path: Path) -> None:
    system, frames = read_backbone("adk", two_states)
    assert frames.rotations is not None
    atoms, positions = full_backbone(system, frames.positions, frames.rotations)
    glycines = system.residue_names.count("GLY")
    assert positions.shape == (2, 5 * 214 - glycines, 3) and len(atoms.bonds) == len(positions[0]) - 1
    assert len(atoms.stereocentres) == 214 - glycines
    top = records.write_topology_pdb(atoms, positions[0], tmp_path / "top.pdb")
    records.write_xtc(atoms, positions, tmp_path / "all.xtc")
    model = gemmi.read_structure(str(top))[0]
    assert gemmi.one_letter_code([residue.name for residue in model[0]]).startswith("MRIILLGAPGAGKGTQ")
    ideal = torsions(positions_of_backbone(atoms, positions))
    read = np.array([[residue.find_atom(name, "*").pos.tolist() for name in ("N", "CA", "C")] for residue in model[0]])
    change = turned(torsions(read[None]) - ideal[:, :1])
    assert change.max() < 3e-3 and np.median(change) < 1e-3
    theirs = mdtraj.load(str(tmp_path / "all.xtc"), top=str(top))
    # XTC rounds to 0.01 Å: each of four atoms is off by up to 0.009 Å, 1.2 Å or more from the axis that it turns about.
    assert turned(mdtraj.compute_phi(theirs)[1] - ideal[0]).max() < 0.03
    assert turned(mdtraj.compute_psi(theirs)[1] - ideal[1]).max() < 0.03


def test_torsions_of_a_crystal_structure_change_by_no_more_than_its_own_angles(
    two_states: list[Path], record_testsuite_property: Callable[[str, object], None]
) -> None:
    system, frames = read_backbone("adk", two_states)
    assert frames.rotations is not None
    atoms, positions = full_backbone(system, frames.positions, frames.rotations)
    source = np.stack([read_models(path)[0].atoms for path in two_states])
    change = turned(torsions(positions_of_backbone(atoms, positions)) - torsions(source))
    to_n, to_c = source[:, :, 0] - source[:, :, 1], source[:, :, 2] - source[:, :, 1]
    cosine = (to_n * to_c).sum(-1) / np.linalg.norm(to_n, axis=-1) / np.linalg.norm(to_c, axis=-1)
    departure = np.arccos(cosine) - np.radians(110.497)
    # Bending N-CA-C by d moves C by 1.52 d, 1.2 Å from the axis of psi: up to 1.27 d; the rest is for lengths and other angles.
    record_testsuite_property("rms_torsion_change_degrees", float(np.degrees(np.sqrt((change**2).mean()))))
    assert np.sqrt((change**2).mean()) < 1.5 * np.sqrt((departure**2).mean())


def test_torsions_of_an_ideal_peptide_survive_the_way_through_a_file(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    system, frames = read_backbone("x", [written(tmp_path / "start.pdb", pdb_lines("GAVLIKMSTA"))])
    assert frames.rotations is not None
    bent = rotations.exp(0.2 * torch.randn(1, 10, 3, generator=generator, dtype=torch.float64)).numpy()
    atoms, positions = full_backbone(system, frames.positions, frames.rotations @ bent)
    path = records.write_topology_pdb(atoms, positions[0], tmp_path / "ideal.pdb")
    again, read = read_backbone("x", [path])
    assert read.rotations is not None and again.residue_names == system.residue_names
    found = full_backbone(again, read.positions, read.rotations)
    # PDB rounds to 0.001 Å, a tenth of XTC's grid.
    change = turned(torsions(positions_of_backbone(*found)) - torsions(positions_of_backbone(atoms, positions)))
    assert change.max() < 3e-3 and np.median(change) < 1e-3


def positions_of_backbone(atoms: System, positions: np.ndarray) -> np.ndarray:
    names = np.array(atoms.atom_names)
    return np.stack([positions[:, names == name] for name in ("N", "CA", "C")], axis=2)


def test_full_backbone_refuses_frames_of_another_system(two_states: list[Path]) -> None:
    system, frames = read_backbone("adk", two_states)
    assert frames.rotations is not None
    with pytest.raises(InvalidSystemError, match=r"expected \(S, 214, 3\)"):
        full_backbone(system, frames.positions[:, 1:], frames.rotations)
