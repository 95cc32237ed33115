"""Packed batches: B samples of different lengths laid end to end, and ragged pair blocks beside them.

Site tensors are [T, ...] with T = sum of lengths; sample b owns rows cu_seqlens[b] : cu_seqlens[b+1]. Pair tensors are
flat: sample b owns a block [C, L_b, pitch_b], C channels (heads) first, rows padded to pitch_b = L_b rounded up to 8
elements (16-byte rows in bf16); the block starts at C * pair_offsets[b]. Padding columns hold anything and are not read.
Static pair tensors (one block per distinct system) have the same form over systems; `system[b]` names the block that
sample b reads, so that many conformations of one system share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PITCH = 8
"""Row lengths of pair blocks are multiples of this many elements."""


def pitch_of(length: int) -> int:
    """Elements from one row of a pair block to the next."""
    return -(-length // PITCH) * PITCH


@dataclass(frozen=True)
class Packing:
    """Where each sample lies: cu_seqlens [B+1] int32, pair_offsets [B+1] int64 (of one channel), system [B] int32.

    static_offsets [G+1] int64 are the pair offsets (of one channel) of the G systems' static blocks.
    """

    cu_seqlens: Tensor
    pair_offsets: Tensor
    system: Tensor
    static_offsets: Tensor
    max_length: int
    sites: int
    pairs: int
    """Elements of one channel of a pair tensor, row padding included: pair_offsets[B]."""

    @property
    def batch(self) -> int:
        """Number of samples B."""
        return len(self.cu_seqlens) - 1


def pack_lengths(
    lengths: Sequence[int], device: torch.device | str = "cpu", system: Sequence[int] | None = None
) -> Packing:
    """Packing of samples of these lengths (0 is allowed); `system` (numbered from 0) defaults to one system per sample."""
    indices = list(system) if system is not None else list(range(len(lengths)))
    if any(length < 0 for length in lengths):
        raise ValueError(f"lengths must be 0 or more, found {min(lengths)}")
    if len(indices) != len(lengths):
        raise ValueError(f"{len(indices)} system indices for {len(lengths)} samples")
    return Packing(
        cu_seqlens=_offsets(lengths).to(device, torch.int32),
        pair_offsets=_offsets([length * pitch_of(length) for length in lengths]).to(device),
        system=torch.tensor(indices, dtype=torch.int32).to(device),
        static_offsets=_offsets([length * pitch_of(length) for length in _system_lengths(lengths, indices)]).to(device),
        max_length=max(lengths, default=0),
        sites=sum(lengths),
        pairs=sum(length * pitch_of(length) for length in lengths),
    )


def _offsets(sizes: Sequence[int]) -> Tensor:
    return torch.tensor([0, *sizes], dtype=torch.int64).cumsum(0)


def _system_lengths(lengths: Sequence[int], system: Sequence[int]) -> list[int]:
    of_system: dict[int, int] = {}
    for length, index in zip(lengths, system, strict=True):
        if of_system.setdefault(index, length) != length:
            raise ValueError(f"system {index} has samples of {of_system[index]} and of {length} sites")
    if sorted(of_system) != list(range(len(of_system))):
        raise ValueError(f"systems must be numbered 0..{len(of_system) - 1}, found {sorted(of_system)}")
    return [of_system[index] for index in range(len(of_system))]


def uniform_packing(batch: int, length: int, device: torch.device | str = "cpu") -> Packing:
    """Packing of `batch` samples of one system, all of the same length (a padded batch is one, with a key mask)."""
    return pack_lengths([length] * batch, device, system=[0] * batch)


def blocks_from_dense(dense: Sequence[Tensor]) -> Tensor:
    """Flat pair tensor from one dense [C, L_b, L_b] per sample (or per system); differentiable."""
    if not dense:
        raise ValueError("no block to pack")
    widths = [pitch_of(block.shape[-1]) - block.shape[-1] for block in dense]
    padded = [torch.nn.functional.pad(block, (0, width)) for block, width in zip(dense, widths, strict=True)]
    return torch.cat([block.reshape(-1) for block in padded])


def dense_from_blocks(flat: Tensor, packing: Packing, channels: int) -> list[Tensor]:
    """One dense view [C, L_b, L_b] per sample of a flat pair tensor [C * pairs]; differentiable. For tests and the oracle."""
    starts = (packing.pair_offsets * channels).tolist()
    return [_block(flat, start, length, channels) for start, length in zip(starts, _lengths(packing), strict=False)]


def static_from_blocks(flat: Tensor, packing: Packing, channels: int) -> list[Tensor]:
    """The static block [C, L_b, L_b] that each sample reads, from the flat static tensor over systems; differentiable."""
    starts = (packing.static_offsets[packing.system.long()] * channels).tolist()
    return [_block(flat, start, length, channels) for start, length in zip(starts, _lengths(packing), strict=True)]


def _lengths(packing: Packing) -> list[int]:
    return list(packing.cu_seqlens.diff().tolist())


def _block(flat: Tensor, start: int, length: int, channels: int) -> Tensor:
    pitch = pitch_of(length)
    return flat[start : start + channels * length * pitch].view(channels, length, pitch)[..., :length]
