"""Potentials on Ray actors: the energies of one process, whoever dies meanwhile; few structures start no Ray."""

from __future__ import annotations

import numpy as np
import psutil
import pytest
import torch

from dig_scale.config import Simulate, SystemSpec
from dig_scale.importers import system_from_spec
from dig_scale.simulation.engine import SimulationError
from dig_scale.simulation.posterior import Dynamics, MeansOfPart, Part
from dig_scale.simulation.potential import PotentialOptions, potential_for
from dig_scale.simulation.potential_actors import crew_of, potential_for_many, potential_on_actors
from dig_scale.system import System
from tests.simulation_runs import ray_session

__all__ = ["ray_session"]

FLEXIBLE = Simulate(constraints="none", time_step_fs=1.0)


@pytest.fixture(scope="module")
def dipeptide() -> System:
    return system_from_spec(SystemSpec(name="ala2", sequence="ACE-ALA-NME"))


def _shaken(system: System, count: int) -> np.ndarray:
    noise = np.random.default_rng(1).normal(scale=0.04, size=(count, system.n_sites, 3))
    return system.reference_positions + noise


def test_actors_give_the_energies_of_one_process(ray_session: None, dipeptide: System) -> None:
    x = _shaken(dipeptide, 11)
    here = potential_for(dipeptide, FLEXIBLE, PotentialOptions(threads=1)).energy_and_forces(x)
    with potential_on_actors(dipeptide, FLEXIBLE, len(x), PotentialOptions(actors=2)) as potential:
        assert np.array_equal(potential.energy_and_forces(x)[0], here[0])
        positions = torch.tensor(x, requires_grad=True)
        (gradient,) = torch.autograd.grad(potential.reduced_energy(positions).sum(), positions)
        np.testing.assert_allclose(-gradient * potential.kT_ev, here[1], rtol=1e-9, atol=1e-12)
        with pytest.raises(SimulationError, match="cell that varies"):
            potential.energy_and_forces(x, np.zeros((11, 3, 3)))


def test_killed_actor_is_replaced_and_its_piece_computed_again(ray_session: None, dipeptide: System) -> None:
    x = _shaken(dipeptide, 6)
    with potential_on_actors(dipeptide, FLEXIBLE, len(x), PotentialOptions(actors=1)) as potential:
        before = potential.energy_and_forces(x)
        running = psutil.Process().children(recursive=True)
        (worker,) = [process for process in running if "_Worker" in " ".join(process.cmdline())]
        worker.kill()
        after = potential.energy_and_forces(x)
    assert np.array_equal(before[0], after[0]) and np.array_equal(before[1], after[1])


def test_a_crew_works_off_any_list_in_order_and_tells_how_far_it_is(ray_session: None, dipeptide: System) -> None:
    x = _shaken(dipeptide, 9)
    work = MeansOfPart(Dynamics(step=0.02, periods=1))
    parts = [Part(x[low : low + 3], np.full(3, 0.05), x[low : low + 3], (7, low)) for low in (0, 3, 6)]
    here = potential_for(dipeptide, FLEXIBLE, PotentialOptions(threads=1))
    heard: list[int] = []
    with crew_of(dipeptide, FLEXIBLE, len(parts), PotentialOptions(actors=2)) as crew:
        found = crew(work, parts, heard.append)
    assert heard == [1, 2, 3]
    for means, part in zip(found, parts, strict=True):
        assert np.array_equal(means, work(here, part))


def test_few_structures_stay_in_this_process(dipeptide: System) -> None:
    import ray

    running = ray.is_initialized()
    with potential_for_many(dipeptide, FLEXIBLE, 10, PotentialOptions(threads=1)) as potential:
        assert ray.is_initialized() == running
        assert np.isfinite(potential.energy_and_forces(_shaken(dipeptide, 1))[0]).all()
