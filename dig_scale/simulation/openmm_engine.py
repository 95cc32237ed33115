"""Langevin-middle dynamics with OpenMM of any Model: peptides, molecules, pockets, prepared and solvated systems.

In: a System with all atoms, config.Simulate, a temperature in K, a platform name, and the Model where it is not the one
that openmm_systems builds from the System. Out: an Engine. This is the door between Å, eV, ps and OpenMM's nm, kJ/mol,
ps. A PhaseSpace holds every particle; Frames hold the System's sites alone, whole even in a periodic box. Energies are
those of all particles, forces the potential's: constraint forces are not in them.

Integrator: Zhang et al., J. Phys. Chem. A 123 (2019) 6056.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import openmm

from dig_scale.config import Simulate
from dig_scale.simulation.engine import PhaseSpace, SimulationError
from dig_scale.simulation.force_field import PREPARED, mmff_variant, time_step_fs
from dig_scale.simulation.openmm_systems import PLATFORM_PROPERTIES, Model, build_model, build_openmm_system
from dig_scale.simulation.whole import Whole
from dig_scale.system import Frames, System
from dig_scale.units import ANGSTROM_PER_NM, EV_PER_ANGSTROM_PER_KJ_MOL_NM, EV_PER_KJ_MOL, PS_PER_FS

__all__ = ["OpenMMEngine", "PlatformChoice", "build_openmm_system", "fastest_platform"]

_CANDIDATES = ("Reference", "CPU", "CUDA")
_MEASURE_SECONDS = 0.25
_STILL_FS = 1e-6
_LARGEST_FOR_REFERENCE = 1000
"""Particles; above it one step of the Reference platform takes longer than the whole measurement should."""


@dataclass(frozen=True)
class PlatformChoice:
    """The platform a system runs on, and the measured time of one step on every candidate, in s."""

    platform: str
    seconds_per_step: dict[str, float]


class OpenMMEngine:
    """An Engine on one OpenMM platform; raises SimulationError when the force field does not know the system."""

    def __init__(
        self, system: System, simulate: Simulate, temperature: float, platform: str, model: Model | None = None
    ) -> None:
        self._name = system.name
        self._simulate = simulate
        self._time_step_fs = time_step_fs(system, simulate)
        self._temperature = temperature
        self._platform = openmm.Platform.getPlatformByName(platform)
        self._properties = PLATFORM_PROPERTIES.get(platform, {})
        self._force_field = _force_field(system, simulate)
        self._model = model or build_model(system, simulate)
        self._whole = None if self._model.box is None else Whole.of(system.bonds, system.n_sites)
        self._context: openmm.Context | None = None
        self._first_step = 0

    @property
    def origin(self) -> dict[str, Any]:
        """Engine, versions, platform, force-field hash, thermostat, time step: JSON-ready."""
        xml = openmm.XmlSerializer.serialize(self._model.openmm_system)
        return self._force_field | {
            "engine": "OpenMM",
            "engine_version": openmm.Platform.getOpenMMVersion(),
            "platform": self._platform.getName(),
            "force_field_sha256": hashlib.sha256(xml.encode()).hexdigest(),
            "thermostat": "Langevin middle",
            "friction_per_ps": self._simulate.friction_per_ps,
            "temperature_K": self._temperature,
            "time_step_fs": self._time_step_fs,
            "constraints": self._simulate.constraints,
            "hydrogen_mass_amu": self._simulate.hydrogen_mass,
        }

    @property
    def temperature(self) -> float:
        """K."""
        return self._temperature

    @property
    def degrees_of_freedom(self) -> int:
        """Momenta that carry kinetic energy: three per particle that moves, less constraints and a centre held at rest."""
        model = self._model.openmm_system
        moving = sum(model.getParticleMass(i)._value > 0 for i in range(model.getNumParticles()))
        held = any(isinstance(force, openmm.CMMotionRemover) for force in model.getForces())
        return 3 * moving - model.getNumConstraints() - 3 * held

    def minimised(self, noise_seed: int) -> PhaseSpace:
        """A start: the reference geometry at a local energy minimum, with thermal velocities drawn from `noise_seed`."""
        context = self._new_context(noise_seed)
        context.setPositions(self._model.positions / ANGSTROM_PER_NM)
        openmm.LocalEnergyMinimizer.minimize(context)
        context.setVelocitiesToTemperature(self._temperature, noise_seed)
        return self.checkpoint()

    def restore(self, point: PhaseSpace, noise_seed: int) -> None:
        """Continue from `point`; all later noise follows from `noise_seed`."""
        # A new context, not a reseeded one: platforms differ in whether their generator can be set back.
        context = self._new_context(noise_seed)
        context.setPositions(point.positions / ANGSTROM_PER_NM)
        context.setVelocities(point.velocities / ANGSTROM_PER_NM)
        self._first_step = point.step

    def move_to(self, point: PhaseSpace) -> None:
        """Jump to `point` within a running noise stream, as an accepted replica exchange does."""
        context = self._running()
        context.setPositions(point.positions / ANGSTROM_PER_NM)
        context.setVelocities(point.velocities / ANGSTROM_PER_NM)

    def advance(self, n_steps: int) -> Frames:
        """Take steps and return the frame [1, N, 3] reached; raises SimulationError when it is not finite."""
        context = self._running()
        try:
            context.getIntegrator().step(n_steps)
        except openmm.OpenMMException as error:
            raise self._broken_down(str(error)) from error
        state = context.getState(getPositions=True, getEnergy=True, getForces=True)
        energy = state.getPotentialEnergy()._value * EV_PER_KJ_MOL
        if not np.isfinite(energy):
            raise self._broken_down(f"the potential energy is {energy} eV")
        positions = state.getPositions(asNumpy=True)._value[self._model.solute] * ANGSTROM_PER_NM
        forces = state.getForces(asNumpy=True)._value[self._model.solute] * EV_PER_ANGSTROM_PER_KJ_MOL_NM
        return Frames(
            positions=self._made_whole(positions)[None],
            time_ps=np.array([self._steps_taken() * self._time_step_fs * PS_PER_FS]),
            energy=np.array([energy]),
            forces=forces[None],
        )

    def checkpoint(self) -> PhaseSpace:
        """Where the simulation stands."""
        state = self._running().getState(getPositions=True, getVelocities=True)
        positions = state.getPositions(asNumpy=True)._value * ANGSTROM_PER_NM
        velocities = state.getVelocities(asNumpy=True)._value * ANGSTROM_PER_NM
        return PhaseSpace(positions, velocities, self._steps_taken())

    def kinetic_energy(self) -> float:
        """Kinetic energy in eV."""
        return float(self._running().getState(getEnergy=True).getKineticEnergy()._value) * EV_PER_KJ_MOL

    def _made_whole(self, positions: np.ndarray) -> np.ndarray:
        box = self._model.box
        return positions if self._whole is None or box is None else self._whole(positions, box)

    def _new_context(self, noise_seed: int) -> openmm.Context:
        time_step = self._time_step_fs * PS_PER_FS
        integrator = openmm.LangevinMiddleIntegrator(self._temperature, self._simulate.friction_per_ps, time_step)
        integrator.setRandomNumberSeed(noise_seed)
        self._context = openmm.Context(self._model.openmm_system, integrator, self._platform, self._properties)
        self._first_step = 0
        return self._context

    def _running(self) -> openmm.Context:
        if self._context is None:
            raise SimulationError(f"system {self._name!r}: the engine was not started; call minimised or restore first")
        return self._context

    def _steps_taken(self) -> int:
        return self._first_step + int(self._running().getStepCount())

    def _broken_down(self, problem: str) -> SimulationError:
        return SimulationError(
            f"system {self._name!r} at {self._temperature:g} K broke down after step {self._first_step}: {problem}; try "
            f"a shorter simulate.time_step_fs or inspect the starting structure"
        )


def fastest_platform(system: System, simulate: Simulate, model: Model | None = None) -> PlatformChoice:
    """The platform with the shortest step for this system here, among Reference, CPU on one thread, and CUDA."""
    chosen = model or build_model(system, simulate)
    available = {openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())}
    if len(chosen.positions) > _LARGEST_FOR_REFERENCE and "CPU" in available:
        available -= {"Reference"}
    times = {}
    for name in _CANDIDATES:
        if name in available:
            seconds = _seconds_per_step(system, simulate, name, chosen)
            if seconds is not None:
                times[name] = seconds
    if not times:
        raise SimulationError(f"no OpenMM platform runs here (found {', '.join(sorted(available))}); reinstall openmm")
    return PlatformChoice(min(times, key=times.__getitem__), times)


def _seconds_per_step(system: System, simulate: Simulate, platform: str, model: Model) -> float | None:
    # A step without motion costs the same, and a start that is not yet minimised cannot break it down.
    still = simulate.model_copy(update={"time_step_fs": _STILL_FS})
    engine = OpenMMEngine(system, still, simulate.temperature, platform, model)
    try:
        engine.restore(PhaseSpace(model.positions, np.zeros_like(model.positions), 0), 1)
    except openmm.OpenMMException:
        return None  # the plug-in is installed but there is no such device
    engine.advance(1)
    steps, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < _MEASURE_SECONDS:
        engine.advance(5)
        steps += 5
    return (time.perf_counter() - begin) / steps


def _force_field(system: System, simulate: Simulate) -> dict[str, Any]:
    """What the origin of frames says of the force field."""
    prepared = system.origin.get(PREPARED)
    if prepared is not None:
        return {"force_field": prepared}
    variant = mmff_variant(system, simulate)
    solvent = getattr(simulate, "explicit_solvent", None)
    return {
        "force_field": [variant] if variant else list(simulate.force_field),
        "implicit_solvent": "none" if solvent else simulate.implicit_solvent,
        "explicit_solvent": solvent.model_dump(mode="json") if solvent else None,
    }
