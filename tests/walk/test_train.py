# ruff: noqa: F401, F811 (fixtures are imported, then named as arguments)
"""From a packed dataset to a trained model: the real loop on real shards, killed, resumed and split in every way."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dig_shards import Cursor, ShardReader, batch_ids

from dig_scale.config import Diffusion, Recipe
from dig_scale.errors import TrainingError
from dig_scale.model.checkpoint import build_score_model, load_checkpoint
from dig_scale.training.launch import TrainingProgress, launch_ranks
from dig_scale.training.metrics import read_metrics
from tests.dig_scale.training.rank_groups import RankGroup, dataset, pair, single
from tests.dig_scale.training.small_runs import make_dataset, small_recipe
from tests.molecules import alanine_dipeptide_heavy, five_beads

Train = Callable[..., Path]
LONG = {"steps": 32, "checkpoint_every": 8, "validate_every": 16}
SHORT = {"steps": 6, "checkpoint_every": 3, "validate_every": 6}


def rows_of(out: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_metrics(out) if row["kind"] == kind]


def losses_of(out: Path, kind: str = "train") -> list[float]:
    return [row["loss"] for row in rows_of(out, kind)]


def train_in(group: RankGroup, recipe: Recipe, data: Path, out: Path) -> Path:
    group.run("train_job", recipe=recipe.model_dump(mode="json"), dataset=str(data), out=str(out))
    return out


@pytest.fixture(scope="module")
def uninterrupted(pair: RankGroup, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_in(pair, small_recipe(**LONG), dataset, tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def short(pair: RankGroup, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_in(pair, small_recipe(**SHORT), dataset, tmp_path_factory.mktemp("short") / "run")


@pytest.fixture(scope="module")
def killed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which one rank was killed by SIGKILL after its first checkpoint."""
    out = tmp_path_factory.mktemp("killed") / "run"
    killer = threading.Thread(target=_kill_rank_after, args=(out, 10))
    killer.start()
    with pytest.raises(TrainingError, match=r"rank \d of 2 failed .*log: .*rank-\d\.log"):
        launch_ranks(small_recipe(**LONG), dataset, out, 2)
    killer.join()
    return out


