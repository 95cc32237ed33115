"""What a training run says about itself: one JSON row and one dense line every few steps, and TensorBoard events.

In: per-step numbers of this rank. Out: rows of `metrics.jsonl`, which a launcher may follow and which survive resuming
without duplicates (rows past the resumed step are cut), TensorBoard events, and lines on stdout. Rank 0 writes.

FLOP of one training sample of N sites (forward 1, backward 2, so x 3): 6 P N for the P parameters that multiply every
site's token (embeddings, tables and what acts once per sample are not among them), plus 12 L N² D for the attention scores
and mixtures of L layers of width D. Pair channels and geometric filters are left out, so the figure is a lower bound. MFU
is FLOP/s over the peak of the devices.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

LEVELS = 8
"""Bins of diffusion time t in [0, 1] that losses are reported in."""
METRICS_FILE = "metrics.jsonl"

_PEAK_TFLOPS = {
    "B200": {"bf16": 2250.0, "fp32": 75.0},
    "H200": {"bf16": 989.0, "fp32": 67.0},
    "H100": {"bf16": 989.0, "fp32": 67.0},
    "A100": {"bf16": 312.0, "fp32": 19.5},
    "L40S": {"bf16": 362.0, "fp32": 91.6},
    "L4": {"bf16": 121.0, "fp32": 30.3},
    "A10": {"bf16": 125.0, "fp32": 31.2},
}
"""Dense peaks of vendors' data sheets, by a word of the device's name; longer words first where one holds another."""
_PROBE = 768


@dataclass(frozen=True)
class Throughput:
    """What is needed to turn samples into FLOP/s: site parameters, layers and width of the model, and the peak of all ranks."""

    parameters: int
    layers: int
    width: int
    peak_flops: float

    def flops_of(self, n_sites: int) -> float:
        """FLOP of one training sample of n_sites sites; the formula is in the module's header."""
        return 6.0 * self.parameters * n_sites + 12.0 * self.layers * n_sites**2 * self.width


def peak_flops(device: torch.device, precision: str) -> float:
    """Peak FLOP/s of one rank: from a table for known GPUs, else from matrix products timed here (fp32)."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for word, peaks in _PEAK_TFLOPS.items():
            if word in name:
                return peaks[precision] * 1e12
    a, b = torch.randn(_PROBE, _PROBE, device=device), torch.randn(_PROBE, _PROBE, device=device)
    return 2 * _PROBE**3 / min(_seconds_of_product(a, b) for _ in range(5))


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(frozen=True)
class LevelLoss:
    """Sums [LEVELS] of losses and of samples by noise level, on the device until they are asked for."""

    total: Tensor
    count: Tensor

    @classmethod
    def zeros(cls, device: torch.device) -> LevelLoss:
        """Nothing seen yet."""
        return cls(torch.zeros(LEVELS, device=device), torch.zeros(LEVELS, device=device))

    def plus(self, losses: Tensor, t: Tensor) -> LevelLoss:
        """With the losses [B] of samples at t [B] added."""
        level = (t * LEVELS).long().clamp(0, LEVELS - 1)
        total = self.total.index_add(0, level, losses.detach().float())
        return LevelLoss(total, self.count.index_add(0, level, torch.ones_like(t)))


def level_means(total: np.ndarray, count: np.ndarray) -> list[float | None]:
    """Mean loss by level, None where no sample fell."""
    return [float(s / n) if n else None for s, n in zip(total, count, strict=True)]


@dataclass
class Window:
    """The steps since the last row, of this rank."""

    levels: LevelLoss
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    physics_losses: list[float] = field(default_factory=list)
    """Of candidates, one per evaluation, without their weight; empty in runs without an energy."""
    posterior_losses: list[float] = field(default_factory=list)
    """Of pairs of `dig-scale posterior`, likewise."""
    flops: float = 0.0
    samples: int = 0
    gradient_norm: float = 0.0
    frames_crc32: int = 0
    """CRC-32 of this rank's frame ids (int64) in order: tells whether two runs saw the same data."""

    def vector(self, cpu_seconds: float, stop: float) -> np.ndarray:
        """Sums to be added over the ranks: loss, steps, wait, time, flops, samples, CPU seconds, stop votes, physics
        loss and its evaluations, the same of pairs, level sums."""
        head = [sum(self.losses), len(self.losses), sum(self.waits), sum(self.seconds), self.flops, self.samples]
        levels = [self.levels.total.cpu().numpy(), self.levels.count.cpu().numpy()]
        others = [
            part for losses in (self.physics_losses, self.posterior_losses) for part in (sum(losses), len(losses))
        ]
        return np.concatenate([[*head, cpu_seconds, stop, *others], *levels])


