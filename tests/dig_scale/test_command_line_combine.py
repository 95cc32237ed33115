"""`dig-scale combine`: windows become one ensemble with weights back to the model; what does not belong together is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dig_scale.config import Sample
from dig_scale.ensemble import BOLTZMANN, MODEL, STEERED, Ensemble, read_ensemble, write_ensemble_file
from dig_scale.importers.protein import system_from_sequence
from dig_scale.model.checkpoint import load_checkpoint
from dig_scale.serving.block import draw_block
from dig_scale.serving.served import build_bench, load_served_model
from dig_scale.system import System
from dig_scale.units import thermal_energy
from tests.dig_scale.test_command_line_data import Command
from tests.dig_scale.test_command_line_physics import (  # noqa: F401
    FLEXIBLE,
    PHI,
    QUICK,
    command,
    dipeptide,
    model,
    shaken,
    trained,
)

LENGTH, TARGET, SPREAD = "distance:0,20", 7.0, 0.5
"""A window that FILE.py or this text gives."""


@pytest.fixture(scope="module")
def told(model: Path) -> Mapping[str, Any]:  # noqa: F811
    """What is said of every ensemble that this model drew."""
    served = load_served_model(model, torch.device("cpu"))
    recipe = load_checkpoint(model).recipe.model_dump(mode="json")
    return {"checkpoint": served.checkpoint_id, "solver": "heun", "steps": 2, "recipe": recipe, "cpu_seconds": 1.0}


def length(positions: np.ndarray) -> np.ndarray:
    return np.linalg.norm(positions[:, 0].astype(float) - positions[:, 20], axis=1)


def written(ensemble: Ensemble, folder: Path) -> Path:
    return write_ensemble_file(ensemble, folder / "ensemble.npz").parent


def plain(system: System, told: Mapping[str, Any], seed: int = 1, count: int = 40) -> Ensemble:
    """As if drawn without steering."""
    return Ensemble(system, shaken(system, count), np.arange(count), seed=seed, provenance=dict(told))


def steered(
    system: System, told: Mapping[str, Any], seed: int = 2, potential: str = f"{LENGTH}:{TARGET}:{SPREAD}"
) -> Ensemble:
    """As if steered without resampling: two populations of plain samples, which weigh exp(-bias)."""
    ensemble = plain(system, told, seed)
    positions = shaken(system, 40, 0.03)
    bias = ((length(positions) - TARGET) / SPREAD) ** 2 / 2
    populations = [{"first": first, "ess": [20.0], "resampled": [], "distinct": 20} for first in (0, 20)]
    steer = {"potentials": [potential], "strength": 1.0, "resample_below": 0.5, "start": 1.0}
    more = {"steer": steer, "population": 20, "populations": populations, "log_weights": STEERED}
    return replace(ensemble, positions=positions, log_weights=-bias, bias=bias, provenance=ensemble.provenance | more)


def test_windows_of_a_model_become_one_ensemble(command: Command, model: Path, tmp_path: Path) -> None:  # noqa: F811
    words = ("sample", model, "--steps", 6, "--workers", 1, "--batch", 16, "--num", 32, "--seed", 10)
    assert command(*words, "--steer", f"{PHI}:60:60", "--out", tmp_path / "w60").code == 0
    window = read_ensemble(tmp_path / "w60")
    bench = build_bench(load_served_model(model, torch.device("cpu")), window.system)
    index, provenance = np.arange(16), dict(window.provenance)
    for name in ("steer", "population", "populations", "log_weights"):
        provenance.pop(name)
    plain = Ensemble(
        window.system,
        draw_block(bench, Sample(steps=6, seed=12), index)["positions"],
        index,
        seed=12,
        provenance=provenance,
    )
    windows = (tmp_path / "w60", written(plain, tmp_path / "plain"))
    done = command("combine", *windows, "--out", tmp_path / "all")
    assert done.code == 0, done.err
    found = read_ensemble(tmp_path / "all")
    assert found.n_samples == 48 and found.log_weights_towards == MODEL
    assert found.correcting_log_weights is found.log_weights and found.log_weights is not None
    assert np.exp(found.log_weights).mean() == pytest.approx(1)
    assert found.replicates is not None and found.replicates.shape == (48, 50)
    assert [one["rows"] for one in found.provenance["windows"]] == [[0, 32], [32, 48]]
    assert found.provenance["windows"][1]["free_energy_kT"] == pytest.approx(0, abs=1e-9)
    lines = done.out.splitlines()
    assert lines[0].startswith("w60: 32 samples in 2 populations, ESS ")
    assert "overlap" in lines[0] and "by its own weights alone" in lines[0]
    assert "bootstrap over independent populations" in done.out and "warning" not in done.out
    again = command("combine", *windows, "--out", tmp_path / "all")
    assert again.out == done.out
    report = command("reweight", tmp_path / "all", "--state", f"left:{PHI}:0:180", "--state", f"right:{PHI}:-180:0")
    assert report.code == 0, report.err
    assert "log Z" not in report.out
    (one,) = json.loads((tmp_path / "all" / "reweighting.json").read_text())["states"]["differences"]
    assert one["reweighted"]["error"] > 0


def test_unsteered_samples_have_equal_weights_and_those_of_one_window_are_its_own(
    command: Command,  # noqa: F811
    dipeptide: System,  # noqa: F811
    told: Mapping[str, Any],
    tmp_path: Path,
) -> None:
    done = command("combine", written(plain(dipeptide, told), tmp_path / "p"), "--out", tmp_path / "one")
    assert done.code == 0, done.err
    np.testing.assert_allclose(read_ensemble(tmp_path / "one").log_weights, 0, atol=1e-9)
    window = steered(dipeptide, told)
    assert command("combine", written(window, tmp_path / "s"), "--out", tmp_path / "two").code == 0
    found = read_ensemble(tmp_path / "two")
    np.testing.assert_allclose(found.log_weights, 0, atol=1e-3)  # exp(-bias) times exp(bias)
    assert found.provenance["windows"][0]["free_energy_kT"] == pytest.approx(
        -np.log(np.exp(-window.bias).mean()), abs=0.1
    )


def test_density_of_a_combined_ensemble_gives_boltzmann_weights(
    command: Command,  # noqa: F811
    model: Path,  # noqa: F811
    dipeptide: System,  # noqa: F811
    told: Mapping[str, Any],
    tmp_path: Path,
) -> None:
    window = steered(dipeptide, told)
    window = replace(window, log_weights=-window.bias + np.linspace(0, 1, 40))
    windows = written(plain(dipeptide, told).take(np.arange(6)), tmp_path / "p"), written(window, tmp_path / "s")
    assert command("combine", *windows, "--out", tmp_path / "all").code == 0
    words = ("density", tmp_path / "all", "--model", model, "--energy", *QUICK, "--num", 10, "--out", tmp_path / "d")
    done = command(*words)
    assert done.code == 0, done.err
    given, found = read_ensemble(tmp_path / "all"), read_ensemble(tmp_path / "d")
    assert given.log_weights is not None and np.ptp(given.log_weights) > 0.5
    assert found.log_density is not None and found.energy is not None
    expected = -found.energy / thermal_energy(300.0) - found.log_density + given.log_weights[found.index]
    np.testing.assert_allclose(found.log_weights, expected, atol=1e-6)
    np.testing.assert_array_equal(found.replicates, given.replicates[found.index])  # type: ignore[index]
    assert found.log_weights_towards == BOLTZMANN
    line = command("reweight", tmp_path / "d").out
    assert "log Z" in line and "entropy of the model" not in line
    assert (
        "give it as it was sampled or combined"
        in command("density", tmp_path / "d", *words[2:-1], tmp_path / "again").error
    )


def test_windows_that_do_not_meet_are_named(
    command: Command,  # noqa: F811
    dipeptide: System,  # noqa: F811
    told: Mapping[str, Any],
    tmp_path: Path,
) -> None:
    far = steered(dipeptide, told, 3, f"{LENGTH}:57:{SPREAD}")
    positions = far.positions.copy()
    positions[:, 0] += (positions[:, 0] - positions[:, 20]) / length(positions)[:, None].astype(np.float32) * 50
    bias = ((length(positions) - 57) / SPREAD) ** 2 / 2
    populations = [far.provenance["populations"][0] | {"first": 0}]
    provenance = far.provenance | {"populations": populations, "steps": 9}
    alone = replace(far, positions=positions, bias=bias, log_weights=-bias, provenance=provenance)
    windows = written(steered(dipeptide, told), tmp_path / "near"), written(alone, tmp_path / "far")
    done = command("combine", *windows, "--out", tmp_path / "all")
    assert done.code == 0, done.err
    assert "near and far do not overlap (0.000" in done.out
    assert "far is one population" in done.out
    assert "solvers or steps differ" in done.out
    assert read_ensemble(tmp_path / "all").replicates is None


def test_windows_of_the_same_noise_are_told_and_counted_once(
    command: Command,  # noqa: F811
    dipeptide: System,  # noqa: F811
    told: Mapping[str, Any],
    tmp_path: Path,
) -> None:
    first = written(plain(dipeptide, told, seed=2), tmp_path / "p")
    second = written(steered(dipeptide, told), tmp_path / "s")
    assert "p, s were drawn from the same noise" in command("combine", first, second, "--out", tmp_path / "all").out
    copy = written(read_ensemble(second), tmp_path / "copy")
    assert "give each once" in command("combine", second, copy, "--out", tmp_path / "b").error


def test_a_potential_of_a_file_is_evaluated_again_and_a_changed_one_is_refused(
    command: Command,  # noqa: F811
    dipeptide: System,  # noqa: F811
    told: Mapping[str, Any],
    tmp_path: Path,
) -> None:
    text = "def bias(geometry, context):\n    x = geometry.positions\n"
    text += f"    return (((x[:, 0] - x[:, 20]).norm(dim=1) - {TARGET}) / {SPREAD})**2 / 2\n"
    file = tmp_path / "mine.py"
    file.write_text(text)
    first = written(steered(dipeptide, told, 2, f"{file}:bias"), tmp_path / "s")
    second = written(plain(dipeptide, told), tmp_path / "p")
    words = ("combine", first, second, "--out")
    assert command(*words, tmp_path / "a").code == 0
    assert (
        command("combine", written(steered(dipeptide, told), tmp_path / "t"), second, "--out", tmp_path / "b").code == 0
    )
    same = [read_ensemble(tmp_path / name).log_weights for name in "ab"]
    np.testing.assert_allclose(same[0], same[1], atol=1e-3)
    file.write_text(text.replace("/ 2\n", "/ 3\n"))
    error = command(*words, tmp_path / "c").error
    assert str(first) in error and "was changed since" in error
    file.unlink()
    error = command(*words, tmp_path / "c").error
    assert str(first) in error and "no file" in error
    assert not (tmp_path / "c" / "ensemble.npz").exists()


@pytest.mark.parametrize(
    ("told_otherwise", "said"),
    [
        ({"checkpoint": "another"}, "has another checkpoint"),
        ({"guide": {"property": PHI}}, "has another guide"),
        ({"conditions": {"gap": 1.0}, "guidance": 2.0}, "has another conditions"),
        ({"windows": []}, "is not as `dig-scale sample` wrote it"),
        ({"validity": {}}, "chosen by --valid"),
    ],
)
def test_ensembles_that_do_not_belong_together_are_refused(
    command: Command,  # noqa: F811
    dipeptide: System,  # noqa: F811
    told: Mapping[str, Any],
    tmp_path: Path,
    told_otherwise: dict[str, Any],
    said: str,
) -> None:
    first = written(plain(dipeptide, told), tmp_path / "p")
    other = written(steered(dipeptide, {**told, **told_otherwise}), tmp_path / "other")
    error = command("combine", first, other, "--out", tmp_path / "all").error
    assert said in error and str(other) in error
    assert not (tmp_path / "all").exists()


def test_other_weights_other_systems_and_other_folders_are_refused(
    command: Command,  # noqa: F811
    dipeptide: System,  # noqa: F811
    told: Mapping[str, Any],
    tmp_path: Path,
) -> None:
    first = written(plain(dipeptide, told), tmp_path / "p")
    weighted = written(replace(plain(dipeptide, told, 3), log_weights=np.zeros(40)), tmp_path / "weighted")
    assert "towards: boltzmann" in command("combine", first, weighted, "--out", tmp_path / "all").error
    system = system_from_sequence("other", "ACE-GLY-NME")
    other = written(plain(system, told, 3), tmp_path / "other")
    assert "is of another system ('other')" in command("combine", first, other, "--out", tmp_path / "all").error
    assert "give another --out" in command("combine", first, "--out", first).error
    second = written(plain(dipeptide, told, 4), tmp_path / "q")
    assert command("combine", first, "--out", tmp_path / "all").code == 0
    assert "give another --out" in command("combine", first, second, "--out", tmp_path / "all").error
