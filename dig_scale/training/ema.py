"""Exponential moving average of the weights, kept as local fp32 fragments so that it costs each rank only its own share.

In: the live fragments of `zero.local_fragments` at every step. Out: averaged fragments with the same names and starts,
which `zero` gathers, swaps in for validation, and files. Knows no DeepSpeed: under every ZeRO stage the average is the
same operation on a list of flat tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dig_scale.errors import TrainingError

_WARM_UP = 10


@dataclass(frozen=True)
class Fragment:
    """The elements [start, start + len(values)) of the flattened parameter `name`, in fp32, held by this rank."""

    name: str
    start: int
    values: Tensor

    @property
    def key(self) -> str:
        """Name in files: `name@start`."""
        return f"{self.name}@{self.start}"


def decay_at(updates: int, decay: float) -> float:
    """Decay of the update that follows `updates` earlier ones: min(decay, (1 + n) / (10 + n)), so the start is forgotten."""
    return min(decay, (1 + updates) / (_WARM_UP + updates))


def averaged_copy(live: Sequence[Fragment]) -> tuple[Fragment, ...]:
    """An average that starts at the live weights."""
    return tuple(Fragment(f.name, f.start, f.values.detach().clone()) for f in live)


@torch.no_grad()
def move_average_(average: Sequence[Fragment], live: Sequence[Fragment], decay: float) -> None:
    """average <- decay * average + (1 - decay) * live, in place; raises TrainingError if the fragments differ."""
    if len(average) != len(live) or any(a.key != b.key for a, b in zip(average, live, strict=True)):
        raise TrainingError("the moving average and the live weights are split differently over the ranks")
    torch._foreach_lerp_([f.values for f in average], [f.values for f in live], 1.0 - decay)


def save_fragments(path: Path, fragments: Sequence[Fragment]) -> None:
    """Write fragments to a safetensors file as `name@start`."""
    save_file({f.key: f.values.detach().cpu().contiguous() for f in fragments}, path)


def load_fragments_(path: Path, fragments: Sequence[Fragment]) -> None:
    """Fill `fragments` in place from a file of save_fragments; raises TrainingError where it holds other ones."""
    stored: Mapping[str, Tensor] = load_file(path)
    if set(stored) != {f.key for f in fragments}:
        raise TrainingError(
            f"{path} holds other fragments than this rank: same number of ranks and ZeRO stage are needed"
        )
    for fragment in fragments:
        fragment.values.copy_(stored[fragment.key])
