"""Proteins and peptides with OpenMM: Amber force field, OBC2 implicit solvent, Langevin-middle dynamics.

In: a System with all atoms, config.Simulate, a temperature in K, a platform name. Out: an Engine. This is the door
between Å, eV, ps and OpenMM's nm, kJ/mol, ps. Energies and forces are the potential's: constraint forces are not in them.

Solvent: `implicit/obc2.xml` builds a CustomGBForce, many times slower on CPUs than OpenMM's native GBSAOBCForce, which
is the same model (Onufriev, Bashford, Case, Proteins 55 (2004) 383); the former is replaced by the latter.
Integrator: Zhang et al., J. Phys. Chem. A 123 (2019) 6056.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import openmm
from openmm import app

from dig_scale.config import Simulate
from dig_scale.simulation.engine import PhaseSpace, SimulationError
from dig_scale.system import Frames, System, SystemKind
from dig_scale.units import ANGSTROM_PER_NM, EV_PER_ANGSTROM_PER_KJ_MOL_NM, EV_PER_KJ_MOL, PS_PER_FS

_OFFSET_NM = 0.009
_SOLVENT_DIELECTRIC = 78.5
_SOLUTE_DIELECTRIC = 1.0
_IMPLICIT_SOLVENT = {"obc2": ("implicit/obc2.xml",), "none": ()}
_PROPERTIES = {"CPU": {"Threads": "1", "DeterministicForces": "true"}, "CUDA": {"Precision": "mixed"}}
_CANDIDATES = ("Reference", "CPU", "CUDA")
_MEASURE_SECONDS = 0.25


@dataclass(frozen=True)
class PlatformChoice:
    """The platform a system runs on, and the measured time of one step on every candidate, in s."""

    platform: str
    seconds_per_step: dict[str, float]


class OpenMMEngine:
    """An Engine on one OpenMM platform; raises SimulationError when the force field does not know the system."""

    def __init__(self, system: System, simulate: Simulate, temperature: float, platform: str) -> None:
        self._name = system.name
        self._simulate = simulate
        self._temperature = temperature
        self._platform = openmm.Platform.getPlatformByName(platform)
        self._properties = _PROPERTIES.get(platform, {})
        self._start_nm = system.reference_positions / ANGSTROM_PER_NM
        self._model = build_openmm_system(system, simulate)
        self._context: openmm.Context | None = None
        self._first_step = 0

    @property
    def origin(self) -> dict[str, Any]:
        """Engine, versions, platform, force-field hash, thermostat, time step: JSON-ready."""
        return {
            "engine": "OpenMM",
            "engine_version": openmm.Platform.getOpenMMVersion(),
            "platform": self._platform.getName(),
            "force_field": list(self._simulate.force_field),
            "implicit_solvent": self._simulate.implicit_solvent,
            "force_field_sha256": hashlib.sha256(openmm.XmlSerializer.serialize(self._model).encode()).hexdigest(),
            "thermostat": "Langevin middle",
            "friction_per_ps": self._simulate.friction_per_ps,
            "temperature_K": self._temperature,
            "time_step_fs": self._simulate.time_step_fs,
            "constraints": self._simulate.constraints,
            "hydrogen_mass_amu": self._simulate.hydrogen_mass,
        }

    @property
    def temperature(self) -> float:
        """K."""
        return self._temperature

    @property
    def degrees_of_freedom(self) -> int:
        """Momenta that carry kinetic energy: three per atom, less constraints and the motion of the centre of mass."""
        return 3 * self._model.getNumParticles() - self._model.getNumConstraints() - 3

    def minimised(self, noise_seed: int) -> PhaseSpace:
        """A start: the reference geometry at a local energy minimum, with thermal velocities drawn from `noise_seed`."""
        context = self._new_context(noise_seed)
        context.setPositions(self._start_nm)
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
        return Frames(
            positions=state.getPositions(asNumpy=True)._value[None] * ANGSTROM_PER_NM,
            time_ps=np.array([self._steps_taken() * self._simulate.time_step_fs * PS_PER_FS]),
            energy=np.array([energy]),
            forces=state.getForces(asNumpy=True)._value[None] * EV_PER_ANGSTROM_PER_KJ_MOL_NM,
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

    def _new_context(self, noise_seed: int) -> openmm.Context:
        time_step = self._simulate.time_step_fs * PS_PER_FS
        integrator = openmm.LangevinMiddleIntegrator(self._temperature, self._simulate.friction_per_ps, time_step)
        integrator.setRandomNumberSeed(noise_seed)
        self._context = openmm.Context(self._model, integrator, self._platform, self._properties)
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


def build_openmm_system(system: System, simulate: Simulate) -> openmm.System:
    """The OpenMM System of a peptide or protein with native OBC2; raises SimulationError if it has no parameters."""
    if system.kind is not SystemKind.PROTEIN or (system.elements == 0).any():
        what = "coarse-grained beads" if (system.elements == 0).any() else f"a {system.kind}"
        raise SimulationError(
            f"system {system.name!r} is {what}: the force fields at hand describe peptides and proteins with all atoms; "
            f"simulate it with a program of your own and use `dig-scale import`"
        )
    try:
        force_field = app.ForceField(*simulate.force_field, *_IMPLICIT_SOLVENT[simulate.implicit_solvent])
        model = force_field.createSystem(
            openmm_topology(system),
            nonbondedMethod=app.NoCutoff,
            constraints=app.HBonds if simulate.constraints == "h-bonds" else None,
            hydrogenMass=simulate.hydrogen_mass,
            removeCMMotion=True,
        )
    except (ValueError, OSError) as error:
        raise SimulationError(f"system {system.name!r}: force field {list(simulate.force_field)}: {error}") from error
    return with_native_obc2(model)


def openmm_topology(system: System) -> app.Topology:
    """Topology with the atoms, residues, chains and bonds of a System in the same order."""
    topology, atoms = app.Topology(), []
    chain, residue = None, None
    for i in range(system.n_sites):
        # A new object at every change of index, so that the order of atoms is the System's whatever its indices are.
        if i == 0 or system.chain_index[i] != system.chain_index[i - 1]:
            chain, residue = topology.addChain(), None
        if residue is None or system.residue_index[i] != system.residue_index[i - 1]:
            residue = topology.addResidue(system.residue_names[i], chain)
        element = app.Element.getByAtomicNumber(int(system.elements[i]))
        atoms.append(topology.addAtom(system.atom_names[i], element, residue))
    for i, j in system.bonds:
        topology.addBond(atoms[i], atoms[j])
    return topology


def with_native_obc2(model: openmm.System) -> openmm.System:
    """A copy in which each CustomGBForce of `implicit/obc2.xml` is the equal GBSAOBCForce."""
    copy = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(model))
    for index in reversed(range(copy.getNumForces())):
        force = copy.getForce(index)
        if isinstance(force, openmm.CustomGBForce):
            native = _native_obc2(force)
            copy.removeForce(index)
            copy.addForce(native)
    return copy


def _native_obc2(force: openmm.CustomGBForce) -> openmm.GBSAOBCForce:
    names = [force.getPerParticleParameterName(k) for k in range(force.getNumPerParticleParameters())]
    native = openmm.GBSAOBCForce()
    native.setSolventDielectric(_SOLVENT_DIELECTRIC)
    native.setSoluteDielectric(_SOLUTE_DIELECTRIC)
    native.setNonbondedMethod(openmm.GBSAOBCForce.NoCutoff)
    for particle in range(force.getNumParticles()):
        values = dict(zip(names, force.getParticleParameters(particle), strict=True))
        # The XML gives the radius less the dielectric offset, and the scaled radius, not the scale.
        native.addParticle(values["charge"], values["or"] + _OFFSET_NM, values["sr"] / values["or"])
    return native


def fastest_platform(system: System, simulate: Simulate) -> PlatformChoice:
    """The platform with the shortest step for this system here, among Reference, CPU on one thread, and CUDA."""
    available = {openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())}
    times = {}
    for name in _CANDIDATES:
        if name in available:
            seconds = _seconds_per_step(system, simulate, name)
            if seconds is not None:
                times[name] = seconds
    if not times:
        raise SimulationError(f"no OpenMM platform runs here (found {', '.join(sorted(available))}); reinstall openmm")
    return PlatformChoice(min(times, key=times.__getitem__), times)


def _seconds_per_step(system: System, simulate: Simulate, platform: str) -> float | None:
    engine = OpenMMEngine(system, simulate, simulate.temperature, platform)
    zero = np.zeros_like(system.reference_positions)
    try:
        engine.restore(PhaseSpace(system.reference_positions, zero, 0), 1)
    except openmm.OpenMMException:
        return None  # the plug-in is installed but there is no such device
    engine.advance(1)
    steps, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < _MEASURE_SECONDS:
        engine.advance(5)
        steps += 5
    return (time.perf_counter() - begin) / steps
