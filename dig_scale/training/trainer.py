"""The training loop: `train(recipe, dataset, out)`, which needs only the rank environment.

Runs the same under torchrun, srun, Ray Train and the launcher of the command line: RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT tell each process its place. A step: rows by cursor -> noise -> denoising loss (of a predictor
-log q of the labels; and the physics-informed loss of candidate structures, where asked) -> DeepSpeed backward and update ->
moving average.
Started again in the same folder it carries on from the latest checkpoint, with the same losses and without repeating a
record; SIGUSR1 makes it write a checkpoint and end at the next row of metrics.
"""

from __future__ import annotations

import math
import os
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from dig_shards import Cursor
from dig_shards.manifest import TRAIN, VALIDATION
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from dig_scale.config import Model, Recipe, Train
from dig_scale.errors import TrainingError, UserError
from dig_scale.model.checkpoint import Checkpoint, save_checkpoint
from dig_scale.model.encoder import Encoder
from dig_scale.model.predictor import network_for
from dig_scale.predictions import Predicted
from dig_scale.training import metrics, run_folder, zero
from dig_scale.training.data import (
    MicroBatch,
    Prefetcher,
    StepInput,
    TrainingData,
    open_split,
    validation_batches,
)
from dig_scale.training.ema import Fragment, averaged_copy, decay_at, load_fragments_, move_average_, save_fragments
from dig_scale.training.labels import labelled, predicted_by
from dig_scale.training.launch import end_with_launcher, read_recipe
from dig_scale.training.objective import Objective
from dig_scale.training.physics import PhysicsData, open_candidates
from dig_scale.training.posterior import PosteriorData, open_posterior
from dig_scale.training.prior import prior_warning
from dig_scale.training.run_folder import Progress
from dig_scale.training.stopping import StopOnSignal

VALIDATION_ROWS = 2048
_PREFIX = "network."


@dataclass(frozen=True)
class Run:
    """All that does not change while training."""

    recipe: Recipe
    train: Train
    ranks: zero.Ranks
    data: TrainingData
    validation: TrainingData | None
    candidates: PhysicsData | None
    posterior: PosteriorData | None
    predicts: Predicted | None
    engine: zero.ZeroEngine
    live: tuple[Fragment, ...]
    """Views of the fp32 weights, walked once: DeepSpeed updates them in place."""
    ema: tuple[Fragment, ...]
    throughput: metrics.Throughput
    out: Path
    resumed: Progress
    started: float


def train(recipe: Recipe, dataset: Path, out: Path) -> None:
    """Train the recipe's model on a packed dataset until recipe.train.steps, leaving `out`/model.safetensors.

    Returns at once where that is done. Raises TrainingError: other settings or data in `out`, a batch that does not divide
    over the ranks, a loss that is not finite (named with its step and systems; the last checkpoint stays).
    """
    started = time.perf_counter()
    settings = _in_one_pass(required_section(recipe))
    joined_before = dist.is_initialized()
    ranks = zero.join_ranks()
    try:
        with _claimed(recipe, ranks, dataset, out) as state:
            if state == "complete":
                print(f"already complete: {out}", flush=True)
                return
            _loop(_prepare(recipe, settings, ranks, dataset, out, started))
    finally:
        if not joined_before:
            zero.leave_ranks()


@contextmanager
def _claimed(recipe: Recipe, ranks: zero.Ranks, dataset: Path, out: Path) -> Iterator[str]:
    """Hold the run's folder and learn its RunState. Rank 0 looks, all ranks learn what it found and raise what it raised."""
    found: list[str | None] = [None, None]
    lock = None
    if ranks.is_first:
        try:
            found[0] = run_folder.claim_folder(out, recipe, dataset)
            lock = run_folder.lock_folder(out)
        except TrainingError as error:
            found[1] = str(error)
    dist.broadcast_object_list(found, src=0)
    try:
        state, problem = found
        if state is None or problem is not None:
            raise TrainingError(problem or f"{out}: cannot be used")
        yield state
    finally:
        if lock is not None:
            lock.close()


def required_section(recipe: Recipe) -> Train:
    """The [train] section; raises TrainingError where the recipe has none."""
    if recipe.train is None:
        raise TrainingError(f"recipe {recipe.name!r} has no [train] section; add one to train")
    return recipe.train


