"""A ligand in its pocket from a recipe: all atoms move, the pocket System's sites are kept, a stopped run goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from dig_scale.config import ComplexSpec, Recipe, Simulate, SystemSpec
from dig_scale.importers.pocket import PocketOptions, place_of_ligands, pocket_system
from dig_scale.recipe_files import load_recipe
from dig_scale.records import find_trajectories, pack_dataset, read_trajectory_frames
from dig_scale.simulation.engine import SimulationError
from dig_scale.simulation.openmm_complex import complex_system
from dig_scale.simulation.openmm_start import start_from_spec
from dig_scale.simulation.replica import ReplicaJob, ReplicaRun
from dig_scale.system import SiteRole, System, SystemKind

SIMULATE = Simulate(
    frames=4,
    chunk_frames=2,
    frame_spacing_ps=0.01,
    equilibration_ps=0.01,
    replicas=1,
    implicit_solvent="none",
)
LIGAND = "lig_43"


@pytest.fixture(scope="module")
def spec(shared_data: Path) -> ComplexSpec:
    folder = shared_data / "fep_pockets" / "mcl1"
    return ComplexSpec(
        protein=folder / "01_protein" / "crd" / "protein.pdb",
        ligand=folder / "02_ligands" / "ligands.sdf",
        name_of_ligand=LIGAND,
        cutoff=4.0,
        defined_by=(LIGAND,),
    )


def advanced(out: Path, system: System, chunks: int | None) -> ReplicaRun:
    run = ReplicaRun(ReplicaJob(out, system, SIMULATE, 1, 0, "Reference"))
    while not run.progress().is_complete and chunks != 0:
        run.advance()
        chunks = None if chunks is None else chunks - 1
    run.close()
    return run


def test_frames_are_those_of_the_pocket_system_and_a_stopped_run_repeats_none(
    spec: ComplexSpec, tmp_path: Path
) -> None:
    start = start_from_spec(SystemSpec(name="mcl1-a", complex=spec), SIMULATE)
    system = start.system
    (tmp_path / "whole" / "mcl1-a").mkdir(parents=True)
    start.model.save(tmp_path / "whole" / "mcl1-a")
    advanced(tmp_path / "whole", system, 1)  # to the end of the equilibration, which is the long part
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    advanced(tmp_path / "whole", system, None)
    advanced(tmp_path / "stopped", system, 1)
    assert not advanced(tmp_path / "stopped", system, 0).progress().is_complete
    advanced(tmp_path / "stopped", system, None)
    (whole, first), (_, second) = (
        read_trajectory_frames(find_trajectories(tmp_path / name)[0]) for name in ("whole", "stopped")
    )
    np.testing.assert_allclose(first.positions, second.positions, atol=1e-3)
    assert whole.system_id == system.system_id and first.n_frames == 4
    pocket = system.roles == SiteRole.POCKET
    crystal = system.reference_positions[pocket]
    np.testing.assert_allclose(first.positions[:, pocket], np.broadcast_to(crystal, (4, *crystal.shape)), atol=1e-3)
    assert np.linalg.norm(np.diff(first.positions[:, ~pocket], axis=0), axis=-1).min(axis=0).max() > 1e-4
    assert len(start.model.positions) > system.n_sites
    recipe = Recipe.model_validate({"name": "p", "pack": {"validation_fraction": 0.0}, "simulate": {}})
    assert pack_dataset(recipe, [tmp_path / "whole"], tmp_path / "dataset").frames("train") == 4


def test_sites_are_those_that_an_import_of_the_same_files_has(spec: ComplexSpec) -> None:
    system, model = complex_system("mcl1-a", spec, SIMULATE)
    options = PocketOptions(cutoff=4.0, place=place_of_ligands(spec.ligand, (LIGAND,)), name="mcl1")
    imported, frames = pocket_system(spec.protein, spec.ligand, LIGAND, options)
    assert system.kind == SystemKind.MOLECULE and system.atom_names == imported.atom_names
    np.testing.assert_array_equal(system.roles, imported.roles)
    np.testing.assert_allclose(system.reference_positions, imported.reference_positions)
    np.testing.assert_allclose(model.positions[model.solute], frames.positions[0], atol=2e-3)


@pytest.mark.parametrize(
    ("changes", "simulate", "words"),
    [
        ({"name_of_ligand": None}, {}, r"ligands\.sdf holds 25 molecules; give complex\.name_of_ligand, one of lig_43"),
        ({"name_of_ligand": "lig_1"}, {}, r"no ligand 'lig_1'"),
        ({"protein": Path("nowhere.pdb")}, {}, r"system 'x': there is no file nowhere\.pdb"),
        ({"protein": Path("${NOWHERE}/a.pdb")}, {}, r"\$\{NOWHERE\}/a\.pdb names an environment variable"),
        ({}, {"force_field": ("amber14/protein.ff14SB.xml", "x.xml")}, r"is simulated with MMFF"),
        ({}, {"explicit_solvent": {}}, r"leave simulate\.explicit_solvent out"),
    ],
)
def test_what_cannot_be_simulated_is_named(
    spec: ComplexSpec, changes: dict[str, object], simulate: dict[str, object], words: str
) -> None:
    with pytest.raises(SimulationError if "no ligand" not in words else ValueError, match=words):
        complex_system("x", spec.model_copy(update=changes), Simulate.model_validate(simulate))


def test_files_of_a_complex_are_relative_to_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('name = "r"\n[[systems]]\nname = "a"\ncomplex = { protein = "p.pdb", ligand = "l.sdf" }\n')
    found = load_recipe(recipe).systems[0].complex
    assert found is not None and (found.protein, found.ligand) == (tmp_path / "p.pdb", tmp_path / "l.sdf")
