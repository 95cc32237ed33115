"""What the ranks of a test group are asked to do. Every job gets its Ranks first and answers with JSON-ready values."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dig_scale.config import Train
from dig_scale.recipe_files import parse_recipe
from dig_scale.training import zero
from dig_scale.training.ema import Fragment, averaged_copy, load_fragments_, move_average_, save_fragments
from dig_scale.training.metrics import read_metrics
from dig_scale.training.trainer import recompute_blocks_, train

WIDTH = 17
"""Odd, so that no parameter divides evenly over two ranks."""


class Regression(nn.Module):
    """Rows x -> squared error against sin(x): two blocks, matrices and vectors, so both parameter groups are there."""

    def __init__(self, precision: str = "fp32") -> None:
        super().__init__()
        self.precision = precision
        make = lambda: nn.Sequential(nn.Linear(WIDTH, 31), nn.Tanh(), nn.Linear(31, WIDTH))  # noqa: E731
        self.blocks = nn.ModuleList([make(), make()])
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Losses [B]."""
        hidden = x
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
            for block in self.blocks:
                hidden = hidden + block(hidden)
        return ((self.norm(hidden) - torch.sin(3 * x)) ** 2).mean(-1)


def train_job(ranks: zero.Ranks, recipe: dict[str, Any], dataset: str, out: str) -> None:
    """The real entry of training."""
    train(parse_recipe(recipe, "test"), Path(dataset), Path(out))


def warned_train_job(ranks: zero.Ranks, recipe: dict[str, Any], dataset: str, out: str) -> None:
    """Training in which rank 1 alone gets SIGUSR1 once the first rows are written."""
    if ranks.rank == 1:
        threading.Thread(target=_warn_after_first_row, args=(Path(out),), daemon=True).start()
    train_job(ranks, recipe, dataset, out)


def _warn_after_first_row(out: Path) -> None:
    while not read_metrics(out):
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGUSR1)


def engine_job(ranks: zero.Ranks, stage: int, steps: int) -> dict[str, Any]:
    """Train Regression; what its weights, average, fragments and replaced weights turn out to be."""
    engine, start = _engine(ranks, stage, accumulation=1)
    before = zero.gather(engine, zero.local_fragments(engine))
    live = zero.local_fragments(engine)
    average = averaged_copy(live)
    losses, norms = [], []
    for step in range(steps):
        loss, norm = _step(engine, ranks, step)
        losses.append(loss)
        norms.append(norm)
        move_average_(average, live, 0.9)
    whole = zero.gather(engine, zero.local_fragments(engine))
    rows = _rows(99)[:4]
    plain = float(engine(rows).sum())
    with zero.weights_replaced(engine, average):
        replaced = float(engine(rows).sum())
    return {
        "losses": losses,
        "norms": norms,
        "start_equals_module": all(torch.equal(before[name], start[name]) for name in start),
        "start": _checksum(before),
        "weights": _checksum(whole),
        "average": _checksum(zero.gather(engine, average)),
        "cached_views_are_live": all(torch.equal(a.values, b.values) for a, b in _pairs(live, engine)),
        "agrees_with_deepspeed": _agrees_with_deepspeed(engine, whole),
        "covered": _covered(live),
        "numel": sum(values.numel() for values in whole.values()),
        "replaced_differs": plain != replaced,
        "restored": plain == float(engine(rows).sum()),
    }


def resume_job(ranks: zero.Ranks, stage: int, folder: str) -> dict[str, Any]:
    """Save after 2 and after 4 steps, go on to 6; then resume both in fresh engines and go on again."""
    engine, _ = _engine(ranks, stage, accumulation=1)
    live = zero.local_fragments(engine)
    average = averaged_copy(live)
    expected = []
    for step in range(6):
        if step in (2, 4):
            _save(engine, average, Path(folder) / f"step-{step}", ranks)
        expected.append(_step(engine, ranks, step)[0])
        move_average_(average, live, 0.9)
    answers: dict[str, Any] = {"expected": expected}
    for saved in (2, 4):
        again, _ = _engine(ranks, stage, accumulation=1)
        zero.load_state_(again, Path(folder) / f"step-{saved}")
        resumed_average = averaged_copy(zero.local_fragments(again))
        load_fragments_(_ema_file(Path(folder) / f"step-{saved}", ranks), resumed_average)
        groups = [group["weight_decay"] for group in again.engine.optimizer.param_groups]
        losses = []
        for step in range(saved, 6):
            losses.append(_step(again, ranks, step)[0])
            move_average_(resumed_average, zero.local_fragments(again), 0.9)
        answers[str(saved)] = {
            "losses": losses,
            "weight_decay": groups,
            "step_counters": _step_counters(again),
            "average_equal": all(
                torch.equal(a.values, b.values) for a, b in zip(average, resumed_average, strict=True)
            ),
        }
    return answers


