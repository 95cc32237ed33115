"""DeepSpeed behind one door: engine, ZeRO stages 0-3, its private fragment tables, its checkpoints. Nothing else imports it.

In: a plain torch module whose forward returns a loss per sample, and config.Train. Out: a ZeroEngine, whose weights are
seen by the rest of the program as fp32 Fragments of this rank. The DeepSpeed settings are derived here from the recipe.
Parameters stay fp32; bf16 is autocast inside the module, so positions in Å never lose digits to a cast.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from dig_scale.config import Train
from dig_scale.errors import TrainingError
from dig_scale.training.ema import Fragment

BETAS = (0.9, 0.999)
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_BUCKET = 50_000_000
"""Elements per communication bucket; smaller models use their own size (DeepSpeed allocates a whole bucket)."""


@dataclass(frozen=True)
class Ranks:
    """This process among all: `rank` of `world_size`, on `device`."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes the files."""
        return self.rank == 0


@dataclass(frozen=True)
class Share:
    """How a global batch is split: rows per rank and forward pass, and forward passes per step."""

    micro_batch: int
    accumulation: int

    @property
    def rows(self) -> int:
        """Rows of one rank per step."""
        return self.micro_batch * self.accumulation


@dataclass(frozen=True)
class ZeroEngine:
    """A module trained by DeepSpeed; call it like the module."""

    engine: Any
    stage: int
    clip: float

    def __call__(self, *inputs: Any) -> Tensor:
        """Forward pass."""
        return self.engine(*inputs)

    @property
    def module(self) -> nn.Module:
        """The module whose parameters are trained."""
        return self.engine.module


def join_ranks() -> Ranks:
    """Join the process group that the rank environment describes (NCCL on GPUs, gloo on CPU), or take the one there is.

    Raises TrainingError where the environment is incomplete.
    """
    missing = [name for name in _RANK_VARIABLES if name not in os.environ]
    if missing:
        raise TrainingError(
            f"rank environment incomplete: {', '.join(missing)} not set; start with `dig-scale train`, torchrun or srun"
        )
    local_rank = int(os.environ["LOCAL_RANK"])
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank) if gpu else torch.device("cpu")
    _deepspeed(device).init_distributed(
        dist_backend="nccl" if gpu else "gloo", auto_mpi_discovery=False, verbose=False, timeout=timedelta(minutes=30)
    )
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def leave_ranks() -> None:
    """Leave the process group; DeepSpeed forgets it too, so that another training may follow in this process."""
    if dist.is_initialized():
        from deepspeed import comm

        comm.destroy_process_group()


def rows_per_rank(name: str, batch: int, world_size: int) -> int:
    """Rows of each rank of a batch that the recipe calls `name`; raises TrainingError where it does not split evenly."""
    if batch % world_size:
        raise TrainingError(f"{name} = {batch} is not a multiple of {world_size} ranks; change either")
    return batch // world_size


def share_of(train: Train, world_size: int) -> Share:
    """Micro-batch and accumulation steps of each rank; raises TrainingError when the global batch does not divide."""
    rows = rows_per_rank("train.global_batch", train.global_batch, world_size)
    micro = train.micro_batch or rows
    if rows % micro:
        raise TrainingError(
            f"train.global_batch = {train.global_batch} over {world_size} ranks is {rows} rows per rank, "
            f"not a multiple of train.micro_batch = {micro}; choose a divisor of {rows}"
        )
    return Share(micro, rows // micro)


def deepspeed_settings(train: Train, world_size: int, n_parameters: int) -> dict[str, Any]:
    """The DeepSpeed dict of a recipe. Stage 0 is clipped in `apply_update_`."""
    share = share_of(train, world_size)
    bucket = max(1024, min(_BUCKET, n_parameters))
    return {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": share.micro_batch,
        "gradient_accumulation_steps": share.accumulation,
        "gradient_clipping": train.gradient_clip if train.zero_stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": sys.maxsize,
        "zero_optimization": {
            "stage": train.zero_stage,
            "overlap_comm": torch.cuda.is_available(),
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
            # else stage 3 replaces torch's linear for the whole process, for good, with one that rounds differently
            "memory_efficient_linear": False,
        },
    }


def start_engine(module: nn.Module, train: Train, ranks: Ranks) -> ZeroEngine:
    """Hand `module`, already initialised, to DeepSpeed with AdamW in two groups: matrices decay, vectors do not."""
    n_parameters = sum(p.numel() for p in module.parameters())
    module = module.to(ranks.device)
    optimizer = torch.optim.AdamW(
        _parameter_groups(module, train.weight_decay), lr=train.learning_rate, betas=BETAS, fused=True
    )
    engine, *_ = _deepspeed(ranks.device).initialize(
        model=module,
        optimizer=optimizer,
        config=deepspeed_settings(train, ranks.world_size, n_parameters),
        dist_init_required=False,
    )
    # Stage 0 reduces in `apply_update_`, in one pass with the norm; DeepSpeed's own way takes several.
    engine.enable_backward_allreduce = train.zero_stage > 0
    return ZeroEngine(engine, train.zero_stage, train.gradient_clip)


def accumulate_(zero: ZeroEngine, loss: Tensor) -> None:
    """Back-propagate one micro-batch whose update is still to come."""
    zero.engine.backward(loss)
    zero.engine.step()


def backward_last_(zero: ZeroEngine, loss: Tensor) -> None:
    """Back-propagate the last micro-batch of a step."""
    zero.engine.backward(loss)


def apply_update_(zero: ZeroEngine, learning_rate: float) -> float:
    """Average the gradients over the ranks, clip and apply them; the gradient norm before clipping."""
    for group in zero.engine.optimizer.param_groups:
        group["lr"] = learning_rate
    if zero.stage == 0:
        norm = _reduce_and_clip_([p for p in zero.module.parameters() if p.requires_grad], zero.clip)
        zero.engine.step()
        return norm
    zero.engine.step()
    return float(zero.engine.get_global_grad_norm())


def local_fragments(zero: ZeroEngine) -> tuple[Fragment, ...]:
    """The fp32 weights that this rank holds, as live views; at stage 0 every rank holds all of them."""
    named = zero.module.named_parameters()
    if zero.stage == 0:
        return tuple(Fragment(name, 0, parameter.data.view(-1)) for name, parameter in named)
    walk = _stage3_fragment if zero.stage == 3 else _stage12_fragment
    found = (walk(name, parameter) for name, parameter in named)
    return tuple(fragment for fragment in found if fragment is not None)


def full_shapes(zero: ZeroEngine) -> dict[str, torch.Size]:
    """Shape of every parameter, also where it is partitioned."""
    return {name: getattr(p, "ds_shape", p.shape) for name, p in zero.module.named_parameters()}


def gather(zero: ZeroEngine, fragments: Sequence[Fragment]) -> dict[str, Tensor]:
    """Whole parameters from the fragments of all ranks, on every rank; all ranks must call it."""
    return {name: _whole(zero, name, shape, fragments) for name, shape in full_shapes(zero).items()}


@contextmanager
def weights_replaced(zero: ZeroEngine, fragments: Sequence[Fragment]) -> Iterator[None]:
    """Inside, the forward pass uses `fragments` (such as the average); after, the live weights again, to the last bit."""
    live = local_fragments(zero)
    saved = [Fragment(f.name, f.start, f.values.clone()) for f in live] if zero.stage == 0 else list(live)
    _write_weights(zero, fragments)
    try:
        yield
    finally:
        _write_weights(zero, saved)


def save_state(zero: ZeroEngine, folder: Path) -> None:
    """Write DeepSpeed's own checkpoint into `folder`; all ranks must call it."""
    zero.engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)


