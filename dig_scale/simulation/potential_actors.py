"""Ray actors that have a potential each, for energies of many structures and for whatever else asks potentials over and over.

In: what `potential_for` takes, and how much work there will be. Out: for as long as a `with` lasts, a Crew that works off a list,
or a Potential whose batches are spread over one. An actor that dies is started again and its piece of work done again, three
times. Worth it where a calculator is slow or there are more machines than one: OpenMM fills one machine by threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
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
    if not worth_actors(here, structures):
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
    here = potential_for(system, simulate, replace(settings, threads=1))
    with crew_of(system, simulate, structures, settings) as crew:
        yield replace(here, compute=_Spread(crew))


@contextmanager
def crew_of(system: System, simulate: Simulate, pieces: int, options: PotentialOptions | None = None) -> Iterator[Crew]:
    """Actors for so many pieces of work, at most options.actors."""
    settings = options or PotentialOptions()
    with cluster(settings.actors, pieces) as count:
        kind = ray.remote(_Worker).options(
            num_cpus=1, max_restarts=_TRIES_AFTER_DEATHS, max_task_retries=_TRIES_AFTER_DEATHS
        )
        actors: tuple[Any, ...] = tuple(
            kind.remote(system, simulate, replace(settings, threads=1)) for _ in range(count)
        )
        try:
            yield Crew(system.name, actors)
        finally:
            for actor in actors:
                ray.kill(actor)


class _Worker:
    """A potential in a process of its own, and what is done with it."""

    def __init__(self, system: System, simulate: Simulate, options: PotentialOptions) -> None:
        self._potential = potential_for(system, simulate, options)

    def do(self, work: Work, number: int, piece: Any) -> tuple[int, Any]:
        return number, work(self._potential, piece)


Work = Callable[[EnginePotential, Any], Any]


@dataclass(frozen=True)
class Crew:
    """Actors with a potential of the system `name` each."""

    name: str
    actors: tuple[Any, ...]

    def __call__(self, work: Work, pieces: Sequence[Any], heard: Callable[[int], None] | None = None) -> list[Any]:
        """work(potential, piece) of every piece, in their order; `heard` is told after each how many are done.

        The first pieces begin first. Raises what `work` raises, and SimulationError when actors die again and again.
        """
        found: dict[int, Any] = {}
        pool = ActorPool(list(self.actors))

        def sent(actor: Any, number: Any) -> Any:
            return actor.do.remote(work, number, pieces[number])

        try:
            for number, result in pool.map_unordered(sent, list[Any](range(len(pieces)))):
                found[number] = result
                if heard is not None:
                    heard(len(found))
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, UserError) else error from None
        except ray.exceptions.RayActorError as error:
            raise SimulationError(
                f"system {self.name!r}: a process that computed its energies died {_TRIES_AFTER_DEATHS + 1} times: "
                f"{str(error).splitlines()[0]}"
            ) from error
        return [found[number] for number in range(len(pieces))]


@dataclass(frozen=True)
class _Spread:
    """A Compute on a crew."""

    crew: Crew

    def __call__(self, positions: np.ndarray, cells: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        count = min(len(positions), _PIECES_PER_ACTOR * len(self.crew.actors))
        rows = np.array_split(np.arange(len(positions)), count)
        pieces = [(positions[row], None if cells is None else cells[row]) for row in rows]
        energies, forces = zip(*self.crew(_energy_and_forces, pieces), strict=True)
        return np.concatenate(energies), np.concatenate(forces)


def _energy_and_forces(
    potential: EnginePotential, piece: tuple[np.ndarray, np.ndarray | None]
) -> tuple[np.ndarray, np.ndarray]:
    return potential.energy_and_forces(*piece)


def worth_actors(potential: EnginePotential, evaluations: int) -> bool:
    """Whether so many evaluations, by the time that one takes, are long enough for actors to start; so they are where there is
    no structure to try it on."""
    system = potential.system
    if system.cell is None and any(system.periodic):
        return True
    begin = time.perf_counter()
    potential.energy_and_forces(system.reference_positions[None])
    return evaluations * (time.perf_counter() - begin) > _WORTH_ACTORS_S
