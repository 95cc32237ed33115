"""What a campaign simulates for a surface of a recipe: its System, whose calculator has been found to know it.

In: a SurfaceSpec and config.Simulate. Out: what the campaign keeps of it, JSON-ready. Knows no campaign.
"""

from __future__ import annotations

from typing import Any

from dig_scale.config import Simulate, SurfaceSpec


def surface_start(name: str, spec: SurfaceSpec, simulate: Simulate) -> dict[str, Any]:
    """The built System; raises UserError for a surface that cannot be built or that the calculator does not know."""
    from dig_scale.importers.catalyst import surface_system
    from dig_scale.simulation.ase_engine import engines_at

    system = surface_system(name, spec)
    engines_at(system, simulate, (simulate.temperature,))
    return {"system": system.to_dict(), "platform": "ASE", "seconds_per_step": {}}
