"""The surfaces recipe: adsorbates on the metals that the model was trained on, and on a metal left out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.walk import dig_scale, timed
from dig_scale.config import SurfaceSpec, SystemSpec
from dig_scale.ensemble import read_ensemble
from dig_scale.evaluation.surface import (
    Symmetry,
    adsorbate_heights,
    lateral_divergence,
    lateral_histogram,
    populations,
)
from dig_scale.importers.catalyst import surface_system
from dig_scale.recipe_files import load_recipe
from dig_scale.records import find_trajectories, read_trajectory_frames
from dig_scale.system import System

LEFT_OUT = SystemSpec(name="O-Pt", surface=SurfaceSpec(metal="Pt", adsorbate="O"))
BINS = 24
SAMPLES = 4_000


@dataclass(frozen=True)
class SurfaceResult:
    """One metal and adsorbate: JS (nat) of the lateral map with its floor, largest population error, height error in Å."""

    metal: str
    adsorbate: str
    held_out: bool
    divergence: float
    floor: float
    population_error: float
    height_error: float


def surface_results(runs: Path) -> tuple[list[SurfaceResult], float]:
    """Run the recipe, then molecular dynamics and samples of the metal left out; results, and minutes of the recipe."""
    out = runs / "surfaces"
    minutes = timed(runs / "surfaces.json", lambda: dig_scale("run", "surfaces", "--out", out))
    left_out = out / "left-out"
    recipe = _left_out_recipe(runs / "surfaces-left-out.toml")
    dig_scale("simulate", recipe, "--out", left_out / "trajectories")
    if not (left_out / "ensemble" / "ensemble.npz").is_file():
        assert LEFT_OUT.surface is not None
        description = left_out / "system.json"
        description.write_text(surface_system(LEFT_OUT.name, LEFT_OUT.surface).to_json())
        words = ("--system", description, "--num", SAMPLES, "--out", left_out / "ensemble")
        dig_scale("sample", out / "model", *words)
    return [*_trained(out), _result(LEFT_OUT, left_out / "trajectories", left_out / "ensemble", "left out")], minutes


def _trained(out: Path) -> Iterator[SurfaceResult]:
    for spec in load_recipe("surfaces").systems:
        yield _result(spec, out / "trajectories" / spec.name, out / "ensemble" / spec.name, "")


def _result(spec: SystemSpec, trajectories: Path, samples: Path, held_out: str) -> SurfaceResult:
    read = [read_trajectory_frames(path) for path in find_trajectories(trajectories)]
    system = read[0][0]
    halves = [np.concatenate([frames.positions for _, frames in read[part::2]]) for part in (0, 1)]
    md, drawn = np.concatenate(halves), read_ensemble(samples).positions.astype(np.float64)
    ours, theirs = populations(system, drawn), populations(system, md)
    assert spec.surface is not None
    return SurfaceResult(
        spec.surface.metal,
        str(spec.surface.adsorbate),
        bool(held_out),
        lateral_divergence(_map(system, drawn), _map(system, md)),
        lateral_divergence(*(_map(system, half) for half in halves)),
        max(abs(ours[name] - theirs[name]) for name in theirs),
        abs(float(adsorbate_heights(system, drawn).mean() - adsorbate_heights(system, md).mean())),
    )


def _map(system: System, positions: np.ndarray) -> np.ndarray:
    return lateral_histogram(system, positions, BINS, Symmetry.SURFACE)


def _left_out_recipe(path: Path) -> Path:
    """The recipe's dynamics for the metal left out."""
    from dig_scale.recipe_files import resolve_recipe_path

    text = resolve_recipe_path("surfaces").read_text()
    begin, end = text.index("[[systems]]"), text.index("[simulate]")
    entry = '[[systems]]\nname = "O-Pt"\nsurface = { metal = "Pt", adsorbate = "O" }\n\n'
    stop = text.index("[model]")
    path.write_text(text[:begin].replace('"surfaces"', '"surfaces-left-out"') + entry + text[end:stop])
    return path
