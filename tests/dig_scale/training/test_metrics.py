"""What a run says of itself: rows survive resuming, numbers mean what they say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dig_scale.config import Train
from dig_scale.training.ema import Fragment, averaged_copy, decay_at, move_average_
from dig_scale.training.launch import rank_count
from dig_scale.training.metrics import (
    LEVELS,
    LevelLoss,
    MetricsWriter,
    Throughput,
    Window,
    WindowSum,
    level_means,
    peak_flops,
    read_metrics,
    train_row,
)
from dig_scale.training.trainer import learning_rate_at


def test_reopening_cuts_rows_past_the_resumed_step(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0)
    for step in range(1, 6):
        writer.write({"kind": "train", "step": step, "loss": 0.5})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "train", "step": 6, "lo')  # a write that a kill cut short
    writer = MetricsWriter(tmp_path, 3)
    writer.write({"kind": "train", "step": 4, "loss": 0.25})
    writer.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 0.5), (2, 0.5), (3, 0.5), (4, 0.25)]


def test_losses_keep_every_digit(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0)
    writer.write({"kind": "train", "step": 1, "loss": 1 / 3})
    writer.close()
    assert read_metrics(tmp_path)[0]["loss"] == 1 / 3


def test_losses_fall_into_the_level_of_their_time() -> None:
    levels = LevelLoss.zeros(torch.device("cpu"))
    levels = levels.plus(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0.0, 0.01, 1.0]))
    means = level_means(levels.total.numpy(), levels.count.numpy())
    assert means == [2.0, *[None] * (LEVELS - 2), 5.0]


def test_row_adds_up_the_ranks() -> None:
    windows = [Window(LevelLoss.zeros(torch.device("cpu"))) for _ in range(2)]
    for window, loss in zip(windows, (1.0, 3.0), strict=True):
        window.losses, window.seconds, window.waits = [loss] * 2, [0.1, 0.3], [0.05, 0.05]
        window.samples, window.flops = 8, 4e9
        window.levels = window.levels.plus(torch.tensor([loss]), torch.tensor([0.5]))
    total = WindowSum.of(np.sum([window.vector(2.0, float(k)) for k, window in enumerate(windows)], axis=0))
    row = train_row(windows[0], total, Throughput(10, 1, 8, 1e12), step=2)
    assert row["loss"] == 2.0
    assert row["samples_per_s"] == pytest.approx(16 / 0.4)
    assert row["tflops"] == pytest.approx(8e9 / 0.4 / 1e12)
    assert row["mfu"] == pytest.approx(8e9 / 0.4 / 1e12)
    assert row["data_wait_share"] == pytest.approx(0.25)
    assert row["cpu_seconds"] == 4.0
    assert row["step_ms_p50"] == pytest.approx(200)
    assert row["step_ms_mean"] == pytest.approx(200)
    assert row["loss_by_level"][LEVELS // 2] == 2.0
    assert total.stop
    json.dumps(row)


def test_flops_count_parameters_and_attention() -> None:
    assert Throughput(1000, 2, 16, 1.0).flops_of(10) == 6 * 1000 * 10 + 12 * 2 * 10**2 * 16


def test_peak_of_a_cpu_is_measured() -> None:
    assert 1e9 < peak_flops(torch.device("cpu"), "fp32") < 1e14


def test_learning_rate_rises_then_falls_to_its_final_share() -> None:
    settings = Train(steps=100, warmup_steps=10, learning_rate=1.0, final_learning_rate_fraction=0.1)
    rates = [learning_rate_at(step, settings) for step in range(100)]
    assert rates[0] == 0.1
    assert rates[9] == 1.0
    assert np.all(np.diff(rates[10:]) < 0)
    assert rates[99] == pytest.approx(0.1)


def test_average_forgets_the_start_quickly_then_slowly() -> None:
    assert decay_at(0, 0.999) == pytest.approx(0.1)
    assert decay_at(90, 0.999) == pytest.approx(0.91)
    assert decay_at(10**6, 0.999) == 0.999


def test_average_moves_by_one_minus_decay() -> None:
    live = [Fragment("w", 0, torch.tensor([0.0, 4.0]))]
    average = averaged_copy(live)
    live[0].values.copy_(torch.tensor([1.0, 0.0]))
    move_average_(average, live, 0.75)
    assert torch.equal(average[0].values, torch.tensor([0.25, 3.0]))


def test_average_of_other_fragments_is_refused() -> None:
    live = [Fragment("w", 0, torch.zeros(2))]
    with pytest.raises(ValueError, match="split differently"):
        move_average_(averaged_copy(live), [Fragment("w", 2, torch.zeros(2))], 0.5)


def test_ranks_divide_the_global_batch() -> None:
    assert rank_count(Train(ranks=7, global_batch=64)) == 7
    for batch in (1, 7, 256):
        assert batch % rank_count(Train(global_batch=batch)) == 0
