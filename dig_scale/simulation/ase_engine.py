"""Langevin dynamics on any ASE calculator: slabs with adsorbates, molecules, whatever has a fixed cell.

In: a System, a Potential, Dynamics. Out: an Engine, and `advance_together`, which advances many engines of one system at
once (walkers, or the temperatures of a ladder): what a walker does depends on its own point and noise alone. Sites that
are not mobile stay where the reference has them; positions are not wrapped into the cell. ASE's units Å and eV are the
project's. Integrator: BAOAB, Leimkuhler and Matthews, Appl. Math. Res. Express 2013, 34; noise from a Philox counter
keyed by the seed, so a point and a seed determine all steps.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np
from ase.calculators.calculator import CalculatorError, PropertyNotImplementedError
from ase.data import atomic_masses

from dig_scale.config import CalculatorSpec, Simulate
from dig_scale.importers.slab import layers, surface_normal
from dig_scale.simulation.ase_emt import EMTPotential, require_emt_elements
from dig_scale.simulation.calculators import atoms_of, calculator_named, method_of
from dig_scale.simulation.engine import PhaseSpace, SimulationError
from dig_scale.simulation.force_field import time_step_fs
from dig_scale.system import Frames, SiteRole, System
from dig_scale.units import ANGSTROM_PER_NM, EV_PER_KJ_MOL, PS_PER_FS, thermal_energy

_AMU_A2_PS2_PER_EV = ANGSTROM_PER_NM**2 / EV_PER_KJ_MOL
"""1 kJ/mol is 1 amu nm²/ps²."""
_NOISE_STEPS = 64
"""Steps whose noise is drawn in one go; the numbers do not depend on it."""
_FORCE_TOLERANCE = 0.02
_MINIMISER_STEPS = 300


class Potential(Protocol):
    """Energies and forces of one system at many positions."""

    def energy_and_forces(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Energies [W] eV and forces [W, N, 3] eV/Å at positions [W, N, 3] Å."""

    def mobile_forces(self, positions: np.ndarray) -> np.ndarray:
        """Forces [W, N, 3] eV/Å of which those on mobile sites are right."""


class SlabLayers(enum.StrEnum):
    """Whether the mobile layers of a slab may slide as a whole.

    In cells of a few atoms a layer crosses from one stacking to another within picoseconds, which surfaces do not do.
    """

    HELD = "held"
    """The centre of every mobile layer keeps its place along the surface; a linear constraint."""
    FREE = "free"


@dataclass(frozen=True)
class Dynamics:
    """Temperature in K, friction in 1/ps, time step in fs, and what whole layers of slabs do."""

    temperature: float
    friction_per_ps: float
    time_step_fs: float
    layers: SlabLayers = SlabLayers.HELD


