"""Doors for physics: densities and weights, reweighting between states, guided and steered samples, and what they refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dig_scale import cli
from dig_scale.config import Diffusion, Model, Pack, Recipe, Sample, Simulate, SteerSpec
from dig_scale.ensemble import BOLTZMANN, STEERED, Ensemble, read_ensemble, write_ensemble_file
from dig_scale.errors import UserError
from dig_scale.evaluation.structure import dihedrals
from dig_scale.importers.protein import system_from_sequence
from dig_scale.importers.stores import write_store
from dig_scale.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from dig_scale.records import pack_dataset
from dig_scale.serving.block import draw_block
from dig_scale.serving.served import build_bench, load_served_model
from dig_scale.simulation.potential import potential_for
from dig_scale.system import Frames, System
from dig_scale.units import thermal_energy
from tests.dig_scale.test_command_line_data import Command, Done
from tests.truth.test_score_model import lively_model

TINY = Model(layers=1, width=16, heads=2, feed_forward=16, radial_kernels=16, vector_channels=4, kernels="reference")
FLEXIBLE = Simulate(constraints="none", implicit_solvent="none")
PHI = "dihedral:4,6,8,10"
QUICK = ("--method", "heun", "--steps", 3, "--divergence", "hutchinson", "--probes", 2, "--workers", 1)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in this process."""

    def run(*words: object) -> Done:
        monkeypatch.setattr("sys.argv", ["dig-scale", *map(str, words)])
        code: object = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        text = capsys.readouterr()
        return Done(code, text.out, text.err)

    return run


@pytest.fixture(scope="module")
def dipeptide() -> System:
    """Alanine dipeptide with all atoms."""
    return system_from_sequence("ala2", "ACE-ALA-NME")


def trained(folder: Path, system: System, simulate: Simulate | None) -> Path:
    """A small network with random weights, as if trained on simulations of this recipe."""
    weights = lively_model(TINY).state_dict()
    averaged = {name: tensor.clone() for name, tensor in weights.items()}
    recipe = Recipe(name="random", model=TINY, simulate=simulate, pack=Pack(), diffusion=Diffusion(noise_max=3.0))
    return save_checkpoint(folder / "model.safetensors", Checkpoint(weights, averaged, recipe, (system,), 0, {}))


