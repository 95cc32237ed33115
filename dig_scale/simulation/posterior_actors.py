"""Posterior means of many noised structures, part by part on Ray actors that have a potential each; see posterior.py.

In: a system, [simulate], and parts. Out: the means of every part. Parts do not depend on who has computed them; one whose actor
died is computed again, three times. Soon done work stays in this process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.util import ActorPool

from dig_scale.config import Simulate
from dig_scale.errors import UserError
from dig_scale.simulation.campaign import cluster
from dig_scale.simulation.engine import SimulationError
from dig_scale.simulation.posterior import Dynamics, posterior_means, steps_of
from dig_scale.simulation.potential import Potential, PotentialOptions, potential_for
from dig_scale.system import System

_WORTH_ACTORS_S = 60.0
_TRIES_AFTER_DEATHS = 3


@dataclass(frozen=True)
class Part:
    """Noised structures [F, N, 3] Å at like levels [F] Å, where their dynamics start, and the seed of their random numbers."""

    noised: np.ndarray
    noise_std: np.ndarray
    start: np.ndarray
    seed: tuple[int, ...]


def means_of_parts(
    system: System, simulate: Simulate, dynamics: Dynamics, parts: Sequence[Part], heard: Callable[[int], None]
) -> list[np.ndarray]:
    """Means [F, N, 3] Å of every part, in order; `heard` is told after each how many are done.

    Raises UserError as potential_for does.
    """
    here = potential_for(system, simulate, PotentialOptions(threads=1))
    evaluations = sum(steps_of(part.noise_std, dynamics)[0] * len(part.start) for part in parts)
    if evaluations * _seconds(here, parts[0].start[:1]) < _WORTH_ACTORS_S:
        found = []
        for part in parts:
            found.append(_means(here, dynamics, part))
            heard(len(found))
        return found
    with cluster(None, len(parts)) as count:
        kind = ray.remote(_Sampler).options(
            num_cpus=1, max_restarts=_TRIES_AFTER_DEATHS, max_task_retries=_TRIES_AFTER_DEATHS
        )
        actors: list[Any] = [kind.remote(system, simulate, dynamics) for _ in range(count)]
        try:
            return _on_actors(system.name, actors, parts, heard)
        finally:
            for actor in actors:
                ray.kill(actor)


def _on_actors(name: str, actors: list[Any], parts: Sequence[Part], heard: Callable[[int], None]) -> list[np.ndarray]:
    """The longest parts, which are the last, begin first."""
    found: dict[int, np.ndarray] = {}
    pool, order = ActorPool(actors), list(range(len(parts)))[::-1]
    try:
        for number, means in pool.map_unordered(lambda actor, one: actor.means.remote(one, parts[one]), order):  # type: ignore[arg-type]
            found[number] = means
            heard(len(found))
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, UserError) else error from None
    except ray.exceptions.RayActorError as error:
        raise SimulationError(
            f"system {name!r}: a process that sampled noised structures died {_TRIES_AFTER_DEATHS + 1} times: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return [found[number] for number in range(len(parts))]


class _Sampler:
    """Computes parts in a process of its own."""

    def __init__(self, system: System, simulate: Simulate, dynamics: Dynamics) -> None:
        self._potential = potential_for(system, simulate, PotentialOptions(threads=1))
        self._dynamics = dynamics

    def means(self, number: int, part: Part) -> tuple[int, np.ndarray]:
        return number, _means(self._potential, self._dynamics, part)


def _means(potential: Potential, dynamics: Dynamics, part: Part) -> np.ndarray:
    given = (part.noised, part.noise_std, part.start, potential.system.mobile)
    return posterior_means(potential, *given, dynamics, np.random.default_rng(part.seed))


def _seconds(potential: Potential, positions: np.ndarray) -> float:
    begin = time.perf_counter()
    potential.energy_and_forces(positions)
    return time.perf_counter() - begin
