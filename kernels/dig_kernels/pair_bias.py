"""Pair bias generator: one scalar u per pair -> C tabulated channels, the first as attention bias, the others summed.

    bias_h,ij = log sum over copies m of key j of exp f_h(u_ijm) + static_h,ij          h < biased
    node_i,c  = sum over keys j (not masked) and their copies m of f_c(u_ijm)           biased <= c < C

f is the table of radial_table.py. u is given, or gain[t_i,t_j] |x_i - x_j - offset_m| + shift[t_i,t_j] (pair_source.py);
without images a key has one copy, itself, and the logarithm and the exponential cancel. Copies share q, k and v, so
attention over the keys with this bias equals attention over all copies. One pass over the pairs; nothing of size
pairs x C is made, not even in the backward (pair_contract.py), which is deterministic. Second derivatives are those of
the table: piecewise linear in u (radial_table.py). Knows tensors, not molecules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dig_kernels.dispatch import Backend, backend_for, log_slow_path, wants_reference
from dig_kernels.layout import Packing
from dig_kernels.pair_source import (
    GivenScalar,
    PairGeometry,
    PairGradients,
    PairProblem,
    PairSource,
    PeriodicImages,
    Wanted,
    check_source,
    check_static,
    kernel_operands,
    periodic_images,
    single_precision,
    tile_heads,
)
from dig_kernels.radial_table import KnotGrid
from dig_kernels.reference_pairs import pair_channels_cpu, pair_channels_reference

if TYPE_CHECKING:
    from dig_kernels.compiling import CompileCase

__all__ = [
    "GivenScalar",
    "PairGeometry",
    "PairGradients",
    "PairSource",
    "PeriodicImages",
    "Wanted",
    "compile_cases",
    "pair_channels",
    "periodic_images",
]

_TENSORS = (
    "pieces", "u", "positions", "gain", "shift", "static", "types", "image_starts", "image_offsets", "key_mask",
    "cu_seqlens", "pair_offsets", "system", "static_offsets",
)  # fmt: skip
"""Tensors of the operator in order; the first _DIFFERENTIABLE may need a gradient."""
_DIFFERENTIABLE = 6


def _launch(problem: PairProblem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The fused kernel: bias and node sums. More than one launch only beyond 4 blocks of summed channels."""
    from dig_kernels.pair_bias_kernels import LAUNCH, pair_channels_kernel, tile_keys

    pieces, packing, biased = problem.pieces, problem.packing, problem.biased
    summed = pieces.shape[-1] - biased
    bias = pieces.new_empty(biased * packing.pairs, dtype=dtype)
    node = pieces.new_empty(packing.sites, summed)
    if not packing.sites:
        return bias, node
    operands = kernel_operands(problem, LAUNCH.channels)
    heads = tile_heads(biased)
    for first in range(0, max(summed, 1), 4 * LAUNCH.channels):
        pair_channels_kernel[(packing.sites,)](
            bias,
            node,
            **operands,
            static=problem.static.contiguous() if problem.static is not None else None,
            system=packing.system,
            static_offsets=packing.static_offsets,
            first_summed=first,
            STATIC=problem.static is not None,
            BIAS=biased > 0 and first == 0,
            NODE_BLOCKS=min(4, -(-(summed - first) // LAUNCH.channels)),
            BLOCK_KEYS=tile_keys(LAUNCH.keys, heads),
            BLOCK_HEADS=heads,
            BLOCK_CHANNELS=LAUNCH.channels,
            num_warps=LAUNCH.warps,
        )
    return bias, node


def _problem(tensors: dict[str, Tensor | None], numbers: tuple[Any, ...]) -> PairProblem:
    """The inverse of _flatten."""
    copies, max_length, sites, pairs, start, stop, biased = numbers
    t: dict[str, Any] = tensors
    packing = Packing(t["cu_seqlens"], t["pair_offsets"], t["system"], t["static_offsets"], max_length, sites, pairs)
    grid = KnotGrid(start, stop, len(t["pieces"]) + 1)
    source: PairSource
    if t["u"] is not None:
        source = GivenScalar(t["u"])
    else:
        images = None
        if t["image_starts"] is not None:
            images = PeriodicImages(t["image_starts"], t["image_offsets"], copies)
        source = PairGeometry(t["positions"], t["types"], t["gain"], t["shift"], images)
    return PairProblem(t["pieces"], grid, source, t["static"], t["key_mask"], packing, biased)


def _flatten(problem: PairProblem) -> tuple[Any, ...]:
    """Arguments of the operator: tensors in the order of _TENSORS, then the numbers of _problem."""
    source, packing, grid = problem.source, problem.packing, problem.grid
    images = source.images if isinstance(source, PairGeometry) else None
    named: dict[str, Any] = {**vars(problem), **vars(source), **vars(packing)}
    if images is not None:
        named |= {"image_starts": images.starts, "image_offsets": images.offsets}
    numbers = (images.copies if images is not None else 0, packing.max_length, packing.sites, packing.pairs)
    return *(named.get(name) for name in _TENSORS), *numbers, grid.start, grid.stop, problem.biased


def _unflatten(*operands: Any) -> PairProblem:
    count = len(_TENSORS)
    return _problem(dict(zip(_TENSORS, operands[:count], strict=True)), operands[count:])


@torch.library.custom_op("dig_kernels::pair_channels", mutates_args=())
def _pair_channels(
    pieces: Tensor,
    u: Tensor | None,
    positions: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    static: Tensor | None,
    types: Tensor | None,
    image_starts: Tensor | None,
    image_offsets: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor,
    pair_offsets: Tensor,
    system: Tensor,
    static_offsets: Tensor,
    copies: int,
    max_length: int,
    sites: int,
    pairs: int,
    start: float,
    stop: float,
    biased: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    tensors = (pieces, u, positions, gain, shift, static, types, image_starts, image_offsets, key_mask)
    offsets = (cu_seqlens, pair_offsets, system, static_offsets)
    numbers = (copies, max_length, sites, pairs, start, stop, biased)
    return _launch(_unflatten(*tensors, *offsets, *numbers), dtype)


@_pair_channels.register_fake
def _(*operands: Any) -> tuple[Tensor, Tensor]:
    pieces, (sites, pairs, _, _, biased, dtype) = operands[0], operands[-6:]
    return pieces.new_empty(biased * pairs, dtype=dtype), pieces.new_empty(sites, pieces.shape[-1] - biased)


@torch.library.custom_op("dig_kernels::pair_channels_backward", mutates_args=())
def _pair_channels_backward(
    d_bias: Tensor,
    d_node: Tensor,
    wanted: int,
    pieces: Tensor,
    u: Tensor | None,
    positions: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    static: Tensor | None,
    types: Tensor | None,
    image_starts: Tensor | None,
    image_offsets: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor,
    pair_offsets: Tensor,
    system: Tensor,
    static_offsets: Tensor,
    copies: int,
    max_length: int,
    sites: int,
    pairs: int,
    start: float,
    stop: float,
    biased: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from dig_kernels.pair_contract import contract_all

    tensors = (pieces, u, positions, gain, shift, static, types, image_starts, image_offsets, key_mask)
    offsets = (cu_seqlens, pair_offsets, system, static_offsets)
    numbers = (copies, max_length, sites, pairs, start, stop, biased)
    problem = _unflatten(*tensors, *offsets, *numbers)
    gradients = contract_all(problem, d_bias, d_node, Wanted(wanted))
    found = [getattr(gradients, name) for name in _TENSORS[:_DIFFERENTIABLE]]
    given = tensors[:_DIFFERENTIABLE]
    one, two, three, four, five, six = (
        gradient.to(like.dtype) if gradient is not None and like is not None else pieces.new_empty(0)
        for gradient, like in zip(found, given, strict=True)
    )
    return one, two, three, four, five, six


@_pair_channels_backward.register_fake
def _(d_bias: Tensor, d_node: Tensor, wanted: int, *operands: Any) -> tuple[Tensor, ...]:
    pieces, kinds = operands[0], _kinds()
    return tuple(
        torch.empty_like(like, memory_format=torch.contiguous_format)
        if like is not None and kind in Wanted(wanted)
        else pieces.new_empty(0)
        for like, kind in zip(operands[:_DIFFERENTIABLE], kinds, strict=True)
    )


def _kinds() -> tuple[Wanted, ...]:
    return Wanted.PIECES, Wanted.PLACES, Wanted.PLACES, Wanted.MAPS, Wanted.MAPS, Wanted.STATIC


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    count = len(_TENSORS)
    ctx.save_for_backward(*inputs[:count])
    ctx.numbers = inputs[count:-1]
    ctx.dtype = inputs[-1]


def _backward(ctx: Any, d_bias: Tensor, d_node: Tensor) -> tuple[Any, ...]:
    operands = (*ctx.saved_tensors, *ctx.numbers)
    needed = ctx.needs_input_grad[:_DIFFERENTIABLE]
    found: tuple[Tensor | None, ...]
    if torch.is_grad_enabled():
        log_slow_path("pair_channels", "create_graph=True")
        found = _differentiable_backward(operands, needed, ctx.dtype, d_bias, d_node)
    else:
        wanted = Wanted(0)
        for kind, need in zip(_kinds(), needed, strict=True):
            wanted |= kind if need else Wanted(0)
        found = _pair_channels_backward(d_bias, d_node, wanted.value, *operands)
    gradients = (gradient if need else None for gradient, need in zip(found, needed, strict=True))
    return *gradients, *(None for _ in range(len(operands) + 1 - _DIFFERENTIABLE))


def _differentiable_backward(
    operands: tuple[Any, ...], needed: tuple[bool, ...], dtype: torch.dtype, d_bias: Tensor, d_node: Tensor
) -> tuple[Tensor | None, ...]:
    """The vector-Jacobian product through the reference, with a graph of its own."""
    inputs = [tensor for tensor, need in zip(operands, needed, strict=False) if need]
    with torch.enable_grad():
        bias, node = pair_channels_reference(_unflatten(*operands))
        outputs, seeds = (bias.to(dtype), node), (d_bias, d_node)
        found = iter(torch.autograd.grad(outputs, inputs, seeds, create_graph=True, materialize_grads=True))
    return tuple(next(found) if need else None for need in needed)


_pair_channels.register_autograd(_backward, setup_context=_save)


def pair_channels(
    pieces: Tensor,
    grid: KnotGrid,
    source: PairSource,
    static: Tensor | None,
    packing: Packing,
    biased: int,
    *,
    key_mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Bias flat [biased * pairs] and node sums [T, C - biased] from pieces [K-1, 4, C] on the knots of `grid`.

    static: flat over the systems of the packing, [biased * static pairs]; key_mask [T]: True where a key counts in the
    sums (the bias of other keys is for the attention to ignore); dtype of the bias, by default that of pieces.
    Differentiable in pieces, u or positions, gain and shift, and static; image offsets are constants.
    Raises ValueError where shapes disagree, or for fp64 in the fused kernels.
    """
    problem = PairProblem(pieces, grid, source, static, key_mask, packing, biased)
    _check(problem)
    dtype = dtype if dtype is not None else pieces.dtype
    chosen = backend if backend is not None else backend_for(pieces)
    # a compiler's tracer looks like a functorch transform to wants_reference
    if not torch.compiler.is_compiling() and wants_reference("pair_channels", *_flatten(problem)[:_DIFFERENTIABLE]):
        chosen = Backend.REFERENCE
    if chosen is Backend.TRITON:
        if pieces.dtype is torch.float64:
            raise ValueError("the fused kernels compute in fp32; for fp64 pieces pass backend=Backend.REFERENCE")
        return _pair_channels(*_flatten(single_precision(problem)), dtype)
    bias, node = pair_channels_reference(problem) if chosen is Backend.REFERENCE else pair_channels_cpu(problem)
    return bias.to(dtype), node


def _check(problem: PairProblem) -> None:
    pieces, packing = problem.pieces, problem.packing
    expected = (problem.grid.knots - 1, 4)
    if pieces.dim() != 3 or tuple(pieces.shape[:2]) != expected:
        raise ValueError(
            f"pieces has shape {tuple(pieces.shape)}; {problem.grid.knots} knots need [{expected[0]}, 4, C]"
        )
    if not 0 <= problem.biased <= min(pieces.shape[2], 256):
        raise ValueError(
            f"biased is {problem.biased}, expected 0 .. {min(pieces.shape[2], 256)} of {pieces.shape[2]} channels"
        )
    if problem.key_mask is not None and tuple(problem.key_mask.shape) != (packing.sites,):
        raise ValueError(f"key_mask has shape {tuple(problem.key_mask.shape)}, expected ({packing.sites},)")
    if problem.static is not None:
        check_static(problem.static, packing, problem.biased)
    check_source(problem.source, packing)


def compile_cases() -> list[CompileCase]:
    """The chosen configurations: 32 heads in bf16 with 128 summed channels, for each source, forward and backward."""
    from dig_kernels.compiling import CompileCase
    from dig_kernels.pair_bias_kernels import (
        GEOMETRY_ARGUMENTS,
        GIVEN_ARGUMENTS,
        IMAGES_ARGUMENTS,
        LAUNCH,
        compile_signature,
        pair_channels_kernel,
        tile_keys,
    )
    from dig_kernels.pair_contract import gradient_cases

    sources = (("given", GIVEN_ARGUMENTS), ("geometry", GEOMETRY_ARGUMENTS), ("images", IMAGES_ARGUMENTS))
    cases = []
    for name, absent in sources:
        flags = {"GIVEN": name == "given", "IMAGES": name == "images", "STATIC": True, "MASKED": True}
        blocks = {"BLOCK_KEYS": tile_keys(LAUNCH.keys, 32), "BLOCK_HEADS": 32, "BLOCK_CHANNELS": LAUNCH.channels}
        constants = {**absent, **flags, "BIAS": True, "NODE_BLOCKS": 4, **blocks}
        signature = compile_signature(pair_channels_kernel.arg_names, constants)
        aligned = frozenset(("biased", "summed", "table_width", "first_summed"))
        cases.append(
            CompileCase(
                f"pair_channels_{name}",
                pair_channels_kernel,
                signature,
                constants,
                LAUNCH.warps,
                divisible_by_16=aligned,
            )
        )
    return cases + gradient_cases()
