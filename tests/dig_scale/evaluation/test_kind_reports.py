"""Reports by kind, through the stage that the command line runs: what they say of samples whose truth is known."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dig_scale.config import Evaluate, SurfaceSpec
from dig_scale.ensemble import Ensemble, write_ensemble_file
from dig_scale.errors import UserError
from dig_scale.evaluation.side_by_side import joined
from dig_scale.importers.backbone import backbone_of_trajectory, read_backbone
from dig_scale.importers.catalyst import surface_system
from dig_scale.importers.crystal import crystal_system
from dig_scale.importers.pocket import PocketOptions, pocket_system
from dig_scale.importers.stores import imported, write_store
from dig_scale.outputs.molecules import ligand_sites
from dig_scale.stages.evaluate import evaluate_stage
from dig_scale.system import Frames, System

QUICK = Evaluate(bins=12, bootstrap=10)


def reported(folder: Path, system: System, reference: Frames, samples: Frames, seed: int = 3) -> dict[str, Any]:
    """report.json of samples against a reference stored in `folder`."""
    write_store(folder / "reference" / f"{system.name}.zarr", system, reference, imported([], 300.0))
    index = np.arange(samples.n_frames)
    positions = samples.positions.astype(np.float32)
    ensemble = Ensemble(system, positions, index, seed, rotations=samples.rotations, cell=samples.cell)
    write_ensemble_file(ensemble, folder / "ensemble" / "ensemble.npz")
    page = evaluate_stage(folder / "ensemble", folder / "reference", QUICK, folder / "report")
    report = json.loads(page.with_name("report.json").read_text())
    assert (folder / "report" / "summary.png").stat().st_size > 5000
    assert shown(page) <= set(leaves(report))
    return report


def shown(page: Path) -> set[float]:
    """The numbers of a page's <data> elements."""

    found: set[float] = set()

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            if tag == "data":
                found.add(float(dict(attributes)["value"] or "nan"))

    Reader().feed(page.read_text())
    assert len(found) > 10
    return found


def leaves(content: Any) -> list[Any]:
    """All numbers of JSON content."""
    if isinstance(content, dict | list):
        return [leaf for one in (content.values() if isinstance(content, dict) else content) for leaf in leaves(one)]
    return [content] if isinstance(content, int | float) else []


def row(report: dict[str, Any], label: str) -> dict[str, Any]:
    """The values of the first row of this name that is no row of distances."""
    tables = [table for section in report["findings"]["sections"] for table in section["tables"]]
    rows = [
        one
        for table in tables
        if "subsample" not in table["columns"] or "md" in table["columns"]
        for one in table["rows"]
    ]
    return next(one["values"] for one in rows if one["label"] == label)


def some(frames: Frames, rows: np.ndarray) -> Frames:
    cell = None if frames.cell is None else frames.cell[rows]
    rotations = None if frames.rotations is None else frames.rotations[rows]
    return Frames(frames.positions[rows], frames.time_ps[rows], rotations=rotations, cell=cell)


@pytest.fixture(scope="module")
def transition(shared_data: Path) -> tuple[System, Frames]:
    """Adenylate kinase on its way from closed to open, 98 frames."""
    folder = shared_data / "adk_transition"
    return backbone_of_trajectory("adk", folder / "adk.psf", [folder / "adk_dims.dcd"], frame_spacing_ps=1.0)


