"""Step 11 of the walk: from a trained model to an ensemble on disk, continued, killed and refused."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import mdtraj
import numpy as np
import psutil
import pytest

from dig_scale.config import Model, Recipe, Sample
from dig_scale.ensemble import read_ensemble
from dig_scale.errors import UserError
from dig_scale.model.checkpoint import Checkpoint, save_checkpoint
from dig_scale.serving.offline import Draws, sample_ensemble
from tests.molecules import alanine_dipeptide_heavy
from tests.truth.test_score_model import lively_model

SYSTEM = alanine_dipeptide_heavy()
TINY = Model(layers=1, width=16, heads=2, feed_forward=16, radial_kernels=16, vector_channels=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    weights = lively_model(TINY).state_dict()
    averaged = {name: tensor.clone() for name, tensor in weights.items()}
    content = Checkpoint(weights, averaged, Recipe(name="random", model=TINY), (SYSTEM,), 0, {})
    return save_checkpoint(tmp_path_factory.mktemp("model") / "model.safetensors", content)


def draws(checkpoint: Path, out: Path, **settings: object) -> Draws:
    return Draws(checkpoint, SYSTEM, Sample.model_validate({"steps": 6, "batch": 16, "workers": 1} | settings), out)


@pytest.fixture(scope="module")
def hundred(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hundred")
    sample_ensemble(draws(checkpoint, out, num=100))
    return out


def test_files_hold_the_samples_and_who_made_them(hundred: Path) -> None:
    ensemble = read_ensemble(hundred)
    assert ensemble.index.tolist() == list(range(100))
    assert ensemble.provenance["network_evaluations_per_sample"] == 6
    assert ensemble.provenance["cpu_seconds"] > 0
    topology = mdtraj.load_pdb(hundred / "topology.pdb", standard_names=False).topology
    trajectory = mdtraj.load(hundred / "samples.xtc", top=topology)
    assert np.abs(10 * trajectory.xyz - ensemble.positions).max() < 0.006  # Å: XTC keeps 1e-3 nm
    assert [atom.name for atom in trajectory.topology.atoms] == list(SYSTEM.atom_names)
    assert not (hundred / "parts").exists() or not any((hundred / "parts").iterdir())


def test_more_samples_are_added_to_what_is_there(checkpoint: Path, hundred: Path, tmp_path: Path) -> None:
    sample_ensemble(draws(checkpoint, tmp_path, num=30, batch=7))
    grown = sample_ensemble(draws(checkpoint, tmp_path, num=100, workers=2))
    assert grown.index.tolist() == list(range(100))
    assert np.abs(grown.positions - read_ensemble(hundred).positions).max() < 1e-3


def test_rerun_with_nothing_to_do_draws_nothing(checkpoint: Path, hundred: Path) -> None:
    before = (hundred / "ensemble.npz").stat().st_mtime_ns
    sample_ensemble(draws(checkpoint, hundred, num=100))
    assert (hundred / "ensemble.npz").stat().st_mtime_ns == before


@pytest.mark.parametrize("change", [{"seed": 2}, {"steps": 7}, {"solver": "ancestral"}])
def test_samples_of_another_run_are_not_mixed_in(checkpoint: Path, hundred: Path, change: dict[str, object]) -> None:
    with pytest.raises(UserError, match="another --out"):
        sample_ensemble(draws(checkpoint, hundred, num=100, **change))


def test_fewer_samples_than_there_are_is_refused(checkpoint: Path, hundred: Path) -> None:
    with pytest.raises(UserError, match="holds 100 samples"):
        sample_ensemble(draws(checkpoint, hundred, num=50))


def test_a_killed_run_carries_on(checkpoint: Path, hundred: Path, tmp_path: Path) -> None:
    words = ["sample", str(checkpoint), "--num", "100", "--steps", "6", "--batch", "4", "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dig_scale.cli", *words, "--out", str(tmp_path)], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("parts/*.npz")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert workers
    assert not alive, "sampling workers outlive a killed command"
    ensemble = sample_ensemble(draws(checkpoint, tmp_path, num=100, batch=4))
    assert np.abs(ensemble.positions - read_ensemble(hundred).positions).max() < 1e-3


def test_a_mirrored_system_is_another_system(checkpoint: Path, hundred: Path) -> None:
    mirrored = replace(SYSTEM, reference_positions=SYSTEM.reference_positions * [1, 1, -1])
    with pytest.raises(UserError, match="system_id"):
        sample_ensemble(replace(draws(checkpoint, hundred, num=100), system=mirrored))