def learning_rate_at(step: int, settings: Train) -> float:
    """Learning rate of step `step` (0-based): linear warm-up, then a half cosine down to the final fraction at the last."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    part = (step - settings.warmup_steps) / max(1, settings.steps - 1 - settings.warmup_steps)
    low = settings.final_learning_rate_fraction
    return settings.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, part))))


def precision_of(settings: Train, device: torch.device) -> str:
    """`fp32` or `bf16`; `auto` takes bf16 where the hardware multiplies it natively."""
    if settings.precision != "auto":
        return settings.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return "bf16" if any(getattr(torch.cpu, probe, bool)() for probe in probes) else "fp32"


def new_network(recipe: Recipe, settings: Train, predicts: Predicted | None) -> Encoder:
    """The score model or predictor with weights that depend on the seed only, its blocks recomputed in backward where asked."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = network_for(recipe.model, predicts)
    if settings.activation_checkpointing == "blocks":
        recompute_blocks_(network.trunk.blocks)
    return network


def recompute_blocks_(blocks: nn.ModuleList) -> None:
    """Wrap each block so that its activations are recomputed in backward; parameter names stay."""
    for block in blocks:
        block.forward = _Recomputed(block.forward)  # type: ignore[method-assign]


@dataclass(frozen=True)
class _Recomputed:
    forward: Any

    def __call__(self, *inputs: Any) -> Any:
        return recompute(self.forward, *inputs, use_reentrant=False)


def _prepare(recipe: Recipe, settings: Train, ranks: zero.Ranks, dataset: Path, out: Path, started: float) -> Run:
    data = open_split(dataset, TRAIN, recipe, ranks.device)
    if data is None:
        raise TrainingError(f"{dataset}: the train split has no frames; pack it again")
    warning = prior_warning(recipe, data) if ranks.is_first else None
    if warning is not None:
        print(f"warning: {warning}", flush=True)
    predicts = predicted_by(recipe, data, dataset)
    validation = open_split(dataset, VALIDATION, recipe, ranks.device)
    precision = precision_of(settings, ranks.device)
    engine = zero.start_engine(Objective(new_network(recipe, settings, predicts), precision), settings, ranks)
    resumed, ema = _resume(engine, settings, ranks, out)
    posterior = open_posterior(recipe, data, ranks)
    if posterior is not None:
        data = replace(data, first_time=posterior.share)
    return Run(
        recipe=recipe,
        train=settings,
        ranks=ranks,
        data=labelled(data, predicts),
        validation=validation and labelled(validation, predicts),
        candidates=open_candidates(recipe, dataset, ranks),
        posterior=posterior,
        predicts=predicts,
        engine=engine,
        live=zero.local_fragments(engine),
        ema=ema,
        throughput=_throughput(recipe.model, predicts, ranks, precision),
        out=out,
        resumed=resumed,
        started=started,
    )


def _resume(
    engine: zero.ZeroEngine, settings: Train, ranks: zero.Ranks, out: Path
) -> tuple[Progress, tuple[Fragment, ...]]:
    """Load the latest checkpoint if there is one."""
    ema = averaged_copy(zero.local_fragments(engine))
    folder = run_folder.latest_checkpoint(out)
    if folder is None:
        return Progress(0, Cursor(settings.seed), ranks.world_size, engine.stage), ema
    progress = run_folder.read_progress(folder)
    if engine.stage and progress.world_size != ranks.world_size:
        raise TrainingError(
            f"{folder} was written by {progress.world_size} ranks at ZeRO stage {engine.stage} and cannot be carried on "
            f"by {ranks.world_size}; start {progress.world_size} ranks (stage 0 takes any number)"
        )
    zero.load_state_(engine, folder)
    load_fragments_(_ema_file(folder, engine, ranks), ema)
    return replace(progress, world_size=ranks.world_size), ema


def _loop(run: Run) -> None:
    writer = metrics.MetricsWriter(run.out, run.resumed.step) if run.ranks.is_first else None
    reader = Prefetcher(run.data, run.train, run.ranks, run.resumed.step, run.resumed.cursor)
    asked_to_stop = StopOnSignal()
    with closing(reader), asked_to_stop:
        window = _new_window(run)
        for step in range(run.resumed.step, run.train.steps):
            start = time.perf_counter()
            item = reader.next()
            _one_step(run, step, item, window)
            window.waits.append(reader.waited)
            window.seconds.append(time.perf_counter() - start)
            done, stop = step + 1, False
            last = done == run.train.steps
            if last or done % run.train.log_every == 0:
                stop = _report(run, done, window, writer, asked_to_stop.seen)
                window = _new_window(run)
            if run.validation and (last or done % run.train.validate_every == 0):
                _validate(run, done, writer)
            if last or stop or done % run.train.checkpoint_every == 0:
                _write_checkpoint(run, done, item.next_cursor, writer)
            if stop and not last:
                print(f"stopped on request after step {done}; start again to carry on", flush=True)
                break
    if writer is not None:
        writer.close()