@pytest.fixture(scope="module")
def model(dipeptide: System, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained with flexible bonds."""
    return trained(tmp_path_factory.mktemp("flexible"), dipeptide, FLEXIBLE)


def shaken(system: System, count: int, width: float = 0.02) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, width, size=(count, system.n_sites, 3))
    return (system.reference_positions + noise).astype(np.float32)


@pytest.fixture(scope="module")
def drawn(dipeptide: System, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ensemble that says it was drawn by the model; near the reference, so that its energies are numbers."""
    told = {"checkpoint": load_served_model(model, torch.device("cpu")).checkpoint_id, "solver": "heun", "steps": 2}
    told["recipe"] = load_checkpoint(model).recipe.model_dump(mode="json")
    ensemble = Ensemble(dipeptide, shaken(dipeptide, 8), np.arange(8), seed=1, provenance=told)
    return write_ensemble_file(ensemble, tmp_path_factory.mktemp("drawn") / "ensemble.npz").parent


def test_density_with_energies_gives_weights(
    command: Command,
    model: Path,
    dipeptide: System,
    drawn: Path,
    tmp_path: Path,
) -> None:
    done = command(
        "density", drawn, "--model", model, "--energy", *QUICK, "--batch", 3, "--workers", 2, "--out", tmp_path / "d"
    )
    assert done.code == 0, done.err
    assert "Pearson r" in done.out and "ESS" in done.out
    found = read_ensemble(tmp_path / "d")
    assert found.log_density is not None and found.energy is not None and found.log_weights is not None
    assert found.log_density_error is not None and (found.log_density_error > 0).all()
    assert (tmp_path / "d" / "topology.pdb").is_file()
    expected = potential_for(dipeptide, FLEXIBLE).energy_and_forces(found.positions.astype(float))[0]
    np.testing.assert_allclose(found.energy, expected, atol=1e-6)
    np.testing.assert_allclose(found.log_weights, -expected / thermal_energy(300.0) - found.log_density, atol=1e-6)
    assert found.provenance["log_weights"] == BOLTZMANN
    assert not list((tmp_path / "d" / "parts").iterdir())


def test_samples_of_every_state_get_weights_that_lead_back_to_the_model(
    command: Command, model: Path, drawn: Path, tmp_path: Path
) -> None:
    ensemble = read_ensemble(drawn)
    x = ensemble.positions.copy()
    x[6:, 0] += [0, 0, 0.4]  # two of eight
    far = np.linalg.norm(x[:, 0] - x[:, 1], axis=1)
    edge = float(np.sort(far)[5:7].mean())
    write_ensemble_file(replace(ensemble, positions=x), tmp_path / "e.npz")
    states = ("--state", f"near:distance:0,1:0:{edge}", "--state", f"far:distance:0,1:{edge}:inf")
    words = ("density", tmp_path / "e.npz", "--model", model, *QUICK, *states, "--out")
    done = command(*words, tmp_path / "d", "--num", 3, "--energy")
    assert done.code == 0, done.err
    found = read_ensemble(tmp_path / "d")
    rare = far[found.index] > edge
    assert rare.sum() == 2 and (~rare).sum() == 3
    assert found.provenance["strata"][0] == {"state": "near", "samples": 6, "chosen": 3}
    assert found.log_weights is not None and found.energy is not None and found.log_density is not None
    factors = np.exp(found.log_weights + found.energy / thermal_energy(300.0) + found.log_density)
    assert factors.mean() == pytest.approx(1, rel=1e-5)
    assert factors[rare].sum() / factors.sum() == pytest.approx(2 / 8, rel=1e-5)
    assert command("reweight", tmp_path / "d", *states).code == 0
    rows = json.loads((tmp_path / "d" / "reweighting.json").read_text())["states"]["states"]
    assert [row["population"]["value"] for row in rows] == pytest.approx([6 / 8, 2 / 8], rel=1e-5)
    assert "not overlap" in command(*words, tmp_path / "o", "--num", 3, "--state", "all:distance:0,1:0:inf").error
    assert "--num" in command(*words, tmp_path / "o").error
    assert "or have weights" in command("density", tmp_path / "d", *words[2:], tmp_path / "o", "--num", 1).error


def test_a_rerun_computes_no_density_again_and_another_run_is_refused(
    command: Command,
    model: Path,
    drawn: Path,
    tmp_path: Path,
) -> None:
    words = ("density", drawn, "--model", model, "--out", tmp_path / "d")
    assert command(*words, *QUICK).code == 0
    first = read_ensemble(tmp_path / "d")
    assert first.log_weights is None
    assert command(*words, *QUICK, "--energy").code == 0
    again = read_ensemble(tmp_path / "d")
    np.testing.assert_array_equal(first.log_density, again.log_density)
    assert again.provenance["density"] == first.provenance["density"]
    assert again.log_weights is not None
    assert "integration" in command(*words, "--method", "heun", "--steps", 4, *QUICK[4:]).error


def test_densities_serve_the_same_structures_chosen_in_another_way(
    command: Command, model: Path, drawn: Path, tmp_path: Path
) -> None:
    words = ("density", drawn, "--model", model, *QUICK, "--num", 8, "--out", tmp_path / "d")
    assert command(*words, "--state", "all:distance:0,1:0:inf").code == 0
    chosen = read_ensemble(tmp_path / "d")
    assert chosen.is_tilted
    assert command(*words, "--energy").code == 0
    plain = read_ensemble(tmp_path / "d")
    assert not plain.is_tilted and plain.log_weights_towards == BOLTZMANN
    np.testing.assert_array_equal(plain.log_density, chosen.log_density)


def test_batches_that_a_killed_run_left_are_kept(
    command: Command,
    model: Path,
    drawn: Path,
    tmp_path: Path,
) -> None:
    words = ("density", drawn, "--model", model, "--out", tmp_path / "d", *QUICK, "--batch", 4)
    assert command(*words).code == 0
    (tmp_path / "d" / "ensemble.npz").unlink()
    part = tmp_path / "d" / "parts" / "000000000-000000003.npz"
    told = np.zeros(0, np.uint8)
    np.savez(part, value=np.full(4, 7.0), error=np.zeros(4), evaluations=5, cpu_seconds=1.0, problem=told)
    (tmp_path / "d" / "parts" / "000000004.tmp").write_bytes(b"half")
    assert command(*words).code == 0
    found = read_ensemble(tmp_path / "d").log_density
    assert found is not None
    assert (found[:4] == 7.0).all() and (found[4:] != 7.0).all()


def test_a_broken_structure_has_no_density_and_the_others_have(
    command: Command,
    model: Path,
    drawn: Path,
    tmp_path: Path,
) -> None:
    ensemble = read_ensemble(drawn)
    positions = ensemble.positions.copy()
    positions[2, 0] = np.nan
    write_ensemble_file(replace(ensemble, positions=positions), tmp_path / "broken.npz")
    done = command("density", tmp_path / "broken.npz", "--model", model, *QUICK, "--num", 4, "--out", tmp_path / "d")
    assert done.code == 0, done.err
    found = read_ensemble(tmp_path / "d")
    assert found.index.tolist() == [0, 2, 5, 7]
    assert np.isnan(found.log_density).tolist() == [False, True, False, False]
    assert "1 structures have none" in done.out


def test_frames_of_trajectories_and_held_out_frames_have_densities_but_no_weights(
    command: Command,
    model: Path,
    dipeptide: System,
    tmp_path: Path,
) -> None:
    origin = {"temperature_K": 300.0, "first_frame_ps": 0.0, "frame_spacing_ps": 1.0}
    frames = Frames(shaken(dipeptide, 200), np.arange(200.0))
    write_store(tmp_path / "md" / "ala2" / "0.zarr", dipeptide, frames, origin)
    recipe = Recipe(name="md", simulate=FLEXIBLE, pack=Pack(validation_fraction=0.2))
    pack_dataset(recipe, [tmp_path / "md"], tmp_path / "data")
    for source in ("md", "data"):
        out = tmp_path / f"{source}-density"
        done = command("density", tmp_path / source, "--model", model, "--energy", *QUICK, "--num", 3, "--out", out)
        assert done.code == 0, done.err
        assert "no weights" in done.out
        found = read_ensemble(out)
        assert found.n_samples == 3 and found.log_weights is None and np.isfinite(found.energy).all()


def test_constrained_bonds_have_no_density(
    command: Command,
    dipeptide: System,
    drawn: Path,
    tmp_path: Path,
) -> None:
    rigid = trained(tmp_path, dipeptide, Simulate())
    for words in ((), ("--energy",)):
        error = command("density", drawn, "--model", rigid, *QUICK, *words, "--out", tmp_path / "d").error
        assert 'simulate.constraints = "none"' in error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--steps", 5), "--steps is for --method rk4 or heun"),
        (("--probes", 4), "--probes is for --divergence hutchinson"),
        (("--recipe", "full"), "--recipe is for --energy"),
        (("--method", "rk4", "--rtol", 0.1), "--rtol is for --method dopri5"),
    ],
)
def test_options_that_do_nothing_are_refused(
    command: Command,
    model: Path,
    drawn: Path,
    tmp_path: Path,
    words: tuple[object, ...],
    said: str,
) -> None:
    assert said in command("density", drawn, "--model", model, *words, "--out", tmp_path / "d").error