class CalculatorPotential:
    """A Potential by one ASE calculator, position after position."""

    def __init__(self, system: System, spec: CalculatorSpec) -> None:
        self._name = system.name
        self._atoms = atoms_of(system, system.reference_positions)
        self._atoms.calc = calculator_named(spec)

    def energy_and_forces(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Energies [W] eV and forces [W, N, 3] eV/Å; raises SimulationError naming the system when it fails."""
        energies, forces = np.empty(len(positions)), np.empty(positions.shape)
        for number, one in enumerate(positions):
            self._atoms.positions = one
            try:
                # forces first: one calculation gives both
                forces[number] = self._atoms.get_forces(apply_constraint=False)
                energies[number] = self._atoms.get_potential_energy()
            except (CalculatorError, PropertyNotImplementedError, RuntimeError) as error:
                raise SimulationError(f"system {self._name!r}: {error}") from error
        return energies, forces

    def mobile_forces(self, positions: np.ndarray) -> np.ndarray:
        """Forces [W, N, 3] eV/Å."""
        return self.energy_and_forces(positions)[1]


def potential_of(system: System, spec: CalculatorSpec) -> Potential:
    """The potential of a spec: the batched one for effective medium theory on slabs, else ASE's calculator."""
    if spec.name == "emt":
        require_emt_elements(system.name, system.elements)
    if spec.name != "emt" or system.cell is None:
        return CalculatorPotential(system, spec)
    return EMTPotential(
        system.name, system.elements, system.cell, system.periodic, system.reference_positions, system.mobile
    )


class ASEEngine:
    """An Engine on a Potential; engines of one system may share it."""

    def __init__(self, system: System, potential: Potential, dynamics: Dynamics, spec: CalculatorSpec) -> None:
        self.system, self.potential, self.dynamics = system, potential, dynamics
        self._spec = spec
        self._point: PhaseSpace | None = None
        self._noise: np.random.Generator | None = None

    @property
    def origin(self) -> dict[str, Any]:
        """Engine, versions, method, thermostat, time step: JSON-ready."""
        return {
            "engine": "ASE",
            "engine_version": version("ase"),
            "calculator": self._spec.model_dump(mode="json"),
            "thermostat": "Langevin BAOAB",
            "friction_per_ps": self.dynamics.friction_per_ps,
            "temperature_K": self.dynamics.temperature,
            "time_step_fs": self.dynamics.time_step_fs,
            "slab_layers": str(self.dynamics.layers),
        } | method_of(self._spec, self.system).origin

    @property
    def temperature(self) -> float:
        """K."""
        return self.dynamics.temperature

    @property
    def degrees_of_freedom(self) -> int:
        """Momenta that carry kinetic energy: three per mobile site, less two per held layer."""
        return 3 * int(self.system.mobile.sum()) - 2 * len(_Layers.of(self.system, self.dynamics).share)

    def minimised(self, noise_seed: int) -> PhaseSpace:
        """A start: the reference geometry at a local energy minimum, with thermal velocities drawn from `noise_seed`."""
        mobile = self.system.mobile
        positions = np.array(self.system.reference_positions)
        positions[mobile] = _minimum(self.potential, positions, mobile)
        noise = _stream(noise_seed)
        velocities = np.zeros_like(positions)
        widths = np.sqrt(thermal_energy(self.temperature) * _AMU_A2_PS2_PER_EV / self._masses())
        drawn = noise.standard_normal((int(mobile.sum()), 3)) * widths[:, None]
        velocities[mobile] = _Layers.of(self.system, self.dynamics).hold(drawn)
        self._point, self._noise = PhaseSpace(positions, velocities, 0), noise
        return self._point

    def restore(self, point: PhaseSpace, noise_seed: int) -> None:
        """Continue from `point`; all later noise follows from `noise_seed`."""
        self._point, self._noise = point, _stream(noise_seed)

    def move_to(self, point: PhaseSpace) -> None:
        """Jump to `point` within a running noise stream, as an accepted replica exchange does."""
        self._point = PhaseSpace(point.positions, point.velocities, self.checkpoint().step)

    def advance(self, n_steps: int) -> Frames:
        """Take steps and return the frame [1, N, 3] reached; raises SimulationError when it is not finite."""
        return advance_together([self], n_steps)[0]

    def checkpoint(self) -> PhaseSpace:
        """Where the simulation stands."""
        if self._point is None:
            raise SimulationError(
                f"system {self.system.name!r}: the engine was not started; call minimised or restore first"
            )
        return self._point

    def kinetic_energy(self) -> float:
        """Kinetic energy in eV."""
        speeds = (self.checkpoint().velocities[self.system.mobile] ** 2).sum(axis=1)
        return float((self._masses() * speeds).sum() / 2 / _AMU_A2_PS2_PER_EV)

    def _masses(self) -> np.ndarray:
        return np.asarray(atomic_masses[self.system.elements[self.system.mobile]])

    def _running(self) -> tuple[PhaseSpace, np.random.Generator]:
        point = self.checkpoint()
        assert self._noise is not None
        return point, self._noise

    def _reach(self, positions: np.ndarray, velocities: np.ndarray, n_steps: int) -> None:
        self._point = PhaseSpace(positions, velocities, self.checkpoint().step + n_steps)


def engines_at(system: System, simulate: Simulate, temperatures: Sequence[float]) -> list[ASEEngine]:
    """Engines of a recipe at these temperatures in K, on one potential; raises SimulationError as calculators do."""
    spec = simulate.calculator or CalculatorSpec()
    held = SlabLayers(simulate.slab_layers)
    potential = potential_of(system, spec)
    step = time_step_fs(system, simulate)
    every = [Dynamics(kelvin, simulate.friction_per_ps, step, held) for kelvin in temperatures]
    return [ASEEngine(system, potential, dynamics, spec) for dynamics in every]


def advance_together(engines: Sequence[ASEEngine], n_steps: int) -> list[Frames]:
    """Advance engines of one system and one potential at once; the frame [1, N, 3] of each, as its `advance` would give.

    Raises SimulationError naming the system and the walker whose energy or positions are not finite.
    """
    first, mobile = engines[0], engines[0].system.mobile
    points, streams = zip(*(engine._running() for engine in engines), strict=True)
    step = _Step.of(engines)
    positions = np.stack([point.positions for point in points])
    velocities = np.stack([point.velocities[mobile] for point in points])
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        positions, velocities = _walk(first.potential, mobile, step, (positions, velocities), streams, n_steps)
        energy, forces = first.potential.energy_and_forces(positions)
    sound = np.isfinite(energy) & np.isfinite(positions).all(axis=(1, 2)) & np.isfinite(velocities).all(axis=(1, 2))
    if not sound.all():
        raise _broken_down(first, int(np.argmin(sound)), float(energy[np.argmin(sound)]))
    frames = []
    for k, engine in enumerate(engines):
        whole = np.zeros_like(positions[k])
        whole[mobile] = velocities[k]
        engine._reach(positions[k], whole, n_steps)
        time_ps = np.array([engine.checkpoint().step * engine.dynamics.time_step_fs * PS_PER_FS])
        frames.append(Frames(positions[k : k + 1], time_ps, energy[k : k + 1], forces[k : k + 1]))
    return frames


@dataclass(frozen=True)
class _Layers:
    """Layers that are held: share [G, M] of each mobile site in its layer's momentum, members [M, G], normal [3]."""

    share: np.ndarray
    members: np.ndarray
    normal: np.ndarray

    @classmethod
    def of(cls, system: System, dynamics: Dynamics) -> _Layers:
        mobile = system.mobile
        number = np.full(system.n_sites, -1)
        slab = mobile & (system.roles == SiteRole.SURFACE)
        normal = np.zeros(3)
        if dynamics.layers is SlabLayers.HELD and system.cell is not None and slab.any():
            normal = surface_normal(system.cell)
            number[slab] = layers(system.reference_positions[slab] @ normal)
        members = (number[mobile][:, None] == np.arange(number.max() + 1)).astype(float)
        weights = members * atomic_masses[system.elements[mobile]][:, None]
        return cls((weights / weights.sum(axis=0)).T, members, normal)

    def hold(self, velocities: np.ndarray) -> np.ndarray:
        """Velocities [..., M, 3] without the motion of layers along the surface."""
        if not len(self.share):
            return velocities
        drift = self.share @ velocities
        along = drift - (drift @ self.normal)[..., None] * self.normal
        return np.asarray(velocities - self.members @ along)


@dataclass(frozen=True)
class _Step:
    """Constants of a BAOAB step: half a step in ps, kick [M, 1] Å/ps per eV/Å, decay, noise widths [W, M, 1] Å/ps, and the
    layers that are held."""

    half: float
    kick: np.ndarray
    decay: float
    width: np.ndarray
    layers: _Layers

    @classmethod
    def of(cls, engines: Sequence[ASEEngine]) -> _Step:
        dynamics, masses = engines[0].dynamics, engines[0]._masses()
        length = dynamics.time_step_fs * PS_PER_FS
        decay = float(np.exp(-dynamics.friction_per_ps * length))
        kelvins = np.array([engine.temperature for engine in engines])
        thermal = thermal_energy(1.0) * kelvins[:, None] * _AMU_A2_PS2_PER_EV / masses
        half_kick = 0.5 * length * _AMU_A2_PS2_PER_EV / masses[:, None]
        width = np.sqrt(thermal * (1 - decay**2))[..., None]
        return cls(0.5 * length, half_kick, decay, width, _Layers.of(engines[0].system, dynamics))


def _walk(
    potential: Potential,
    mobile: np.ndarray,
    step: _Step,
    start: tuple[np.ndarray, np.ndarray],
    streams: Sequence[np.random.Generator],
    n_steps: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Positions [W, N, 3] and velocities [W, M, 3] after `n_steps`; forces are computed anew, for they are not stored."""
    positions, velocities = np.array(start[0]), start[1]
    forces = potential.mobile_forces(positions)[:, mobile]
    for done in range(0, n_steps, _NOISE_STEPS):
        count = min(_NOISE_STEPS, n_steps - done)
        noise = np.stack([stream.standard_normal((count, *velocities.shape[1:])) for stream in streams], axis=1)
        for kick in noise:
            velocities = step.layers.hold(velocities + step.kick * forces)
            drift = step.half * velocities
            velocities = step.layers.hold(step.decay * velocities + step.width * kick)
            positions[:, mobile] += drift + step.half * velocities
            forces = potential.mobile_forces(positions)[:, mobile]
            velocities = step.layers.hold(velocities + step.kick * forces)
    return positions, velocities


def _stream(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def _minimum(potential: Potential, positions: np.ndarray, mobile: np.ndarray) -> np.ndarray:
    """Positions [M, 3] Å of mobile sites at a local minimum near `positions` [N, 3]."""
    from scipy.optimize import minimize

    def energy_and_slope(flat: np.ndarray) -> tuple[float, np.ndarray]:
        moved = np.array(positions)
        moved[mobile] = flat.reshape(-1, 3)
        energy, forces = potential.energy_and_forces(moved[None])
        return float(energy[0]), -forces[0, mobile].ravel()

    options = {"gtol": _FORCE_TOLERANCE, "maxiter": _MINIMISER_STEPS}
    found = minimize(energy_and_slope, positions[mobile].ravel(), jac=True, method="L-BFGS-B", options=options)
    return np.asarray(found.x).reshape(-1, 3)


def _broken_down(engine: ASEEngine, walker: int, energy: float) -> SimulationError:
    step = engine.checkpoint().step
    return SimulationError(
        f"system {engine.system.name!r} at {engine.temperature:g} K broke down after step {step} (walker {walker}): the "
        f"potential energy is {energy} eV; try a shorter simulate.time_step_fs or inspect the starting structure"
    )