def _one_step(run: Run, step: int, item: StepInput, window: metrics.Window) -> None:
    """Forward, backward and update of one global batch; adds to `window`."""
    total = torch.zeros((), device=run.ranks.device)
    count = len(item.micro_batches)
    share = 1 - run.data.first_time
    for number, micro in enumerate(item.micro_batches):
        loss = share * _denoising(run, micro, window)
        if number + 1 == count:
            # `count` undoes the mean over micro-batches
            loss = loss + count * (_physics(run, step, window) + _posterior(run, step, window))
            zero.backward_last_(run.engine, loss)
        else:
            zero.accumulate_(run.engine, loss)
        total += loss.detach() / count
    value = float(total)
    _require_finite(value, "loss", step, item)
    window.losses.append(value)
    window.frames_crc32 = zlib.crc32(item.frame_ids.tobytes(), window.frames_crc32)
    window.gradient_norm = zero.apply_update_(run.engine, learning_rate_at(step, run.train))
    _require_finite(window.gradient_norm, "gradient norm", step, item)
    move_average_(run.ema, run.live, decay_at(step, run.train.ema_decay))


def _denoising(run: Run, micro: MicroBatch, window: metrics.Window) -> Tensor:
    """Weighted denoising loss, or regression loss, of a micro-batch; where its weight is 0 the network is not asked."""
    weight = _denoising_weight(run.train)
    if weight == 0:
        return torch.zeros((), device=run.ranks.device)
    placed = micro.trimmed().to(run.ranks.device)
    losses = run.engine(placed)
    window.levels = window.levels.plus(losses, placed.t)
    window.samples += len(losses)
    window.flops += run.throughput.flops_of(placed.batch.context.n_sites) * len(losses)
    return weight * losses.mean()


def _physics(run: Run, step: int, window: metrics.Window) -> Tensor:
    """Weighted loss of the step's candidates; 0 in steps that have none."""
    if run.candidates is None or step % run.candidates.settings.every:
        return torch.zeros((), device=run.ranks.device)
    losses = run.engine(run.candidates.batch(step, run.ranks))
    window.physics_losses.append(float(losses.detach().mean()))
    window.samples += 0 if _denoising_weight(run.train) else len(losses)
    return run.candidates.settings.weight * losses.mean()


def _posterior(run: Run, step: int, window: metrics.Window) -> Tensor:
    """Weighted loss of the step's pairs of noised and mean clean structures, which stand for denoising at low noise."""
    if run.posterior is None:
        return torch.zeros((), device=run.ranks.device)
    losses = run.engine(run.posterior.batch(step, run.ranks))
    window.posterior_losses.append(float(losses.detach().mean()))
    window.samples += len(losses)
    return run.posterior.share * losses.mean()


def _denoising_weight(settings: Train) -> float:
    return settings.physics_informed.denoising_weight if settings.physics_informed else 1.0


def _in_one_pass(settings: Train) -> Train:
    """Where candidates are all there is, nothing accumulates."""
    return settings if _denoising_weight(settings) else settings.model_copy(update={"micro_batch": None})


def _require_finite(value: float, what: str, step: int, item: StepInput) -> None:
    if math.isfinite(value):
        return
    systems = sorted({name for micro in item.micro_batches for name in micro.batch.systems})
    raise TrainingError(
        f"{what} is {value} at step {step + 1}, in a batch of {', '.join(systems)} (frames {item.frame_ids[:4].tolist()}, "
        "...); the last checkpoint is good: lower train.learning_rate or check these frames, then start again"
    )


def _report(run: Run, done: int, window: metrics.Window, writer: metrics.MetricsWriter | None, stop: bool) -> bool:
    """Add the window over the ranks, write its row; whether any rank was asked to stop."""
    vector = torch.as_tensor(window.vector(time.process_time(), float(stop)), device=run.ranks.device)
    dist.all_reduce(vector)
    total = metrics.WindowSum.of(vector.cpu().numpy())
    if writer is not None:
        row = metrics.train_row(
            window,
            replace(total, cpu_seconds=total.cpu_seconds + run.resumed.cpu_seconds),
            run.throughput,
            step=done,
            steps=run.train.steps,
            learning_rate=learning_rate_at(done - 1, run.train),
            memory_gib=metrics.memory_bytes(run.ranks.device) / 2**30,
        )
        seconds_left = (run.train.steps - done) * sum(window.seconds) / len(window.seconds)
        writer.write({**row, "seconds_left": seconds_left})
    return total.stop


