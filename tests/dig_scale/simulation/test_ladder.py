"""Replica exchange leaves each temperature's Boltzmann distribution as it is, and depends on its seeds alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dig_scale.config import ReplicaExchange, Simulate
from dig_scale.simulation.engine import PhaseSpace, SimulationError
from dig_scale.simulation.ladder import LadderState, NoiseKey, Timetable, next_chunk
from dig_scale.system import Frames
from dig_scale.units import thermal_energy

_STIFFNESS = 0.5  # eV/Å^2
_MEMORY = 0.9


class HarmonicEngine:
    """An exactly sampled harmonic particle: each step forgets a fixed part of the position (Ornstein-Uhlenbeck)."""

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature
        self._noise = np.random.default_rng(0)
        self._point = PhaseSpace(np.zeros((1, 3)), np.zeros((1, 3)), 0)

    @property
    def origin(self) -> dict[str, Any]:
        return {}

    @property
    def temperature(self) -> float:
        return self._temperature

    def minimised(self, noise_seed: int) -> PhaseSpace:
        return self._point

    def restore(self, point: PhaseSpace, noise_seed: int) -> None:
        self._point, self._noise = point, np.random.default_rng(noise_seed)

    def move_to(self, point: PhaseSpace) -> None:
        self._point = point

    def advance(self, n_steps: int) -> Frames:
        width = np.sqrt(thermal_energy(self._temperature) / _STIFFNESS)
        for _ in range(n_steps):
            fresh = self._noise.normal(size=(1, 3)) * width
            moved = _MEMORY * self._point.positions + np.sqrt(1 - _MEMORY**2) * fresh
            self._point = PhaseSpace(moved, self._point.velocities, self._point.step + 1)
        energy = 0.5 * _STIFFNESS * float((self._point.positions**2).sum())
        return Frames(self._point.positions[None], np.array([float(self._point.step)]), np.array([energy]))

    def checkpoint(self) -> PhaseSpace:
        return self._point


_TEMPERATURES = (300.0, 450.0, 700.0)
_NOISE = NoiseKey(1, 2, "harmonic", 0)


def _timetable(frames: int, frame_steps: int = 2, exchange_steps: int | None = 3) -> Timetable:
    return Timetable(frame_steps, exchange_steps, 0, frames, frames)


def _start() -> LadderState:
    point = PhaseSpace(np.zeros((1, 3)), np.zeros((1, 3)), 0)
    return LadderState(0, 0, (point,) * 3, (0, 0), (0, 0))


def test_exchange_leaves_every_temperature_its_own_distribution() -> None:
    engines = [HarmonicEngine(kelvin) for kelvin in _TEMPERATURES]
    state, chunk = next_chunk(engines, _start(), _timetable(2500, exchange_steps=1), _NOISE)
    for kelvin, frames in zip(_TEMPERATURES, chunk, strict=True):
        variance = float((frames.positions[50:] ** 2).mean())
        # 7,500 values, their squares correlated over some five frames: relative error sqrt(2 * 5 / 7,500) = 4 %, four times.
        assert variance == pytest.approx(thermal_energy(kelvin) / _STIFFNESS, rel=0.15)
    assert all(rate is not None and 0.3 < rate < 0.95 for rate in state.acceptance)


def test_wrong_energies_would_have_shown() -> None:
    class Upside(HarmonicEngine):
        def advance(self, n_steps: int) -> Frames:
            frame = super().advance(n_steps)
            assert frame.energy is not None
            return Frames(frame.positions, frame.time_ps, -frame.energy)

    engines = [Upside(kelvin) for kelvin in _TEMPERATURES]
    _, chunk = next_chunk(engines, _start(), _timetable(2500, exchange_steps=1), _NOISE)
    variance = float((chunk[0].positions[50:] ** 2).mean())
    assert variance > 1.2 * thermal_energy(300.0) / _STIFFNESS


def test_frames_and_exchanges_fall_on_their_own_steps() -> None:
    engines = [HarmonicEngine(kelvin) for kelvin in _TEMPERATURES]
    state, chunk = next_chunk(engines, _start(), _timetable(9, frame_steps=4, exchange_steps=6), _NOISE)
    assert all(frames.time_ps.tolist() == [4.0 * (k + 1) for k in range(9)] for frames in chunk)
    assert state.tried == (3, 3)
    assert state.points[0].step == 36


def test_chunks_repeat_from_their_state_alone() -> None:
    first, _ = next_chunk([HarmonicEngine(k) for k in _TEMPERATURES], _start(), _timetable(20), _NOISE)
    used = [HarmonicEngine(k) for k in _TEMPERATURES]
    next_chunk(used, _start(), _timetable(7), _NOISE)
    again = [
        next_chunk(engines, first, Timetable(2, 3, 0, 40, 20), _NOISE)
        for engines in (used, [HarmonicEngine(k) for k in _TEMPERATURES])
    ]
    for one, two in zip(again[0][1], again[1][1], strict=True):
        assert np.array_equal(one.positions, two.positions)


def test_last_chunk_is_as_long_as_what_is_left() -> None:
    timetable = Timetable(2, None, 0, 25, 10)
    assert [timetable.chunk_size(done) for done in (0, 10, 20)] == [10, 10, 5]


def test_noise_differs_between_replicas_chunks_rungs_and_seeds() -> None:
    keys = [
        NoiseKey(1, 1, "a", 0),
        NoiseKey(1, 1, "a", 1),
        NoiseKey(1, 2, "a", 0),
        NoiseKey(2, 1, "a", 0),
        NoiseKey(1, 1, "b", 0),
    ]
    seeds = [key.seed(chunk, rung) for key in keys for chunk in range(4) for rung in range(3)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 < seed < 2**31 for seed in seeds)


@pytest.mark.parametrize("wrong", [{"frame_spacing_ps": 0.0051}, {"frame_spacing_ps": 0.001}])
def test_spacing_that_is_no_whole_number_of_steps_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(SimulationError, match=r"frame_spacing_ps.*4 fs"):
        Timetable.of(Simulate.model_validate(wrong), 4.0)


def test_timetable_counts_steps() -> None:
    exchange = ReplicaExchange(temperatures=(300.0, 400.0), exchange_interval_ps=0.5)
    timetable = Timetable.of(Simulate(frame_spacing_ps=1.0, replica_exchange=exchange, equilibration_ps=2.0), 4.0)
    assert (timetable.frame_steps, timetable.exchange_steps, timetable.equilibration_steps) == (250, 125, 500)
