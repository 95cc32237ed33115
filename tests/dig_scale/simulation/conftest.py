"""A peptide in a small box of water, made once for all tests that need one."""

from __future__ import annotations

import pytest

from dig_scale.config import SystemSpec
from dig_scale.simulation.openmm_start import Start, start_from_spec
from tests.dig_scale.simulation.water_runs import InWater, Water


@pytest.fixture(scope="session")
def in_water() -> InWater:
    """Settings of a simulation in water."""
    return InWater(explicit_solvent=Water())


@pytest.fixture(scope="session")
def solvated_dipeptide(in_water: InWater) -> Start:
    """Alanine dipeptide in some 130 waters."""
    return start_from_spec(SystemSpec(name="ala2", sequence="ACE-ALA-NME"), in_water)
