"""The gradient of a pair bias that many attention layers share: only the sum over layers of dS is ever made.

A Ledger goes through the layers with the activations: `out, ledger = layer_attention(q, k, v, ledger)`. It holds carriers:
tensors that take no memory and whose values nobody reads, but whose GRADIENTS do the bookkeeping, so that nothing is kept
outside autograd's graph. Checkpointing and compilation see ordinary tensors.

DEFER: each layer has six carriers; its backward returns q, k, v, dO, LSE and delta as their gradients (no copy). The
opening node's backward runs last, has all layers' leavings, and sums dS over the layers in registers: each element of the
bias gradient is written once. Holds 4 T H d elements a layer until then.
ACCUMULATE: one carrier goes through all layers in a chain; its gradient is the fp32 sum of dS, to which each layer's
backward adds its own in place. For dense biases only. Holds 4 bytes a pair and head; nothing by layer.

Non-reentrant checkpointing only. Under torch.compile carriers take real memory (their gradients must have their strides).
With create_graph=True the gradient takes the ordinary way, through each layer's bias argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dig_kernels.attention_call import Call, LayerTensors
from dig_kernels.bias_source import (
    PairTable,
    Source,
    SourceKind,
    dense_source,
    source_from_flat,
    table_source,
)
from dig_kernels.dispatch import Backend, backend_for, wants_reference
from dig_kernels.layout import PITCH, Packing, pitch_of
from dig_kernels.pair_source import GivenScalar, PairGeometry, PairGradients, Wanted
from dig_kernels.radial_table import KnotGrid

TABLE_BLOCK_BYTES = 256 * 2**20
"""Most memory that a block of summed dS takes on its way into a table's gradient."""
CARRIERS = 6


class LedgerMode(Enum):
    """How the shared gradient is kept."""

    DEFER = "defer"
    ACCUMULATE = "accumulate"


class Settings(NamedTuple):
    """The numbers that every operator of this module and of attention.py takes, in this order."""

    kind: int
    start: float
    step: float
    scale: float
    max_length: int
    tile: int
    fused: bool


@dataclass(frozen=True)
class Ledger:
    """A bias shared by `layers` attention layers, `calls` of which were made, and the carriers of its gradient.

    Without gradients to keep, `carriers` is empty. The next layer's carriers stand first; each call moves them to the end.
    """

    source: Source
    packing: Packing
    key_mask: Tensor | None
    scale: float
    tile: int
    heads: int
    width: int
    layers: int
    calls: int
    backend: Backend
    carriers: tuple[tuple[Tensor, ...], ...]


def packing_tensors(packing: Packing) -> list[Tensor]:
    """The four tensors of a packing, in the order operators take them."""
    return [packing.cu_seqlens, packing.pair_offsets, packing.system, packing.static_offsets]


def settings_of(source: Source, packing: Packing, scale: float, tile: int, backend: Backend) -> Settings:
    """Settings of a call."""
    fused = backend is Backend.TRITON
    return Settings(int(source.kind), source.start, source.step, scale, packing.max_length, tile, fused)


def call_of(source: Sequence[Tensor], packing: Sequence[Tensor], key_mask: Tensor | None, settings: Settings) -> Call:
    """The Call that an operator's flat arguments describe."""
    bias = source_from_flat(settings.kind, source, settings.start, settings.step)
    return Call(bias, packing, key_mask, settings.scale, settings.max_length, settings.tile)


