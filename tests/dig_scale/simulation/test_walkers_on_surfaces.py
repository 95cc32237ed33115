"""Many walkers on a slab at once: ASE's effective medium theory to rounding, Langevin dynamics that restart exactly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT

from dig_scale.config import CalculatorSpec, SurfaceSpec
from dig_scale.importers.catalyst import surface_system
from dig_scale.simulation.ase_emt import EMTPotential
from dig_scale.simulation.ase_engine import (
    ASEEngine,
    CalculatorPotential,
    Dynamics,
    Potential,
    SlabLayers,
    advance_together,
    potential_of,
)
from dig_scale.simulation.engine import Engine, PhaseSpace, SimulationError
from dig_scale.system import SiteRole, System
from dig_scale.units import thermal_energy

SPEC = CalculatorSpec()
KELVIN = 600.0


def _system(metal: str = "Cu", adsorbate: str = "O") -> System:
    return surface_system(f"{metal}-{adsorbate}", SurfaceSpec(metal=metal, adsorbate=adsorbate))


def _engines(
    system: System, count: int, potential: Potential | None = None, layers: SlabLayers = SlabLayers.HELD
) -> list[ASEEngine]:
    dynamics = Dynamics(KELVIN, 5.0, 4.0, layers)
    shared = potential or potential_of(system, SPEC)
    return [ASEEngine(system, shared, dynamics, SPEC) for _ in range(count)]


def _scattered(system: System, walkers: int) -> np.ndarray:
    """Walkers with shaken slabs and the adsorbate anywhere, in other cells and off the surface too."""
    random = np.random.default_rng(3)
    assert system.cell is not None
    positions = system.reference_positions + 0.12 * random.normal(size=(walkers, system.n_sites, 3))
    guest = system.roles == SiteRole.ADSORBATE
    positions[:, guest] += random.uniform(-2, 2, (walkers, 1, 2)) @ system.cell[:2]
    positions[:, guest, 2] += np.linspace(-0.3, 7.0, walkers)[:, None] ** 2 / 7
    return np.where(system.mobile[:, None], positions, system.reference_positions)


def _by_ase(atoms: Atoms, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    atoms.calc = EMT()
    rows = []
    for one in positions:
        atoms.positions = one
        rows.append((atoms.get_potential_energy(), atoms.get_forces(apply_constraint=False).copy()))
    return np.array([energy for energy, _ in rows]), np.array([forces for _, forces in rows])


@pytest.mark.parametrize(("metal", "adsorbate"), [("Cu", "O"), ("Pt", "H"), ("Ag", "CO")])
def test_energies_and_forces_are_those_of_ase(metal: str, adsorbate: str) -> None:
    system = _system(metal, adsorbate)
    positions = _scattered(system, 18)
    energy, forces = potential_of(system, SPEC).energy_and_forces(positions)
    atoms = Atoms(numbers=system.elements, cell=system.cell, pbc=system.periodic, positions=positions[0])
    expected = _by_ase(atoms, positions)
    np.testing.assert_allclose(energy, expected[0], atol=1e-8, rtol=0)
    np.testing.assert_allclose(forces, expected[1], atol=1e-8, rtol=0)


def test_alloy_in_a_skewed_cell_periodic_in_all_directions_is_as_in_ase() -> None:
    atoms = bulk("Au") * (2, 2, 2)
    atoms.numbers[::3] = 29
    positions = atoms.positions + 0.1 * np.random.default_rng(0).normal(size=(3, len(atoms), 3))
    everything = np.ones(len(atoms), bool)
    potential = EMTPotential(
        "alloy", atoms.numbers, np.array(atoms.cell), (True, True, True), atoms.positions.copy(), everything
    )
    energy, forces = potential.energy_and_forces(positions)
    expected = _by_ase(atoms, positions)
    np.testing.assert_allclose(energy, expected[0], atol=1e-8, rtol=0)
    np.testing.assert_allclose(forces, expected[1], atol=1e-8, rtol=0)


def test_forces_of_dynamics_follow_positions_for_as_long_as_lists_are_kept() -> None:
    system = _system()
    potential = potential_of(system, SPEC)
    positions, random = _scattered(system, 5), np.random.default_rng(1)
    for _ in range(12):
        # single precision; the steepest places give 30 eV/Å
        exact = potential.energy_and_forces(positions)[1][:, system.mobile]
        np.testing.assert_allclose(potential.mobile_forces(positions)[:, system.mobile], exact, atol=3e-4, rtol=1e-5)
        positions = positions + 0.06 * random.normal(size=positions.shape) * system.mobile[:, None]


def test_element_without_parameters_is_named() -> None:
    with pytest.raises(SimulationError, match=r"'s'.*no parameters for Ir, S"):
        potential_of(surface_system("s", SurfaceSpec(metal="Ir", adsorbate="S", lattice_constant=3.84)), SPEC)


def test_walker_does_not_depend_on_who_is_beside_it() -> None:
    system = _system()
    alone, among = _engines(system, 1), _engines(system, 20)
    start = alone[0].minimised(1)
    for number, engine in enumerate(among):
        engine.restore(start, 100 + number)
    advance_together(among, 30)
    frames = advance_together(among, 30)
    for number in (0, 7, 19):
        alone[0].restore(start, 100 + number)
        alone[0].advance(30)
        frame = alone[0].advance(30)
        assert (frame.positions == frames[number].positions).all()
        assert frame.energy == frames[number].energy
        assert (alone[0].checkpoint().velocities == among[number].checkpoint().velocities).all()


def test_point_and_seed_decide_all_steps_also_in_another_process_state() -> None:
    system = _system()
    (first,), (fresh,) = _engines(system, 1), _engines(system, 1)
    first.restore(first.minimised(2), 9)
    first.advance(50)
    point = first.checkpoint()
    first.restore(point, 5)
    fresh.restore(PhaseSpace(point.positions.copy(), point.velocities.copy(), point.step), 5)
    assert (first.advance(40).positions == fresh.advance(40).positions).all()
    first.restore(point, 6)
    assert not np.allclose(first.advance(40).positions, fresh.checkpoint().positions)


def test_start_is_a_minimum_with_thermal_velocities_and_fixed_sites_never_move() -> None:
    system = _system("Pd", "H")
    engines = _engines(system, 30)
    points = [engine.minimised(seed) for seed, engine in enumerate(engines)]
    forces = potential_of(system, SPEC).energy_and_forces(points[0].positions[None])[1]
    assert np.abs(forces[0, system.mobile]).max() < 0.05
    # 750 momenta: the kinetic temperature is known to 5 %; four standard deviations
    kinetic = np.mean([engine.kinetic_energy() for engine in engines])
    expected = engines[0].degrees_of_freedom / 2 * thermal_energy(KELVIN)
    assert kinetic == pytest.approx(expected, rel=0.21)
    advance_together(engines, 20)
    for engine in engines:
        moved = engine.checkpoint().positions - system.reference_positions
        assert (moved[~system.mobile] == 0).all() and (engine.checkpoint().velocities[~system.mobile] == 0).all()
        assert (np.abs(moved[system.mobile]).max(axis=1) > 0).all()


class _Springs:
    """Every site on a spring to its reference: all averages are known."""

    def __init__(self, system: System, stiffness: float) -> None:
        self._reference, self._stiffness = system.reference_positions, stiffness

    def energy_and_forces(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        moves = positions - self._reference
        return self._stiffness / 2 * (moves**2).sum(axis=(1, 2)), -self._stiffness * moves

    def mobile_forces(self, positions: np.ndarray) -> np.ndarray:
        return self.energy_and_forces(positions)[1]


def test_dynamics_samples_the_boltzmann_distribution() -> None:
    system, stiffness = _system(), 4.0
    engines = _engines(system, 200, _Springs(system, stiffness), SlabLayers.FREE)
    rest = PhaseSpace(system.reference_positions, np.zeros((system.n_sites, 3)), 0)
    for number, engine in enumerate(engines):
        engine.restore(rest, number)
    advance_together(engines, 250)
    squares = []
    for _ in range(8):
        positions = np.concatenate([frame.positions for frame in advance_together(engines, 50)])
        squares.append(((positions - system.reference_positions)[:, system.mobile] ** 2).mean())
    kinetic = np.mean([engine.kinetic_energy() for engine in engines])
    # BAOAB's positions are exact for springs; over 5400 coordinates and 8 looks the error is below 1 %
    assert np.mean(squares) == pytest.approx(thermal_energy(KELVIN) / stiffness, rel=0.03)
    assert kinetic == pytest.approx(engines[0].degrees_of_freedom / 2 * thermal_energy(KELVIN), rel=0.08)


def test_held_layers_keep_their_place_along_the_surface_and_free_ones_do_not() -> None:
    system = _system()
    top = np.arange(12, 16)
    drift = {}
    for layers in SlabLayers:
        engines = _engines(system, 8, layers=layers)
        start = engines[0].minimised(1)
        for number, engine in enumerate(engines):
            engine.restore(start, number)
        frames = advance_together(engines, 150)
        moves = np.concatenate([frame.positions for frame in frames])[:, top] - start.positions[top]
        drift[layers] = np.abs(moves.mean(axis=1)[:, :2]).max()
        assert np.abs(moves.mean(axis=1)[:, 2]).max() > 1e-3
    assert drift[SlabLayers.HELD] < 1e-9 < 1e-2 < drift[SlabLayers.FREE]
    mobile = int(system.mobile.sum())
    assert _engines(system, 1)[0].degrees_of_freedom == 3 * mobile - 4
    assert _engines(system, 1, layers=SlabLayers.FREE)[0].degrees_of_freedom == 3 * mobile


def test_jump_keeps_the_steps_taken_and_the_noise() -> None:
    system = _system()
    one, two = _engines(system, 2)
    start = one.minimised(1)
    one.restore(start, 4)
    two.restore(start, 4)
    one.advance(10)
    two.advance(10)
    one.move_to(replace(start.at_temperature(300.0, 600.0), step=77))
    assert one.checkpoint().step == 10
    two.move_to(start.at_temperature(300.0, 600.0))
    assert (one.advance(5).positions == two.advance(5).positions).all()


def test_breakdown_names_system_temperature_and_step() -> None:
    system = _system()
    (engine,) = _engines(system, 1)
    fast = np.where(system.mobile[:, None], 1e200, 0.0) * np.ones(3)
    engine.restore(PhaseSpace(system.reference_positions, fast, 12), 1)
    with pytest.raises(SimulationError, match=r"'Cu-O' at 600 K broke down after step 12"):
        engine.advance(5)


def test_engine_not_started_says_so_and_tells_its_origin() -> None:
    (engine,) = _engines(_system(), 1)
    with pytest.raises(SimulationError, match="call minimised or restore"):
        engine.advance(1)
    described: Engine = engine
    assert described.origin["method"] == "ASE EMT" and described.origin["temperature_K"] == KELVIN


def test_any_ase_calculator_gives_the_dynamics_of_the_batched_potential() -> None:
    system = _system()
    (batched,) = _engines(system, 1)
    (plain,) = _engines(system, 1, CalculatorPotential(system, SPEC))
    start = batched.minimised(1)
    for engine in (batched, plain):
        engine.restore(start, 3)
    # forces of dynamics are in single precision
    assert np.allclose(batched.advance(15).positions, plain.advance(15).positions, atol=1e-6)
