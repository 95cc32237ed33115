"""Numbers of a model beside the same numbers of its reference, for any kind of system: sets of frames, observables, tables.

In: Frames of the model and of the reference. Out: tables whose columns are sets (model, reference, its halves, and as many of
its frames as there are samples) or distances between them. Where the reference has too few frames for halves - two known
states, one pose - those columns are empty. Distances of observables are Wasserstein-1, in the observable's unit; the floor
of a distance is what the reference's own frames score. Knows neither kinds of system nor HTML.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dig_scale.ensemble import Ensemble
from dig_scale.errors import UserError
from dig_scale.evaluation.formats import FORMATS
from dig_scale.evaluation.reference import first_halves
from dig_scale.evaluation.verdict import AT_NOISE_FLOOR
from dig_scale.system import Frames, System

FEW_FRAMES = 20
"""A reference of fewer frames is a list of known structures, not a distribution."""
FLOOR_DRAWS = 10
SET_TITLES = {
    "model": "Model",
    "md": "Reference",
    "first_half": "Reference, first half",
    "second_half": "Reference, second half",
    "subsample": "Reference, same-size subsample",
}
DISTANCE_TITLES = {
    "model": "Model to reference",
    "halves": "Reference halves to each other",
    "subsample": "Reference, same-size subsample, to reference (noise floor)",
}

Numbers = Mapping[str, float | None]
"""A number for each column; None where it is not determined."""


@dataclass(frozen=True)
class Reference:
    """Reference frames of `system`, those of a trajectory adjacent and in time order; trajectory [F] labels, temperature in K."""

    system: System
    frames: Frames
    trajectory: np.ndarray
    temperature: float
    source: str = ""

    @property
    def is_few(self) -> bool:
        """Whether the frames are known structures rather than a distribution."""
        return self.frames.n_frames < FEW_FRAMES


@dataclass(frozen=True)
class Sets:
    """Samples and reference frames, and the reference's parts as indices: first_half, second_half, subsample, or none; draws
    [FLOOR_DRAWS, S] are subsamples, of which the first is that part.
    """

    model: Frames
    reference: Frames
    parts: Mapping[str, np.ndarray]
    draws: np.ndarray

    def distances(self, distance: Callable[[Frames, Frames], float]) -> Numbers:
        """A distance of the model from the reference, and its yardsticks."""
        if not self.parts:
            return dict.fromkeys(DISTANCE_TITLES)
        first, second, drawn = (taken(self.reference, rows) for rows in self.parts.values())
        pairs = ((self.model, self.reference), (first, second), (drawn, self.reference))
        return {name: distance(*pair) for name, pair in zip(DISTANCE_TITLES, pairs, strict=True)}


@dataclass(frozen=True)
class Observable:
    """A number per sample [S, ...] and per reference frame [F, ...]; `format` is a name of formats.FORMATS."""

    label: str
    model: np.ndarray
    reference: np.ndarray
    format: str = "number"

    @property
    def is_drawn(self) -> bool:
        """Whether it has a distribution worth a distance and a picture: not a yes or no."""
        return self.format != "percent"


@dataclass(frozen=True)
class Row:
    """One line of a table: a number, and where known its spread, for every column."""

    label: str
    format: str
    values: Numbers
    spread: Numbers = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """Rows under columns (key -> title); the column `model` is the model's."""

    title: str
    columns: Mapping[str, str]
    rows: tuple[Row, ...]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a report: tables, and a figure with its caption."""

    title: str
    tables: tuple[Table, ...]
    figure: Any = field(default=None, metadata={"picture": True})
    caption: str = field(default="", metadata={"picture": True})


@dataclass(frozen=True)
class Headline:
    """The one distance that stands at the top: what it is about and its yardsticks, in columns of DISTANCE_TITLES."""

    about: str
    distances: Numbers
    format: str
    unit: str


@dataclass(frozen=True)
class Findings:
    """What a comparison found: a verdict in words, the headline if there is one, sections, and notes (term, explanation)."""

    verdict: tuple[str, ...]
    headline: Headline | None
    sections: tuple[Section, ...]
    notes: tuple[tuple[str, str], ...]


def observed(label: str, pair: Iterable[np.ndarray], format: str = "number") -> Observable:
    """The Observable of two arrays: of the samples, of the reference frames."""
    model, reference = pair
    return Observable(label, model, reference, format)


def reference_of(system: System, trajectories: Sequence[Frames], temperature: float, source: str) -> Reference:
    """The Frames of one or more trajectories as one Reference, sorted by time; raises UserError where there is no frame."""
    kept = [taken(frames, np.argsort(frames.time_ps, kind="stable")) for frames in trajectories if frames.n_frames]
    if not kept:
        raise UserError(f"reference {source or system.name!r}: no frames")
    labels = np.repeat(np.arange(len(kept)), [frames.n_frames for frames in kept])
    return Reference(system, joined(kept), labels, temperature, source)


def samples_of(ensemble: Ensemble) -> Frames:
    """The finite samples of an ensemble as Frames; raises UserError where none is."""
    finite = np.ones(ensemble.n_samples, bool)
    for values in (ensemble.positions, ensemble.rotations, ensemble.cell):
        if values is not None:
            finite &= np.isfinite(values).reshape(len(values), -1).all(axis=1)
    if not finite.any():
        raise UserError(
            f"ensemble of {ensemble.system.name!r}: none of {ensemble.n_samples} samples is finite; sample again or look at "
            "the training log"
        )
    whole = Frames(
        ensemble.positions.astype(np.float64),
        ensemble.index.astype(np.float64),
        rotations=ensemble.rotations,
        cell=ensemble.cell,
    )
    return taken(whole, np.flatnonzero(finite))


def sets_of(model: Frames, reference: Reference, seed: int) -> Sets:
    """Samples and reference with its halves in time, and a subsample drawn with replacement."""
    return _sets(model, reference, first_halves(reference.trajectory), seed)


def alternating_sets(model: Frames, reference: Reference, seed: int) -> Sets:
    """As sets_of, for frames that are independent structures: every other one is in the first half."""
    return _sets(model, reference, np.arange(reference.frames.n_frames) % 2 == 0, seed)


def means_table(title: str, observables: Sequence[Observable], sets: Sets, note: str = "") -> Table:
    """Mean and standard deviation of every observable in every set that there is."""
    rows = []
    for one in observables:
        values = {"model": one.model, "md": one.reference}
        values |= {name: one.reference[part] for name, part in sets.parts.items()}
        means = {name: _mean(found) for name, found in values.items()}
        spread = {name: float(np.std(found)) for name, found in values.items() if one.is_drawn and found.size}
        rows.append(Row(one.label, one.format, means, spread))
    columns = {name: text for name, text in SET_TITLES.items() if name in ("model", "md", *sets.parts)}
    return Table(title, columns, tuple(rows), note)


def distance_table(title: str, observables: Sequence[Observable], sets: Sets, note: str = "") -> Table:
    """Wasserstein-1 distance of every observable that has a distribution."""
    rows = [Row(one.label, one.format, observed_distances(one, sets)) for one in observables if one.is_drawn]
    return Table(title, DISTANCE_TITLES, tuple(rows), note)


def observed_distances(one: Observable, sets: Sets) -> Numbers:
    """Wasserstein-1 distances of one observable, in its unit; the floor is the mean over FLOOR_DRAWS subsamples."""
    if not sets.parts:
        return dict.fromkeys(DISTANCE_TITLES)
    halves = (one.reference[sets.parts[name]] for name in ("first_half", "second_half"))
    floor = np.mean([_wasserstein(one.reference[rows], one.reference) for rows in sets.draws])
    return {"model": _wasserstein(one.model, one.reference), "halves": _wasserstein(*halves), "subsample": float(floor)}


def taken(frames: Frames, rows: np.ndarray) -> Frames:
    """Some frames, by index or mask; their labels are left out."""

    def some(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else values[rows]

    kept = (some(frames.energy), some(frames.forces), some(frames.rotations), some(frames.cell))
    return Frames(frames.positions[rows], frames.time_ps[rows], *kept)


def joined(parts: Sequence[Frames]) -> Frames:
    """Frames one after another; fields that a part lacks are left out, labels too."""

    def together(name: str) -> np.ndarray | None:
        values = [getattr(part, name) for part in parts]
        return None if any(value is None for value in values) else np.concatenate(values)

    return Frames(
        np.concatenate([part.positions for part in parts]),
        np.concatenate([part.time_ps for part in parts]),
        together("energy"),
        together("forces"),
        together("rotations"),
        together("cell"),
    )


def in_words(headline: Headline) -> str:
    """One sentence that says how the model's distance compares with its yardsticks."""
    model, halves, floor = (headline.distances.get(name) for name in DISTANCE_TITLES)
    if model is None or halves is None or floor is None:
        return f"{headline.about}: not determined, as the reference has too few frames."
    text = {name: FORMATS[headline.format](value) for name, value in headline.distances.items() if value is not None}
    said = f"{headline.about}: {text['model']} {headline.unit} from the reference"
    scale = (
        f"its halves are {text['halves']} {headline.unit} apart, chance alone makes {text['subsample']} {headline.unit}"
    )
    if model <= AT_NOISE_FLOOR * floor:
        return f"{said}, which cannot be told from chance at this sample size ({scale})."
    if model <= halves:
        return f"{said}, no more than its halves differ ({scale})."
    ratio = model / halves if halves > 0 else math.inf
    return f"{said}, {ratio:.1f} times what its halves differ by ({scale})."


def _sets(model: Frames, reference: Reference, in_first: np.ndarray, seed: int) -> Sets:
    count = reference.frames.n_frames
    draws = np.random.default_rng(seed).integers(count, size=(FLOOR_DRAWS, model.n_frames))
    if reference.is_few:
        return Sets(model, reference.frames, {}, draws)
    halves = {"first_half": np.flatnonzero(in_first), "second_half": np.flatnonzero(~in_first)}
    return Sets(model, reference.frames, {**halves, "subsample": draws[0]}, draws)


def _mean(values: np.ndarray) -> float | None:
    finite = np.asarray(values, np.float64)[np.isfinite(values)]
    return float(finite.mean()) if finite.size else None


def _wasserstein(first: np.ndarray, second: np.ndarray) -> float:
    from scipy.stats import wasserstein_distance

    if not first.size or not second.size:
        return math.nan
    return float(wasserstein_distance(np.ravel(first), np.ravel(second)))
