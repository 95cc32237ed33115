"""Settings of small simulations in explicit water."""

from __future__ import annotations

from typing import Literal

from dig_scale.config import Section, Simulate


class Water(Section):
    """The recipe's explicit solvent, with a box as small as its cutoff allows."""

    model: Literal["tip3p", "spce"] = "tip3p"
    padding_nm: float = 0.4
    ionic_strength: float = 0.3
    box: Literal["cube", "dodecahedron", "octahedron"] = "dodecahedron"
    cutoff_nm: float = 0.6
    pressure_bar: float = 1.0
    pressure_equilibration_ps: float = 2.0


class InWater(Simulate):
    """A recipe's simulation with explicit solvent."""

    explicit_solvent: Water | None = None
