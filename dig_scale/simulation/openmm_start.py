"""What a campaign simulates for each entry of a recipe: its System, its Model, and the platform they run on.

In: a SystemSpec and config.Simulate. Out: a Start, made once per system and kept for all replicas. Knows no campaign.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dig_scale.config import Simulate, SystemSpec
from dig_scale.importers import system_from_spec
from dig_scale.simulation.force_field import time_step_fs
from dig_scale.simulation.openmm_complex import complex_system
from dig_scale.simulation.openmm_engine import PlatformChoice, fastest_platform
from dig_scale.simulation.openmm_prepared import prepared_system
from dig_scale.simulation.openmm_solvent import at_pressure, solvated
from dig_scale.simulation.openmm_systems import Model, build_model
from dig_scale.system import System


@dataclass(frozen=True)
class Start:
    """A System, the Model that OpenMM simulates for it, and the platform that was the fastest here."""

    system: System
    model: Model
    platform: PlatformChoice


def start_from_spec(spec: SystemSpec, simulate: Simulate) -> Start:
    """The start of a recipe's entry: imported, solvated, a ligand in its pocket, or read as prepared; raises UserError as
    those do."""
    if spec.prepared or spec.complex:
        system, model = (
            complex_system(spec.name, spec.complex, simulate)
            if spec.complex
            else prepared_system(spec.name, [Path(file) for file in spec.prepared or ()], simulate)
        )
        return Start(system, model, fastest_platform(system, simulate, model))
    system = system_from_spec(spec, simulate)
    solvent = simulate.explicit_solvent
    if solvent is None:
        model = build_model(system, simulate)
        return Start(system, model, fastest_platform(system, simulate, model))
    dry = solvated(system, simulate, solvent)
    platform = fastest_platform(system, simulate, dry)
    if not solvent.pressure_equilibration_ps:
        return Start(system, dry, platform)
    step = time_step_fs(system, simulate)
    return Start(system, at_pressure(dry, simulate, solvent, platform.platform, step), platform)
