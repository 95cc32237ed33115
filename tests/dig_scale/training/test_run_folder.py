"""A run's folder: claimed once, checkpointed atomically."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dig_shards import Cursor

from dig_scale.errors import TrainingError
from dig_scale.training import run_folder
from dig_scale.training.run_folder import Progress
from tests.dig_scale.training.small_runs import small_recipe

CONTENT = b"state" * 200_000


def write_checkpoint(out: Path, step: int) -> None:
    hidden = run_folder.begin_checkpoint(out, step)
    (hidden / "weights").write_bytes(CONTENT)
    run_folder.publish_checkpoint(out, Progress(step, Cursor(1, 0, step), 1, 0), keep=2)


def write_until_killed(out: Path, first: int) -> None:
    for step in range(first, 1_000_000):
        write_checkpoint(out, step)


def test_latest_checkpoint_is_whole_whenever_the_writer_is_killed(tmp_path: Path) -> None:
    chance, last = random.Random(3), 0
    write_checkpoint(tmp_path, 0)
    for _ in range(12):
        child = os.fork()
        if child == 0:
            try:
                write_until_killed(tmp_path, last + 1)
            finally:
                os._exit(1)
        time.sleep(chance.uniform(0.01, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        folder = run_folder.latest_checkpoint(tmp_path)
        assert folder is not None
        assert run_folder.read_progress(folder).step >= last
        assert (folder / "weights").read_bytes() == CONTENT
        last = run_folder.read_progress(folder).step
    assert last > 0


def test_an_interrupted_checkpoint_is_swept_away_by_the_next(tmp_path: Path) -> None:
    (run_folder.begin_checkpoint(tmp_path, 3) / "half").write_text("half")
    write_checkpoint(tmp_path, 4)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000004"]


def test_progress_comes_back(tmp_path: Path) -> None:
    wrote = Progress(5, Cursor(9, 2, 77), 4, 2, 12.5, 3.25)
    run_folder.begin_checkpoint(tmp_path, 5)
    assert run_folder.read_progress(run_folder.publish_checkpoint(tmp_path, wrote, keep=1)) == wrote


def test_a_latest_that_names_nothing_is_told(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1)
    (tmp_path / "checkpoints" / "latest").write_text("step-00000009")
    with pytest.raises(TrainingError, match="names step-00000009, which is not there"):
        run_folder.latest_checkpoint(tmp_path)


def test_free_settings_may_change_and_others_not(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run_folder.claim_folder(out, small_recipe(), dataset) == "new"
    assert run_folder.claim_folder(out, small_recipe(log_every=5, ranks=1, keep_checkpoints=9), dataset) == "new"
    with pytest.raises(TrainingError, match=r"train.seed is 1 there, 2 here"):
        run_folder.claim_folder(out, small_recipe(seed=2), dataset)
    with pytest.raises(TrainingError, match=r"model.width is 32 there, 64 here"):
        run_folder.claim_folder(out, small_recipe({"width": 64}), dataset)


def test_missing_dataset_is_told(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no finished dataset here"):
        run_folder.claim_folder(tmp_path / "run", small_recipe(), tmp_path)


def test_a_folder_is_trained_in_by_one_process(tmp_path: Path) -> None:
    held = run_folder.lock_folder(tmp_path)
    with pytest.raises(TrainingError, match="another process is training here"):
        run_folder.lock_folder(tmp_path)
    held.close()
    run_folder.lock_folder(tmp_path).close()


def test_launcher_needs_neither_torch_nor_deepspeed() -> None:
    code = (
        "import sys, dig_scale.training.launch; print([m for m in ('torch', 'deepspeed', 'ray') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
