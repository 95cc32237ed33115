"""The engine gives the force field's energies, the thermostat's temperature, and the same steps after a restart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import openmm
import pytest
from openmm import app

from dig_scale.config import Simulate, SystemSpec
from dig_scale.importers import system_from_spec
from dig_scale.simulation.engine import PhaseSpace, SimulationError
from dig_scale.simulation.openmm_engine import OpenMMEngine, fastest_platform
from dig_scale.simulation.openmm_systems import build_openmm_system, openmm_topology, with_native_obc2
from dig_scale.system import System, SystemKind
from dig_scale.units import BOLTZMANN_EV_PER_K


@pytest.fixture(scope="module")
def dipeptide() -> System:
    return system_from_spec(SystemSpec(name="ala2", sequence="ACE-ALA-NME"))


def _started(system: System, simulate: Simulate, platform: str = "Reference", seed: int = 3) -> OpenMMEngine:
    engine = OpenMMEngine(system, simulate, simulate.temperature, platform)
    engine.restore(engine.minimised(seed), seed)
    return engine


def _energy_and_forces(model: openmm.System, positions_nm: np.ndarray) -> tuple[float, np.ndarray]:
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(model, openmm.VerletIntegrator(0.001), platform)
    context.setPositions(positions_nm)
    state = context.getState(getEnergy=True, getForces=True)
    return state.getPotentialEnergy()._value, state.getForces(asNumpy=True)._value


@pytest.mark.parametrize("file", ["bioemu_tests/chignolin.pdb", "timewarp/implicit-2olx-traj-state0.pdb"])
def test_native_obc2_equals_the_force_field_files_solvent(file: str, shared_data: Path) -> None:
    system = system_from_spec(SystemSpec(name="real", file=shared_data / file))
    force_field = app.ForceField(*Simulate().force_field, "implicit/obc2.xml")
    custom = force_field.createSystem(openmm_topology(system))
    native = with_native_obc2(custom)
    assert any(isinstance(force, openmm.CustomGBForce) for force in custom.getForces())
    assert not any(isinstance(force, openmm.CustomGBForce) for force in native.getForces())
    energies, forces = zip(
        *(_energy_and_forces(m, system.reference_positions / 10) for m in (custom, native)), strict=True
    )
    # kJ/mol and kJ/mol/nm; the XML rounds Coulomb's constant and the surface term to nine digits
    assert energies[0] == pytest.approx(energies[1], abs=2e-3)
    np.testing.assert_allclose(forces[0], forces[1], atol=2e-2)
    assert abs(energies[0]) > 100


def test_forces_are_the_slope_of_the_energy_in_ev_and_angstrom(dipeptide: System) -> None:
    still = Simulate(time_step_fs=1e-9, constraints="none")
    engine = OpenMMEngine(dipeptide, still, 300.0, "Reference")
    rest = np.zeros_like(dipeptide.reference_positions)

    def at(positions: np.ndarray) -> tuple[float, np.ndarray]:
        engine.restore(PhaseSpace(positions, rest, 0), 1)
        frame = engine.advance(1)
        assert frame.energy is not None
        assert frame.forces is not None
        return float(frame.energy[0]), frame.forces[0]

    start = dipeptide.reference_positions + np.random.default_rng(0).normal(scale=0.02, size=rest.shape)
    _, forces = at(start)
    for atom, axis in ((0, 0), (8, 1), (14, 2)):
        step = np.zeros_like(rest)
        step[atom, axis] = 1e-4
        slope = (at(start + step)[0] - at(start - step)[0]) / 2e-4
        assert forces[atom, axis] == pytest.approx(-slope, rel=1e-3, abs=1e-4)


def test_kinetic_energy_is_that_of_the_thermostat(dipeptide: System) -> None:
    simulate = Simulate(friction_per_ps=10.0)
    engine = _started(dipeptide, simulate)
    engine.advance(500)
    kinetic = []
    for _ in range(800):
        engine.advance(25)
        kinetic.append(engine.kinetic_energy())
    temperature = 2 * np.mean(kinetic) / (engine.degrees_of_freedom * BOLTZMANN_EV_PER_K)
    # One sample scatters by 300 sqrt(2 / 51) = 59 K; 80 ps at 10/ps hold some 800 independent ones: 2 K. Four of these,
    # and 4 K for the error of a 4 fs step.
    assert temperature == pytest.approx(300, abs=12)


def test_constrained_bonds_keep_their_length(dipeptide: System) -> None:
    engine = _started(dipeptide, Simulate())
    hydrogen_bonds = dipeptide.bonds[(dipeptide.elements[dipeptide.bonds] == 1).any(axis=1)]
    frames = [engine.advance(20).positions[0] for _ in range(10)]
    lengths = [np.linalg.norm(x[hydrogen_bonds[:, 0]] - x[hydrogen_bonds[:, 1]], axis=1) for x in frames]
    assert np.ptp(lengths, axis=0).max() < 1e-3
    assert len(hydrogen_bonds) == 12


@pytest.mark.parametrize("platform", ["Reference", "CPU"])
def test_restored_engine_takes_the_very_same_steps(platform: str, dipeptide: System) -> None:
    simulate = Simulate()
    first = _started(dipeptide, simulate, platform)
    first.advance(50)
    point = first.checkpoint()
    first.restore(point, 11)
    uninterrupted = [first.advance(25).positions for _ in range(3)]
    second = OpenMMEngine(dipeptide, simulate, 300.0, platform)
    second.restore(point, 11)
    assert all(np.array_equal(second.advance(25).positions, expected) for expected in uninterrupted)
    assert second.checkpoint().step == point.step + 75


def test_other_noise_seed_takes_other_steps(dipeptide: System) -> None:
    engine = _started(dipeptide, Simulate())
    point = engine.checkpoint()
    engine.restore(point, 1)
    one = engine.advance(25).positions
    engine.restore(point, 2)
    assert not np.allclose(one, engine.advance(25).positions, atol=1e-3)


def test_l_stays_l_in_dynamics(dipeptide: System) -> None:
    engine = _started(dipeptide, Simulate())
    (centre, a, b, c) = dipeptide.stereocentres[0]
    for _ in range(20):
        x = engine.advance(50).positions[0]
        assert (x[a] - x[centre]) @ np.cross(x[b] - x[centre], x[c] - x[centre]) > 0


def test_explosion_is_an_error_that_names_the_system(dipeptide: System) -> None:
    engine = _started(dipeptide, Simulate(time_step_fs=40.0, constraints="none", hydrogen_mass=1.0))
    with pytest.raises(SimulationError, match=r"'ala2' at 300 K broke down.*time_step_fs"):
        engine.advance(2500)


def test_slabs_and_beads_are_refused_with_the_next_step(dipeptide: System) -> None:
    slab = replace(dipeptide, kind=SystemKind.CATALYST, cell=20.0 * np.eye(3), periodic=(True, True, False))
    with pytest.raises(SimulationError, match=r"periodic \(a catalyst\): .*dig-scale import"):
        build_openmm_system(slab, Simulate())
    with pytest.raises(SimulationError, match="coarse-grained beads"):
        build_openmm_system(replace(dipeptide, elements=np.zeros(22)), Simulate())


def test_missing_hydrogen_is_named_by_the_force_field(dipeptide: System) -> None:
    with pytest.raises(SimulationError, match=r"'ala2'.*template"):
        build_openmm_system(dipeptide.select(dipeptide.heavy_sites()), Simulate())


def test_platform_is_measured_and_small_systems_run_on_one_thread(dipeptide: System) -> None:
    choice = fastest_platform(dipeptide, Simulate())
    assert choice.platform == min(choice.seconds_per_step, key=choice.seconds_per_step.__getitem__)
    assert {"Reference", "CPU"} <= set(choice.seconds_per_step)


def test_origin_tells_what_made_the_frames(dipeptide: System) -> None:
    origin = OpenMMEngine(dipeptide, Simulate(), 300.0, "Reference").origin
    other = OpenMMEngine(dipeptide, Simulate(hydrogen_mass=2.0), 300.0, "Reference").origin
    assert origin["temperature_K"] == 300.0
    assert origin["force_field_sha256"] != other["force_field_sha256"]
