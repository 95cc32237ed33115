"""What to pack: sources, the plan, and the split and order that follow from them.

In: trajectory paths with frame slices, and a PackPlan. Out: for every drawn frame, its split and its place in the
shuffled order of its system; both are pure functions of plan and frame number, so nothing is held per frame.
Knows nothing of tars.
"""

from __future__ import annotations

import enum
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dig_shards.errors import ShardError
from dig_shards.fields import FieldSpec
from dig_shards.permutation import permute
from dig_shards.trajectory import TrajectoryReader

_DATASET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,47}")
_SYSTEM_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=@-]{0,127}")


class SplitBy(enum.Enum):
    """What goes to validation as a whole: single frames, contiguous blocks of time, or whole trajectories."""

    FRAME = "frame"
    BLOCK = "block"
    TRAJECTORY = "trajectory"


@dataclass(frozen=True)
class TrajectorySource:
    """Frames start:stop:stride of a trajectory store; `name` (default: the store's) must be unique in a dataset.

    `rows` names, per field, the indices kept on the first axis of its frames, in that order (sites of a subsystem);
    fields that are not named stay whole. `system` then replaces the store's system_id.
    """

    path: Path | str
    start: int = 0
    stop: int | None = None
    stride: int = 1
    name: str | None = None
    rows: Mapping[str, tuple[int, ...]] | None = None
    system: str | None = None


@dataclass(frozen=True)
class PackPlan:
    """How to pack; equal plans and inputs give byte-identical tars.

    `fields`: names to keep, in order. `validation_fraction` of all frames, blocks of `block_frames` drawn frames, or
    trajectories (see `split_by`) goes to validation. `seed` fixes split and order. Raises ShardError for bad values.
    """

    name: str
    fields: tuple[str, ...]
    frames_per_member: int = 64
    members_per_shard: int = 1024
    validation_fraction: float = 0.0
    split_by: SplitBy = SplitBy.BLOCK
    block_frames: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if not _DATASET_NAME.fullmatch(self.name):
            raise ShardError(f"dataset name {self.name!r}: use letters, digits, _ and - (at most 48), no dots")
        if not self.fields or len(set(self.fields)) != len(self.fields):
            raise ShardError(f"plan.fields is {self.fields}: name one or more fields, each once")
        for key in ("frames_per_member", "members_per_shard", "block_frames"):
            if getattr(self, key) < 1:
                raise ShardError(f"plan.{key} is {getattr(self, key)}, expected at least 1")
        if not 0.0 <= self.validation_fraction < 1.0:
            raise ShardError(f"plan.validation_fraction is {self.validation_fraction}, expected 0 <= fraction < 1")

    def to_json(self) -> dict[str, Any]:
        """The plan as a JSON object."""
        return {**asdict(self), "fields": list(self.fields), "split_by": self.split_by.value}


@dataclass(frozen=True)
class Draw:
    """A source made definite: `count` frames start, start + stride, ... of an opened trajectory."""

    number: int
    name: str
    system: str
    reader: TrajectoryReader
    start: int
    stop: int
    stride: int
    rows: Mapping[str, tuple[int, ...]]

    @property
    def count(self) -> int:
        """How many frames are drawn."""
        return len(range(self.start, self.stop, self.stride))


def resolve_sources(sources: Sequence[TrajectorySource], plan: PackPlan) -> tuple[Draw, ...]:
    """Open every source; raises ShardError for bad slices, names, systems, or fields that differ within a system."""
    draws = tuple(_resolve(number, source) for number, source in enumerate(sources))
    if not draws:
        raise ShardError("nothing to pack: give at least one trajectory")
    seen: dict[str, Draw] = {}
    for draw in draws:
        if draw.name in seen:
            raise ShardError(
                f"two sources are named {draw.name!r} ({seen[draw.name].reader.path} and {draw.reader.path}); "
                f"give TrajectorySource.name to tell them apart"
            )
        seen[draw.name] = draw
    fields: dict[str, tuple[Draw, tuple[FieldSpec, ...]]] = {}
    for draw in draws:
        first, specs = fields.setdefault(draw.system, (draw, kept_fields(draw, plan)))
        if kept_fields(draw, plan) != specs:
            raise ShardError(
                f"system {draw.system}: trajectories {first.name} and {draw.name} declare different fields "
                f"({specs} and {kept_fields(draw, plan)}); pack them as different systems, or convert one"
            )
    return draws


