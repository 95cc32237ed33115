"""Runs of the crystal recipes for benchmarks/kinds.py: carbon by size, perovskites asked for a heat of formation."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from dig_shards import ShardReader
from dig_shards.manifest import VALIDATION

from benchmarks.walk import dig_scale, timed
from dig_scale.ensemble import read_ensemble
from dig_scale.records import dataset_systems
from dig_scale.system import Frames, System

Group = list[tuple[System, Frames]]
HEAT = "heat_ref"
SHIFT = 1.5
"""Standard deviations of the data that samples are asked to lie off its mean."""
COMPOSITIONS = 60
EACH = 16


def samples_by_size(out: Path) -> Group:
    """System and samples of every composition of a run."""
    found = []
    for folder in sorted((out / "ensemble").iterdir()):
        if (folder / "ensemble.npz").is_file():
            ensemble = read_ensemble(folder)
            found.append((ensemble.system, as_frames(ensemble.positions, ensemble.cell)))
    return found


def split_frames(out: Path, split: str) -> Group:
    """System and structures of every system in a split of a run's dataset."""
    reader, systems = ShardReader(out / "dataset", split), dataset_systems(out / "dataset")
    groups = reader.read(np.arange(reader.n_frames))
    return [(systems[one.system], as_frames(one.arrays["positions"], one.arrays.get("cell"))) for one in groups]


def as_frames(positions: np.ndarray, cell: np.ndarray | None) -> Frames:
    """Independent structures, numbered."""
    return Frames(positions.astype(np.float64), np.arange(len(positions), dtype=float), cell=cell)


@dataclass(frozen=True)
class Perovskites:
    """What a judge says of samples of compositions that the model has not seen, open and asked for a heat of formation.

    `judge_error`: its mean absolute error in eV/atom. `spread`: s.d. in eV/atom of the open samples of one composition. `shift`:
    mean over compositions of how far asking moved the mean of a composition's samples toward what was asked, in eV/atom.
    `lowered`, `raised`: the same of the compositions that were asked for less, and for more. `distance`: how far off it was.
    """

    minutes: float
    judge_error: float
    compositions: int
    spread: float
    distance: float
    lowered: float
    raised: float
    shift: float


def perovskite_results(runs: Path, data: Path) -> Perovskites:
    """Train the recipe, then draw samples of held-out compositions: open ones, and asked for a heat of formation.

    A composition whose open samples lie above the mean of the data is asked for SHIFT standard deviations of the data below
    that mean, and the other way round, so that what is asked for is never where the composition lies anyway.
    """
    from benchmarks.perovskite_judge import fit_judge

    os.environ["PEROVSKITES_CSV"] = str(data)
    out = runs / "perovskites"
    minutes = timed(runs / "perovskites.json", lambda: dig_scale("run", "perovskites", "--out", out))
    judge = fit_judge(data)
    systems = [system for system, _ in split_frames(out, VALIDATION)][:COMPOSITIONS]
    asked = {"open": None, "low": judge.mean - SHIFT * judge.spread, "high": judge.mean + SHIFT * judge.spread}
    judged = {
        name: np.array([judge(*one) for one in _samples(out, systems, name, wanted)]) for name, wanted in asked.items()
    }
    means = {name: values.mean(1) for name, values in judged.items()}
    above = means["open"] > judge.mean
    toward = np.where(above, means["open"] - means["low"], means["high"] - means["open"])
    target = np.where(above, asked["low"], asked["high"])
    return Perovskites(
        minutes,
        judge.error,
        len(systems),
        float(np.sqrt(judged["open"].var(1, ddof=1).mean())),
        float(np.abs(target - means["open"]).mean()),
        float(toward[above].mean()),
        float(toward[~above].mean()),
        float(toward.mean()),
    )


def _samples(out: Path, systems: list[System], name: str, wanted: float | None) -> Group:
    """EACH samples of every system, asked for a heat of formation, or left open."""
    import torch

    from dig_scale.serving.offline import Draws
    from dig_scale.serving.served import load_served_model
    from dig_scale.stages.sample import sample_stage

    recipe = load_served_model(out / "model", torch.device("cpu")).recipe
    conditions = {} if wanted is None else {HEAT: wanted}
    settings = recipe.sample.model_copy(update={"num": EACH, "conditions": conditions})
    folder = out / f"asked-{name}"
    drawn = sample_stage([Draws(out / "model", one, settings, folder / one.name) for one in systems])
    return [(one.system, as_frames(one.positions, one.cell)) for one in drawn]
