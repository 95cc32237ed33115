"""Potential: the reduced energy u(x) = E/kT of a System and its force, batched, for torch and numpy; and where u has a density.

In: positions [B, N, 3] Å of all sites. Out: u [B], differentiable once (engines) or as often as asked (analytic), or energies
in eV and forces in eV/Å. Engines compute in double precision as far as they can; results come back in the dtype and on the
device of what was given. Sites that are not mobile have their forces too: who moves sites knows which.

A structure without a number is not an error: where the engine overflows, answers NaN or does not converge, or where a
position is not finite, the energy is +inf and the force zero, so that its Boltzmann weight is 0 and no gradient is NaN.
Knows no engine; `potential_for` chooses one, and simulation/potential_actors.py spreads many structures over Ray.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dig_scale.config import CalculatorSpec, Simulate
from dig_scale.ensemble import Ensemble
from dig_scale.errors import UserError
from dig_scale.importers.residues import is_peptide
from dig_scale.shapes import PerSample, Positions
from dig_scale.system import SiteRole, System
from dig_scale.units import thermal_energy

Compute = Callable[[np.ndarray, np.ndarray | None], tuple[np.ndarray, np.ndarray]]
"""Finite positions [B, N, 3] Å and, of systems whose cell varies, cells [B, 3, 3] Å -> energies [B] eV, forces [B, N, 3]
eV/Å; what overflows may be anything that is not finite."""
LARGEST_EXCESS = 1e20
"""kT above the cutoff; where regularised energies stop growing."""
_LONGEST_FLEXIBLE_STEP_FS = 1.0
_LARGEST = float(np.finfo(np.float64).max)


class Potential(Protocol):
    """The energy of one system, and the temperature that makes it a density."""

    @property
    def system(self) -> System:
        """Whose sites the positions are."""

    @property
    def temperature(self) -> float:
        """K."""

    @property
    def kT_ev(self) -> float:
        """kT in eV."""

    @property
    def origin(self) -> dict[str, Any]:
        """What computes, JSON-ready."""

    def reduced_energy(self, positions: Positions) -> PerSample:
        """u = E/kT [B] at positions [B, N, 3] Å; +inf where there is no number."""

    def energy_and_forces(
        self, positions: np.ndarray, cells: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Energies [B] eV and forces [B, N, 3] eV/Å at positions [B, N, 3] Å; cells [B, 3, 3] Å where the cell varies."""


@dataclass(frozen=True)
class PotentialOptions:
    """How energies are computed, where it is not as the recipe's own simulation would.

    threads: OpenMM contexts that work side by side, one per core when absent; platform: of OpenMM, chosen by size and speed
    when absent; calculator: an ASE calculator in OpenMM's place, or in that of the recipe; prepared: the folder of the
    system within its campaign, for systems that another program prepared; actors: Ray actors, where there are any.
    """

    threads: int | None = None
    platform: str | None = None
    calculator: CalculatorSpec | None = None
    prepared: Path | None = None
    actors: int | None = None