# --- reweight ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def weighted(dipeptide: System, tmp_path: Path) -> Path:
    """Structures in two states of a distance, 300 and 100 of them; the second state's weigh three times as much."""
    positions = np.repeat(dipeptide.reference_positions[None], 400, axis=0)
    positions[300:, 0] += [50.0, 0, 0]
    log_weights = np.where(np.arange(400) < 300, 0.0, np.log(3.0))
    ensemble = Ensemble(
        dipeptide, positions.astype(np.float32), np.arange(400), seed=1, log_weights=log_weights, provenance={}
    )
    write_ensemble_file(ensemble, tmp_path / "weighted" / "ensemble.npz")
    return tmp_path / "weighted"


def test_free_energies_are_corrected_by_the_weights_and_stand_beside_their_ess(
    command: Command,
    weighted: Path,
) -> None:
    done = command("reweight", weighted, "--state", "near:distance:0,1:0:10", "--state", "far:distance:0,1:10:inf")
    assert done.code == 0, done.err
    content = json.loads((weighted / "reweighting.json").read_text())
    (one,) = content["states"]["differences"]
    assert one["sampled"]["value"] == pytest.approx(np.log(3.0))
    assert one["reweighted"]["value"] == pytest.approx(0.0, abs=1e-9)
    assert one["reweighted"]["fraction"] == pytest.approx((600**2 / (300 + 900)) / 400)
    assert content["weights"]["log_z"]["value"] == pytest.approx(np.log(1.5))
    for line in done.out.splitlines():
        assert "reweighted" not in line or "ESS" in line


