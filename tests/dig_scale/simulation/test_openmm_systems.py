"""Which force field a System gets, and what is done to it: solvent, constraints, masses, fixed sites, storage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import openmm
import pytest

from dig_scale.config import Simulate, SystemSpec
from dig_scale.importers import system_from_spec
from dig_scale.simulation.engine import SimulationError
from dig_scale.simulation.force_field import PREPARED, mmff_variant
from dig_scale.simulation.openmm_engine import OpenMMEngine
from dig_scale.simulation.openmm_start import start_from_spec
from dig_scale.simulation.openmm_systems import (
    Model,
    build_model,
    build_openmm_system,
    obc2,
    openmm_topology,
    stored_or_built,
)
from dig_scale.system import System
from dig_scale.units import BOLTZMANN_EV_PER_K

MMFF = Simulate(time_step_fs=2.0)


@pytest.fixture(scope="module")
def dipeptide() -> System:
    return system_from_spec(SystemSpec(name="ala2", sequence="ACE-ALA-NME"))


@pytest.fixture(scope="module")
def ethanol() -> System:
    return system_from_spec(SystemSpec(name="ethanol", smiles="CCO"))


def forces_of(model: openmm.System) -> dict[str, openmm.Force]:
    return {force.getName(): force for force in model.getForces()}


def test_residue_names_decide_between_amber_and_mmff(dipeptide: System, ethanol: System) -> None:
    assert mmff_variant(dipeptide, Simulate()) is None
    assert mmff_variant(ethanol, Simulate()) == "MMFF94"
    assert mmff_variant(dipeptide, Simulate(force_field=("mmff94s",))) == "MMFF94s"
    assert mmff_variant(ethanol, Simulate(force_field=("my-own.xml",))) is None
    with pytest.raises(SimulationError, match="mmff94 describes a system by itself"):
        mmff_variant(ethanol, Simulate(force_field=("amber14/protein.ff14SB.xml", "mmff94")))


def test_peptide_with_mmff_is_imported_and_simulated() -> None:
    simulate = Simulate(force_field=("mmff94",), time_step_fs=2.0, implicit_solvent="none")
    start = start_from_spec(SystemSpec(name="ala2", sequence="ACE-ALA-NME"), simulate)
    engine = OpenMMEngine(start.system, simulate, 300.0, "Reference", start.model)
    assert engine.origin["force_field"] == ["MMFF94"]
    engine.restore(engine.minimised(1), 1)
    assert engine.advance(50).energy is not None


def test_files_that_do_not_know_a_molecule_say_so(ethanol: System) -> None:
    with pytest.raises(SimulationError, match=r"'ethanol': force field .*protein.ff15ipq.xml.*template"):
        build_openmm_system(ethanol, Simulate(force_field=("amber14/protein.ff15ipq.xml",), implicit_solvent="none"))


def test_unknown_bond_order_is_named(ethanol: System) -> None:
    with pytest.raises(SimulationError, match=r"LIG1:C1 \(atom 0\) with LIG1:C2 \(atom 1\) has no order"):
        build_openmm_system(replace(ethanol, bond_orders=np.zeros(8)), MMFF)


def test_long_step_is_refused_for_mmff_alone(dipeptide: System, ethanol: System) -> None:
    with pytest.raises(SimulationError, match=r"'ethanol'.*time_step_fs = 2"):
        build_openmm_system(ethanol, Simulate(time_step_fs=4.0))
    assert build_openmm_system(dipeptide, Simulate(time_step_fs=4.0)).getNumParticles() == 22


def test_constraints_and_masses_of_a_molecule_are_the_recipes(ethanol: System) -> None:
    model = build_openmm_system(ethanol, MMFF)
    masses = np.array([model.getParticleMass(i)._value for i in range(9)])
    assert (masses[ethanol.elements == 1] == 3.0).all()
    assert masses.sum() == pytest.approx(46.07, abs=0.01)
    assert model.getNumConstraints() == 6
    assert build_openmm_system(ethanol, MMFF.model_copy(update={"constraints": "none"})).getNumConstraints() == 0


def test_molecule_has_the_temperature_of_the_thermostat(ethanol: System) -> None:
    simulate = MMFF.model_copy(update={"friction_per_ps": 20.0, "implicit_solvent": "none"})
    engine = OpenMMEngine(ethanol, simulate, 300.0, "Reference")
    engine.restore(engine.minimised(3), 3)
    engine.advance(200)
    kinetic = []
    for _ in range(300):
        engine.advance(25)
        kinetic.append(engine.kinetic_energy())
    temperature = 2 * np.mean(kinetic) / (engine.degrees_of_freedom * BOLTZMANN_EV_PER_K)
    # One sample scatters by 300 sqrt(2 / 18) = 100 K; 15 ps at 20/ps hold some 200 independent ones: 7 K. Four of these.
    assert temperature == pytest.approx(300, abs=28)


def test_solvent_of_a_molecule_is_obc2_with_its_mmff_charges(ethanol: System) -> None:
    solvated, vacuum = (
        build_openmm_system(ethanol, Simulate(time_step_fs=2, implicit_solvent=s)) for s in ("obc2", "none")
    )
    force = forces_of(solvated)["GBSAOBCForce"]
    assert "GBSAOBCForce" not in forces_of(vacuum)
    charges = [force.getParticleParameters(i)[0]._value for i in range(9)]
    assert charges[:3] == pytest.approx([0.0, 0.28, -0.68])
    assert sum(charges) == pytest.approx(0, abs=1e-9)


def test_radii_for_molecules_are_those_of_ambers_solvent(dipeptide: System) -> None:
    """The force-field file and the rule by elements agree on a peptide."""
    filed = forces_of(build_openmm_system(dipeptide, Simulate()))["GBSAOBCForce"]
    ruled = obc2(openmm_topology(dipeptide), np.zeros(22))
    for i in range(22):
        expected = [value._value if hasattr(value, "_value") else value for value in filed.getParticleParameters(i)[1:]]
        found = [value._value if hasattr(value, "_value") else value for value in ruled.getParticleParameters(i)[1:]]
        assert found == pytest.approx(expected, abs=1e-6)


def test_sites_that_are_not_mobile_stay_where_they_are(ethanol: System) -> None:
    held = replace(ethanol, mobile=ethanol.elements == 1)
    engine = OpenMMEngine(held, MMFF, 300.0, "Reference")
    engine.restore(engine.minimised(1), 1)
    positions = engine.advance(200).positions[0]
    np.testing.assert_array_equal(positions[~held.mobile], held.reference_positions[~held.mobile])
    assert np.linalg.norm(positions - held.reference_positions, axis=1)[held.mobile].min() > 0.01
    assert engine.degrees_of_freedom == 18


def test_stored_model_is_the_model(ethanol: System, tmp_path: Path) -> None:
    model = build_model(ethanol, MMFF)
    model.save(tmp_path)
    loaded = Model.load(tmp_path)
    serialize = openmm.XmlSerializer.serialize
    assert serialize(loaded.openmm_system) == serialize(model.openmm_system)
    np.testing.assert_array_equal(loaded.positions, model.positions)
    np.testing.assert_array_equal(loaded.solute, np.arange(9))
    assert loaded.box is None


def test_model_that_cannot_be_built_again_must_be_there(ethanol: System, tmp_path: Path) -> None:
    assert stored_or_built(tmp_path, ethanol, MMFF).positions.shape == (9, 3)
    with pytest.raises(SimulationError, match=r"model.npz is gone"):
        stored_or_built(tmp_path, replace(ethanol, origin={PREPARED: ["a.prmtop"]}), MMFF)
