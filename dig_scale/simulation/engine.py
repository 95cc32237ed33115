"""What a simulation engine does: hold one system at one temperature, and advance it.

In: a phase-space point and a noise seed. Out: Frames in Å, ps, eV, eV/Å. An engine keeps nothing else between chunks: a
run continued from a stored PhaseSpace with the same noise seed takes the same steps as one that was never stopped.
Knows no files, no campaign, no other temperature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dig_scale.errors import UserError
from dig_scale.system import Frames


class SimulationError(UserError):
    """A simulation cannot start or broke down; the message names the system and the next step."""


@dataclass(frozen=True)
class PhaseSpace:
    """Where a simulation stands: positions [N, 3] Å and velocities [N, 3] Å/ps in float64, and steps taken."""

    positions: np.ndarray
    velocities: np.ndarray
    step: int

    def at_temperature(self, new: float, old: float) -> PhaseSpace:
        """The same point with velocities rescaled from temperature `old` to `new`, both in K."""
        return PhaseSpace(self.positions, self.velocities * np.sqrt(new / old), self.step)


class Engine(Protocol):
    """One system at one temperature."""

    @property
    def origin(self) -> dict[str, Any]:
        """Engine, versions, platform, force-field hash, thermostat, time step: JSON-ready."""

    @property
    def temperature(self) -> float:
        """K."""

    def minimised(self, noise_seed: int) -> PhaseSpace:
        """A start: the reference geometry at a local energy minimum, with thermal velocities drawn from `noise_seed`."""

    def restore(self, point: PhaseSpace, noise_seed: int) -> None:
        """Continue from `point`; all later noise follows from `noise_seed`."""

    def move_to(self, point: PhaseSpace) -> None:
        """Jump to `point` within a running noise stream, as an accepted replica exchange does."""

    def advance(self, n_steps: int) -> Frames:
        """Take steps and return the frame [1, N, 3] reached; raises SimulationError when it is not finite."""

    def checkpoint(self) -> PhaseSpace:
        """Where the simulation stands."""