def test_weights_that_one_sample_carries_are_not_to_be_trusted(
    command: Command,
    weighted: Path,
    tmp_path: Path,
) -> None:
    ensemble = read_ensemble(weighted)
    log_weights = np.zeros(400)
    log_weights[5] = 30.0
    write_ensemble_file(replace(ensemble, log_weights=log_weights), tmp_path / "one.npz")
    assert "do not trust reweighted numbers" in command("reweight", tmp_path / "one.npz").out


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("near:0:10", "expected NAME:PROPERTY:LOW:HIGH"),
        ("near:distance:0,1:9:1", "9 is not below 1"),
        ("near:distance:0,99:1:9", "distance of site 99"),
        ("near:dihedral:4,6,8,10:-inf:0", "finite angles in degrees"),
    ],
)
def test_a_state_that_is_none_is_one_line(command: Command, weighted: Path, state: str, said: str) -> None:
    assert said in command("reweight", weighted, "--state", state).error


def test_an_ensemble_without_weights_says_where_they_come_from(command: Command, drawn: Path) -> None:
    assert "dig-scale density" in command("reweight", drawn).error


# --- guided and steered samples ---------------------------------------------------------------------------------------


def test_guided_samples_follow_the_guide_and_say_so(command: Command, model: Path, tmp_path: Path) -> None:
    words = ("sample", model, "--num", 12, "--steps", 12, "--workers", 1)
    guide = ("--guide", "distance:0,20", "--guide-target", 9.0, "--guide-spread", 0.3, "--guide-clip", 1.0)
    done = command(*words, *guide, "--out", tmp_path / "guided")
    assert done.code == 0, done.err
    guided = read_ensemble(tmp_path / "guided")
    served = load_served_model(model, torch.device("cpu"))
    plain = draw_block(build_bench(served, guided.system), Sample(steps=12), np.arange(12))["positions"]
    off = [np.abs(np.linalg.norm(x[:, 0] - x[:, 20], axis=1) - 9.0).mean() for x in (plain, guided.positions)]
    assert off[1] < 0.5 * off[0]
    assert guided.provenance["guide"]["target"] == 9.0
    assert "guide" in command(*words, "--out", tmp_path / "guided").error  # not mixed with plain ones
    found = command("density", tmp_path / "guided", "--model", model, *QUICK, "--out", tmp_path / "d")
    assert found.code == 0
    assert read_ensemble(tmp_path / "d").log_weights is None


def test_steered_samples_keep_their_weights_and_grow_by_populations(
    command: Command,
    model: Path,
    tmp_path: Path,
) -> None:
    words = ("sample", model, "--steps", 6, "--workers", 1, "--batch", 16, "--out", tmp_path / "s")
    steer = ("--steer", f"{PHI}:60:20", "--steer-strength", 0.5)
    assert command(*words, *steer, "--num", 16).code == 0
    before = read_ensemble(tmp_path / "s")
    done = command(*words, *steer, "--num", 48)
    assert done.code == 0, done.err
    found = read_ensemble(tmp_path / "s")
    assert found.bias is not None and found.log_weights is not None and found.log_weights_towards == STEERED
    np.testing.assert_array_equal(found.log_weights[:16], before.log_weights)
    phi = np.degrees(dihedrals(found.positions, np.array([[4, 6, 8, 10]]))[:, 0])
    apart = np.mod(phi - 60.0 + 180.0, 360.0) - 180.0
    np.testing.assert_allclose(found.bias, 0.5 * 0.5 * (apart / 20.0) ** 2, rtol=1e-3, atol=1e-3)
    populations = found.provenance["populations"]
    assert [one["first"] for one in populations] == [0, 16, 32]
    assert all(len(one["ess"]) == 7 for one in populations)
    assert found.provenance["steer"]["potentials"] == [f"{PHI}:60:20"]
    assert "ask for 64" in command(*words, *steer, "--num", 50).error
    line = command("reweight", tmp_path / "s", "--state", f"left:{PHI}:0:180").out.splitlines()[0]
    assert line.startswith("ESS")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--guide", PHI), "needs either a target or a window"),
        (("--guide", PHI, "--guide-target", 60, "--guide-window", 0, 90), "needs either a target or a window"),
        (("--guide", "dihedral:1,2", "--guide-target", 60), "a dihedral takes 4"),
        (("--guide", "distance:0,99", "--guide-target", 3), "has sites 0 to 21"),
        (("--guide-target", 60), "--guide-target is for samples with --guide"),
        (("--steer", f"{PHI}:60:0"), "a spread above 0"),
        (("--steer", "nothing"), "expected one such as dihedral"),
    ],
)
def test_wishes_that_make_no_sense_are_refused(
    command: Command,
    model: Path,
    tmp_path: Path,
    words: tuple[object, ...],
    said: str,
) -> None:
    amount = () if "--num" in words else ("--num", 4)
    asked = ("--steps", 2, "--workers", 1, "--out", tmp_path / "s")
    assert said in command("sample", model, *words, *amount, *asked).error


