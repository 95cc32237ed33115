"""Contraction: the gradient of pair channels -> gradients of the table, of u or positions, of gain and shift, of static.

One pass over the pairs recomputes u and writes du, and for the table one gradient row per pair; the pairs are sorted by
piece and their rows summed (pair_moments.py); gain and shift likewise by type pair; positions and static gradients have
kernels of their own. Nothing is atomic, the order of every sum is fixed. Buffers hold a window of the pairs at a time,
WORKSPACE_BYTES at most. Needs Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dig_kernels.layout import PITCH, Packing, pitch_of
from dig_kernels.pair_bias_kernels import (
    GEOMETRY_ARGUMENTS,
    GIVEN_ARGUMENTS,
    IMAGES_ARGUMENTS,
    compile_signature,
    tile_keys,
)
from dig_kernels.pair_contract_kernels import pair_gradient_kernel, position_gradient_kernel, static_gradient_kernel
from dig_kernels.pair_moments import key_dtype, segment_moments, sort_segments
from dig_kernels.pair_source import (
    PairGeometry,
    PairGradients,
    PairProblem,
    PairSource,
    Wanted,
    check_source,
    kernel_operands,
    sample_of_sites,
    single_precision,
    tile_heads,
)
from dig_kernels.radial_table import KnotGrid

if TYPE_CHECKING:
    from dig_kernels.compiling import CompileCase

WORKSPACE_BYTES = 512 * 2**20
"""Bound of the buffers that grow with the number of pairs."""
BYTES_PER_SLOT = 72
"""Of a pair's buffers beside its gradient row: scalars 28, keys sorted with their order and the sort's own space 44."""


@dataclass(frozen=True)
class BiasGradient:
    """d_bias of sites first_site .. first_site + sites - 1: element (h, i, j) of sample b at start + h head + i row + j."""

    values: Tensor
    start: Tensor
    row: Tensor
    head: Tensor
    first_site: int
    sites: int


@dataclass(frozen=True)
class Slots:
    """Where the copies of each query lie: slot of (i, key copy) of sample b = start[b] + i stride[b] + place of the copy."""

    start: Tensor
    stride: Tensor
    origin: Tensor
    """Slot [1] at which the buffers begin."""
    count: int
    """At most so many slots follow."""


@dataclass(frozen=True)
class ContractLaunch:
    """Tile sizes of the gradient kernels."""

    keys: int = 32
    channels: int = 32
    sites: int = 128
    static: int = 256
    warps: int = 4


LAUNCH = ContractLaunch()


def contract(
    d_bias: Tensor,
    first_site: int,
    pieces: Tensor,
    grid: KnotGrid,
    source: PairSource,
    packing: Packing,
    wanted: Wanted,
    *,
    static: Tensor | None = None,
    into: PairGradients | None = None,
) -> PairGradients:
    """Gradients from d_bias [H, rows, width], the bias gradient of query sites first_site .. first_site + rows - 1.

    Element [h, r, j] belongs to site first_site + r of the packed batch and key j of that site's own sample; columns
    from the sample's length on are not read (width = pitch_of(packing.max_length) always suffices). fp32 or bf16, last
    stride 1, other strides free. The first H channels of pieces [K-1, 4, C] are the bias. Sources without images.

    Sums over blocks of rows: hand the result of one call to the next as `into`; its tensors are then written to and
    returned. Runs on the tensors as they are and builds no autograd graph: call it inside a backward. Raises ValueError
    where shapes disagree.
    """
    if d_bias.dim() != 3 or d_bias.stride(2) != 1 or d_bias.shape[2] < packing.max_length:
        found = f"d_bias has shape {tuple(d_bias.shape)} and strides {d_bias.stride()}"
        raise ValueError(f"{found}; expected [H, rows, >= {packing.max_length}] with the last stride 1")
    if isinstance(source, PairGeometry) and source.images is not None:
        raise ValueError("contract takes sources without images; pair_channels differentiates through images itself")
    heads, rows, _ = d_bias.shape
    if not 0 <= first_site <= first_site + rows <= packing.sites:
        raise ValueError(f"rows {first_site} .. {first_site + rows} do not lie in a batch of {packing.sites} sites")
    check_source(source, packing)
    ones = torch.ones_like(packing.pair_offsets[1:])
    start = (packing.cu_seqlens[:-1].long() - first_site) * d_bias.stride(1)
    block = BiasGradient(d_bias, start, ones * d_bias.stride(1), ones * d_bias.stride(0), first_site, rows)
    problem = single_precision(PairProblem(pieces, grid, source, static, None, packing, heads))
    gradients = into if into is not None else _zeros(problem, wanted, torch.float32)
    return _contract_rows(problem, block, None, wanted, gradients)


def contract_all(problem: PairProblem, d_bias: Tensor, d_node: Tensor, wanted: Wanted) -> PairGradients:
    """Gradients from d_bias flat [biased * pairs] and d_node [T, C - biased]; of static in its own dtype."""
    packing = problem.packing
    lengths = packing.cu_seqlens.long().diff()
    pitch = _pitches(lengths)
    start = packing.pair_offsets[:-1] * problem.biased
    whole = BiasGradient(d_bias.contiguous(), start, pitch, lengths * pitch, 0, packing.sites)
    static_dtype = problem.static.dtype if problem.static is not None else torch.float32
    return _contract_rows(problem, whole, d_node.contiguous(), wanted, _zeros(problem, wanted, static_dtype))


def _zeros(problem: PairProblem, wanted: Wanted, static_dtype: torch.dtype) -> PairGradients:
    source = problem.source
    tensors = {
        "pieces": (problem.pieces, Wanted.PIECES),
        "u": (getattr(source, "u", None), Wanted.PLACES),
        "positions": (getattr(source, "positions", None), Wanted.PLACES),
        "gain": (getattr(source, "gain", None), Wanted.MAPS),
        "shift": (getattr(source, "shift", None), Wanted.MAPS),
        "static": (problem.static, Wanted.STATIC),
    }
    dtypes = dict.fromkeys(tensors, torch.float32) | {"static": static_dtype}
    return PairGradients(
        **{
            name: torch.zeros(tensor.shape, dtype=dtypes[name], device=tensor.device)
            for name, (tensor, kind) in tensors.items()
            if tensor is not None and kind in wanted
        }
    )


def _pitches(lengths: Tensor) -> Tensor:
    return torch.div(lengths + (PITCH - 1), PITCH, rounding_mode="floor") * PITCH


def _slots(problem: PairProblem, first_site: int, sites: int, sample_of: Tensor) -> Slots:
    """The slots of these query sites: a flat pair tensor's own elements, or one per copy where there are images."""
    packing, source = problem.packing, problem.source
    begin = packing.cu_seqlens.long()
    lengths = begin.diff()
    if isinstance(source, PairGeometry) and source.images is not None:
        stride = source.images.starts.long()[begin].diff()
        start = (lengths * stride).cumsum(0) - lengths * stride
        count = source.images.copies
    else:
        stride = _pitches(lengths)
        start = packing.pair_offsets[:-1]
        count = min(packing.pairs, sites * pitch_of(packing.max_length))
    sample = sample_of[first_site : first_site + 1].long()
    return Slots(start, stride, start[sample] + (first_site - begin[sample]) * stride[sample], count)