@dataclass(frozen=True)
class WindowSum:
    """Window.vector, added over all ranks."""

    loss: float
    data_wait_share: float
    flops: float
    samples: float
    cpu_seconds: float
    stop: bool
    physics_loss: float
    posterior_loss: float
    loss_by_level: list[float | None]

    @classmethod
    def of(cls, vector: np.ndarray) -> WindowSum:
        """Unpack the sum of the ranks' vectors."""
        loss, steps, wait, seconds, flops, samples, cpu, stop, *others = vector[: -2 * LEVELS].tolist()
        by_level = level_means(vector[-2 * LEVELS : -LEVELS], vector[-LEVELS:])
        physics, posterior = (total / max(count, 1) for total, count in zip(others[::2], others[1::2], strict=True))
        wait_share = wait / max(seconds, 1e-9)
        return cls(loss / steps, wait_share, flops, samples, cpu, stop > 0, physics, posterior, by_level)


def train_row(window: Window, total: WindowSum, throughput: Throughput, **known: Any) -> dict[str, Any]:
    """The row of the steps since the last one; `known` holds what the trainer knows (step, learning rate, memory)."""
    seconds = max(sum(window.seconds), 1e-9)
    p50, p99 = np.percentile(window.seconds, [50, 99]) * 1e3
    return {
        "kind": "train",
        **known,
        "loss": total.loss,
        **({"physics_loss": total.physics_loss} if window.physics_losses else {}),
        **({"posterior_loss": total.posterior_loss} if window.posterior_losses else {}),
        "loss_by_level": total.loss_by_level,
        "gradient_norm": window.gradient_norm,
        "frames_crc32": window.frames_crc32,
        "samples_per_s": total.samples / seconds,
        "step_ms_mean": 1e3 * seconds / max(len(window.seconds), 1),
        "step_ms_p50": float(p50),
        "step_ms_p99": float(p99),
        "data_wait_share": total.data_wait_share,
        "tflops": total.flops / seconds / 1e12,
        "mfu": total.flops / seconds / throughput.peak_flops,
        "cpu_seconds": total.cpu_seconds,
    }


class MetricsWriter:
    """Appends rows to a run's metrics.jsonl, TensorBoard folder and stdout; opening it cuts rows past `resumed_step`."""

    def __init__(self, folder: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / METRICS_FILE
        _cut_rows(self.path, resumed_step)
        self._stream = self.path.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row ("kind" and "step" are required), flushed."""
        self._stream.write(json.dumps({**row, "time": time.time()}) + "\n")
        self._stream.flush()
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                self._board.add_scalar(f"{row['kind']}/{name}", value, row["step"])
        print(dense_line(row), flush=True)

    def close(self) -> None:
        """Flush and close all files."""
        self._stream.close()
        self._board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All complete rows of a run, oldest first; an unfinished last line is left out."""
    path = folder / METRICS_FILE
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def dense_line(row: Mapping[str, Any]) -> str:
    """One line for a person: kind, step and every number, four digits each."""
    parts = [f"{name} {_short(value)}" for name, value in row.items() if name not in ("kind", "step", "steps")]
    of = f"/{row['steps']}" if "steps" in row else ""
    return f"{row['kind']} {row['step']}{of} | " + " | ".join(parts)


def _short(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(_short(item) for item in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def _cut_rows(path: Path, last_step: int) -> None:
    kept = [row for row in read_metrics(path.parent) if row["step"] <= last_step]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
    temporary.replace(path)


def _seconds_of_product(a: Tensor, b: Tensor) -> float:
    start = time.perf_counter()
    product = a @ b
    if product.is_cuda:
        torch.cuda.synchronize(product.device)
    return time.perf_counter() - start
