"""The pockets recipe with one ligand per target held out: its pocket is drawn around the other ligands, its pose is asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.walk import dig_scale, timed
from dig_scale.ensemble import read_ensemble
from dig_scale.evaluation.poses import CheckDepth, pose_accuracy, posebusters_checks
from dig_scale.importers.molecule import molecule_names, read_molecules
from dig_scale.importers.pocket import PocketOptions, pocket_system
from dig_scale.system import Frames, System

SHELL = 5.0
"""Å; pocket atoms this near to a ligand of the series are seen by the model."""


@dataclass(frozen=True)
class PoseResult:
    """One held-out ligand: best symmetry-corrected RMSD in Å, share of poses without a clash, checks' shares, ligands read."""

    target: str
    ligand: str
    best: float
    without_clash: float
    checks: dict[str, float]
    read: float


def pocket_results(runs: Path, data: Path, targets: Sequence[str], poses: int) -> tuple[list[PoseResult], float]:
    """Train on all other ligands of all targets, draw poses of the held-out ones; the results, and the minutes."""
    out = runs / "pockets"
    held_out = {target: _middle(_ligands(data, target)) for target in targets}
    recipe = _write_recipe(runs / "pockets.toml", data, held_out)

    from dig_scale.recipe_files import load_recipe
    from dig_scale.serving.offline import Draws
    from dig_scale.stages.sample import sample_stage

    def work() -> None:
        dig_scale("import", recipe, "--out", out / "trajectories")
        dig_scale("pack", recipe, out / "trajectories", "--out", out / "dataset")
        dig_scale("train", recipe, out / "dataset", "--out", out / "model")
        systems = {target: _held_out(data, target, ligand)[0] for target, ligand in held_out.items()}
        settings = load_recipe(str(recipe)).sample.model_copy(update={"num": poses})
        sample_stage([Draws(out / "model", one, settings, out / "poses" / target) for target, one in systems.items()])

    minutes = timed(runs / "pockets.json", work)
    return [_result(out, data, target, ligand) for target, ligand in held_out.items()], minutes


def _result(out: Path, data: Path, target: str, ligand: str) -> PoseResult:
    system, frames = _held_out(data, target, ligand)
    positions = read_ensemble(out / "poses" / target).positions
    found = pose_accuracy(system, positions, frames.positions[0])
    checks = posebusters_checks(system, positions, depth=CheckDepth.FAST)
    expected = len(_ligands(data, target)) - 1
    stored = len(list((out / "trajectories" / target).glob("*.zarr")))
    return PoseResult(
        target,
        ligand,
        float(found.rmsd.min()),
        float((found.clashes == 0).mean()),
        dict(checks.fractions()),
        stored / expected,
    )


def _held_out(data: Path, target: str, ligand: str) -> tuple[System, Frames]:
    protein, ligands = _files(data, target)
    others = tuple(name for name in _ligands(data, target) if name != ligand)
    return pocket_system(protein, ligands, ligand, PocketOptions(shell=SHELL, defined_by=others, name=target))


def _files(data: Path, target: str) -> tuple[Path, Path]:
    return data / target / "01_protein" / "crd" / "protein.pdb", data / target / "02_ligands" / "ligands.sdf"


def _ligands(data: Path, target: str) -> tuple[str, ...]:
    return molecule_names(read_molecules(_files(data, target)[1]))


def _middle(names: Sequence[str]) -> str:
    return names[len(names) // 2]


def _write_recipe(path: Path, data: Path, held_out: dict[str, str]) -> Path:
    """The bundled recipe with one [[imports]] per target."""
    from dig_scale.recipe_files import resolve_recipe_path

    entries = []
    for target, ligand in held_out.items():
        files = json.dumps([str(file.resolve()) for file in _files(data, target)])
        options = f'{{ shell = {SHELL}, leave_out = ["{ligand}"] }}'
        entries.append(f'[[imports]]\nreader = "pocket"\nname = "{target}"\nfiles = {files}\noptions = {options}\n')
    path.write_text(resolve_recipe_path("pockets").read_text() + "\n" + "\n".join(entries))
    return path