def test_steering_needs_a_solver_with_noise(model: Path, dipeptide: System) -> None:
    bench = build_bench(load_served_model(model, torch.device("cpu")), dipeptide)
    with pytest.raises(UserError, match="draws no noise"):
        draw_block(bench, Sample(solver="heun", steps=2, steer=SteerSpec(potentials=(PHI,))), np.arange(4))


def test_valid_and_steered_do_not_go_together(command: Command, model: Path, tmp_path: Path) -> None:
    error = command("sample", model, "--valid", 4, "--steer", PHI, "--out", tmp_path / "s").error
    assert "whole populations" in error


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_shows_weights_states_and_cost(
    command: Command,
    dipeptide: System,
    tmp_path: Path,
) -> None:
    origin = {"temperature_K": 300.0, "first_frame_ps": 0.0, "frame_spacing_ps": 1.0}
    write_store(
        tmp_path / "md" / "ala2" / "0.zarr", dipeptide, Frames(shaken(dipeptide, 120), np.arange(120.0)), origin
    )
    positions = shaken(dipeptide, 60, 0.03)
    energy = np.random.default_rng(1).normal(0, 0.03, 60)
    log_density = -energy / thermal_energy(300.0) + np.random.default_rng(2).normal(0, 0.3, 60)
    weights = -energy / thermal_energy(300.0) - log_density
    weights[3], weights[4] = np.nan, -np.inf
    told = {"solver": "heun", "cpu_seconds": 6.0, "temperature_K": 300.0, "energy_cpu_seconds": 1.0}
    told |= {"density": {"cpu_seconds": 20.0}, "training_cost": {"cpu_seconds": 100.0}}
    known = {"energy": energy, "log_density": log_density, "log_weights": weights, "provenance": told}
    ensemble = Ensemble(dipeptide, positions, np.arange(60), seed=1, **known)
    write_ensemble_file(ensemble, tmp_path / "e" / "ensemble.npz")
    states = ("--state", f"low:{PHI}:-180:0", "--state", f"high:{PHI}:0:180")
    assert command("reweight", tmp_path / "e", *states).code == 0
    out = tmp_path / "report"
    done = command("evaluate", tmp_path / "e", "--reference", tmp_path / "md", "--out", out, "--bootstrap", 10)
    assert done.code == 0, done.err
    physics = json.loads((out / "report.json").read_text())["physics"]
    assert physics["weights"]["samples"] == 59
    assert physics["agreement"]["pearson"] > 0.9
    assert [row["name"] for row in physics["states"]["states"]] == ["low", "high"]
    assert physics["states"]["states"][0]["md"]["value"] is not None
    curve = physics["cost_curve"]
    assert curve["reweighted"][-1]["cpu_seconds"] == pytest.approx(27.0)
    assert curve["model"][-1]["with_training"] == pytest.approx(106.0)
    assert curve["reweighted"][-1]["effective_samples"] == pytest.approx(
        physics["weights"]["effective_samples"], rel=1e-6
    )
    page = (out / "report.html").read_text()
    assert page.count("Model, reweighted (ESS") >= 1
    for heading in ("Weights", "Log-density and energy", "States", "Error against cost"):
        assert f"<h2>{heading}</h2>" in page
