"""An absent time step is the longest that a system takes; one that is given stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dig_scale.config import Recipe, Simulate, SystemSpec
from dig_scale.importers.molecule import system_from_smiles
from dig_scale.importers.protein import system_from_sequence
from dig_scale.importers.sampled import Reading, system_from_file
from dig_scale.records import write_topology_pdb
from dig_scale.simulation.campaign import _checked
from dig_scale.simulation.engine import SimulationError
from dig_scale.simulation.force_field import PREPARED, shortest_automatic_step_fs, time_step_fs
from dig_scale.simulation.openmm_engine import OpenMMEngine
from dig_scale.simulation.openmm_start import start_from_spec
from tests.kinds import catalyst
from tests.molecules import alanine_dipeptide_heavy

PEPTIDE = alanine_dipeptide_heavy()


@pytest.mark.parametrize(
    ("changes", "peptide", "molecule"),
    [
        ({}, 4.0, 2.0),
        ({"force_field": ("mmff94",)}, 2.0, 2.0),
        ({"hydrogen_mass": 1.008}, 2.0, 2.0),
        ({"constraints": "none"}, 1.0, 1.0),
        ({"time_step_fs": 0.5}, 0.5, 0.5),
        ({"force_field": ("mine.xml",)}, 4.0, 4.0),
    ],
)
def test_time_step_follows_from_force_field_and_constraints(
    changes: dict[str, object], peptide: float, molecule: float
) -> None:
    simulate = Simulate.model_validate(changes)
    ethanol = system_from_smiles("ethanol", "CCO")
    assert (time_step_fs(PEPTIDE, simulate), time_step_fs(ethanol, simulate)) == (peptide, molecule)
    for step in (peptide, molecule):
        assert (step / shortest_automatic_step_fs(simulate)).is_integer()


def test_surfaces_and_prepared_systems_keep_four_femtoseconds() -> None:
    ethanol = system_from_smiles("ethanol", "CCO")
    assert time_step_fs(catalyst().system, Simulate()) == 4.0
    assert time_step_fs(replace(ethanol, origin={PREPARED: ["a.prmtop"]}), Simulate()) == 4.0


def test_a_molecule_needs_no_time_step_and_says_which_it_took() -> None:
    ethanol = system_from_smiles("ethanol", "CCO")
    engine = OpenMMEngine(ethanol, Simulate(), 300.0, "Reference")
    assert engine.origin["time_step_fs"] == 2.0
    engine.minimised(1)
    assert engine.advance(10).time_ps[0] == pytest.approx(0.02)


def test_times_that_no_automatic_step_divides_are_refused_before_anything_is_built() -> None:
    recipe = Recipe(
        name="x",
        systems=(SystemSpec(name="e", smiles="CCO"),),
        simulate=Simulate(frame_spacing_ps=0.003),
    )
    with pytest.raises(SimulationError, match=r"frame_spacing_ps is 0\.003 ps, 1\.5 steps of 2 fs"):
        _checked(recipe)


def test_mmff_describes_a_peptide_from_a_file_as_it_does_when_it_is_sampled(tmp_path: Path) -> None:
    dipeptide = system_from_sequence("ala2", "ACE-ALA-NME")
    file = write_topology_pdb(dipeptide, dipeptide.reference_positions, tmp_path / "ala2.pdb")
    simulate = Simulate(force_field=("mmff94",))
    start = start_from_spec(SystemSpec(name="ala2", file=file), simulate)
    forces = {type(force).__name__ for force in start.model.openmm_system.getForces()}
    assert start.system.n_sites == 22 and time_step_fs(start.system, simulate) == 2.0
    assert "HarmonicBondForce" not in forces
    again = system_from_file(file, Reading("atoms", ("molecule",), simulate))
    assert again.system_id == start.system.system_id