@torch.no_grad()
def _validate(run: Run, done: int, writer: metrics.MetricsWriter | None) -> None:
    """Loss by noise level of the averaged weights on the validation split."""
    assert run.validation is not None
    start = time.perf_counter()
    levels = metrics.LevelLoss.zeros(run.ranks.device)
    run.engine.module.eval()
    with zero.weights_replaced(run.engine, run.ema):
        for part in validation_batches(run.validation, run.train, run.ranks, VALIDATION_ROWS):
            micro = part.micro.trimmed().to(run.ranks.device)
            losses = run.engine(micro)
            levels = levels.plus(losses, micro.t) if part.weight else levels
        table_error = cast(Encoder, run.engine.module.network).pair_bias.review_table()
    run.engine.module.train()
    sums = torch.stack([levels.total, levels.count])
    dist.all_reduce(sums)
    if writer is not None:
        total, count = sums.cpu().numpy()
        row = {"loss": float(total.sum() / count.sum()), "loss_by_level": metrics.level_means(total, count)}
        row["radial_table_error"] = table_error
        writer.write({"kind": "validation", "step": done, **row, "seconds": time.perf_counter() - start})


def _write_checkpoint(run: Run, done: int, cursor: Cursor, writer: metrics.MetricsWriter | None) -> None:
    """Write state and consolidated model; a kill at any moment leaves the previous checkpoint whole."""
    start = time.perf_counter()
    progress = _progress(run, done, cursor)
    hidden = run_folder.hidden_folder(run.out, done)
    if run.ranks.is_first:
        run_folder.begin_checkpoint(run.out, done)
    dist.barrier()
    zero.save_state(run.engine, hidden)
    if run.ranks.is_first or run.engine.stage:
        save_fragments(_ema_file(hidden, run.engine, run.ranks), run.ema)
    weights = _whole_weights(run, run.live)
    averaged = _whole_weights(run, run.ema)
    dist.barrier()
    if run.ranks.is_first:
        cost: dict[str, Any] = {
            "cpu_seconds": progress.cpu_seconds,
            "wall_seconds": progress.wall_seconds,
            "steps": done,
        }
        cost |= {"ranks": run.ranks.world_size, "device": _device_name(run.ranks.device)}
        model = Checkpoint(weights, averaged, run.recipe, run.data.systems, done, cost, run.data.frames, run.predicts)
        save_checkpoint(run_folder.model_file(run.out), model)
        run_folder.publish_checkpoint(run.out, progress, run.train.keep_checkpoints)
    if writer is not None:
        writer.write({"kind": "checkpoint", "step": done, "seconds": time.perf_counter() - start})


def _progress(run: Run, done: int, cursor: Cursor) -> Progress:
    cpu = torch.tensor(time.process_time(), device=run.ranks.device, dtype=torch.float64)
    dist.all_reduce(cpu)
    return replace(
        run.resumed,
        step=done,
        cursor=cursor,
        cpu_seconds=run.resumed.cpu_seconds + float(cpu),
        wall_seconds=run.resumed.wall_seconds + time.perf_counter() - run.started,
    )


def _whole_weights(run: Run, fragments: tuple[Fragment, ...]) -> dict[str, Tensor]:
    """Parameters gathered from `fragments`, and the network's persistent buffers, by their names in the network."""
    whole = {name.removeprefix(_PREFIX): values for name, values in zero.gather(run.engine, fragments).items()}
    module = run.engine.module
    kept = module.state_dict(keep_vars=True)
    buffers = {name.removeprefix(_PREFIX): tensor for name, tensor in module.named_buffers() if name in kept}
    return whole | buffers


def _ema_file(folder: Path, engine: zero.ZeroEngine, ranks: zero.Ranks) -> Path:
    return folder / f"ema-{ranks.rank if engine.stage else 0:05d}.safetensors"


def _throughput(model: Model, predicts: Predicted | None, ranks: zero.Ranks, precision: str) -> metrics.Throughput:
    peak = metrics.peak_flops(ranks.device, precision) * ranks.world_size
    return metrics.Throughput(_site_parameters(model, predicts), model.layers, model.width, peak)


def _site_parameters(model: Model, predicts: Predicted | None) -> int:
    """Parameters that multiply every site's token: those of trunk and heads but for the modulation, once per sample."""
    with torch.device("meta"):
        named = list(network_for(model, predicts).named_parameters())
    per_site = ("trunk.", "head.", "node_feature.")
    return sum(p.numel() for name, p in named if name.startswith(per_site) and ".modulation." not in name)


def _new_window(run: Run) -> metrics.Window:
    return metrics.Window(metrics.LevelLoss.zeros(run.ranks.device))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def main(arguments: list[str]) -> int:
    """Entry of one rank: recipe file, dataset, out. Prints a user's error as one line and returns 2."""
    end_with_launcher()
    recipe, dataset, out = arguments
    try:
        train(read_recipe(Path(recipe)), Path(dataset), Path(out))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        # Without leaving in good order: the other ranks wait in a collective that this one will never join.
        os._exit(2)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