def open_ledger(
    bias: Tensor | PairTable,
    packing: Packing,
    *,
    layers: int,
    heads: int,
    width: int,
    dtype: torch.dtype,
    mode: LedgerMode = LedgerMode.DEFER,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    tile: int | None = None,
    backend: Backend | None = None,
) -> Ledger:
    """Ledger of a flat bias [heads * pairs] or a PairTable for `layers` layers with q, k, v [T, heads, width] of `dtype`.

    `scale` (width ** -0.5), `key_mask` [T] bool and `tile` hold for all layers. Where no gradient is wanted the ledger
    keeps nothing. Raises ValueError where shapes disagree, and for a table with ACCUMULATE, whose gradient is dense.
    """
    tabulated = isinstance(bias, PairTable)
    if tabulated and mode is LedgerMode.ACCUMULATE:
        raise ValueError("a PairTable has no dense gradient to accumulate; use LedgerMode.DEFER")
    check_tile(tile)
    source = table_source(bias, packing, heads) if isinstance(bias, PairTable) else dense_source(bias, packing, heads)
    chosen = backend if backend is not None else backend_for(packing.cu_seqlens)
    scale = scale if scale is not None else width**-0.5
    ledger = Ledger(source, packing, key_mask, scale, tile or 0, heads, width, layers, 0, chosen, ())
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in source.flat)
    if not wanted or chosen is Backend.REFERENCE or needs_reference(*source.flat):
        return ledger
    return _with_carriers(ledger, mode, dtype)


def needs_reference(*tensors: Tensor) -> bool:
    """Whether these tensors are being transformed in a way that the fused operators do not know."""
    # a compiler's tracer looks like a functorch transform to `wants_reference`
    return not torch.compiler.is_compiling() and wants_reference("attention", *tensors)


def check_tile(tile: int | None) -> None:
    """Raises ValueError for a tile that no kernel has."""
    if tile not in (None, 16, 32, 64):
        raise ValueError(f"tile is {tile}, expected 16, 32 or 64, or None to choose by the longest sample")


def _with_carriers(ledger: Ledger, mode: LedgerMode, dtype: torch.dtype) -> Ledger:
    source, packing = ledger.source, ledger.packing
    compiling = torch.compiler.is_compiling()
    if mode is LedgerMode.ACCUMULATE:
        carriers: tuple[tuple[Tensor, ...], ...] = ((_open_sums(source.tensors[0], compiling),),)
    else:
        settings = settings_of(source, packing, ledger.scale, ledger.tile, ledger.backend)
        shape = (ledger.layers, packing.sites, ledger.heads, ledger.width, packing.pairs)
        flat = _open_deferred(
            source.flat, packing_tensors(packing), ledger.key_mask, *shape, dtype, compiling, *settings
        )
        carriers = tuple(tuple(flat[i : i + CARRIERS]) for i in range(0, len(flat), CARRIERS))
    return with_progress(ledger, carriers, 0)


def with_progress(ledger: Ledger, carriers: tuple[tuple[Tensor, ...], ...], calls: int) -> Ledger:
    """The same ledger with other carriers, after `calls` calls."""
    return Ledger(
        ledger.source, ledger.packing, ledger.key_mask, ledger.scale, ledger.tile, ledger.heads, ledger.width,
        ledger.layers, calls, ledger.backend, carriers,
    )  # fmt: skip