def _kill_rank_after(out: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if any(row["step"] >= step for row in read_metrics(out)):
            break
        time.sleep(0.005)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
            is_rank_1 = b"\0RANK=1\0" in b"\0" + (process / "environ").read_bytes()
        except OSError:
            continue
        if str(out).encode() in command and is_rank_1:
            os.kill(int(process.name), signal.SIGKILL)


@pytest.fixture(scope="module")
def progress() -> list[TrainingProgress]:
    return []


@pytest.fixture(scope="module")
def resumed(killed: Path, dataset: Path, progress: list[TrainingProgress]) -> Path:
    assert 10 <= max(row["step"] for row in rows_of(killed, "train")) < 32
    launch_ranks(small_recipe(**LONG), dataset, killed, 2, progress.append)
    return killed


def test_resume_after_sigkill_gives_the_same_losses_to_the_last_bit(uninterrupted: Path, resumed: Path) -> None:
    assert losses_of(resumed) == losses_of(uninterrupted)
    assert losses_of(resumed, "validation") == losses_of(uninterrupted, "validation")
    whole, again = load_checkpoint(uninterrupted), load_checkpoint(resumed)
    assert all(torch.equal(whole.weights[name], again.weights[name]) for name in whole.weights)
    assert all(torch.equal(whole.ema[name], again.ema[name]) for name in whole.ema)


def test_resume_repeats_no_record_and_loses_none(dataset: Path, resumed: Path) -> None:
    n = ShardReader(dataset, "train").n_frames
    cursor, seen, expected = Cursor(1), [], []
    for _ in range(32):
        ids, _ = batch_ids(cursor, n, 16, 0, 2)
        expected.append(zlib.crc32(ids.tobytes()))
        whole, cursor = batch_ids(cursor, n, 16)
        seen.append(whole)
    assert [row["frames_crc32"] for row in rows_of(resumed, "train")] == expected
    epoch = np.concatenate(seen)[:n]
    assert sorted(epoch.tolist()) == list(range(n))


def test_metrics_hold_every_step_once_after_a_resume(resumed: Path) -> None:
    assert [row["step"] for row in rows_of(resumed, "train")] == list(range(1, 33))


def test_warning_signal_leaves_a_checkpoint_that_carries_on(
    pair: RankGroup,
    dataset: Path,
    tmp_path: Path,
    uninterrupted: Path,
) -> None:
    arguments = {"recipe": small_recipe(**LONG).model_dump(mode="json"), "dataset": str(dataset), "out": str(tmp_path)}
    pair.run("warned_train_job", **arguments)
    stopped = rows_of(tmp_path, "checkpoint")[-1]["step"]
    assert stopped < 32
    assert stopped == rows_of(tmp_path, "train")[-1]["step"]
    train_in(pair, small_recipe(**LONG), dataset, tmp_path)
    assert losses_of(tmp_path) == losses_of(uninterrupted)


def test_training_lowers_the_loss(uninterrupted: Path) -> None:
    first, last = losses_of(uninterrupted, "validation")[0], losses_of(uninterrupted)[-5:]
    assert np.mean(last) < np.mean(losses_of(uninterrupted)[:5])
    assert math.isfinite(first)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_score_model_trains_the_same_at_every_stage(
    pair: RankGroup,
    dataset: Path,
    tmp_path: Path,
    short: Path,
    stage: int,
) -> None:
    out = train_in(pair, small_recipe(**SHORT, zero_stage=stage), dataset, tmp_path / "run")
    assert losses_of(out) == pytest.approx(losses_of(short), abs=1e-6)
    assert losses_of(out, "validation") == pytest.approx(losses_of(short, "validation"), abs=1e-6)


def test_one_rank_and_two_ranks_train_the_same(
    single: RankGroup,
    dataset: Path,
    tmp_path: Path,
    short: Path,
) -> None:
    out = train_in(single, small_recipe(**SHORT), dataset, tmp_path / "run")
    assert losses_of(out) == pytest.approx(losses_of(short), abs=1e-6)


def test_stage_0_carries_on_with_another_number_of_ranks(
    pair: RankGroup,
    single: RankGroup,
    dataset: Path,
    tmp_path: Path,
    short: Path,
) -> None:
    out = train_in(pair, small_recipe(**SHORT), dataset, tmp_path / "run")
    _rewind(out, "step-00000003")
    train_in(single, small_recipe(**SHORT), dataset, out)
    assert losses_of(out) == pytest.approx(losses_of(short), abs=1e-6)


def test_sharded_run_refuses_another_number_of_ranks(
    pair: RankGroup,
    single: RankGroup,
    dataset: Path,
    tmp_path: Path,
) -> None:
    out = train_in(pair, small_recipe(**SHORT, zero_stage=2), dataset, tmp_path / "run")
    _rewind(out, "step-00000003")
    with pytest.raises(RuntimeError, match=r"written by 2 ranks at ZeRO stage 2 .* start 2 ranks"):
        train_in(single, small_recipe(**SHORT, zero_stage=2), dataset, out)


def test_recomputed_blocks_and_accumulation_change_no_loss(
    pair: RankGroup,
    dataset: Path,
    tmp_path: Path,
    short: Path,
) -> None:
    recipe = small_recipe(**SHORT, activation_checkpointing="blocks", micro_batch=4, zero_stage=3)
    out = train_in(pair, recipe, dataset, tmp_path / "run")
    assert losses_of(out) == pytest.approx(losses_of(short), abs=1e-6)


def test_bf16_trains_close_to_fp32(pair: RankGroup, dataset: Path, tmp_path: Path, short: Path) -> None:
    out = train_in(pair, small_recipe(**SHORT, precision="bf16", zero_stage=1), dataset, tmp_path / "run")
    # bf16 keeps 8 bits: a few parts in a thousand per product.
    assert np.mean(losses_of(out)) == pytest.approx(np.mean(losses_of(short)), rel=0.05)
    assert losses_of(out) != losses_of(short)


def test_systems_of_different_sizes_train_in_batches_of_one_system(pair: RankGroup, tmp_path: Path) -> None:
    data = make_dataset(tmp_path, [alanine_dipeptide_heavy(), five_beads()], 100)
    out = train_in(pair, small_recipe(**SHORT), data, tmp_path / "run")
    assert len(load_checkpoint(out).systems) == 2
    assert all(math.isfinite(loss) for loss in losses_of(out) + losses_of(out, "validation"))


def test_consolidated_model_is_complete_and_loads(uninterrupted: Path) -> None:
    found = load_checkpoint(uninterrupted)
    assert found.step == 32
    assert found.recipe == small_recipe(**LONG)
    assert [system.name for system in found.systems] == ["ala2-heavy"]
    assert found.training_cost["ranks"] == 2
    assert found.training_cost["cpu_seconds"] > 0
    averaged, last = build_score_model(found), build_score_model(found, "weights")
    assert not averaged.training
    assert any(not torch.equal(a, b) for a, b in zip(averaged.parameters(), last.parameters(), strict=True))


def test_only_the_newest_checkpoints_are_kept(uninterrupted: Path) -> None:
    assert sorted(path.name for path in (uninterrupted / "checkpoints").glob("step-*")) == [
        "step-00000024",
        "step-00000032",
    ]
    assert (uninterrupted / "checkpoints" / "latest").read_text() == "step-00000032"


def test_finished_run_returns_at_once(uninterrupted: Path, dataset: Path) -> None:
    before = (uninterrupted / "model.safetensors").stat().st_mtime_ns
    start = time.perf_counter()
    launch_ranks(small_recipe(**LONG), dataset, uninterrupted, 2)
    assert time.perf_counter() - start < 2
    assert (uninterrupted / "model.safetensors").stat().st_mtime_ns == before


def test_other_recipe_in_a_used_folder_is_refused(uninterrupted: Path, dataset: Path) -> None:
    with pytest.raises(TrainingError, match=r"train.learning_rate is 0.002 there, 0.1 here.*give a new folder"):
        launch_ranks(small_recipe(**LONG, learning_rate=0.1), dataset, uninterrupted, 2)


def test_loss_that_is_not_finite_stops_with_step_and_systems(pair: RankGroup, dataset: Path, tmp_path: Path) -> None:
    recipe = small_recipe(learning_rate=1e30, warmup_steps=0, checkpoint_every=1)
    with pytest.raises(
        RuntimeError, match=r"is (nan|inf) at step \d+, in a batch of ala2-heavy .*last checkpoint is good"
    ):
        train_in(pair, recipe, dataset, tmp_path / "run")


def test_launcher_passes_on_a_warning(dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    too_little = Diffusion(schedule="log-linear", noise_min=0.01, noise_max=0.5)
    launch_ranks(small_recipe(**SHORT).model_copy(update={"diffusion": too_little}), dataset, tmp_path / "run", 1)
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(said) == 1
    assert "show through the noise that samples start from" in said[0]


def test_launcher_reports_progress(resumed: Path, progress: list[TrainingProgress]) -> None:
    assert progress[-1].step == progress[-1].steps == 32
    assert progress[-1].seconds_left == 0
    assert math.isfinite(progress[0].loss)


def _rewind(out: Path, name: str) -> None:
    """As if the run had stopped at an earlier checkpoint."""
    (out / "checkpoints" / "latest").write_text(name)
