"""A peptide in explicit water: box, ions and pressure; frames of the peptide alone, whole; all of the state kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import openmm
import pytest

from dig_scale.config import Simulate, SystemSpec
from dig_scale.importers import system_from_spec
from dig_scale.records import read_trajectory_frames
from dig_scale.simulation.engine import PhaseSpace, SimulationError
from dig_scale.simulation.openmm_engine import OpenMMEngine
from dig_scale.simulation.openmm_solvent import box_vectors, solvated, water_file
from dig_scale.simulation.openmm_start import Start
from dig_scale.simulation.replica import ReplicaJob, ReplicaRun
from dig_scale.system import System
from tests.dig_scale.simulation.water_runs import InWater, Water


def engine_of(start: Start, simulate: Simulate) -> OpenMMEngine:
    """Running from the equilibrated box, at rest."""
    engine = OpenMMEngine(start.system, simulate, simulate.temperature, "CPU", start.model)
    engine.restore(PhaseSpace(start.model.positions, np.zeros_like(start.model.positions), 0), 3)
    return engine


def test_water_surrounds_the_peptide_in_a_neutral_periodic_box(solvated_dipeptide: Start, in_water: InWater) -> None:
    model = solvated_dipeptide.model
    np.testing.assert_array_equal(model.solute, np.arange(22))
    assert model.box is not None
    volume_a3 = float(np.linalg.det(model.box))
    masses = [model.openmm_system.getParticleMass(i)._value for i in range(len(model.positions))]
    density = sum(masses) / 0.6022 / volume_a3
    # g/cm³; a box of 130 waters fluctuates by some percent, and 2 ps hardly equilibrate it
    assert 0.85 < density < 1.15
    nonbonded = next(f for f in model.openmm_system.getForces() if isinstance(f, openmm.NonbondedForce))
    charges = [nonbonded.getParticleParameters(i)[0]._value for i in range(nonbonded.getNumParticles())]
    assert sum(charges) == pytest.approx(0, abs=1e-6)
    assert nonbonded.getNonbondedMethod() == openmm.NonbondedForce.PME
    assert not any(isinstance(f, openmm.MonteCarloBarostat) for f in model.openmm_system.getForces())


def test_pressure_changes_the_box(solvated_dipeptide: Start, in_water: InWater) -> None:
    solvent = in_water.explicit_solvent
    assert solvent is not None
    dry = solvated(solvated_dipeptide.system, in_water, solvent)
    assert dry.box is not None and solvated_dipeptide.model.box is not None
    assert np.linalg.det(solvated_dipeptide.model.box) != pytest.approx(np.linalg.det(dry.box), rel=1e-4)
    again = solvated(solvated_dipeptide.system, in_water, solvent)
    np.testing.assert_array_equal(dry.positions, again.positions)


def test_frames_hold_the_peptide_alone_and_whole(solvated_dipeptide: Start, in_water: InWater) -> None:
    start = solvated_dipeptide
    engine = engine_of(start, in_water)
    frame = engine.advance(20)
    assert frame.forces is not None
    assert frame.positions.shape == frame.forces.shape == (1, 22, 3)
    i, j = start.system.bonds.T
    lengths = np.linalg.norm(frame.positions[0, i] - frame.positions[0, j], axis=1)
    assert lengths.min() > 0.9 and lengths.max() < 1.7


def test_restored_simulation_in_water_takes_the_very_same_steps(solvated_dipeptide: Start, in_water: InWater) -> None:
    first = engine_of(solvated_dipeptide, in_water)
    first.advance(10)
    point = first.checkpoint()
    assert point.positions.shape == point.velocities.shape == solvated_dipeptide.model.positions.shape
    first.restore(point, 11)
    uninterrupted = [first.advance(10).positions for _ in range(2)]
    second = engine_of(solvated_dipeptide, in_water)
    second.restore(point, 11)
    assert all(np.array_equal(second.advance(10).positions, expected) for expected in uninterrupted)


def test_interrupted_replica_in_water_goes_on_as_if_it_had_not_been(
    solvated_dipeptide: Start, in_water: InWater, tmp_path: Path
) -> None:
    short = {"frames": 4, "chunk_frames": 2, "frame_spacing_ps": 0.008, "equilibration_ps": 0.008}
    simulate = in_water.model_copy(update=short)
    stores = []
    for name, times_opened in (("straight", 1), ("stopped", 3)):
        job = ReplicaJob(tmp_path / name, solvated_dipeptide.system, simulate, 1, 0, "CPU")
        job.files.folder.mkdir(parents=True)
        solvated_dipeptide.model.save(job.files.folder)
        for last in range(times_opened):
            run = ReplicaRun(job)
            while not run.advance().is_complete and last == times_opened - 1:
                pass
            run.close()
        stores.append(read_trajectory_frames(job.files.stores[0])[1])
    assert [frames.n_frames for frames in stores] == [4, 4]
    np.testing.assert_array_equal(stores[0].positions, stores[1].positions)


def test_origin_tells_the_water_and_no_implicit_solvent(solvated_dipeptide: Start, in_water: InWater) -> None:
    origin = engine_of(solvated_dipeptide, in_water).origin
    assert origin["implicit_solvent"] == "none"
    assert origin["explicit_solvent"]["model"] == "tip3p"


@pytest.mark.parametrize("shape", ["cube", "dodecahedron", "octahedron"])
def test_every_box_keeps_its_images_apart_and_has_room_for_the_cutoff(shape: str, solvated_dipeptide: Start) -> None:
    system = solvated_dipeptide.system
    wide = Water.model_validate({"box": shape, "padding_nm": 1.5})
    narrow = Water.model_validate({"box": shape, "padding_nm": 0.1})
    diameter = np.linalg.norm(np.ptp(system.reference_positions, axis=0)) / 10
    vectors = np.array(box_vectors(system, wide))
    shortest = min(np.linalg.norm(np.array(n) @ vectors) for n in np.ndindex(3, 3, 3) if any(n))
    assert diameter - 0.5 < shortest - 2 * wide.padding_nm < diameter + 0.1
    assert min(np.diag(np.array(box_vectors(system, narrow)))) >= 2 * narrow.cutoff_nm


def test_water_belongs_to_the_family_of_the_protein() -> None:
    assert water_file(Simulate(), Water()) == "amber14/tip3p.xml"
    assert water_file(Simulate(force_field=("amber99sbildn.xml",)), Water(model="spce")) == "spce.xml"


def test_other_protein_force_field_and_water_fit_together(solvated_dipeptide: Start) -> None:
    simulate = InWater(force_field=("amber99sbildn.xml",))
    model = solvated(solvated_dipeptide.system, simulate, Water(model="spce"))
    assert len(model.positions) > 300


@pytest.mark.parametrize(
    ("change", "complaint"),
    [("molecule", "explicit water goes with Amber"), ("fixed", "do not move"), ("beads", "coarse-grained beads")],
)
def test_what_cannot_be_put_into_water_is_refused(change: str, complaint: str, solvated_dipeptide: Start) -> None:
    peptide = solvated_dipeptide.system
    wrong: dict[str, System] = {
        "molecule": system_from_spec(SystemSpec(name="ethanol", smiles="CCO")),
        "fixed": replace(peptide, mobile=peptide.elements == 1),
        "beads": replace(peptide, elements=np.zeros(22)),
    }
    with pytest.raises(SimulationError, match=complaint):
        solvated(wrong[change], InWater(), Water())
