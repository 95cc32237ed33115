"""What a campaign simulates for each entry of a recipe: its System, its Model, and the platform they run on.

In: a SystemSpec and config.Simulate. Out: a Start, made once per system and kept for all replicas. Knows no campaign.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dig_scale.config import Simulate, SystemSpec
from dig_scale.importers import system_from_spec
from dig_scale.simulation.openmm_engine import PlatformChoice, fastest_platform
from dig_scale.simulation.openmm_prepared import prepared_system
from dig_scale.simulation.openmm_solvent import at_pressure, solvated
from dig_scale.simulation.openmm_systems import DEFAULT_FORCE_FIELD, MMFF_NAMES, Model, build_model
from dig_scale.system import System


@dataclass(frozen=True)
class Start:
    """A System, the Model that OpenMM simulates for it, and the platform that was the fastest here."""

    system: System
    model: Model
    platform: PlatformChoice


def start_from_spec(spec: SystemSpec, simulate: Simulate) -> Start:
    """The start of a recipe's entry: imported, solvated or read as prepared; raises UserError as those do."""
    files = getattr(spec, "prepared", None)
    if files:
        system, model = prepared_system(spec.name, [Path(file) for file in files], simulate)
        return Start(system, model, fastest_platform(system, simulate, model))
    system = system_from_spec(spec, for_import(simulate))
    solvent = getattr(simulate, "explicit_solvent", None)
    if solvent is None:
        model = build_model(system, simulate)
        return Start(system, model, fastest_platform(system, simulate, model))
    dry = solvated(system, simulate, solvent)
    platform = fastest_platform(system, simulate, dry)
    model = at_pressure(dry, simulate, solvent, platform.platform) if solvent.pressure_equilibration_ps else dry
    return Start(system, model, platform)


def for_import(simulate: Simulate) -> Simulate:
    """The settings in whose force field a peptide's geometry is relaxed: OpenMM's files, which MMFF is none of."""
    named = any(name.lower() in MMFF_NAMES for name in simulate.force_field)
    return simulate.model_copy(update={"force_field": DEFAULT_FORCE_FIELD}) if named else simulate