@dataclass(frozen=True)
class EnginePotential:
    """A Potential computed outside torch; its gradient crosses into autograd, its second derivative does not."""

    system: System
    temperature: float
    compute: Compute
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def kT_ev(self) -> float:
        """kT in eV."""
        return thermal_energy(self.temperature)

    def reduced_energy(self, positions: Positions) -> PerSample:
        """u = E/kT [B]; backward multiplies by -F/kT, and differentiating that again raises UserError."""
        reduced: Tensor = _ReducedEnergy.apply(positions, self)
        return reduced

    def energy_and_forces(
        self, positions: np.ndarray, cells: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Energies [B] eV and forces [B, N, 3] eV/Å in float64; raises UserError for another shape."""
        _require_shapes(self.system, positions, cells)
        rows = np.flatnonzero(np.isfinite(positions).all(axis=(1, 2)))
        energy, forces = np.full(len(positions), np.inf), np.zeros(positions.shape)
        if len(rows):
            own = np.ascontiguousarray(positions[rows], np.float64)
            energy[rows], forces[rows] = self.compute(own, None if cells is None else np.asarray(cells, float)[rows])
        return _with_infinities(energy, forces, _LARGEST)


@dataclass(frozen=True)
class AnalyticPotential:
    """A Potential given as a torch function positions [B, N, 3] Å -> u [B] in kT; called with float64, so its constants are."""

    system: System
    temperature: float
    function: Callable[[Tensor], Tensor]
    origin: dict[str, Any] = field(default_factory=lambda: {"method": "analytic"})

    @property
    def kT_ev(self) -> float:
        """kT in eV."""
        return thermal_energy(self.temperature)

    def reduced_energy(self, positions: Positions) -> PerSample:
        """u [B], differentiable as often as the function is; the gradient is zero where u is not finite."""
        own = positions.double().clone()
        reduced = self.function(own)
        broken = ~torch.isfinite(reduced.detach())

        def finite(slope: Tensor) -> Tensor:
            unsound = broken | ~torch.isfinite(slope).flatten(1).all(1)
            return slope.masked_fill(unsound[:, None, None], 0.0)

        if own.requires_grad:
            own.register_hook(finite)
        return reduced.masked_fill(broken, torch.inf).to(positions)

    def energy_and_forces(
        self, positions: np.ndarray, cells: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Energies [B] eV and forces [B, N, 3] eV/Å; raises UserError for another shape or for cells."""
        _require_shapes(self.system, positions, cells)
        if cells is not None:
            raise UserError(f"system {self.system.name!r}: an analytic potential knows no cells")
        with torch.enable_grad():
            x = torch.tensor(positions, dtype=torch.float64, requires_grad=True)
            reduced = self.reduced_energy(x)
            (slope,) = torch.autograd.grad(reduced.sum(), x)
        energy, forces = reduced.detach().numpy() * self.kT_ev, -slope.numpy() * self.kT_ev
        return _with_infinities(energy, forces, _LARGEST)


def regularised(potential: Potential, cutoff: float) -> Potential:
    """The potential whose energies above `cutoff` (eV) grow by their logarithm alone; raises UserError unless it is finite.

    E > cutoff becomes cutoff + kT log(1 + (E - cutoff)/kT): value and gradient are continuous at the cutoff, the force
    falls off as 1/(1 + (E - cutoff)/kT). From 1e20 kT above it on, and where there is no number, the energy is constant and
    the force zero. For training (Noé et al., Science 365 (2019) eaaw1147, supplement), never for weights.
    """
    if not np.isfinite(cutoff):
        raise UserError(f"a potential is regularised from a finite energy in eV on, not from {cutoff}")
    return _Regularised(potential, float(cutoff))


@dataclass(frozen=True)
class _Regularised:
    potential: Potential
    cutoff: float

    @property
    def system(self) -> System:
        return self.potential.system

    @property
    def temperature(self) -> float:
        return self.potential.temperature

    @property
    def kT_ev(self) -> float:
        return self.potential.kT_ev

    @property
    def origin(self) -> dict[str, Any]:
        return self.potential.origin | {"regularised_above_eV": self.cutoff}

    def reduced_energy(self, positions: Positions) -> PerSample:
        reduced, limit = self.potential.reduced_energy(positions.double()), self.cutoff / self.kT_ev
        excess = (reduced - limit).clamp(0.0, LARGEST_EXCESS)
        return torch.where(reduced <= limit, reduced, limit + torch.log1p(excess)).to(positions)

    def energy_and_forces(
        self, positions: np.ndarray, cells: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        energy, forces = self.potential.energy_and_forces(positions, cells)
        excess = np.maximum(energy - self.cutoff, 0.0) / self.kT_ev
        grown = self.cutoff + self.kT_ev * np.log1p(np.minimum(excess, LARGEST_EXCESS))
        share = np.where(excess > LARGEST_EXCESS, 0.0, 1 / (1 + excess))
        return np.where(excess > 0, grown, energy), forces * share[:, None, None]


def potential_for(system: System, simulate: Simulate, options: PotentialOptions | None = None) -> EnginePotential:
    """The Potential that simulating `system` with this recipe would follow, with no bond constrained.

    OpenMM for peptides and molecules, an ASE calculator for what is periodic, or for anything when the options name one.
    Raises UserError for sites that are no atoms, SimulationError where the force field or calculator does not know them.
    """
    settings = options or PotentialOptions()
    require_atoms(system)
    if settings.calculator is not None or any(system.periodic):
        from dig_scale.simulation.ase_potential import calculator_potential

        spec = settings.calculator or simulate.calculator or CalculatorSpec()
        return calculator_potential(system, simulate.temperature, spec)
    from dig_scale.simulation.openmm_potential import openmm_potential

    return openmm_potential(system, simulate, settings)


def require_atoms(system: System) -> None:
    """Raise UserError unless every site is an atom, which energies are functions of."""
    if (system.elements == 0).any():
        raise UserError(
            f"system {system.name!r}: its sites are residues or beads, and no energy is a function of them alone; for "
            f'energies and weights train a model of all atoms: set pack.atoms = "all"'
        )


def label_ensemble(
    ensemble: Ensemble, potential: Potential, batch: int = 1024, progress: Callable[[int, int], None] | None = None
) -> Ensemble:
    """The ensemble with the potential's energies in eV, +inf where there is none; progress hears (done, all) after each batch.

    Raises UserError when the potential is another system's, or when no sample has an energy.
    """
    _require_same(ensemble.system, potential.system)
    energy = np.empty(ensemble.n_samples)
    for start in range(0, ensemble.n_samples, batch):
        rows = slice(start, min(start + batch, ensemble.n_samples))
        cells = None if ensemble.cell is None else ensemble.cell[rows]
        energy[rows] = potential.energy_and_forces(ensemble.positions[rows], cells)[0]
        if progress is not None:
            progress(rows.stop, ensemble.n_samples)
    if len(energy) and not np.isfinite(energy).any():
        raise UserError(
            f"ensemble of {ensemble.system.name!r}: none of {len(energy)} samples has a finite energy; look at them with "
            f"`dig-scale evaluate`, and at the simulate section that the energies follow"
        )
    return replace(ensemble, energy=energy, provenance=ensemble.provenance | {"energy": potential.origin})


# --- whether there is a density ---------------------------------------------------------------------------------------


def density_space_check(system: System, simulate: Simulate) -> None:
    """Raise UserError, naming fields of the recipe and what to set, unless exp(-u) is a density of the sites' positions.

    A constraint makes the distribution flat in some directions: log p of a model trained on it grows without bound as the
    model gets better. Hydrogens that are left out leave no energy to compare with.
    """
    require_atoms(system)
    if any(system.periodic):
        _require_free_layers(system, simulate)
        return
    _require_hydrogens(system)
    if simulate.explicit_solvent is not None:
        raise UserError(
            f"system {system.name!r}: with simulate.explicit_solvent the energy is not a function of its atoms alone; for "
            f'densities and weights leave explicit_solvent out and set simulate.implicit_solvent = "obc2"'
        )
    if simulate.constraints != "none" and _has_rigid_bonds(system):
        raise UserError(
            f'system {system.name!r}: simulate.constraints = "{simulate.constraints}" keeps bonds rigid, and their lengths '
            f'have no density; for densities and weights set simulate.constraints = "none" with simulate.time_step_fs left '
            f"out or at {_LONGEST_FLEXIBLE_STEP_FS:g}, simulate and train again"
        )


def _require_hydrogens(system: System) -> None:
    if _lacks_hydrogens(system):
        raise UserError(
            f"system {system.name!r}: its {system.n_sites} sites are heavy atoms without their hydrogens, and no energy is a "
            f'function of these alone; for densities and weights set pack.atoms = "all", pack and train again'
        )


def _lacks_hydrogens(system: System) -> bool:
    if (system.elements == 1).any():
        return False
    if is_peptide(system.residue_names):
        return True
    from dig_scale.importers.molecule import rdkit_molecule

    try:
        atoms = rdkit_molecule(system).GetAtoms()
    except UserError:
        return False  # its bonds do not tell; the force field's own check names the atom
    return any(atom.GetTotalNumHs() > 0 for atom in atoms)


def _has_rigid_bonds(system: System) -> bool:
    """Whether any bond of a hydrogen is constrained: that of two sites that move."""
    ends = system.bonds
    return bool((system.mobile[ends].all(axis=1) & (system.elements[ends] == 1).any(axis=1)).any())


def _require_free_layers(system: System, simulate: Simulate) -> None:
    slides = np.flatnonzero(system.mobile & (system.roles == SiteRole.SURFACE))
    if simulate.slab_layers == "held" and len(slides):
        raise UserError(
            f'system {system.name!r}: simulate.slab_layers = "held" keeps the centres of its mobile layers in place, and '
            f'these have no density; for densities and weights set simulate.slab_layers = "free" (with more cells along '
            f"the surface), or hold all layers: surface.fixed_layers"
        )


# --- the bridge to autograd -----------------------------------------------------------------------------------------


class _ReducedEnergy(torch.autograd.Function):
    """u(x) of an engine; its gradient is what the engine answered with it."""

    @staticmethod
    def forward(ctx: Any, positions: Tensor, potential: EnginePotential) -> Tensor:
        energy, forces = potential.energy_and_forces(positions.detach().cpu().double().numpy())
        limit = float(torch.finfo(positions.dtype).max)
        reduced, push = _with_infinities(energy / potential.kT_ev, forces / potential.kT_ev, limit)
        ctx.save_for_backward(positions, torch.from_numpy(-push).to(positions.device))
        return torch.from_numpy(reduced).to(positions)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        positions, slope = ctx.saved_tensors
        gradient = upstream[0].double()[:, None, None] * (slope + _Guard.apply(positions))
        return gradient.to(positions.dtype), None


class _Guard(torch.autograd.Function):
    """Zero, as far as values go; whoever differentiates a gradient by positions comes past it, and nobody else."""

    @staticmethod
    def forward(ctx: Any, positions: Tensor) -> Tensor:
        return positions.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        raise UserError(
            "an engine gives forces, no second derivatives: detach the gradient of reduced_energy before you differentiate "
            "what is made of it, or take an AnalyticPotential"
        )


def _with_infinities(energy: np.ndarray, forces: np.ndarray, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """+inf for energies [B] and zero for forces [B, N, 3] of structures where either is beyond `limit` or no number."""
    sound = (np.abs(energy) <= limit) & (np.abs(forces) <= limit).all(axis=(1, 2))
    return np.where(sound, energy, np.inf), np.where(sound[:, None, None], forces, 0.0)


# --- words for what does not fit ------------------------------------------------------------------------------------


def _require_shapes(system: System, positions: np.ndarray, cells: np.ndarray | None) -> None:
    if positions.ndim != 3 or positions.shape[1:] != (system.n_sites, 3):
        raise UserError(
            f"system {system.name!r}: positions have shape {positions.shape}, expected (B, {system.n_sites}, 3) in Å"
        )
    if cells is not None and cells.shape != (len(positions), 3, 3):
        raise UserError(
            f"system {system.name!r}: cells have shape {cells.shape}, expected ({len(positions)}, 3, 3) in Å"
        )


def _require_same(one: System, other: System) -> None:
    if not (np.array_equal(one.elements, other.elements) and np.array_equal(one.bonds, other.bonds)):
        raise UserError(
            f"an ensemble of {one.name!r} with {one.n_sites} sites, a potential of {other.name!r} with {other.n_sites}: "
            f"their atoms or bonds differ; make the potential for the ensemble's own system"
        )