def test_a_protein_is_compared_with_md_by_distances(transition: tuple[System, Frames], tmp_path: Path) -> None:
    system, frames = transition
    report = reported(tmp_path, system, frames, some(frames, np.arange(frames.n_frames)))
    distances = report["findings"]["headline"]["distances"]
    # the transition goes one way, so its halves differ; all of it differs from itself by what samples in single precision lose
    assert distances["model"] < 1e-3 < distances["subsample"] < distances["halves"] / 5
    assert row(report, "sound")["model"] == row(report, "sound")["md"] > 0.9
    half = reported(tmp_path / "half", system, frames, some(frames, np.arange(frames.n_frames // 2)))
    assert half["findings"]["headline"]["distances"]["model"] > distances["subsample"]
    size = row(report, "radius of gyration (Å)")
    assert size["first_half"] < size["md"] < size["second_half"]


def test_a_protein_is_compared_with_each_known_state(
    transition: tuple[System, Frames], shared_data: Path, tmp_path: Path
) -> None:
    folder = shared_data / "adk_transition"
    system, frames = transition
    known, states = read_backbone("adk", [folder / "adk_closed.pdb", folder / "adk_open.pdb"])
    write_store(tmp_path / "reference" / "adk.zarr", known, states, imported([]))
    ensemble = Ensemble(
        system, frames.positions.astype(np.float32), np.arange(frames.n_frames), 1, rotations=frames.rotations
    )
    write_ensemble_file(ensemble, tmp_path / "ensemble.npz")
    page = evaluate_stage(tmp_path / "ensemble.npz", tmp_path / "reference", QUICK, tmp_path / "report")
    report = json.loads(page.with_name("report.json").read_text())
    closed, opened = (row(report, f"state {k}") for k in (1, 2))
    assert closed["others"] == opened["others"] == pytest.approx(6.9, abs=0.1)
    assert closed["model"] < 1 and opened["model"] < 1
    assert report["findings"]["headline"] is None and "known states" in report["findings"]["verdict"][0]


@pytest.fixture(scope="module")
def hif2a(shared_data: Path) -> tuple[System, Frames]:
    """A ligand in its pocket with its crystal pose."""
    folder = shared_data / "fep_pockets" / "hif2a"
    protein, ligands = folder / "01_protein" / "crd" / "protein.pdb", folder / "02_ligands" / "ligands.sdf"
    return pocket_system(protein, ligands, "lig_231", PocketOptions(name="hif2a"))


def moved(system: System, pose: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """The pose with its ligand moved along x by each of shifts (Å)."""
    positions = np.repeat(pose[None], len(shifts), axis=0)
    positions[:, ligand_sites(system), 0] += shifts[:, None]
    return positions


def test_poses_are_compared_with_the_known_one(
    hif2a: tuple[System, Frames], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dig_scale.evaluation.kinds.poses.POSES_CHECKED", 2)
    system, known = hif2a
    shifts = np.array([0.5, 1.0, 1.5, 5.0])
    samples = Frames(moved(system, known.positions[0], shifts), np.arange(4.0))
    report = reported(tmp_path, system, known, samples)
    place = row(report, "RMSD of the ligand in place (Å)")
    assert place["model"] == pytest.approx(shifts.mean(), abs=1e-3) and place["md"] is None
    assert row(report, "within 2 Å")["model"] == 0.75
    tables = [table for section in report["findings"]["sections"] for table in section["tables"]]
    best = next(table for table in tables if table["title"] == "Expected smallest RMSD")
    assert best["rows"][0]["values"]["1"] == pytest.approx(2.0, abs=1e-3)
    assert best["rows"][0]["values"]["2"] == pytest.approx((0.5 * 3 + 1.0 * 2 + 1.5) / 6, abs=1e-3)
    clashes = row(report, "clashes with the pocket")
    assert clashes["md"] == 0 < clashes["model"]


def test_poses_are_compared_with_md_of_the_complex(
    hif2a: tuple[System, Frames], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dig_scale.evaluation.kinds.poses.find_spec", lambda name: None)
    system, known = hif2a
    generator = np.random.default_rng(1)
    pose = known.positions[0]
    md = Frames(moved(system, pose, np.r_[0.0, generator.uniform(0, 1, 59)]), np.arange(60.0))
    samples = Frames(moved(system, pose, generator.uniform(0.5, 1.5, 40)), np.arange(40.0))
    report = reported(tmp_path, system, md, samples)
    assert report["findings"]["headline"]["distances"]["model"] == pytest.approx(0.5, abs=0.12)
    assert report["findings"]["headline"]["distances"]["halves"] < 0.2


def on_sites(system: System, places: np.ndarray, seed: int) -> Frames:
    """Frames with the adsorbate moved over the surface by each of places [F, 3] Å, all mobile atoms shaken."""
    generator = np.random.default_rng(seed)
    noise = generator.normal(0, 0.05, (len(places), system.n_sites, 3)) * system.mobile[:, None]
    positions = system.reference_positions + noise
    positions[:, -1] += places
    return Frames(positions, np.arange(float(len(places))))


def test_an_adsorbate_is_compared_by_sites_and_maps(tmp_path: Path) -> None:
    system = surface_system(
        "O-on-Cu", SurfaceSpec(metal="Cu", size=(2, 2, 3), fixed_layers=1, adsorbate="O", site="fcc")
    )
    assert system.cell is not None
    across = (system.cell[0] / 2 + system.cell[1] / 2) / 3  # from an fcc hollow to the hcp hollow beside it
    choice = np.random.default_rng(2).random(400)
    md = on_sites(system, (choice[:400, None] < 0.2) * across, 3)
    samples = on_sites(system, (choice[:200, None] < 0.8) * across, 4)
    report = reported(tmp_path, system, md, samples)
    fcc, hcp = row(report, "fcc"), row(report, "hcp")
    assert fcc["md"] + hcp["md"] == pytest.approx(1) and fcc["model"] + hcp["model"] == pytest.approx(1)
    assert fcc["md"] == pytest.approx((choice >= 0.2).mean()) and fcc["model"] == pytest.approx(
        (choice[:200] >= 0.8).mean()
    )
    distances = report["findings"]["headline"]["distances"]
    assert distances["model"] > 5 * distances["halves"]
    assert row(report, "height of the adsorbate (Å)")["model"] == pytest.approx(1.2, abs=0.02)


def diamonds(lengths: np.ndarray) -> Frames:
    from ase.build import bulk

    made = [bulk("C", "diamond", length, cubic=True) for length in lengths]
    cells, positions = (np.stack([getattr(one, name).__array__() for one in made]) for name in ("cell", "positions"))
    return Frames(positions, np.arange(float(len(made))), cell=cells)


def test_crystals_are_compared_by_density_and_known_structures(tmp_path: Path) -> None:
    system = crystal_system(np.full(8, 6))
    generator = np.random.default_rng(5)
    known, samples = diamonds(3.567 + generator.normal(0, 0.01, 24)), diamonds(3.567 + generator.normal(0, 0.01, 6))
    samples = joined([samples, diamonds(np.array([0.5]))])
    report = reported(tmp_path, system, known, samples)
    assert row(report, "plausible")["model"] == pytest.approx(6 / 7) and row(report, "plausible")["md"] == 1
    assert row(report, "density (g/cm³)")["model"] == pytest.approx(3.51, abs=0.03)
    assert row(report, "4") == dict.fromkeys(("model", "md", "first_half", "second_half", "subsample"), 1.0)
    assert row(report, "known") == {"model": 1.0, "halves": 1.0} and row(report, "new")["model"] == 0
    assert report["findings"]["headline"]["distances"]["model"] < 0.05


def test_a_reference_of_another_composition_is_refused(tmp_path: Path) -> None:
    known = diamonds(np.array([3.5, 3.6]))
    write_store(tmp_path / "reference" / "Si8.zarr", crystal_system(np.full(8, 14)), known, imported([]))
    system = crystal_system(np.full(8, 6))
    ensemble = Ensemble(system, known.positions.astype(np.float32), np.arange(2), 1, cell=known.cell)
    write_ensemble_file(ensemble, tmp_path / "ensemble.npz")
    with pytest.raises(UserError, match="not of one composition"):
        evaluate_stage(tmp_path / "ensemble.npz", tmp_path / "reference", QUICK, tmp_path / "report")


def test_several_ensembles_have_an_overview_and_find_their_references(tmp_path: Path) -> None:
    for name, z in (("C8", 6), ("Si8", 14)):
        system, length = crystal_system(np.full(8, z)), 3.567 if z == 6 else 5.43
        assert system.name == name
        known = diamonds(np.array([length, 1.01 * length, 1.02 * length]))
        write_store(tmp_path / "trajectories" / name / f"{name}.zarr", system, known, imported([]))
        ensemble = Ensemble(system, known.positions.astype(np.float32), np.arange(3), 1, cell=known.cell)
        write_ensemble_file(ensemble, tmp_path / "ensembles" / name / "ensemble.npz")
    broken = Ensemble(system, np.full((2, 8, 3), np.nan, np.float32), np.arange(2), 1, cell=known.cell[:2])
    write_ensemble_file(broken, tmp_path / "ensembles" / "broken" / "ensemble.npz")
    page = evaluate_stage(tmp_path / "ensembles", tmp_path / "trajectories", QUICK, tmp_path / "report")
    text = page.read_text()
    assert 'href="C8/report.html"' in text and 'href="Si8/report.html"' in text
    report = json.loads(page.with_name("report.json").read_text())
    assert report["samples"] == 6 and "none of 2 samples is finite" in report["failed"]["broken"]
    assert (tmp_path / "report" / "Si8" / "report.json").is_file()
