"""What an energy is worth where data are scarce: `dig-scale ablate` trains a recipe three times at equal budget, on the energy
alone, on a few frames alone and on both, and compares what each samples with the whole molecular dynamics.

In: a recipe with [simulate] (or trajectories of it that are there), [train.physics_informed] and [ablate]. Out: a folder

    trajectories/, few/, candidates/        the reference, and the two datasets that are drawn from it
    posterior/                              where [train.posterior] asks for them, pairs made from the candidates
    energy/, data/, both/                   model, ensemble and report of each training
    ablation.json, ablation.csv             the table

which is carried on when the command is given again. The energy alone sees no frame at the target temperature: its candidates
are of hotter trajectories, for which it is told the forces and the target's kT. Where a training has so many seconds, those
that made its pairs are among them. A stage of the command line.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from dig_shards.durable import replace_durably
from dig_shards.manifest import TRAIN, load_manifest

from dig_scale import records
from dig_scale.config import Ablate, Pack, PhysicsInformed, Posterior, Recipe, Train
from dig_scale.errors import UserError
from dig_scale.stages.data import simulate_stage
from dig_scale.stages.evaluate import evaluate_stage
from dig_scale.stages.posterior import posterior_stage
from dig_scale.stages.sample import sample_stage, shared_out
from dig_scale.stages.train import train_stage
from dig_scale.system import Frames

JSON_NAME, CSV_NAME = "ablation.json", "ablation.csv"
_PLAN = "steps.json"
_TIMED_WINDOWS, _FEWEST_IN_WINDOW = 8, 8
"""Of steps of a training, each with one evaluation of the physics-informed loss at least."""


@dataclass(frozen=True)
class Arm:
    """One of the three trainings; frames are those at the target temperature, candidates those with forces."""

    name: str
    folder: Path
    dataset: Path
    recipe: Recipe
    frames: int
    candidates: int
    prepared_seconds: float = 0.0
    """Of the dynamics that made its pairs."""


@dataclass(frozen=True)
class Row:
    """What a training cost and how far its samples are from the reference (Jensen-Shannon divergence, nat)."""

    training: str
    frames: int
    candidates: int
    steps: int
    wall_seconds: float
    cpu_seconds: float
    samples: int
    divergence: float | None
    divergence_error: float | None
    reference_halves: float | None
    problem: str = ""
    """Why there is no divergence."""


@dataclass(frozen=True)
class Ablation:
    """The table; `about` names the divergence, `gain` is by how much of itself the energy lowers that of the data alone."""

    recipe: str
    budget: str
    about: str
    rows: tuple[Row, ...]
    gain: float | None


def ablate_stage(recipe: Recipe, out: Path) -> Ablation:
    """Simulate what is missing, train three times, sample, compare, and write the table into `out`; carried on if there.

    Raises UserError for a recipe without the sections it takes, or whose trajectories are all at the target temperature.
    """

    settings, _, _ = _required(recipe)
    trajectories = out / "trajectories"
    if recipe.simulate is not None:
        simulate_stage(recipe, trajectories)
    arms = _budgeted(arms_of(recipe, trajectories, out), settings, out)
    judged = [_judged(arm, trajectories) for arm in arms]
    rows = tuple(row for row, _ in judged)
    about = next((words for _, words in judged if words), "")
    table = Ablation(recipe.name, _budget(settings), about, rows, gain_of(rows))
    write_table(table, out)
    return table


def lines_of(table: Ablation) -> list[str]:
    """The table for a person."""
    head = (
        f"{'training':12} {'frames':>7} {'candidates':>11} {'steps':>7} {'wall s':>8} {'CPU s':>8} {'samples':>8}  JS"
    )
    found = [f"{table.recipe}: {table.budget}; JS in nat, {table.about or 'no divergence found'}", head]
    for row in table.rows:
        numbers = f"{row.frames:7d} {row.candidates:11d} {row.steps:7d} {row.wall_seconds:8.0f} {row.cpu_seconds:8.0f}"
        found.append(f"{row.training:12} {numbers} {row.samples:8d}  {_divergence_in_words(row)}")
    if table.gain is not None:
        found.append(f"the energy lowers the divergence of the data alone by {100 * table.gain:.0f} %")
    return found


def _divergence_in_words(row: Row) -> str:
    if row.divergence is None:
        return f"none: {row.problem}"
    error = "" if row.divergence_error is None else f" ± {row.divergence_error:.4f}"
    return f"{row.divergence:.4f}{error} (halves of the reference {row.reference_halves:.4f})"


def _required(recipe: Recipe) -> tuple[Ablate, Train, PhysicsInformed]:
    """The sections that an ablation takes."""
    physics = recipe.train.physics_informed if recipe.train else None
    missing = {"ablate": recipe.ablate, "train": recipe.train, "train.physics_informed": physics}
    for name, section in missing.items():
        if section is None:
            raise UserError(f"recipe {recipe.name!r} has no [{name}] section; `dig-scale ablate` needs it")
    if len(recipe.systems) != 1:
        raise UserError(f"recipe {recipe.name!r} has {len(recipe.systems)} systems; `dig-scale ablate` compares one")
    assert recipe.ablate is not None and recipe.train is not None and physics is not None
    return recipe.ablate, recipe.train, physics


def arms_of(recipe: Recipe, trajectories: Path, out: Path) -> tuple[Arm, ...]:
    """The three trainings with their data, which are drawn into `out`; all but the losses is alike. Raises UserError."""
    settings, train, physics = _required(recipe)
    target = _target(recipe, physics)
    few = _drawn(recipe, trajectories, target, settings.frames, out / "few")
    candidates = physics.candidates or _hot_candidates(recipe, trajectories, target, out / "candidates")
    told = physics.model_copy(update={"candidates": candidates, "temperature": target})
    pairs, seconds = _pairs(recipe, train, target, out)
    number, hot = (load_manifest(folder).frames(TRAIN) for folder in (few, candidates))

    def arm(name: str, folder: str, informed: PhysicsInformed | None, data: Path, counts: tuple[int, int]) -> Arm:
        energy = {"physics_informed": informed, "posterior": pairs if informed is not None else None}
        changed = recipe.model_copy(update={"train": train.model_copy(update=energy)})
        return Arm(name, out / folder, data, changed, *counts, seconds if informed is not None else 0.0)

    return (
        arm(
            "energy only", "energy", told.model_copy(update={"denoising_weight": 0.0, "every": 1}), candidates, (0, hot)
        ),
        arm("data only", "data", None, few, (number, 0)),
        arm("both", "both", told, few, (number, hot)),
    )


def _pairs(recipe: Recipe, train: Train, target: float, out: Path) -> tuple[Posterior | None, float]:
    """[train.posterior] with its pairs, made from the candidates where the recipe names none, and the seconds of that."""
    if train.posterior is None or train.posterior.pairs is not None:
        return train.posterior, 0.0
    if not (out / "candidates").is_dir():
        raise UserError("train.physics_informed.candidates are given: give train.posterior.pairs made from them, too")
    simulate = recipe.simulate and recipe.simulate.model_copy(update={"temperature": target})
    recipe = recipe.model_copy(update={"simulate": simulate})
    found = posterior_stage(recipe, [out / "candidates" / "trajectories"], out / "posterior")
    return train.posterior.model_copy(update={"pairs": found.dataset}), found.seconds


def _target(recipe: Recipe, physics: PhysicsInformed) -> float:
    stated = (physics, recipe.pack, recipe.simulate)
    kelvin = next((one.temperature for one in stated if one is not None and one.temperature is not None), None)
    if kelvin is None:
        raise UserError(f"recipe {recipe.name!r} states no temperature (K); set train.physics_informed.temperature")
    return kelvin


def _hot_candidates(recipe: Recipe, trajectories: Path, target: float, out: Path) -> Path:
    settings, _, _ = _required(recipe)
    found = (records.trajectory_origin(path).get("temperature_K") for path in records.find_trajectories(trajectories))
    held = sorted({kelvin for kelvin in found if kelvin is not None})
    kelvin = settings.candidate_temperature or max(held, default=target)
    if kelvin <= target:
        raise UserError(
            f"{trajectories}: candidates at {kelvin:g} K would be data at the target temperature of {target:g} K; simulate "
            "hotter ones (simulate.replica_exchange), or give train.physics_informed.candidates"
        )
    return _drawn(recipe, trajectories, kelvin, settings.candidates, out)


def _drawn(recipe: Recipe, trajectories: Path, kelvin: float, number: int, out: Path) -> Path:
    """A dataset of `number` frames at a temperature, evenly spread over the trajectories; none are kept for validation."""
    from dig_scale.importers.stores import write_store

    paths = [
        path
        for path in records.find_trajectories(trajectories)
        if abs((records.trajectory_origin(path).get("temperature_K") or kelvin) - kelvin) < 1e-6
    ]
    read = [records.read_trajectory_frames(path) for path in paths]
    starts = np.cumsum([0, *(frames.n_frames for _, frames in read)])
    if starts[-1] < number:
        raise UserError(f"{trajectories}: {starts[-1]} frames at {kelvin:g} K, {number} are asked for; simulate more")
    chosen = records.evenly_spread(int(starts[-1]), number)
    for path, (system, frames), start in zip(paths, read, starts, strict=False):
        own = chosen[(chosen >= start) & (chosen < start + frames.n_frames)] - start
        if len(own):
            store = out / "trajectories" / path.parent.name / path.name
            write_store(store, system, _rows(frames, own), records.trajectory_origin(path))
    pack = (recipe.pack or Pack()).model_copy(update={"temperature": kelvin, "validation_fraction": 0.0})
    records.pack_dataset(recipe.model_copy(update={"pack": pack}), [out / "trajectories"], out / "dataset")
    return out / "dataset"


def _rows(frames: Frames, rows: np.ndarray) -> Frames:
    """Some of the frames."""
    given = {one.name: getattr(frames, one.name) for one in fields(frames) if one.name != "labels"}
    values: dict[str, Any] = {name: None if value is None else value[rows] for name, value in given.items()}
    return Frames(**values, labels={name: label[rows] for name, label in frames.labels.items()})


def _budget(settings: Ablate) -> str:
    return "equal steps" if settings.seconds is None else f"{settings.seconds:g} s of training steps each"


def _budgeted(arms: Sequence[Arm], settings: Ablate, out: Path) -> list[Arm]:
    """The trainings with as many steps as fill the same wall time; decided once, and kept in the folder."""
    if settings.seconds is None:
        return list(arms)
    path = out / _PLAN
    plan: dict[str, int] = json.loads(path.read_text()) if path.is_file() else {}
    for arm in arms:
        if arm.name not in plan:
            plan[arm.name] = max(1, int((settings.seconds - arm.prepared_seconds) / _seconds_per_step(arm)))
            replace_durably(path, json.dumps(plan, indent=1).encode())
    return [_with_steps(arm, plan[arm.name]) for arm in arms]


def _seconds_per_step(arm: Arm) -> float:
    """Median over windows of a short training of their mean times; the first window, where all is set up, is left out."""
    from dig_scale.training.metrics import read_metrics

    assert arm.recipe.train is not None
    physics = arm.recipe.train.physics_informed
    window = max(_FEWEST_IN_WINDOW, physics.every if physics is not None else 1)
    folder, steps = arm.folder / "timing", _TIMED_WINDOWS * window
    logged = {"log_every": window, "checkpoint_every": steps, "validate_every": steps}
    train_stage(_with_train(_with_steps(arm, steps).recipe, logged), arm.dataset, folder)
    rows = [row for row in read_metrics(folder) if row["kind"] == "train"]
    return float(np.median([row["step_ms_mean"] for row in rows[1:]])) / 1e3


def _with_steps(arm: Arm, steps: int) -> Arm:
    assert arm.recipe.train is not None
    warm = min(arm.recipe.train.warmup_steps, steps // 10)
    return replace(arm, recipe=_with_train(arm.recipe, {"steps": steps, "warmup_steps": warm}))


def _with_train(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    assert recipe.train is not None
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})


def _judged(arm: Arm, trajectories: Path) -> tuple[Row, str]:
    """Train, sample and compare one of them: its row, and what its divergence is about."""

    assert arm.recipe.train is not None
    model, drawn, report = (arm.folder / name for name in ("model", "ensemble", "report"))
    train_stage(arm.recipe, arm.dataset, model)
    ensemble = sample_stage(shared_out(model, None, arm.recipe.sample, drawn))[0]
    cost = ensemble.provenance["training_cost"]
    wall = arm.prepared_seconds + cost["wall_seconds"]
    known = (arm.name, arm.frames, arm.candidates, arm.recipe.train.steps, wall, cost["cpu_seconds"])
    try:
        page = evaluate_stage(drawn, trajectories, arm.recipe.evaluate, report)
    except UserError as error:
        return Row(*known, int(np.isfinite(ensemble.positions).all((1, 2)).sum()), None, None, None, str(error)), ""
    content = json.loads(page.with_suffix(".json").read_text())
    headline = content["headline"]
    if headline is None:
        return Row(*known, content["subject"]["samples"], None, None, None, "the system has no torsion"), ""
    found = headline["divergence"]
    numbers = (found["model"], found["model_error"], found["halves"])
    return Row(*known, content["subject"]["samples"], *numbers), headline["about"]


def gain_of(rows: Sequence[Row]) -> float | None:
    """By how much of itself the divergence of the data alone falls with the energy; None where either is missing."""
    found = {row.training: row.divergence for row in rows}
    data, both = found["data only"], found["both"]
    return None if data is None or both is None or data == 0 else 1 - both / data


def write_table(table: Ablation, out: Path) -> None:
    """ablation.json and ablation.csv in the folder `out`."""
    replace_durably(out / JSON_NAME, json.dumps(asdict(table), indent=1).encode())
    with (out / CSV_NAME).open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [one.name for one in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in table.rows)
