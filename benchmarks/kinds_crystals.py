"""Runs of the crystal recipes for benchmarks/kinds.py: carbon by size, perovskites asked for a heat of formation."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from dig_shards import ShardReader

from benchmarks.walk import dig_scale, timed
from dig_scale.ensemble import read_ensemble
from dig_scale.records import dataset_systems
from dig_scale.system import Frames, System

Group = list[tuple[System, Frames]]
HEAT = "heat_ref"
SHIFT = 1.5
"""Standard deviations of the data that samples are asked to lie off its mean."""
SAMPLES = 300


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
    """Minutes of the recipe, mean absolute error of the judge (eV/atom), means it gives to samples, and the shift in s.d."""

    minutes: float
    judge_error: float
    unconditioned: float
    lowered: float
    raised: float
    shift: float


def perovskite_results(runs: Path, data: Path) -> Perovskites:
    """Train the recipe, draw samples with and without a wanted heat of formation, and let a composition model judge them."""
    from benchmarks.perovskite_judge import fit_judge

    os.environ["PEROVSKITES_CSV"] = str(data)
    out = runs / "perovskites"
    minutes = timed(runs / "perovskites.json", lambda: dig_scale("run", "perovskites", "--out", out))
    judge = fit_judge(data)
    means = {}
    for name, wanted in (("unconditioned", None), ("lowered", -SHIFT), ("raised", SHIFT)):
        folder = out / f"asked-{name}"
        asked = () if wanted is None else ("--condition", f"{HEAT}={judge.mean + wanted * judge.spread}")
        if not folder.is_dir():
            dig_scale("sample", out / "model", "--out", folder, "--num", SAMPLES, *asked)
        means[name] = float(np.mean(np.concatenate([judge(s, f) for s, f in _drawn(folder)])))
    shift = min(means["unconditioned"] - means["lowered"], means["raised"] - means["unconditioned"]) / judge.spread
    return Perovskites(minutes, judge.error, means["unconditioned"], means["lowered"], means["raised"], shift)


def _drawn(folder: Path) -> Group:
    ensembles = [read_ensemble(path.parent) for path in sorted(folder.rglob("ensemble.npz"))]
    return [(one.system, as_frames(one.positions, one.cell)) for one in ensembles]