def load_state_(zero: ZeroEngine, folder: Path) -> None:
    """Restore what save_state wrote, optimizer included; raises TrainingError where DeepSpeed cannot."""
    settings = [{k: v for k, v in group.items() if k != "params"} for group in zero.engine.optimizer.param_groups]
    # Optimizer states are always loaded: without them stage 3 reads the tag in `latest`, not the one asked for.
    path, _ = zero.engine.load_checkpoint(str(folder.parent), tag=folder.name, load_optimizer_states=True)
    if path is None:
        raise TrainingError(f"DeepSpeed found no training state in {folder}")
    _repair_optimizer_(zero, settings)


def _repair_optimizer_(zero: ZeroEngine, settings: Sequence[dict[str, Any]]) -> None:
    """DeepSpeed's stage-3 loader can share one `step` tensor among groups and copy group 0's settings into all groups."""
    for group, wanted in zip(zero.engine.optimizer.param_groups, settings, strict=True):
        group.update(wanted)
    inner = getattr(zero.engine.optimizer, "optimizer", zero.engine.optimizer)
    for state in inner.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()


def _reduce_and_clip_(parameters: list[nn.Parameter], limit: float) -> float:
    """Average the gradients over the ranks and scale them to a norm of at most `limit`; the norm before.

    One flat tensor, of which the gradients become views: one reduction, one norm and at most one scaling pass.
    """
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = _flatten_dense_tensors(gradients)
    world_size = dist.get_world_size()
    if world_size > 1:
        dist.all_reduce(flat)
    norm = float(torch.linalg.vector_norm(flat)) / world_size
    scale = min(1.0, limit / (norm + 1e-6)) / world_size
    if scale != 1.0:
        flat.mul_(scale)
    for parameter, view in zip(parameters, _unflatten_dense_tensors(flat, gradients), strict=True):
        parameter.grad = view
    return norm


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _stage12_fragment(name: str, parameter: nn.Parameter) -> Fragment | None:
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    return Fragment(name, mapping.lp_fragment_address.start, mapping.hp_fragment.view(-1))


def _stage3_fragment(name: str, parameter: nn.Parameter) -> Fragment | None:
    from deepspeed.utils import safe_get_local_fp32_param

    per_rank, total = parameter.ds_tensor.ds_numel, parameter.ds_numel  # type: ignore[attr-defined]
    start = dist.get_rank() * per_rank
    if start >= total:
        return None
    # The last partition is padded.
    return Fragment(name, start, safe_get_local_fp32_param(parameter)[: min(per_rank, total - start)])


def _whole(zero: ZeroEngine, name: str, shape: torch.Size, fragments: Sequence[Fragment]) -> Tensor:
    mine = [f for f in fragments if f.name == name]
    if zero.stage == 0:
        return mine[0].values.reshape(shape).clone()
    whole = torch.zeros(shape.numel(), device=zero.engine.device)
    for fragment in mine:
        whole[fragment.start : fragment.start + len(fragment.values)] = fragment.values
    dist.all_reduce(whole)
    return whole.reshape(shape)


@torch.no_grad()
def _write_weights(zero: ZeroEngine, fragments: Sequence[Fragment]) -> None:
    """Set the weights of the forward pass, one parameter at a time; the fp32 master copies of stages 1-3 stay."""
    shapes = full_shapes(zero)
    for name, parameter in zero.module.named_parameters():
        whole = _whole(zero, name, shapes[name], fragments)
        if zero.stage < 3:
            parameter.data.copy_(whole)
            continue
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0):
            if dist.get_rank() == 0:
                parameter.data.copy_(whole)


def _deepspeed(device: torch.device) -> ModuleType:
    """DeepSpeed, imported late (it reads the environment then) and quiet."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Joining a gloo group would otherwise compile a shared-memory kernel for minutes, which only inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
