"""Energies of many structures by Ray actors, each with a potential of its own.

In: what `potential_for` takes, and how many structures there will be. Out: a Potential whose batches are spread over actors
for as long as a `with` lasts. An actor that dies is started again and its piece of the batch computed again, three
times. Worth it where a calculator is slow or there are more machines than one: OpenMM fills one machine by threads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
from ray.util import ActorPool

from dig_scale.config import Simulate
from dig_scale.errors import UserError
from dig_scale.simulation.campaign import cluster
from dig_scale.simulation.engine import SimulationError
from dig_scale.simulation.potential import EnginePotential, PotentialOptions, potential_for
from dig_scale.system import System

_WORTH_ACTORS_S = 60.0
"""Seconds of work here above which actors are started; they need some ten to be up."""
_TRIES_AFTER_DEATHS = 3
_PIECES_PER_ACTOR = 4


@contextmanager
def potential_for_many(
    system: System, simulate: Simulate, structures: int, options: PotentialOptions | None = None
) -> Iterator[EnginePotential]:
    """The Potential of a recipe for `structures` evaluations: in this process if these are soon done, else on actors.

    The cost of one is measured at the reference positions. Raises UserError as potential_for does.
    """
    here = potential_for(system, simulate, options)
    if structures * _seconds(here) < _WORTH_ACTORS_S:
        yield here
        return
    with potential_on_actors(system, simulate, structures, options) as spread:
        yield spread


@contextmanager
def potential_on_actors(
    system: System, simulate: Simulate, structures: int, options: PotentialOptions | None = None
) -> Iterator[EnginePotential]:
    """The Potential of a recipe computed by Ray actors, at most options.actors and one per structure."""
    settings = options or PotentialOptions()
    alone = replace(settings, threads=1)
    here = potential_for(system, simulate, alone)
    with cluster(settings.actors, structures) as count:
        kind = ray.remote(_Evaluator).options(
            num_cpus=1, max_restarts=_TRIES_AFTER_DEATHS, max_task_retries=_TRIES_AFTER_DEATHS
        )
        actors: tuple[Any, ...] = tuple(kind.remote(system, simulate, alone) for _ in range(count))
        try:
            yield replace(here, compute=_Crew(system.name, actors))
        finally:
            for actor in actors:
                ray.kill(actor)


class _Evaluator:
    """Computes pieces of batches in a process of its own."""

    def __init__(self, system: System, simulate: Simulate, options: PotentialOptions) -> None:
        self._potential = potential_for(system, simulate, options)

    def compute(self, positions: np.ndarray, cells: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        return self._potential.energy_and_forces(positions, cells)


@dataclass(frozen=True)
class _Crew:
    """A Compute on actors."""

    name: str
    actors: tuple[Any, ...]

    def __call__(self, positions: np.ndarray, cells: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        count = min(len(positions), _PIECES_PER_ACTOR * len(self.actors))
        pieces = np.array_split(np.arange(len(positions)), count)

        def sent(actor: Any, rows: np.ndarray) -> Any:
            return actor.compute.remote(positions[rows], None if cells is None else cells[rows])

        try:
            energies, forces = zip(*ActorPool(list(self.actors)).map(sent, pieces), strict=True)
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, UserError) else error from None
        except ray.exceptions.RayActorError as error:
            raise SimulationError(
                f"system {self.name!r}: a process that computed its energies died {_TRIES_AFTER_DEATHS + 1} times: "
                f"{str(error).splitlines()[0]}"
            ) from error
        return np.concatenate(energies), np.concatenate(forces)


def _seconds(potential: EnginePotential) -> float:
    """Time of one evaluation; infinite where there is no structure to try it on."""
    system = potential.system
    if system.cell is None and any(system.periodic):
        return math.inf
    begin = time.perf_counter()
    potential.energy_and_forces(system.reference_positions[None])
    return time.perf_counter() - begin