def accumulation_job(ranks: zero.Ranks, stage: int, precision: str) -> dict[str, Any]:
    """Two micro-batches per step with recomputed blocks, optionally in bf16."""
    engine, _ = _engine(ranks, stage, accumulation=2, recomputed_in=precision)
    losses = []
    for step in range(4):
        losses.append(_step(engine, ranks, step, accumulation=2)[0])
    return {"losses": losses}


def _engine(
    ranks: zero.Ranks, stage: int, accumulation: int, recomputed_in: str | None = None
) -> tuple[zero.ZeroEngine, dict[str, Tensor]]:
    torch.manual_seed(5)
    module = Regression(recomputed_in or "fp32")
    if recomputed_in:
        recompute_blocks_(module.blocks)
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    micro = 16 // ranks.world_size // accumulation
    settings = Train(global_batch=16, micro_batch=micro, zero_stage=stage, weight_decay=0.05, gradient_clip=0.5)
    return zero.start_engine(module, settings, ranks), start


def _rows(step: int) -> Tensor:
    return torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(1000 + step))


def _step(engine: zero.ZeroEngine, ranks: zero.Ranks, step: int, accumulation: int = 1) -> tuple[float, float]:
    """One step; its loss over all ranks and its gradient norm."""
    mine = _rows(step).chunk(ranks.world_size)[ranks.rank].chunk(accumulation)
    total = torch.zeros(())
    for number, rows in enumerate(mine):
        loss = engine(rows).mean()
        (zero.backward_last_ if number + 1 == accumulation else zero.accumulate_)(engine, loss)
        total += loss.detach() / accumulation / ranks.world_size
    norm = zero.apply_update_(engine, 1e-2)
    dist.all_reduce(total)
    return float(total), norm


def _checksum(tensors: dict[str, Tensor]) -> list[float]:
    ramps = [torch.arange(1, values.numel() + 1).view(values.shape) for values in tensors.values()]
    return [float((values.double() * ramp).sum()) for values, ramp in zip(tensors.values(), ramps, strict=True)]


def _pairs(live: tuple[Fragment, ...], engine: zero.ZeroEngine) -> list[tuple[Fragment, Fragment]]:
    return list(zip(live, zero.local_fragments(engine), strict=True))


def _agrees_with_deepspeed(engine: zero.ZeroEngine, whole: dict[str, Tensor]) -> bool:
    from deepspeed.utils import safe_get_full_fp32_param

    if engine.stage == 0:
        return all(torch.equal(p, whole[name]) for name, p in engine.module.named_parameters())
    return all(
        torch.equal(safe_get_full_fp32_param(p).reshape(whole[name].shape), whole[name])
        for name, p in engine.module.named_parameters()
    )


def _covered(fragments: tuple[Fragment, ...]) -> list[tuple[str, int, int]]:
    return [(f.name, f.start, f.start + f.values.numel()) for f in fragments]


def _save(engine: zero.ZeroEngine, average: tuple[Fragment, ...], folder: Path, ranks: zero.Ranks) -> None:
    if ranks.is_first:
        folder.mkdir(parents=True)
    dist.barrier()
    zero.save_state(engine, folder)
    save_fragments(_ema_file(folder, ranks), average)
    dist.barrier()
    (folder.parent / "latest").write_text("step-4")


def _ema_file(folder: Path, ranks: zero.Ranks) -> Path:
    return folder / f"ema-{ranks.rank}.safetensors"


def _step_counters(engine: zero.ZeroEngine) -> list[float]:
    inner = getattr(engine.engine.optimizer, "optimizer", engine.engine.optimizer)
    return sorted({float(state["step"]) for state in inner.state.values()})


def linear_job(ranks: zero.Ranks) -> str:
    """The module that torch.nn.functional.linear comes from."""
    return str(torch.nn.functional.linear.__module__)