def hollow_carrier(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of this shape whose values are never read, in one element of memory."""
    return torch.empty((), dtype=dtype, device=device).expand(list(shape))


def real_carrier(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same with memory of its own, for compiled graphs."""
    return torch.empty(list(shape), dtype=dtype, device=device)


CARRIER = {False: hollow_carrier, True: real_carrier}
"""By whether the carrier takes memory."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: fp32, or fp64 where the inputs are."""
    return torch.float64 if dtype is torch.float64 else torch.float32


@torch.library.custom_op("dig_kernels::open_sums", mutates_args=())
def _open_sums(bias: Tensor, real: bool) -> Tensor:
    return CARRIER[real](bias.shape, wide_dtype(bias.dtype), bias.device)


@_open_sums.register_fake
def _(bias: Tensor, real: bool) -> Tensor:
    return CARRIER[real](bias.shape, wide_dtype(bias.dtype), bias.device)


def _open_sums_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.dtype = inputs[0].dtype


def _open_sums_backward(ctx: Any, d_carrier: Tensor | None) -> tuple[Tensor | None, None]:
    slow = d_carrier is None or torch.is_grad_enabled()
    return None if slow else d_carrier.to(ctx.dtype), None  # type: ignore[union-attr]


_open_sums.register_autograd(_open_sums_backward, setup_context=_open_sums_context)


@torch.library.custom_op("dig_kernels::open_deferred", mutates_args=())
def _open_deferred(
    source: Sequence[Tensor], packing: Sequence[Tensor], key_mask: Tensor | None,
    layers: int, sites: int, heads: int, width: int, pairs: int, dtype: torch.dtype, real: bool,
    kind: int, start: float, step: float, scale: float, max_length: int, tile: int, fused: bool,
) -> list[Tensor]:  # fmt: skip
    return _deferred_carriers(source[0].device, layers, (sites, heads, width), dtype, real)


@_open_deferred.register_fake
def _(
    source: Sequence[Tensor], packing: Sequence[Tensor], key_mask: Tensor | None,
    layers: int, sites: int, heads: int, width: int, pairs: int, dtype: torch.dtype, real: bool,
    kind: int, start: float, step: float, scale: float, max_length: int, tile: int, fused: bool,
) -> list[Tensor]:  # fmt: skip
    return _deferred_carriers(source[0].device, layers, (sites, heads, width), dtype, real)


def _deferred_carriers(
    device: torch.device, layers: int, shape: tuple[int, int, int], dtype: torch.dtype, real: bool
) -> list[Tensor]:
    sites, heads, _ = shape
    rows = [(shape, dtype)] * 4 + [((heads, sites), wide_dtype(dtype))] * 2
    return [CARRIER[real](size, element, device) for _ in range(layers) for size, element in rows]


def _open_deferred_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    source, packing, key_mask = inputs[:3]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*source, *packing, key_mask)
    ctx.sources, ctx.pairs, ctx.settings, ctx.others = len(source), inputs[7], Settings(*inputs[10:]), len(inputs) - 2


def _open_deferred_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    source, packing = list(ctx.saved_tensors[: ctx.sources]), list(ctx.saved_tensors[ctx.sources : -1])
    nothing = (*[None] * len(packing),)
    layers = [grads[i : i + CARRIERS] for i in range(0, len(grads), CARRIERS)]
    left = [layer for layer in layers if layer[0] is not None]
    d_source: list[Tensor | None] = [None] * ctx.sources
    if left and not torch.is_grad_enabled():
        groups = [list(group) for group in zip(*left, strict=True)]
        wanted = [bool(needed) for needed in ctx.needs_input_grad[0]]
        arguments = (*groups, source, packing, ctx.saved_tensors[-1], wanted, ctx.pairs, *ctx.settings)
        results = _deferred_gradient(*arguments)
        d_source = [result if needed else None for result, needed in zip(results, wanted, strict=True)]
    return (d_source, list(nothing), *[None] * ctx.others)


_open_deferred.register_autograd(_open_deferred_backward, setup_context=_open_deferred_context)


@torch.library.custom_op("dig_kernels::deferred_gradient", mutates_args=())
def _deferred_gradient(
    q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor], d_out: Sequence[Tensor], lse: Sequence[Tensor],
    delta: Sequence[Tensor], source: Sequence[Tensor], packing: Sequence[Tensor], key_mask: Tensor | None,
    wanted: Sequence[bool], pairs: int,
    kind: int, start: float, step: float, scale: float, max_length: int, tile: int, fused: bool,
) -> list[Tensor]:  # fmt: skip
    layers = LayerTensors(q, k, v, d_out, lse, delta)
    call = call_of(source, packing, key_mask, Settings(kind, start, step, scale, max_length, tile, fused))
    if kind == SourceKind.DENSE:
        d_bias = torch.empty_like(source[0])
        _launch(layers, call, d_bias, None, fused)
        return [d_bias]
    if fused:
        return _table_gradient(layers, call, source, wanted, pairs)
    from dig_kernels.attention_cpu import table_gradient

    return [
        grad if needed else grad.new_empty(0) for grad, needed in zip(table_gradient(layers, call), wanted, strict=True)
    ]


