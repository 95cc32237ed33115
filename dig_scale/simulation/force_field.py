"""What a recipe leaves open and a System decides: MMFF or force-field files, and the longest time step that goes with them.

In: a System and config.Simulate. Out: names and numbers. The one place where an absent simulate.time_step_fs gets its
value. Knows neither OpenMM nor ASE.
"""

from __future__ import annotations

from typing import Literal

from dig_scale.config import Simulate
from dig_scale.importers.residues import is_peptide
from dig_scale.simulation.engine import SimulationError
from dig_scale.system import System

Variant = Literal["MMFF94", "MMFF94s"]

MMFF_NAMES: dict[str, Variant] = {"mmff94": "MMFF94", "mmff94s": "MMFF94s"}
"""Names in `simulate.force_field` that are no files."""
DEFAULT_FORCE_FIELD = Simulate().force_field
"""Means Amber for peptides and MMFF94 for other molecules."""
PREPARED = "prepared"
"""Key of a System's origin: names of the files it was prepared in by another program."""
LONGEST_STEP_FS = 4.0
"""Of force fields with constrained, heavy hydrogens, and of surfaces."""
LONGEST_MMFF_STEP_FS = 2.0
"""MMFF's quartic bonds get stiffer as they are compressed: at 4 fs a carbonyl gains energy until it bursts."""
_LIGHT_HYDROGEN_STEP_FS = 2.0
_FLEXIBLE_STEP_FS = 1.0
_HEAVY_HYDROGEN_AMU = 2.5


def mmff_variant(system: System, simulate: Simulate) -> Variant | None:
    """The MMFF that a recipe gives a System, None where OpenMM's force-field files are meant.

    Raises SimulationError where MMFF stands among files.
    """
    named = [name for name in simulate.force_field if name.lower() in MMFF_NAMES]
    if named and len(simulate.force_field) > 1:
        raise SimulationError(
            f"simulate.force_field {list(simulate.force_field)}: {named[0]} describes a system by itself; give it alone"
        )
    if named:
        return MMFF_NAMES[named[0].lower()]
    is_default = simulate.force_field == DEFAULT_FORCE_FIELD
    return "MMFF94" if is_default and not is_peptide(system.residue_names) else None


def time_step_fs(system: System, simulate: Simulate) -> float:
    """The time step of a System: the recipe's, else the longest that its force field and constraints take."""
    if simulate.time_step_fs is not None:
        return simulate.time_step_fs
    if any(system.periodic):
        return LONGEST_STEP_FS
    by_files = PREPARED in system.origin or mmff_variant(system, simulate) is None
    return min(_by_constraints(simulate), LONGEST_STEP_FS if by_files else LONGEST_MMFF_STEP_FS)


def shortest_automatic_step_fs(simulate: Simulate) -> float:
    """The time step of the recipe, or one that every automatic step is a multiple of: to check times before systems are built."""
    return simulate.time_step_fs or min(_by_constraints(simulate), LONGEST_MMFF_STEP_FS)


def _by_constraints(simulate: Simulate) -> float:
    if simulate.constraints == "none":
        return _FLEXIBLE_STEP_FS
    return LONGEST_STEP_FS if simulate.hydrogen_mass >= _HEAVY_HYDROGEN_AMU else _LIGHT_HYDROGEN_STEP_FS
