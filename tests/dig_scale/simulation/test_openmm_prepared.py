"""Files of AMBER, GROMACS and OpenMM are simulated with their own parameters; only the solute becomes a System."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openmm
import pytest
from openmm import app

from dig_scale.config import Simulate, SystemSpec
from dig_scale.importers import system_from_spec
from dig_scale.simulation.engine import SimulationError
from dig_scale.simulation.openmm_engine import OpenMMEngine
from dig_scale.simulation.openmm_prepared import prepared_system
from dig_scale.simulation.openmm_start import Start
from dig_scale.simulation.openmm_systems import Model, openmm_topology
from dig_scale.system import System, SystemKind

FLEXIBLE = Simulate(constraints="none", implicit_solvent="none", time_step_fs=1.0)


@pytest.fixture(scope="module")
def dipeptide() -> System:
    return system_from_spec(SystemSpec(name="ala2", sequence="ACE-ALA-NME"))


@pytest.fixture(scope="module")
def amber_model(dipeptide: System) -> openmm.System:
    """Flexible and in vacuum, for formats that know nothing else."""
    return app.ForceField("amber14/protein.ff14SB.xml").createSystem(openmm_topology(dipeptide))


def energy(model: openmm.System, positions: np.ndarray) -> float:
    """kJ/mol."""
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(model, openmm.VerletIntegrator(0.001), platform)
    context.setPositions(positions / 10)
    return float(context.getState(getEnergy=True).getPotentialEnergy()._value)


def steps(system: System, model: Model, simulate: Simulate, count: int) -> np.ndarray:
    engine = OpenMMEngine(system, simulate, 300.0, "CPU", model)
    engine.restore(engine.minimised(2), 2)
    return np.asarray(engine.advance(count).positions[0])


def test_amber_topology_runs_with_the_recipes_solvent(shared_data: Path) -> None:
    files = [shared_data / "mdtraj_tests" / f"alanine-dipeptide-implicit.{end}" for end in ("prmtop", "pdb")]
    system, model = prepared_system("ala2", files, Simulate())
    assert system.kind is SystemKind.MOLECULE
    assert system.n_sites == 22 and len(system.bonds) == 21 and len(system.stereocentres) == 1
    assert model.box is None
    assert system.origin["prepared"] == [file.name for file in files]
    content = app.AmberPrmtopFile(str(files[0]))
    own = content.createSystem(implicitSolvent=app.OBC2, constraints=app.HBonds)
    assert energy(model.openmm_system, model.positions) == pytest.approx(energy(own, model.positions), abs=2e-3)
    assert model.openmm_system.getNumConstraints() == 12
    assert np.isfinite(steps(system, model, Simulate(), 50)).all()
    assert OpenMMEngine(system, Simulate(), 300.0, "CPU", model).origin["force_field"] == system.origin["prepared"]


def test_gromacs_topology_has_the_energy_of_the_system_it_was_written_from(
    dipeptide: System, amber_model: openmm.System, tmp_path: Path
) -> None:
    files = [tmp_path / "ala2.top", tmp_path / "ala2.gro"]
    files[0].write_text(gromacs_topology(dipeptide, amber_model))
    files[1].write_text(gromacs_coordinates(dipeptide))
    system, model = prepared_system("ala2", files, FLEXIBLE)
    assert system.atom_names == dipeptide.atom_names
    np.testing.assert_array_equal(system.bonds, dipeptide.bonds)
    np.testing.assert_array_equal(system.bond_orders, dipeptide.bond_orders)
    expected = energy(amber_model, dipeptide.reference_positions)
    # The text has nine digits, and GROMACS scales 1-4 charges by a factor written with ten
    assert energy(model.openmm_system, dipeptide.reference_positions) == pytest.approx(expected, abs=1e-3)
    in_solvent = prepared_system("ala2", files, FLEXIBLE.model_copy(update={"implicit_solvent": "obc2"}))[1]
    assert energy(in_solvent.openmm_system, dipeptide.reference_positions) < expected - 20
    assert np.isfinite(steps(system, model, FLEXIBLE, 50)).all()


def test_openmm_system_in_water_runs_as_it_is(solvated_dipeptide: Start, in_water: Simulate, tmp_path: Path) -> None:
    start = solvated_dipeptide
    files = write_openmm(start, tmp_path)
    system, model = prepared_system("ala2", files, in_water)
    assert system.atom_names == start.system.atom_names
    assert len(model.positions) == len(start.model.positions)
    np.testing.assert_array_equal(model.solute, np.arange(22))
    serialize = openmm.XmlSerializer.serialize
    assert serialize(model.openmm_system) == serialize(start.model.openmm_system)
    # The file cut the peptide at the boundary; its System and start are whole
    for positions in (system.reference_positions, model.positions[:22]):
        lengths = np.linalg.norm(positions[system.bonds[:, 0]] - positions[system.bonds[:, 1]], axis=1)
        assert lengths.max() < 1.7
    assert steps(system, model, in_water, 5).shape == (22, 3)


def test_barostat_is_refused(solvated_dipeptide: Start, in_water: Simulate, tmp_path: Path) -> None:
    files = write_openmm(solvated_dipeptide, tmp_path)
    model = openmm.XmlSerializer.deserialize(files[0].read_text())
    model.addForce(openmm.MonteCarloBarostat(1.0, 300.0))
    files[0].write_text(openmm.XmlSerializer.serialize(model))
    with pytest.raises(SimulationError, match=r"MonteCarloBarostat.*constant volume"):
        prepared_system("ala2", files, in_water)


def test_wrong_files_are_named(dipeptide: System, amber_model: openmm.System, tmp_path: Path) -> None:
    xml, gro, short = tmp_path / "a.xml", tmp_path / "a.gro", tmp_path / "short.pdb"
    xml.write_text(openmm.XmlSerializer.serialize(amber_model))
    gro.write_text(gromacs_coordinates(dipeptide))
    few = dipeptide.select(range(10))
    with short.open("w") as stream:
        app.PDBFile.writeFile(openmm_topology(few), few.reference_positions / 10 * openmm.unit.nanometer, stream)
    with pytest.raises(SimulationError, match=r"no file at .*absent.gro"):
        prepared_system("x", [xml, tmp_path / "absent.gro"], FLEXIBLE)
    with pytest.raises(SimulationError, match="expected one topology"):
        prepared_system("x", [gro, short], FLEXIBLE)
    with pytest.raises(SimulationError, match=r"does not name its atoms; give a .pdb"):
        prepared_system("x", [xml, gro], FLEXIBLE)
    with pytest.raises(SimulationError, match=r"22 particles.*positions of 10"):
        prepared_system("x", [xml, short], FLEXIBLE)
    xml.write_text(openmm.XmlSerializer.serialize(openmm.VerletIntegrator(0.001)))
    with pytest.raises(SimulationError, match=r"expected an openmm\.System"):
        prepared_system("x", [xml, short], FLEXIBLE)
    top = tmp_path / "a.top"
    top.write_text('#include "amber99sb-ildn.ff/forcefield.itp"\n')
    with pytest.raises(SimulationError, match=r"a.top with .*Could not locate #include file"):
        prepared_system("x", [top, gro], FLEXIBLE)


def write_openmm(start: Start, folder: Path) -> list[Path]:
    """XML and PDB of a solvated peptide, with every molecule's atoms in the first box: some are cut."""
    box = start.model.box
    assert box is not None
    topology = openmm_topology(start.system)
    chain = topology.addChain()
    waters = []
    for number in range(22, len(start.model.positions)):
        mass = start.model.openmm_system.getParticleMass(number)._value
        if 15 < mass < 17:
            waters.append(topology.addResidue("HOH", chain))
            topology.addAtom("O", app.element.oxygen, waters[-1])
        elif mass < 4:
            topology.addAtom(f"H{len(list(waters[-1].atoms()))}", app.element.hydrogen, waters[-1])
        else:
            ion = topology.addResidue("NA" if mass < 30 else "CL", chain)
            topology.addAtom(ion.name, app.element.sodium if mass < 30 else app.element.chlorine, ion)
    topology.setPeriodicBoxVectors(openmm.unit.Quantity([openmm.Vec3(*row) for row in box / 10], openmm.unit.nanometer))
    wrapped = start.model.positions - np.floor(start.model.positions @ np.linalg.inv(box)) @ box
    files = [folder / "system.xml", folder / "system.pdb"]
    files[0].write_text(openmm.XmlSerializer.serialize(start.model.openmm_system))
    with files[1].open("w") as stream:
        app.PDBFile.writeFile(topology, wrapped / 10 * openmm.unit.nanometer, stream)
    return files