@_deferred_gradient.register_fake
def _(
    q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor], d_out: Sequence[Tensor], lse: Sequence[Tensor],
    delta: Sequence[Tensor], source: Sequence[Tensor], packing: Sequence[Tensor], key_mask: Tensor | None,
    wanted: Sequence[bool], pairs: int,
    kind: int, start: float, step: float, scale: float, max_length: int, tile: int, fused: bool,
) -> list[Tensor]:  # fmt: skip
    return [_gradient_of(tensor, needed) for tensor, needed in zip(source, wanted, strict=True)]


def _gradient_of(tensor: Tensor, needed: bool) -> Tensor:
    return torch.empty_like(tensor) if needed else tensor.new_empty(0)


def _launch(layers: LayerTensors, call: Call, d_bias: Tensor, sites: range | None, fused: bool) -> None:
    if fused:
        from dig_kernels.deferred_kernels import launch_deferred
    else:
        from dig_kernels.attention_cpu import launch_deferred
    launch_deferred(layers, call, d_bias, sites)


def _table_gradient(
    layers: LayerTensors, call: Call, source: Sequence[Tensor], wanted: Sequence[bool], pairs: int
) -> list[Tensor]:
    """By blocks of query rows: summed dS of the block, contracted at once. Memory bounded by TABLE_BLOCK_BYTES."""
    from dig_kernels.pair_contract import contract

    sites, heads, _ = layers.q[0].shape
    packing = Packing(*call.packing, call.max_length, sites, pairs)  # type: ignore[arg-type, call-arg]
    table, bias = source[0], call.source
    grid = KnotGrid(bias.start, bias.start + bias.step * table.shape[1], table.shape[1] + 1)
    made_from = GivenScalar(source[1]) if bias.kind is SourceKind.GIVEN else PairGeometry(*source[1:5])  # type: ignore[arg-type]
    pieces = table.permute(1, 2, 0).contiguous()
    width = max(pitch_of(call.max_length), PITCH)
    rows = max(1, TABLE_BLOCK_BYTES // (4 * heads * width))
    sums: PairGradients | None = None
    for first in range(0, sites, rows):
        block = range(first, min(first + rows, sites))
        d_bias = torch.empty(heads, len(block), width, dtype=torch.float32, device=table.device)
        _launch(layers, call, d_bias, block, fused=True)
        flags = _wanted_flags(bias, wanted)
        sums = contract(d_bias, first, pieces, grid, made_from, packing, flags, static=bias.static, into=sums)
    return _gradients_as_source(sums, bias, source, wanted)


def _wanted_flags(bias: Source, wanted: Sequence[bool]) -> Wanted:
    flags = Wanted(0)
    geometry = bias.kind is SourceKind.GEOMETRY
    parts = [(Wanted.PIECES, wanted[0]), (Wanted.PLACES, wanted[1])]
    parts += [(Wanted.MAPS, wanted[3] or wanted[4])] if geometry else []
    parts += [(Wanted.STATIC, wanted[-1])] if bias.static is not None else []
    for flag, needed in parts:
        flags |= flag if needed else Wanted(0)
    return flags


def _gradients_as_source(
    sums: PairGradients | None, bias: Source, source: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor]:
    if sums is None:
        return [
            torch.zeros_like(tensor) if needed else tensor.new_empty(0)
            for tensor, needed in zip(source, wanted, strict=True)
        ]
    d_table = None if sums.pieces is None else sums.pieces.permute(2, 0, 1).contiguous()
    if bias.kind is SourceKind.GIVEN:
        found = [d_table, sums.u]
    else:
        found = [d_table, sums.positions, None, sums.gain, sums.shift]
    found += [sums.static] if bias.static is not None else []
    pairs = zip(source, found, wanted, strict=True)
    return [
        tensor.new_empty(0) if grad is None or not needed else grad.to(tensor.dtype).view_as(tensor)
        for tensor, grad, needed in pairs
    ]
