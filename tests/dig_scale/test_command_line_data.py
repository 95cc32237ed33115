"""Doors for data and weights: recipes that import, what is wrong with bad files, published weights, relabelling."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from dig_scale import cli
from dig_scale.ensemble import read_ensemble
from dig_scale.records import evenly_spread, find_trajectories, read_trajectory_frames, trajectory_origin
from tests.dig_scale.model.published.published_files import (
    bioemu_config,
    bioemu_table,
    random_state,
    representation_arrays,
    save,
    structure_table,
    waves,
)


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: object
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a user gets for bad input."""
        assert self.code == 2, self
        (line,) = [line for line in self.err.splitlines() if not line.startswith("[")]
        assert line.startswith("error: ")
        return line


Command = Callable[..., Done]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in this process."""

    def run(*words: object) -> Done:
        monkeypatch.setattr("sys.argv", ["dig-scale", *map(str, words)])
        code: object = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        text = capsys.readouterr()
        return Done(code, text.out, text.err)

    return run


def recipe(folder: Path, reader: str, *files: Path | str, options: str = "{}") -> Path:
    listed = ", ".join(f'"{file}"' for file in files)
    path = folder / "given.toml"
    path.write_text(f'name = "given"\n[[imports]]\nreader = "{reader}"\nfiles = [{listed}]\noptions = {options}\n')
    return path


def crystal(x: str = "0.0", cell: str = "3.6 0 0 0 3.6 0 0 0 3.6") -> str:
    return f'2\nLattice="{cell}" Properties=species:S:1:pos:R:3 pbc="T T T"\nC {x} 0.0 0.0\nC 1.8 1.8 1.8\n'


def slab(x: str = "0.0", cell: str = "5 0 0 0 5 0 0 0 20") -> str:
    header = f'3\nLattice="{cell}" Properties=species:S:1:pos:R:3:tags:I:1 pbc="T T F"\n'
    return f"{header}Cu {x} 0.0 0.0 0\nCu 1.8 1.8 1.8 1\nO 1.8 1.8 3.2 2\n"


def test_a_recipe_with_imports_becomes_trajectories(command: Command, tmp_path: Path) -> None:
    (tmp_path / "two.extxyz").write_text(crystal() + crystal("0.4"))
    out = tmp_path / "out"
    done = command("import", recipe(tmp_path, "crystals", "two.extxyz"), "--out", out)
    assert done.code == 0, done.err
    assert f"trajectories: {out}" in done.out
    (store,) = find_trajectories(out)
    system, frames = read_trajectory_frames(store)
    assert (system.name, frames.n_frames) == ("C2", 2)
    again = command("import", recipe(tmp_path, "crystals", "two.extxyz"), "--out", out)
    assert again.code == 0


@pytest.mark.parametrize(
    ("reader", "text", "words"),
    [
        ("crystals", crystal("nan"), "bad.extxyz structure 1: positions or cell are not finite"),
        ("crystals", crystal(cell="3.6 0 0 0 3.6 0 0 0 0"), "bad.extxyz structure 1: the cell has a volume of 0 Å³"),
        ("crystals", crystal("abc"), "bad.extxyz: ASE cannot read it"),
        ("catalyst", slab("nan"), "bad.extxyz, frame 0: the position of atom 0 is not finite"),
        ("catalyst", slab(cell="5 0 0 0 5 0 0 0 0"), "bad.extxyz, frame 0: its cell has a volume of 0 Å³"),
        ("catalyst", slab() + slab("nan"), "bad.extxyz, frame 1: the position of atom 0 is not finite"),
    ],
)
def test_a_bad_structure_is_one_line_that_names_its_place(
    command: Command, tmp_path: Path, reader: str, text: str, words: str
) -> None:
    (tmp_path / "bad.extxyz").write_text(text)
    done = command("import", recipe(tmp_path, reader, "bad.extxyz"), "--out", tmp_path / "out")
    assert words in done.error
    assert not list(tmp_path.glob("out/**/*.zarr"))


def test_a_table_without_one_usable_row_says_why_for_the_first(command: Command, tmp_path: Path) -> None:
    numbers = "".join(f"_cell_length_{k} 3.6\n" for k in "abc") + "".join(
        f"_cell_angle_{k} 90\n" for k in ("alpha", "beta", "gamma")
    )
    sites = "loop_\n_atom_site_type_symbol\n_atom_site_label\n" + "".join(f"_atom_site_fract_{k}\n" for k in "xyz")
    row = {"id": "m1", "cif": f"data_C\n{numbers}{sites}C C0 nan 0 0\n", "energy": "1.0"}
    with (tmp_path / "table.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(row))
        writer.writeheader()
        writer.writerow(row)
    done = command("import", recipe(tmp_path, "crystals", "table.csv"), "--out", tmp_path / "out")
    assert "no usable crystal structure" in done.error
    assert "table.csv row 1 (m1): positions or cell" in done.error


def cut(source: Path, target: Path, atom: int, column: int = 35) -> Path:
    """The file up to the middle of an ATOM line."""
    lines = source.read_text().splitlines(keepends=True)
    row = [number for number, line in enumerate(lines) if line.startswith("ATOM")][atom]
    target.write_text("".join(lines[:row]) + lines[row][:column])
    return target


def test_a_truncated_structure_is_named_with_its_line(command: Command, tmp_path: Path, shared_data: Path) -> None:
    shared_data = shared_data.resolve()
    whole = shared_data / "bioemu_tests" / "chignolin.pdb"
    cut(whole, tmp_path / "cut.pdb", 40)
    backbone = command("import", recipe(tmp_path, "backbone", "cut.pdb"), "--out", tmp_path / "out")
    assert "cut.pdb: line 42 (C   TRP A   8)" in backbone.error
    poses = shared_data / "complexes" / "diffdock" / "6o5u_ligand.sdf"
    pocket = command("import", recipe(tmp_path, "pocket", "cut.pdb", poses), "--out", tmp_path / "out")
    assert "cut.pdb: line 42 (C   TRP A   8)" in pocket.error
    assert not list(tmp_path.glob("out/**/*.zarr"))


def test_a_ligand_of_another_frame_and_a_broken_molecule_are_named(
    command: Command, tmp_path: Path, shared_data: Path
) -> None:
    shared_data = shared_data.resolve()
    poses, targets = shared_data / "complexes" / "diffdock", shared_data / "fep_pockets"
    (protein,) = (targets / "cdk2" / "01_protein").rglob("*.pdb")
    elsewhere = recipe(tmp_path, "pocket", protein, targets / "syk" / "02_ligands" / "ligands.sdf")
    assert (
        f"{protein}: the protein has no atom within 10 Å"
        in command("import", elsewhere, "--out", tmp_path / "out").error
    )
    broken = recipe(tmp_path, "pocket", poses / "1cbr_protein.pdb", poses / "1cbr_ligand.sdf")
    assert "1cbr_ligand.sdf, molecule 1 (1cbr_ligand): atom 15 (C)" in command("import", broken).error
    assert not (tmp_path / "out").exists()


def test_an_entry_that_fails_leaves_none_of_its_stores_and_all_that_were_there(
    command: Command, tmp_path: Path, shared_data: Path
) -> None:
    whole, out = shared_data.resolve() / "bioemu_tests" / "chignolin.pdb", tmp_path / "out"
    shutil.copy(whole, tmp_path / "first.pdb")
    cut(whole, tmp_path / "second.pdb", 40)
    spacing = "{ frame_spacing_ps = 1.0 }"
    before = command("import", recipe(tmp_path, "trajectory", whole, whole, options=spacing), "--out", out)
    assert before.code == 0, before.err
    (kept,) = find_trajectories(out)
    failing = recipe(tmp_path, "trajectory", whole, "first.pdb", "second.pdb", options=spacing)
    assert "second.pdb" in command("import", failing, "--out", out).error
    assert find_trajectories(out) == [kept]
    words = ("import", whole, tmp_path / "first.pdb", tmp_path / "second.pdb", "--frame-spacing-ps", 1)
    assert "second.pdb" in command(*words, "--out", tmp_path / "other").error
    assert not list(tmp_path.glob("other/**/*.zarr"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("{ shells = 3 }", "no option 'shells'; options are"),
        ('{ cutoff = "far" }', "option 'cutoff': 'far': Input should be a valid number"),
        ("{ cutoff = nan }", "option 'cutoff': nan is not a finite number"),
        ('{ motion = "wild" }', "option 'motion': 'wild': Input should be 'fixed' or 'mobile'"),
        ("{ place = [1.0, 2.0, 3.0] }", "option 'place': cannot be given in a recipe"),
    ],
)
def test_an_option_that_does_not_fit_is_named(command: Command, tmp_path: Path, options: str, words: str) -> None:
    for name in ("protein.pdb", "ligands.sdf"):
        (tmp_path / name).write_text("")
    given = recipe(tmp_path, "pocket", "protein.pdb", "ligands.sdf", options=options)
    assert words in command("import", given, "--out", tmp_path / "out").error


def test_nested_options_are_checked_too(command: Command, tmp_path: Path) -> None:
    (tmp_path / "one.extxyz").write_text(crystal())
    given = recipe(tmp_path, "crystals", "one.extxyz", options="{ similarity = { nonsense = 1 } }")
    assert "option 'similarity': no entry 'nonsense'" in command("import", given).error


def test_what_a_single_file_must_be_is_said(command: Command, tmp_path: Path) -> None:
    (tmp_path / "only.pdb").write_text("")
    assert "is no recipe (.toml)" in command("import", tmp_path / "only.pdb").error
    assert "has no [[imports]]" in command("import", "tiny", "--out", tmp_path / "out").error
    assert "--name is an option of TOPOLOGY TRAJECTORY" in command("import", "tiny", "--name", "x").error
    assert "--set changes a recipe" in command("import", "a.pdb", "b.xtc", "--set", "name=x").error


def test_a_property_asked_of_a_server_must_be_a_number(command: Command, tmp_path: Path) -> None:
    ask = ("request", "http://127.0.0.1:1", "--system", "x", "--out", tmp_path / "out", "--condition")
    assert "--condition 'gap=wide': expected NAME=VALUE" in command(*ask, "gap=wide").error
    assert "finite number" in command(*ask, "gap=inf").error


def bioemu_files(folder: Path) -> Path:
    sizes = {"width": 16, "pair": 8, "hidden": 16, "heads": 2, "layers": 1}
    (folder / "config.yaml").write_text(bioemu_config("true", **sizes))
    np.savez(folder / "chain.npz", **representation_arrays(4))
    return save(waves(bioemu_table(structure_table(16, 8, 1, 2, 16), 1, 16, 8, 1), 0.1), folder / "weights.ckpt")


def test_published_weights_are_kept_sampled_and_replayed(command: Command, tmp_path: Path) -> None:
    file, folder = bioemu_files(tmp_path), tmp_path / "folder"
    done = command("import-weights", file, "--out", folder)
    assert done.out.startswith("bioemu: 45 tensors, 30,986 parameters")
    said = json.loads((folder / "published.json").read_text())
    assert (said["kind"], said["source"], said["format_version"]) == ("bioemu", "weights.ckpt", 1)
    file.unlink()
    ask = ("sample", folder, "--representation", tmp_path / "chain.npz", "--sequence", "GAVL")
    done = command(*ask, "--num", 2, "--out", tmp_path / "one")
    assert done.code == 0, done.err
    first = read_ensemble(tmp_path / "one")
    assert first.system.residue_names == ("GLY", "ALA", "VAL", "LEU")
    assert (tmp_path / "one" / "samples.xtc").is_file() and (tmp_path / "one" / "topology.pdb").is_file()
    replay = tmp_path / "one" / "init_states.npz"
    done = command(*ask, "--init-state", replay, "--out", tmp_path / "two")
    assert done.code == 0, done.err
    second = read_ensemble(tmp_path / "two")
    assert first.rotations is not None and second.rotations is not None
    assert second.positions.tobytes() == first.positions.tobytes()
    assert second.rotations.tobytes() == first.rotations.tobytes()
    assert "seed 1 -> 9" in command(*ask, "--num", 2, "--seed", 9, "--out", tmp_path / "one").error


def test_what_does_not_go_with_published_networks_is_named(command: Command, tmp_path: Path) -> None:
    folder, chain = tmp_path / "folder", tmp_path / "chain.npz"
    command("import-weights", bioemu_files(tmp_path), "--out", folder)
    assert "give AlphaFold2's output" in command("sample", folder).error
    assert "--steps is not for published" in command("sample", folder, "--steps", 3).error
    short = command("sample", folder, "--representation", chain, "--sequence", "GAV").error
    assert "3 letters, the representations of 'chain' 4 residues" in short
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(chain.read_bytes()[:200])
    given = ("--representation", chain, "--sequence", "GAVL", "--init-state", damaged)
    assert "damaged.npz is not a readable file of start states" in command("sample", folder, *given).error
    assert "--sampler is for folders" in command("sample", tmp_path, "--sampler", "heun").error
    assert not list(tmp_path.glob("**/ensemble.npz"))


def test_weights_that_do_not_load_whole_leave_no_folder(command: Command, tmp_path: Path) -> None:
    state, out = random_state(structure_table(16, 8, 1, 2, 16)), tmp_path / "out"
    whole = save({"state_dict": state}, tmp_path / "whole.pth")
    lacking = save({"state_dict": dict(list(state.items())[:-1])}, tmp_path / "lacking.pth")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    assert (
        "lacking.pth looks like dig-protein but does not fit it: 1 missing"
        in command("import-weights", lacking, "--out", out).error
    )
    assert "junk.pth: cannot be read" in command("import-weights", tmp_path / "junk.pth", "--out", out).error
    assert not out.exists()
    assert command("import-weights", whole, "--out", out).code == 0
    other = save({"state_dict": waves(structure_table(16, 8, 1, 2, 16), 0.1)}, tmp_path / "other.pth")
    assert "holds another published network" in command("import-weights", other, "--out", out).error


def test_frames_are_relabelled_through_their_door(command: Command, tmp_path: Path) -> None:
    (tmp_path / "slab.extxyz").write_text("".join(slab(f"{0.01 * k}") for k in range(5)))
    assert command("import", recipe(tmp_path, "catalyst", "slab.extxyz"), "--out", tmp_path / "raw").code == 0
    ask = ("relabel", tmp_path / "raw", "--calculator", "emt", "--out", tmp_path / "new", "--actors", 1)
    assert "give --frames N or --stride K" in command(*ask).error
    assert "emt has one method" in command(*ask, "--frames", 2, "--method", "best").error
    assert "basiss: Extra inputs" in command(*ask, "--frames", 2, "--set", "basiss=1").error
    done = command(*ask, "--frames", 3)
    assert done.code == 0, done.err
    (store,) = find_trajectories(tmp_path / "new")
    assert f"trajectory: {store}" in done.out
    assert trajectory_origin(store)["positions"]["frames"] == [0, 2, 4]
    frames = read_trajectory_frames(store)[1]
    assert frames.energy is not None and frames.forces is not None
    assert np.isfinite(frames.energy).all() and np.ptp(frames.energy) > 0


def test_evenly_spread_frames_are_distinct_and_reach_the_ends() -> None:
    for number in range(1, 12):
        for count in range(1, 30):
            chosen = evenly_spread(count, number).tolist()
            assert len(chosen) == min(number, count)
            assert chosen == sorted(set(chosen))
            assert chosen[0] == 0 and (number == 1 or chosen[-1] == count - 1)