def gromacs_coordinates(system: System) -> str:
    rows = [
        f"{system.residue_index[i] + 1:5d}{system.residue_names[i]:<5s}{system.atom_names[i]:>5s}{i + 1:5d}"
        + "".join(f"{x / 10:8.3f}" for x in system.reference_positions[i])
        for i in range(system.n_sites)
    ]
    return "\n".join(["peptide", f"{system.n_sites:5d}", *rows, "   0.00000   0.00000   0.00000", ""])


def gromacs_topology(system: System, model: openmm.System) -> str:
    """One atom type per atom, and every parameter written out where it is used."""
    forces = {type(force).__name__: force for force in model.getForces()}
    nonbonded, n = forces["NonbondedForce"], system.n_sites
    kinds, atoms = [], []
    for i in range(n):
        charge, sigma, epsilon = (value._value for value in nonbonded.getParticleParameters(i))
        mass = model.getParticleMass(i)._value
        kinds.append(f"T{i} {system.elements[i]} {mass:.6f} 0.0 A {sigma:.9e} {epsilon:.9e}")
        residue = f"{system.residue_index[i] + 1} {system.residue_names[i]}"
        atoms.append(f"{i + 1} T{i} {residue} {system.atom_names[i]} {i + 1} {charge:.9f} {mass:.6f}")
    pairs = []
    for k in range(nonbonded.getNumExceptions()):
        i, j, product, sigma, epsilon = nonbonded.getExceptionParameters(k)
        if product._value or epsilon._value:
            pairs.append(f"{i + 1} {j + 1} 1 {sigma._value:.9e} {epsilon._value:.9e}")
    bonds = [row(forces["HarmonicBondForce"].getBondParameters(k), 2, "1", 1.0) for k in range(21)]
    angle_force = forces["HarmonicAngleForce"]
    angles = [row(angle_force.getAngleParameters(k), 3, "1", 180 / np.pi) for k in range(angle_force.getNumAngles())]
    torsion_force = forces["PeriodicTorsionForce"]
    torsions = []
    for k in range(torsion_force.getNumTorsions()):
        *ends, period, phase, height = torsion_force.getTorsionParameters(k)
        numbers = " ".join(str(end + 1) for end in ends)
        torsions.append(f"{numbers} 9 {phase._value * 180 / np.pi:.9f} {height._value:.9e} {period}")
    sections = {
        "defaults": ["1 2 yes 0.5 0.8333333333"],
        "atomtypes": kinds,
        "moleculetype": ["peptide 3"],
        "atoms": atoms,
        "bonds": bonds,
        "pairs": pairs,
        "angles": angles,
        "dihedrals": torsions,
        "system": ["peptide"],
        "molecules": ["peptide 1"],
    }
    return "\n".join(line for name, rows in sections.items() for line in (f"[ {name} ]", *rows, ""))


def row(parameters: list[object], ends: int, function: str, unit: float) -> str:
    """Atoms counted from 1, the rest value in `unit`, and the force constant."""
    numbers = " ".join(str(int(end) + 1) for end in parameters[:ends])  # type: ignore[call-overload]
    rest, constant = (value._value for value in parameters[ends:])  # type: ignore[attr-defined]
    return f"{numbers} {function} {rest * unit:.9e} {constant:.9e}"
