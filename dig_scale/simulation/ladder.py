"""One replica: its temperatures advanced in turn, and Metropolis exchange between neighbours.

In: engines (one per temperature, one engine when there is no exchange), a LadderState, a Timetable. Out: the next state
and the frames of one chunk at every temperature. All randomness follows from (seeds, replica, chunk, rung) or the
exchange's number, so a chunk depends on the state before it alone. Trajectories are continuous in temperature, not in
configuration. Exchange: Sugita and Okamoto, Chem. Phys. Lett. 314 (1999) 141. Knows no files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dig_scale.config import Simulate
from dig_scale.simulation.engine import Engine, PhaseSpace, SimulationError
from dig_scale.system import Frames
from dig_scale.units import PS_PER_FS, thermal_energy

Advance = Callable[[Sequence[Any], int], list[Frames]]
"""Advances all engines of a replica by a number of steps; the frame [1, N, 3] that each reached."""

_INTEGER_TOLERANCE = 1e-6
_EQUILIBRATION = -1
_MINIMISATION = -2


@dataclass(frozen=True)
class Timetable:
    """Steps between frames and between exchanges (None: no exchange), and of equilibration; frames in all, per chunk."""

    frame_steps: int
    exchange_steps: int | None
    equilibration_steps: int
    frames: int
    chunk_frames: int

    @classmethod
    def of(cls, simulate: Simulate, time_step_fs: float) -> Timetable:
        """The timetable of a recipe with this time step; raises SimulationError for a time that is no whole number of steps."""
        exchange = simulate.replica_exchange
        steps = _Steps(time_step_fs)
        return cls(
            frame_steps=steps("frame_spacing_ps", simulate.frame_spacing_ps),
            exchange_steps=steps("replica_exchange.exchange_interval_ps", exchange.exchange_interval_ps)
            if exchange
            else None,
            equilibration_steps=round(simulate.equilibration_ps / (time_step_fs * PS_PER_FS)),
            frames=simulate.frames,
            chunk_frames=simulate.chunk_frames,
        )

    def chunk_size(self, frames_done: int) -> int:
        """Frames of the chunk that begins after `frames_done`."""
        return min(self.chunk_frames, self.frames - frames_done)


@dataclass(frozen=True)
class NoiseKey:
    """What the noise of one replica follows from."""

    recipe_seed: int
    simulate_seed: int
    system: str
    replica: int

    def seed(self, chunk: int, rung: int) -> int:
        """A 31-bit engine seed, never 0 (which OpenMM reads as "choose one")."""
        return 1 + self._digest("engine", chunk, rung) % (2**31 - 2)

    def exchange_numbers(self, exchange: int, count: int) -> np.ndarray:
        """Uniform numbers [count] of the `exchange`-th exchange."""
        return np.random.default_rng(self._digest("exchange", exchange)).random(count)

    def _digest(self, *what: object) -> int:
        text = repr((self.recipe_seed, self.simulate_seed, self.system, self.replica, *what))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


@dataclass(frozen=True)
class LadderState:
    """Between chunks: chunks and frames done, one point per temperature, exchanges tried and accepted per neighbour pair."""

    chunk: int
    frames: int
    points: tuple[PhaseSpace, ...]
    tried: tuple[int, ...]
    accepted: tuple[int, ...]

    @property
    def acceptance(self) -> tuple[float | None, ...]:
        """Accepted fraction per neighbour pair, None before the first try."""
        return tuple(a / n if n else None for a, n in zip(self.accepted, self.tried, strict=True))


def in_turn(engines: Sequence[Engine], n_steps: int) -> list[Frames]:
    """Advance one engine after the other."""
    return [engine.advance(n_steps) for engine in engines]


def equilibrated(
    engines: Sequence[Engine], timetable: Timetable, noise: NoiseKey, advance: Advance = in_turn
) -> LadderState:
    """Every temperature minimised and equilibrated on its own; steps count from here."""
    for rung, engine in enumerate(engines):
        start = engine.minimised(noise.seed(_MINIMISATION, rung))
        engine.restore(start, noise.seed(_EQUILIBRATION, rung))
    if timetable.equilibration_steps:
        advance(engines, timetable.equilibration_steps)
    points = tuple(replace(engine.checkpoint(), step=0) for engine in engines)
    pairs = len(engines) - 1
    return LadderState(0, 0, points, (0,) * pairs, (0,) * pairs)


def next_chunk(
    engines: Sequence[Engine],
    state: LadderState,
    timetable: Timetable,
    noise: NoiseKey,
    advance: Advance = in_turn,
) -> tuple[LadderState, tuple[Frames, ...]]:
    """The state after one more chunk, and its frames at every temperature; raises SimulationError as engines do."""
    for rung, (engine, point) in enumerate(zip(engines, state.points, strict=True)):
        engine.restore(point, noise.seed(state.chunk, rung))
    count = timetable.chunk_size(state.frames)
    step = state.points[0].step
    end = step + count * timetable.frame_steps
    kept: list[list[Frames]] = [[] for _ in engines]
    tried, accepted = np.array(state.tried, int), np.array(state.accepted, int)
    while step < end:
        target = _next_event(step, timetable)
        reached = advance(engines, target - step)
        step = target
        if step % timetable.frame_steps == 0:
            for rung, frame in enumerate(reached):
                kept[rung].append(frame)
        if timetable.exchange_steps and step % timetable.exchange_steps == 0:
            energies = [_energy(frame) for frame in reached]
            attempts, swaps = _exchange(engines, energies, step // timetable.exchange_steps, noise)
            tried, accepted = tried + attempts, accepted + swaps
    points = tuple(engine.checkpoint() for engine in engines)
    after = LadderState(state.chunk + 1, state.frames + count, points, tuple(tried.tolist()), tuple(accepted.tolist()))
    return after, tuple(_joined(frames) for frames in kept)


def _next_event(step: int, timetable: Timetable) -> int:
    intervals = [timetable.frame_steps, *([timetable.exchange_steps] if timetable.exchange_steps else [])]
    return min((step // interval + 1) * interval for interval in intervals)


def _exchange(
    engines: Sequence[Engine], energies: Sequence[float], number: int, noise: NoiseKey
) -> tuple[np.ndarray, np.ndarray]:
    """Try to exchange every second pair of neighbours, even and odd pairs in turn; returns tries and swaps per pair."""
    pairs = len(engines) - 1
    chances = noise.exchange_numbers(number, pairs)
    tried, accepted = np.zeros(pairs, int), np.zeros(pairs, int)
    for low in range(number % 2, pairs, 2):
        tried[low] = 1
        beta_low, beta_high = (1 / thermal_energy(engines[k].temperature) for k in (low, low + 1))
        exponent = (beta_low - beta_high) * (energies[low] - energies[low + 1])
        if chances[low] < math.exp(min(exponent, 0.0)):
            _swap(engines[low], engines[low + 1])
            accepted[low] = 1
    return tried, accepted


def _swap(one: Engine, two: Engine) -> None:
    point_one, point_two = one.checkpoint(), two.checkpoint()
    one.move_to(point_two.at_temperature(one.temperature, two.temperature))
    two.move_to(point_one.at_temperature(two.temperature, one.temperature))


def _energy(frame: Frames) -> float:
    if frame.energy is None:
        raise SimulationError("replica exchange needs an engine that reports potential energies")
    return float(frame.energy[0])


def _joined(frames: Sequence[Frames]) -> Frames:
    def together(name: str) -> np.ndarray | None:
        parts = [getattr(frame, name) for frame in frames]
        return None if parts[0] is None else np.concatenate(parts)

    return Frames(
        positions=np.concatenate([frame.positions for frame in frames]),
        time_ps=np.concatenate([frame.time_ps for frame in frames]),
        energy=together("energy"),
        forces=together("forces"),
    )


@dataclass(frozen=True)
class _Steps:
    time_step_fs: float

    def __call__(self, name: str, duration_ps: float) -> int:
        steps = duration_ps / (self.time_step_fs * PS_PER_FS)
        if round(steps) < 1 or abs(steps - round(steps)) > _INTEGER_TOLERANCE * max(steps, 1):
            raise SimulationError(
                f"simulate.{name} is {duration_ps:g} ps, {steps:.4g} steps of {self.time_step_fs:g} fs: expected a whole "
                f"number of steps, at least 1"
            )
        return round(steps)
