"""Noised structures and their means under an energy, for [train.posterior]: `dig-scale posterior`.

In: trajectories of structures from anywhere (short hot MD, perturbed ones), and a recipe whose [simulate] section says what the
energy and the temperature are. Out: a folder

    trajectories/       a store per trajectory: means, the noised structures that they are of, and their noise levels
    dataset/            the same, packed: what train.posterior.pairs names
    cost.json           seconds that the dynamics took

carried on trajectory by trajectory when the command is given again. A stage of the command line.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from dig_shards.durable import replace_durably

from dig_scale import records
from dig_scale.config import Pack, Posterior, Recipe, Simulate
from dig_scale.errors import UserError
from dig_scale.importers.stores import write_store
from dig_scale.progress import Reporter, stage
from dig_scale.run_record import claim
from dig_scale.system import Frames, System

if TYPE_CHECKING:
    from dig_scale.simulation.posterior import Dynamics, Part

COST = "cost.json"
_BATCH = 256


@dataclass(frozen=True)
class Pairs:
    """The packed dataset, how many pairs it has, how many dynamics left all numbers, and the seconds that they took in all."""

    dataset: Path
    count: int
    lost: int
    seconds: float


def posterior_stage(recipe: Recipe, folders: Sequence[Path], out: Path) -> Pairs:
    """Write the pairs of all frames of the trajectories in `folders` into `out`.

    Raises UserError: a recipe without [simulate] or [train.posterior], heavy atoms alone, systems whose cell or frames diffuse.
    """
    settings, simulate = _required(recipe)
    found = [path for folder in folders for path in records.find_trajectories(folder)]
    paths = {f"{path.parent.name}/{path.name}": path for path in found}
    if len(paths) < len(found):
        raise UserError("two trajectories have the same name and folder name; give them one `dig-scale posterior` each")
    claim(out, _identity(recipe, settings, simulate, paths))
    cost = json.loads((out / COST).read_text()) if (out / COST).is_file() else {}
    with stage("posterior") as report:
        for number, (name, path) in enumerate(paths.items()):
            if name not in cost:
                begin, store = time.perf_counter(), out / "trajectories" / name
                counts = _write(recipe, settings, simulate, path, store, _part_of(report, number, len(paths)))
                cost[name] = {"seconds": time.perf_counter() - begin, **counts}
                replace_durably(out / COST, json.dumps(cost, indent=1).encode())
        pack = (recipe.pack or Pack()).model_copy(
            update={"temperature": simulate.temperature, "validation_fraction": 0.0}
        )
        records.pack_dataset(recipe.model_copy(update={"pack": pack}), [out / "trajectories"], out / "dataset")
        pairs, lost = (sum(int(one[name]) for one in cost.values()) for name in ("pairs", "lost"))
        report(1, 1, f"{pairs} pairs" + (f", {lost} without numbers left out" if lost else ""))
    return Pairs(out / "dataset", pairs, lost, sum(float(one["seconds"]) for one in cost.values()))


def _required(recipe: Recipe) -> tuple[Posterior, Simulate]:
    settings = recipe.train.posterior if recipe.train else None
    if settings is None or recipe.simulate is None:
        missing = "simulate" if settings is not None else "train.posterior"
        raise UserError(f"recipe {recipe.name!r} has no [{missing}] section; `dig-scale posterior` needs it")
    if recipe.pack is not None and recipe.pack.atoms != "all":
        raise UserError(f'energies are of all atoms: set pack.atoms = "all" in recipe {recipe.name!r}')
    return settings, recipe.simulate


def _identity(recipe: Recipe, settings: Posterior, simulate: Simulate, names: Iterable[str]) -> dict[str, Any]:
    assert recipe.train is not None
    return {
        "trajectories": list(names),
        "simulate": simulate.model_dump(mode="json"),
        "diffusion": recipe.diffusion.model_dump(mode="json"),
        "posterior": settings.model_dump(mode="json", exclude={"pairs", "batch"}),
        "seed": recipe.train.seed,
    }


def _part_of(report: Reporter, number: int, count: int) -> Reporter:
    """A reporter of one of `count` parts."""
    return lambda done, total, words: report(number + done / total, count, words)


def _write(
    recipe: Recipe, settings: Posterior, simulate: Simulate, path: Path, store: Path, report: Reporter
) -> dict[str, int]:
    """The pairs of one trajectory as a store; how many they are, and how many were lost."""
    from dig_scale.simulation.posterior import Dynamics, Part

    assert recipe.train is not None
    dynamics = Dynamics(settings.step, settings.periods)
    system, frames = records.read_trajectory_frames(path)
    levels = noise_levels(recipe, settings, system, settings.copies * frames.n_frames)
    seed = (recipe.train.seed, zlib.crc32(path.name.encode()))
    generator = np.random.default_rng(seed)
    clean = np.tile(frames.positions.astype(np.float64), (settings.copies, 1, 1))[generator.permutation(len(levels))]
    noised = clean + levels[:, None, None] * generator.standard_normal(clean.shape) * system.mobile[:, None]
    rows = [slice(low, low + _BATCH) for low in range(0, len(levels), _BATCH)]
    parts = [Part(noised[row], levels[row], clean[row], (*seed, k)) for k, row in enumerate(rows)]
    words = f"{len(levels)} pairs of {system.name}"
    report(0, len(parts), words)
    found = _means(system, simulate, dynamics, parts, lambda done: report(done, len(parts), words))
    means = np.concatenate(found)
    kept = np.isfinite(means).all(axis=(1, 2))
    if not kept.any():
        raise UserError(f"{path}: no frame has a finite energy; `dig-scale posterior` starts from its frames")
    labels = {records.NOISE_STD: levels[kept]}
    pairs = Frames(means[kept], np.arange(int(kept.sum())).astype(float), noised=noised[kept], labels=labels)
    origin = records.trajectory_origin(path) | {"engine": "posterior", "temperature_K": simulate.temperature}
    write_store(store, system, pairs, origin | {"first_frame_ps": 0.0, "frame_spacing_ps": 1.0})
    return {"pairs": int(kept.sum()), "lost": int((~kept).sum())}


def noise_levels(recipe: Recipe, settings: Posterior, system: System, count: int) -> np.ndarray:
    """Noise levels [count] in Å up to settings.noise_max, rising, evenly spread in the recipe's diffusion time."""
    from dig_scale.diffusion.composition import composition_for
    from dig_scale.diffusion.schedule import schedule_from
    from dig_scale.training.posterior import share_of_times

    if set(composition_for(system.kind, recipe.diffusion).fields) != {records.POSITIONS}:
        raise UserError(
            f"system {system.name!r}: `dig-scale posterior` takes systems of atoms, whose positions alone diffuse"
        )
    last = share_of_times(recipe.diffusion, settings)
    times = last * (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return schedule_from(recipe.diffusion).noise_std(times).numpy()


def _means(
    system: System, simulate: Simulate, dynamics: Dynamics, parts: Sequence[Part], heard: Callable[[int], None]
) -> list[np.ndarray]:
    """Of every part, in this process where that is soon done, else on actors."""
    from dig_scale.simulation.posterior import MeansOfPart, steps_of
    from dig_scale.simulation.potential import PotentialOptions, potential_for
    from dig_scale.simulation.potential_actors import crew_of, worth_actors

    here, work, found = potential_for(system, simulate, PotentialOptions(threads=1)), MeansOfPart(dynamics), []
    if worth_actors(here, sum(steps_of(part.noise_std, dynamics)[0] * len(part.start) for part in parts)):
        with crew_of(system, simulate, len(parts)) as crew:
            # the longest are the last
            return crew(work, parts[::-1], heard)[::-1]
    for part in parts:
        found.append(work(here, part))
        heard(len(found))
    return found
