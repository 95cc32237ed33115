"""From a recipe to packed shards: simulate, import, relabel, pack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dig_scale.config import Recipe
from dig_scale.progress import duration, stage

if TYPE_CHECKING:
    from dig_scale.config import CalculatorSpec


def simulate_stage(recipe: Recipe, out: Path) -> None:
    """Generate the trajectories of a recipe, and the crystals of its structure searches."""
    if recipe.searches:
        _search_crystals(recipe, out)
    if recipe.simulate is not None or not recipe.searches:
        _simulate_systems(recipe, out)


def _search_crystals(recipe: Recipe, out: Path) -> None:
    from dig_scale.simulation.ase_search import search_crystals

    with stage("search") as report:
        for number, spec in enumerate(recipe.searches):
            report(number, len(recipe.searches), f"{spec.composition}, {spec.candidates} random cells")
            found = search_crystals(spec, out)
            words = (
                f"{spec.composition}: {found.kept} crystals, {found.repeats} found again, {len(found.failed)} failed"
            )
            report(number + 1, len(recipe.searches), words)


def _simulate_systems(recipe: Recipe, out: Path) -> None:
    from dig_scale.simulation.campaign import Progress, simulate

    with stage("simulate") as report:

        def show(p: Progress) -> None:
            speed = f"{p.ns_per_day:.0f} ns/day" if p.ns_per_day else "starting"
            words = f"{p.done_ns:.2f} of {p.total_ns:.2f} ns, {speed}, {duration(p.eta_s)} left"
            report(p.done_ns, p.total_ns, words + (f", {p.failed} failed" if p.failed else ""))

        simulate(recipe, out, show)


def import_stage(recipe: Recipe, out: Path) -> None:
    """Read the data that a recipe imports."""
    from dig_scale.importers.readers import run_import

    with stage("import") as report:
        count = 0
        for number, entry in enumerate(recipe.imports):
            count += len(run_import(entry, out))
            report(number + 1, len(recipe.imports), f"{count} trajectories")


def relabel_stage(
    folders: Sequence[Path],
    choose: Callable[[int], Sequence[int]],
    spec: CalculatorSpec,
    out: Path,
    actors: int | None = None,
) -> list[Path]:
    """Compute energies and forces of frames of all trajectories again; `choose` gives indices for a number of frames."""
    from dig_shards.trajectory import TrajectoryReader

    from dig_scale.records import find_trajectories
    from dig_scale.simulation.relabel import ChosenFrames, RelabelOptions, relabel

    with stage("relabel") as report:
        paths = [path for folder in folders for path in find_trajectories(folder)]
        chosen = [ChosenFrames(path, tuple(choose(TrajectoryReader(path).n_frames))) for path in paths]
        count = sum(len(one.frames) for one in chosen)
        report(0, 1, f"{count} frames of {len(paths)} trajectories")
        stores = relabel(chosen, spec, out, RelabelOptions(actors=actors))
        report(1, 1, f"{count} frames of {len(paths)} trajectories")
    return stores


def pack_stage(recipe: Recipe, folders: Sequence[Path], out: Path) -> None:
    """Pack trajectories into shards; all-atom ones become residue frames first where the recipe says so."""
    from dig_scale.records import pack_dataset

    if recipe.pack is not None and recipe.pack.atoms == "residues":
        folders = [_residue_frames(folders, out.parent / "residues")]
    with stage("pack") as report:
        manifest = pack_dataset(
            recipe, folders, out, lambda done, total: report(done, total, f"{done} of {total} frames")
        )
        report(1, 1, ", ".join(f"{split} {manifest.frames(split)} frames" for split in manifest.shards))


def _residue_frames(folders: Sequence[Path], out: Path) -> Path:
    """The folder `out` with the trajectories below `folders` as residue frames."""
    from dig_scale.importers.backbone import backbone_of
    from dig_scale.importers.stores import write_store
    from dig_scale.records import ROTATIONS, find_trajectories, read_trajectory_frames, trajectory_origin

    with stage("residues") as report:
        paths = [path for folder in folders for path in find_trajectories(folder)]
        for number, path in enumerate(paths):
            system, frames = read_trajectory_frames(path)
            if getattr(frames, ROTATIONS) is None:
                system, frames = backbone_of(system, frames)
            write_store(out / path.parent.name / path.name, system, frames, trajectory_origin(path))
            report(number + 1, len(paths), f"{number + 1} of {len(paths)} trajectories")
    return out
