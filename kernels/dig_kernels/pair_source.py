"""Where the scalar u of a pair comes from: given, or an affine map by atom types of a distance, periodic copies included.

Values only: the kernels of pair_bias.py and their reference read them. Shapes: T sites, E extra copies, n atom types.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Flag, auto
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dig_kernels.layout import PITCH, Packing, pitch_of
from dig_kernels.radial_table import KnotGrid


@dataclass(frozen=True)
class GivenScalar:
    """u itself, flat [pairs] (layout.py, one channel)."""

    u: Tensor


@dataclass(frozen=True)
class PeriodicImages:
    """Copies of the key sites: site j is seen at x_j + offsets[e] for e in starts[j] : starts[j + 1], itself (0) among them.

    starts [T+1] int32, offsets [E, 3] Å (constants); `copies` is the number of (query, copy) pairs of the whole batch.
    Made by `periodic_images`.
    """

    starts: Tensor
    offsets: Tensor
    copies: int


@dataclass(frozen=True)
class PairGeometry:
    """u = gain[t_i, t_j] |x_i - x_j| + shift[t_i, t_j] from positions [T, 3] Å, types [T] in 0..n-1, gain and shift [n, n]."""

    positions: Tensor
    types: Tensor
    gain: Tensor
    shift: Tensor
    images: PeriodicImages | None = None


PairSource = GivenScalar | PairGeometry


def periodic_images(starts: Tensor, offsets: Tensor, packing: Packing) -> PeriodicImages:
    """PeriodicImages of a packed batch; counts the pairs (reads `starts` on the host: call it where batches are made).

    Raises ValueError where shapes disagree, the last start is not E, or a site has no copy.
    """
    if starts.shape != (packing.sites + 1,):
        raise ValueError(
            f"image starts have shape {tuple(starts.shape)}; {packing.sites} sites need [{packing.sites + 1}]"
        )
    if offsets.dim() != 2 or offsets.shape[1] != 3 or int(starts[-1]) != len(offsets):
        raise ValueError(
            f"image offsets have shape {tuple(offsets.shape)}; the starts end at {int(starts[-1])}, need [E, 3]"
        )
    if packing.sites and int(starts.diff().min()) < 1:
        raise ValueError(f"site {int(starts.diff().argmin())} has no copy; list the site itself with offset 0")
    bounds = packing.cu_seqlens.long()
    return PeriodicImages(starts.to(torch.int32), offsets, int((bounds.diff() * starts.long()[bounds].diff()).sum()))


def check_static(static: Tensor, packing: Packing, channels: int) -> None:
    """Raises ValueError where a static tensor over systems cannot be [channels * static pairs] of this packing.

    Its exact size is on the device and not worth waiting for. It holds the longest sample's system, and no more than a
    block for each sample, in whole rows of all channels.
    """
    least, most = channels * packing.max_length * pitch_of(packing.max_length), channels * packing.pairs
    whole = static.dim() == 1 and (static.numel() % (PITCH * channels) == 0 if channels else not static.numel())
    if not whole or not least <= static.numel() <= most:
        raise ValueError(
            f"static has shape {tuple(static.shape)}; expected flat [{channels} * static pairs], from {least} to {most}"
            f" elements, a multiple of {PITCH * channels}"
        )


def check_source(source: PairSource, packing: Packing) -> None:
    """Raises ValueError naming the tensor whose shape does not fit the packing."""
    if isinstance(source, GivenScalar):
        _expect("u", source.u, (packing.pairs,))
        return
    n = len(source.gain)
    _expect("positions", source.positions, (packing.sites, 3))
    _expect("types", source.types, (packing.sites,))
    _expect("gain", source.gain, (n, n))
    _expect("shift", source.shift, (n, n))
    if source.images is not None:
        _expect("image starts", source.images.starts, (packing.sites + 1,))
        _expect("image offsets", source.images.offsets, (len(source.images.offsets), 3))


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")


@dataclass(frozen=True)
class PairProblem:
    """All that decides the channels of the pairs: the first `biased` of C channels are the bias, the others summed."""

    pieces: Tensor
    grid: KnotGrid
    source: PairSource
    static: Tensor | None
    key_mask: Tensor | None
    packing: Packing
    biased: int


class Wanted(Flag):
    """Which gradients a contraction computes."""

    PIECES = auto()
    PLACES = auto()
    """Of u, or of positions."""
    MAPS = auto()
    """Of gain and shift."""
    STATIC = auto()


@dataclass(frozen=True)
class PairGradients:
    """Gradients shaped as their inputs, in fp32; None where not wanted or without meaning for the source."""

    pieces: Tensor | None = None
    u: Tensor | None = None
    positions: Tensor | None = None
    gain: Tensor | None = None
    shift: Tensor | None = None
    static: Tensor | None = None


def single_precision(problem: PairProblem) -> PairProblem:
    """The problem in the fp32 that the kernels compute in; u and static may be narrower. Differentiable."""
    source = problem.source
    if isinstance(source, PairGeometry):
        images = source.images
        if images is not None:
            images = replace(images, offsets=images.offsets.float())
        positions, gain, shift = (tensor.float() for tensor in (source.positions, source.gain, source.shift))
        source = PairGeometry(positions, source.types, gain, shift, images)
    return replace(problem, pieces=problem.pieces.float(), source=source)


def sample_of_sites(packing: Packing) -> Tensor:
    """Which sample each site belongs to, [T] int32; found on the device."""
    sites = torch.arange(packing.sites, dtype=torch.int32, device=packing.cu_seqlens.device)
    return torch.searchsorted(packing.cu_seqlens[1:].contiguous(), sites, right=True, out_int32=True)


def tile_heads(biased: int) -> int:
    """Columns of a tile that holds all heads: a power of two, 4 at least."""
    return max(4, 1 << max(biased - 1, 0).bit_length())


def padded_table(pieces: Tensor, biased: int, block: int) -> Tensor:
    """pieces with the biased channels padded to tile_heads(biased) and the others to a multiple of `block`."""
    summed = pieces.shape[-1] - biased
    gaps = tile_heads(biased) - biased, -summed % block
    if not any(gaps):
        return pieces.contiguous()
    parts = pieces.split((biased, summed), dim=-1)
    return torch.cat([pad(part, (0, gap)) for part, gap in zip(parts, gaps, strict=True)], dim=-1)


def kernel_operands(problem: PairProblem, block: int) -> dict[str, Any]:
    """Arguments that the forward and the gradient kernel share, by name, contiguous; None where the source has none.

    The summed channels of the table are padded to a multiple of `block`.
    """
    table = padded_table(problem.pieces, problem.biased, block)
    source, images, packing = problem.source, None, problem.packing
    names = ("u", "positions", "types", "gain", "shift")
    tensors = {name: getattr(source, name, None) for name in names}
    if isinstance(source, PairGeometry):
        images = source.images
    tensors["image_starts"] = images.starts if images is not None else None
    tensors["image_offsets"] = images.offsets if images is not None else None
    tensors["pieces"], tensors["key_mask"] = table, problem.key_mask
    tensors["cu_seqlens"], tensors["pair_offsets"] = packing.cu_seqlens, packing.pair_offsets
    return {name: tensor.contiguous() if tensor is not None else None for name, tensor in tensors.items()} | {
        "sample_of": sample_of_sites(packing),
        "start": problem.grid.start,
        "inverse_step": 1.0 / problem.grid.step,
        "n_pieces": len(problem.pieces),
        "n_types": len(source.gain) if isinstance(source, PairGeometry) else 0,
        "biased": problem.biased,
        "summed": problem.pieces.shape[-1] - problem.biased,
        "table_width": table.shape[-1],
        "GIVEN": isinstance(source, GivenScalar),
        "IMAGES": images is not None,
        "MASKED": problem.key_mask is not None,
    }