def kept_fields(draw: Draw, plan: PackPlan) -> tuple[FieldSpec, ...]:
    """The declarations of the plan's fields in a trajectory, in the plan's order."""
    return tuple(_kept(draw.reader.spec(name), draw.rows.get(name)) for name in plan.fields)


def request_digest(draws: Sequence[Draw], plan: PackPlan, sidecars: Mapping[str, str], prints: Sequence[str]) -> str:
    """SHA-256 of all that the tars depend on: plan, drawn frames, content fingerprints and sidecar texts."""
    sources = [
        [d.name, d.system, d.start, d.stop, d.stride, dict(d.rows), p] for d, p in zip(draws, prints, strict=True)
    ]
    request = json.dumps({"plan": plan.to_json(), "sources": sources, "sidecars": sidecars}, sort_keys=True)
    return hashlib.sha256(request.encode()).hexdigest()


@dataclass(frozen=True)
class Split:
    """Which drawn frames are validation: a seeded choice among `units` (frames, blocks or trajectories)."""

    plan: PackPlan
    first_unit: tuple[int, ...]
    units: int
    chosen: int

    @classmethod
    def of(cls, draws: Sequence[Draw], plan: PackPlan) -> Split:
        """The split of a plan; raises ShardError when the fraction would leave a split empty."""
        sizes = [_units(draw.count, plan) for draw in draws]
        units = sum(sizes)
        chosen = round(plan.validation_fraction * units)
        if plan.validation_fraction > 0 and not 0 < chosen < units:
            raise ShardError(
                f"validation_fraction {plan.validation_fraction} of {units} {plan.split_by.value}s puts {chosen} in "
                f"validation; change the fraction, split by smaller units, or give more trajectories"
            )
        first = np.concatenate([[0], np.cumsum(sizes)]).astype(int).tolist()
        return cls(plan, tuple(first[:-1]), units, chosen)

    def is_validation(self, draw: Draw, drawn: np.ndarray) -> np.ndarray:
        """For drawn frame numbers 0..count of a draw: True where the frame belongs to validation."""
        if not self.chosen:
            return np.zeros(len(drawn), bool)
        step = {SplitBy.FRAME: 1, SplitBy.BLOCK: self.plan.block_frames, SplitBy.TRAJECTORY: draw.count}
        unit = self.first_unit[draw.number] + drawn // step[self.plan.split_by]
        return np.asarray(permute(unit, self.units, self.plan.seed, epoch=0) < self.chosen)


def shuffled_rank(drawn: np.ndarray, total: int, plan: PackPlan, system: int) -> np.ndarray:
    """Place in the shuffled order of a system, of the system's drawn frames 0..total."""
    return permute(drawn, total, plan.seed, epoch=1 + system)


def _units(count: int, plan: PackPlan) -> int:
    return {SplitBy.FRAME: count, SplitBy.BLOCK: -(-count // plan.block_frames), SplitBy.TRAJECTORY: 1}[plan.split_by]


def _resolve(number: int, source: TrajectorySource) -> Draw:
    reader = TrajectoryReader(source.path)
    system = source.system or reader.attributes.get("system_id")
    if not isinstance(system, str) or not _SYSTEM_ID.fullmatch(system):
        raise ShardError(
            f"{source.path}: attribute system_id is {system!r}, expected a name of letters, digits and ._+=@- "
            f"(at most 128), for it names a file"
        )
    stop = reader.n_frames if source.stop is None else source.stop
    if not 0 <= source.start < stop <= reader.n_frames or source.stride < 1:
        raise ShardError(
            f"{source.path}: frames {source.start}:{stop}:{source.stride} asked; the store holds {reader.n_frames} "
            f"frames, and a source must draw at least one"
        )
    rows = dict(source.rows or {})
    for field, indices in rows.items():
        _require_rows(source.path, reader.spec(field), indices)
    return Draw(number, source.name or reader.name, system, reader, source.start, stop, source.stride, rows)


def _kept(spec: FieldSpec, rows: tuple[int, ...] | None) -> FieldSpec:
    return spec if rows is None else replace(spec, shape=(len(rows), *spec.shape[1:]))


def _require_rows(path: Path | str, spec: FieldSpec, rows: tuple[int, ...]) -> None:
    size = spec.shape[0] if spec.shape else 0
    if not rows or min(rows) < 0 or max(rows) >= size or len(set(rows)) != len(rows):
        raise ShardError(f"{path}: rows of field {spec.name!r} must be distinct indices in 0..{size - 1}, found {rows}")