def _contract_rows(
    problem: PairProblem, d_bias: BiasGradient, d_node: Tensor | None, wanted: Wanted, gradients: PairGradients
) -> PairGradients:
    """Adds to the tensors of `gradients`, window by window, and returns them."""
    if not d_bias.sites:
        return gradients
    operands = kernel_operands(problem, LAUNCH.channels)
    pairwise = wanted & ~Wanted.STATIC
    if pairwise:
        slots = _slots(problem, d_bias.first_site, d_bias.sites, sample_of_sites(problem.packing))
        window = max(PITCH, WORKSPACE_BYTES // (BYTES_PER_SLOT + 4 * problem.biased))
        for offset in range(0, slots.count, window):
            _contract_window(
                operands, d_bias, d_node, pairwise, gradients, slots, offset, min(window, slots.count - offset)
            )
    if gradients.static is not None:
        _static_gradient(gradients.static, d_bias, problem)
    return gradients


@dataclass(frozen=True)
class _Window:
    """What one pass over a window of slots leaves behind; slots without a pair have the last key and code."""

    du: Tensor | None
    keys: Tensor | None
    fractions: Tensor | None
    queries: Tensor | None
    rows: Tensor | None
    codes: Tensor | None
    distances: Tensor | None


def _window_buffers(operands: dict[str, Any], wanted: Wanted, d_u: Tensor | None, count: int) -> _Window:
    device = operands["pieces"].device

    def scalars(kind: Wanted) -> Tensor | None:
        return torch.empty(count, dtype=torch.float32, device=device) if kind & wanted else None

    def codes(kind: Wanted, last: int) -> Tensor | None:
        return torch.full((count,), last, dtype=key_dtype(last), device=device) if kind & wanted else None

    table = Wanted.PIECES in wanted
    return _Window(
        du=d_u if d_u is not None else scalars(Wanted.PLACES | Wanted.MAPS),
        keys=codes(Wanted.PIECES, operands["n_pieces"]),
        fractions=scalars(Wanted.PIECES),
        queries=torch.empty(count, dtype=torch.int32, device=device) if table else None,
        rows=torch.empty(count, operands["biased"], dtype=torch.float32, device=device) if table else None,
        codes=codes(Wanted.MAPS, operands["n_types"] ** 2),
        distances=scalars(Wanted.MAPS),
    )


def _contract_window(
    operands: dict[str, Any],
    d_bias: BiasGradient,
    d_node: Tensor | None,
    wanted: Wanted,
    gradients: PairGradients,
    slots: Slots,
    offset: int,
    count: int,
) -> None:
    if operands["GIVEN"]:
        wanted &= ~Wanted.MAPS
    buffers = _window_buffers(operands, wanted, gradients.u, count)
    span: dict[str, Any] = {"slot_start": slots.start, "slot_stride": slots.stride, "origin": slots.origin}
    span |= {"offset": offset, "window": count, "first_site": d_bias.first_site}
    _launch_gradient(operands, d_bias, d_node, wanted, buffers, span)
    if gradients.pieces is not None:
        _table_gradient(gradients.pieces, buffers, d_node, operands["biased"])
    if gradients.positions is not None:
        _position_gradient(gradients.positions, operands, buffers, span, d_bias.sites)
    if gradients.gain is not None and gradients.shift is not None:
        assert buffers.codes is not None and buffers.distances is not None and buffers.du is not None
        by_code = sort_segments(buffers.codes, gradients.gain.numel())
        moments = segment_moments(by_code, buffers.distances, buffers.du.unsqueeze(1), None, 2)
        gradients.shift.add_(moments[:, 0].view_as(gradients.shift))
        gradients.gain.add_(moments[:, 1].view_as(gradients.gain))


def _launch_gradient(
    operands: dict[str, Any],
    d_bias: BiasGradient,
    d_node: Tensor | None,
    wanted: Wanted,
    buffers: _Window,
    span: dict[str, Any],
) -> None:
    heads = tile_heads(operands["biased"])
    pair_gradient_kernel[(d_bias.sites,)](
        **vars(buffers),
        **operands,
        **span,
        d_bias=d_bias.values,
        d_node=d_node,
        bias_start=d_bias.start,
        bias_row=d_bias.row,
        bias_head=d_bias.head,
        BIAS=operands["biased"] > 0,
        NODE=d_node is not None and operands["summed"] > 0,
        PLACES=buffers.du is not None,
        PIECES=Wanted.PIECES in wanted,
        MAPS=Wanted.MAPS in wanted,
        BLOCK_KEYS=tile_keys(LAUNCH.keys, heads),
        BLOCK_HEADS=heads,
        BLOCK_CHANNELS=LAUNCH.channels,
        num_warps=LAUNCH.warps,
    )


def _table_gradient(d_pieces: Tensor, buffers: _Window, d_node: Tensor | None, biased: int) -> None:
    assert buffers.keys is not None and buffers.fractions is not None and buffers.rows is not None
    by_piece = sort_segments(buffers.keys, len(d_pieces))
    d_pieces[..., :biased] += segment_moments(by_piece, buffers.fractions, buffers.rows, None, 4)
    if d_node is not None:
        d_pieces[..., biased:] += segment_moments(by_piece, buffers.fractions, d_node, buffers.queries, 4)


def _position_gradient(
    d_positions: Tensor, operands: dict[str, Any], buffers: _Window, span: dict[str, Any], n_sites: int
) -> None:
    shared = (
        "positions",
        "types",
        "gain",
        "image_starts",
        "image_offsets",
        "sample_of",
        "cu_seqlens",
        "n_types",
        "IMAGES",
    )
    position_gradient_kernel[(len(d_positions),)](
        d_positions,
        buffers.du,
        **{name: operands[name] for name in shared},
        **span,
        n_sites=n_sites,
        BLOCK=LAUNCH.sites,
        num_warps=LAUNCH.warps,
    )


def _static_gradient(d_static: Tensor, d_bias: BiasGradient, problem: PairProblem) -> None:
    packing = problem.packing
    if not d_static.numel():
        return
    systems = len(packing.static_offsets) - 1
    ordered, samples = torch.sort(packing.system, stable=True)
    edges = torch.arange(systems + 1, dtype=ordered.dtype, device=ordered.device)
    static_gradient_kernel[(systems * packing.max_length, problem.biased)](
        d_static,
        d_bias.values,
        d_bias.start,
        d_bias.row,
        d_bias.head,
        samples,
        torch.searchsorted(ordered, edges, out_int32=True),
        packing.cu_seqlens,
        packing.static_offsets,
        d_bias.first_site,
        d_bias.sites,
        packing.max_length,
        BLOCK=LAUNCH.static,
        num_warps=LAUNCH.warps,
    )


def gradient_cases() -> list[CompileCase]:
    """The chosen configurations: 32 heads in bf16 with 128 summed channels, for each source, and the sums that follow."""
    from dig_kernels.compiling import CompileCase

    def case(name: str, kernel: Any, constants: dict[str, Any]) -> CompileCase:
        signature = compile_signature(kernel.arg_names, constants)
        aligned = frozenset({"biased", "summed", "table_width"} & set(signature))
        return CompileCase(name, kernel, signature, constants, LAUNCH.warps, divisible_by_16=aligned)

    sources = (("given", GIVEN_ARGUMENTS), ("geometry", GEOMETRY_ARGUMENTS), ("images", IMAGES_ARGUMENTS))
    cases = []
    for name, absent in sources:
        flags = dict.fromkeys(("MASKED", "BIAS", "NODE", "PLACES", "PIECES"), True)
        flags |= {"GIVEN": name == "given", "IMAGES": name == "images", "MAPS": name != "given"}
        blocks = {"BLOCK_KEYS": tile_keys(LAUNCH.keys, 32), "BLOCK_HEADS": 32, "BLOCK_CHANNELS": LAUNCH.channels}
        codes = {"codes": None, "distances": None} if name == "given" else {}
        cases.append(case(f"pair_gradient_{name}", pair_gradient_kernel, {**absent, **codes, **flags, **blocks}))
    places = {"IMAGES": True, "BLOCK": LAUNCH.sites}
    cases.append(case("pair_positions", position_gradient_kernel, places))
    cases.append(case("pair_static", static_gradient_kernel, {"BLOCK": LAUNCH.static}))
    return cases
