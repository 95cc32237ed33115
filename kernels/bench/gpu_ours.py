"""This package's attention kernels as contenders: bias streamed, gradient deferred, table in the kernel, CUDA C++."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from bench.gpu_problem import CHECKED_HEADS, Problem, dense_bias, first_block, table_slice
from bench.gpu_setup import Arrangement, Build, Layer, Setup, UnavailableError, arranged
from bench.gpu_timing import Bench
from dig_kernels import cuda_extension
from dig_kernels.attention import biased_attention, layer_attention, open_ledger
from dig_kernels.bias_gradient import LedgerMode
from dig_kernels.bias_source import PairTable
from dig_kernels.dispatch import Backend
from torch import Tensor

SMALL_BLOCK = 192
"""Longest sample of the whole-block kernel in bf16."""


def packed(problem: Problem) -> Arrangement:
    """[T, H, d] as it is."""
    length = problem.lengths[0]
    return Arrangement(lambda rows: rows, lambda tensor: tensor[:length, :CHECKED_HEADS].transpose(0, 1))


Ours = Callable[[Problem, Tensor, Sequence[Layer]], Sequence[Tensor]]
"""(problem, bias leaf, layers) -> outputs."""


def packed_setup(problem: Problem, attend: Ours, layers: int) -> Setup:
    """Setup with a dense packed bias."""
    bias = dense_bias(problem)
    rows, seeds = arranged(problem, packed(problem), layers)
    leaf, cut_bias = bias.requires_grad_(), partial(first_block, problem)
    known = partial(cut_bias, leaf)
    scale = problem.width**-0.5
    return Setup(rows, [leaf], seeds, partial(attend, problem, leaf), scale, packed(problem).cut, known, cut_bias)


def table_setup(
    problem: Problem, attend: Callable[[PairTable, Sequence[Layer]], Sequence[Tensor]], layers: int
) -> Setup:
    """Setup with the bias made from geometry inside the kernel; gradients of table, positions, gain and shift."""
    tensors = (problem.pieces, problem.geometry.positions, problem.geometry.gain, problem.geometry.shift)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    geometry = replace(problem.geometry, positions=leaves[1], gain=leaves[2], shift=leaves[3])
    table = PairTable(leaves[0], problem.grid, geometry)
    rows, seeds = arranged(problem, packed(problem), layers)
    scale = problem.width**-0.5
    return Setup(rows, leaves, seeds, partial(attend, table), scale, packed(problem).cut, partial(table_slice, problem))


def through_ledger(
    problem: Problem, mode: LedgerMode, bias: Tensor | PairTable, layers: Sequence[Layer]
) -> list[Tensor]:
    """Layers that share a bias through a ledger."""
    ledger = open_ledger(
        bias, problem.packing, layers=len(layers), heads=problem.heads, width=problem.width, dtype=problem.dtype,
        mode=mode, backend=Backend.TRITON,
    )  # fmt: skip
    outs = []
    for q, k, v in layers:
        out, ledger = layer_attention(q, k, v, ledger)
        outs.append(out)
    return outs


def stream(problem: Problem, bias: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
    """One layer writes its own gradient of the bias; several add to one fp32 sum."""
    if len(layers) > 1:
        return through_ledger(problem, LedgerMode.ACCUMULATE, bias, layers)
    q, k, v = layers[0]
    return [biased_attention(q, k, v, bias, problem.packing, backend=Backend.TRITON)]


def defer(problem: Problem, bias: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
    """The gradient of the bias is summed over layers in registers at the end."""
    return through_ledger(problem, LedgerMode.DEFER, bias, layers)


def small_block(problem: Problem, bias: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
    """A thread block per sample and head; autograd adds the gradients of layers."""
    return [cuda_extension.small_block_attention(q, k, v, bias, problem.packing) for q, k, v in layers]


def stream_variants(problem: Problem, bench: Bench) -> dict[str, Build]:
    """See `stream`."""
    return {"packed": partial(packed_setup, problem, stream)}


def defer_variants(problem: Problem, bench: Bench) -> dict[str, Build]:
    """See `defer`."""
    return {"packed": partial(packed_setup, problem, defer)}


def table_variants(problem: Problem, bench: Bench) -> dict[str, Build]:
    """The table inside the Triton kernels."""
    return {"packed": partial(table_setup, problem, partial(through_ledger, problem, LedgerMode.DEFER))}


def small_block_variants(problem: Problem, bench: Bench) -> dict[str, Build]:
    """See `small_block`."""
    _need_extension()
    if problem.longest > SMALL_BLOCK:
        raise UnavailableError(f"takes samples of at most {SMALL_BLOCK} sites")
    return {"packed": partial(packed_setup, problem, small_block)}


def cuda_table_variants(problem: Problem, bench: Bench) -> dict[str, Build]:
    """The table inside the CUDA C++ kernel; gradients of q, k and v alone, since those of the table are not fused."""
    _need_extension()

    def attend(table: PairTable, layers: Sequence[Layer]) -> list[Tensor]:
        constant = replace(table, pieces=table.pieces.detach(), source=problem.geometry)
        return [cuda_extension.table_attention(q, k, v, constant, problem.packing) for q, k, v in layers]

    def build(layers: int) -> Setup:
        return replace(table_setup(problem, attend, layers), shared=[])

    return {"packed": build}


def _need_extension() -> None:
    if not cuda_extension.is_available():
        raise UnavailableError("cannot be built here: needs a GPU of capability 8.0 and nvcc")
    cuda_extension.load_extension()
