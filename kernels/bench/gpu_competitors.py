"""Competitors of the attention kernels, each in the arrangement, head width and element type that suit it best.

They take padded batches: sides rounded up to 16 sites, absent keys masked by the bias.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from bench.gpu_problem import CHECKED_HEADS, Problem, dense_bias, table_slice
from bench.gpu_setup import Arrangement, Attention, Build, Layer, Setup, UnavailableError, arranged
from bench.gpu_timing import Bench
from dig_kernels.layout import dense_from_blocks
from dig_kernels.reference import distances, pair_scalar
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

ABSENT = -1e4
"""Bias of keys that are padding."""
SIDE = 16
"""Padded batches have sides of a multiple of this many sites: every row of the bias is aligned to 32 bytes in bf16."""
PADDED_WIDTH = 32


def side_of(problem: Problem) -> int:
    """Sites of a padded sample."""
    return -(-problem.longest // SIDE) * SIDE


def head_first(problem: Problem, width: int) -> Arrangement:
    """[B, H, side, width]."""
    length, d = problem.lengths[0], problem.width

    def place(rows: Tensor) -> Tensor:
        out = rows.new_zeros(len(problem.lengths), problem.heads, side_of(problem), width)
        for sample, part in zip(out, rows.split(problem.lengths), strict=True):
            sample[:, : len(part), :d] = part.transpose(0, 1)
        return out

    return Arrangement(place, lambda tensor: tensor[0, :CHECKED_HEADS, :length, :d])


def with_row_axis(arrangement: Arrangement) -> Arrangement:
    """[B, 1, H, side, width]: libraries for pair representations attend within rows."""
    return Arrangement(
        lambda rows: arrangement.place(rows).unsqueeze(1), lambda tensor: arrangement.cut(tensor.squeeze(1))
    )


def site_first(arrangement: Arrangement) -> Arrangement:
    """[B, 1, side, H, width] from [B, H, side, width]."""
    return Arrangement(
        lambda rows: arrangement.place(rows).transpose(1, 2).unsqueeze(1).contiguous(),
        lambda tensor: arrangement.cut(tensor.squeeze(1).transpose(1, 2)),
    )


def padded_bias(problem: Problem) -> Tensor:
    """[B, H, side, side], ABSENT beyond a sample's sites."""
    shape = (len(problem.lengths), problem.heads, side_of(problem), side_of(problem))
    out = torch.full(shape, ABSENT, dtype=problem.dtype, device=problem.pieces.device)
    blocks = dense_from_blocks(dense_bias(problem), problem.packing, problem.heads)
    for sample, block in zip(out, blocks, strict=True):
        sample[:, : block.shape[1], : block.shape[2]] = block
    return out


@dataclass(frozen=True)
class Padded:
    """How a padded competitor takes its arguments."""

    arrangement: Arrangement
    scale: float
    bias_dtype: torch.dtype
    row_axis: int | None = None
    """Axis of size 1 that the bias has besides [B, H, side, side]."""


def padded_setup(problem: Problem, padded: Padded, attention: Callable[[Tensor], Attention], layers: int) -> Setup:
    """Setup of `attention`, which binds the bias and then takes q, k, v."""
    axis, length = padded.row_axis, problem.lengths[0]
    bias = padded_bias(problem).to(padded.bias_dtype)
    bias = (bias if axis is None else bias.unsqueeze(axis)).requires_grad_()

    def cut_bias(tensor: Tensor) -> Tensor:
        plain = tensor if axis is None else tensor.squeeze(axis)
        return plain[0, :CHECKED_HEADS, :length, :length]

    bound = attention(bias)
    rows, seeds = arranged(problem, padded.arrangement, layers)
    return Setup(
        rows, [bias], seeds, partial(each_layer, bound), padded.scale, padded.arrangement.cut,
        lambda: cut_bias(bias), cut_bias,
    )  # fmt: skip


def each_layer(attention: Attention, layers: Sequence[Layer]) -> list[Tensor]:
    """Attention of every layer."""
    return [attention(*layer) for layer in layers]


def plain(problem: Problem, width: int) -> Padded:
    """[B, H, side, width], the bias in the dtype of the rows."""
    return Padded(head_first(problem, width), problem.width**-0.5, problem.dtype)


def widths(problem: Problem) -> tuple[int, int]:
    """Head widths to try: as it is, and padded with zeros."""
    return problem.width, PADDED_WIDTH


def eager_attention(softmax_dtype: torch.dtype, scale: float, bias: Tensor) -> Attention:
    """From the formula, the softmax in `softmax_dtype`."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = scale * q @ k.transpose(-1, -2) + bias
        return torch.softmax(logits, dim=-1, dtype=softmax_dtype).to(v.dtype) @ v

    return attention


def eager_variants(problem: Problem, bench: Bench) -> dict[str, Build]:
    """Softmax in fp32, as the reference model has it, and in the dtype of the rows."""
    return {
        f"softmax {dtype}".replace("torch.", ""): partial(
            padded_setup, problem, plain(problem, problem.width), partial(eager_attention, dtype, problem.width**-0.5)
        )
        for dtype in dict.fromkeys((torch.float32, problem.dtype))
    }


def compiled_variants(problem: Problem, bench: Bench) -> dict[str, Build]:
    """The same through torch.compile."""

    def formula(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        return eager_attention(dtype, problem.width**-0.5, bias)(q, k, v)

    compiled = bench.compiled(formula)

    def attention(dtype: torch.dtype, bias: Tensor) -> Attention:
        return lambda q, k, v: compiled(q, k, v, bias, dtype)

    return {
        f"softmax {dtype}".replace("torch.", ""): partial(
            padded_setup, problem, plain(problem, problem.width), partial(attention, dtype)
        )
        for dtype in dict.fromkeys((torch.float32, problem.dtype))
    }


def sdpa_variants(problem: Problem, bench: Bench) -> dict[str, Build]:
    """Backends that take a bias with a gradient."""
    backends = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION] if bench.on_gpu else [SDPBackend.MATH]

    def attention(backend: SDPBackend, bias: Tensor) -> Attention:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=problem.width**-0.5)

        return attend

    return {
        f"{backend.name.lower()} d={width}": partial(
            padded_setup, problem, plain(problem, width), partial(attention, backend)
        )
        for backend in backends
        for width in widths(problem)
    }


def compiled_flex(bench: Bench) -> Callable[..., Tensor]:
    """FlexAttention, compiled once for all setups of a contender (uncompiled on a processor, where it has no backward)."""
    compiled: Callable[..., Tensor] = bench.compiled(flex_attention) if bench.on_gpu else flex_attention
    return compiled


def flex_dense_variants(problem: Problem, bench: Bench) -> dict[str, Build]:
    """FlexAttention with the dense bias captured by score_mod."""
    flex = compiled_flex(bench)

    def attention(bias: Tensor) -> Attention:
        def added(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + bias[b, h, i, j]

        return lambda q, k, v: flex(q, k, v, score_mod=added, scale=problem.width**-0.5)

    return {f"d={width}": partial(padded_setup, problem, plain(problem, width), attention) for width in widths(problem)}


def flex_table_variants(problem: Problem, bench: Bench) -> dict[str, Build]:
    """FlexAttention that looks the bias up: piece and fraction of each pair are given, the table alone has a gradient."""
    flex = compiled_flex(bench)
    return {f"d={width}": partial(flex_table_setup, problem, flex, width) for width in widths(problem)}


def flex_table_setup(problem: Problem, flex: Callable[..., Tensor], width: int, layers: int) -> Setup:
    """Each coefficient is a tensor of its own: score_mod may read a captured tensor with a gradient once."""
    piece, fraction, absent = padded_places(problem)
    coefficients = [c.t().contiguous().requires_grad_() for c in problem.pieces.unbind(1)]
    c0, c1, c2, c3 = coefficients

    def looked_up(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        k, f = piece[b, i, j], fraction[b, i, j]
        return score + absent[b, j] + c0[h, k] + f * (c1[h, k] + f * (c2[h, k] + f * c3[h, k]))

    attend = partial(each_layer, lambda q, k, v: flex(q, k, v, score_mod=looked_up, scale=problem.width**-0.5))
    arrangement = head_first(problem, width)
    rows, seeds = arranged(problem, arrangement, layers)
    known = partial(table_slice, problem)
    return Setup(rows, coefficients, seeds, attend, problem.width**-0.5, arrangement.cut, known)


def padded_places(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Piece [B, side, side] int32 and fraction of every pair, and the mask [B, side] as a bias."""
    batch, side, device = len(problem.lengths), side_of(problem), problem.pieces.device
    place = torch.zeros(batch, side, side, device=device)
    absent = torch.full((batch, side), ABSENT, device=device)
    geometry, begin = problem.geometry, 0
    for sample, length in enumerate(problem.lengths):
        x, types = geometry.positions[begin : begin + length], geometry.types[begin : begin + length].long()
        u = pair_scalar(distances(x, x), types, types, geometry.gain, geometry.shift)
        place[sample, :length, :length] = ((u - problem.grid.start) / problem.grid.step).clamp(0, len(problem.pieces))
        absent[sample, :length] = 0
        begin += length
    piece = place.floor().clamp(max=len(problem.pieces) - 1)
    return piece.int(), place - piece, absent


def ds4sci_variants(problem: Problem, bench: Bench) -> dict[str, Build]:
    """DeepSpeed's Evoformer attention, [B, 1, L, H, d] with the bias [B, 1, H, L, L]; it scales by its own width."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UnavailableError("deepspeed is not installed")
    if not bench.on_gpu:
        raise UnavailableError("needs a GPU")
    from deepspeed.ops.deepspeed4science import DS4Sci_EvoformerAttention

    return evoformer_variants(problem, DS4Sci_EvoformerAttention)


def evoformer_variants(problem: Problem, kernel: Callable[..., Tensor]) -> dict[str, Build]:
    """Variants of a function (q, k, v, [mask, bias]) in Evoformer's arrangement."""

    def padded(width: int) -> Padded:
        return Padded(site_first(head_first(problem, width)), width**-0.5, problem.dtype, row_axis=1)

    def attention(bias: Tensor) -> Attention:
        return lambda q, k, v: kernel(q, k, v, [None, bias])

    return {f"d={width}": partial(padded_setup, problem, padded(width), attention) for width in widths(problem)}


def cuequivariance_variants(problem: Problem, bench: Bench) -> dict[str, Build]:
    """cuEquivariance's triangle attention over one row."""
    if importlib.util.find_spec("cuequivariance_torch") is None:
        raise UnavailableError("cuequivariance_torch is not installed")
    from cuequivariance_torch import triangle_attention

    return triangle_variants(problem, triangle_attention)


def triangle_variants(problem: Problem, kernel: Callable[..., Tensor]) -> dict[str, Build]:
    """Variants of a function (q, k, v, bias, scale=) on [B, 1, H, L, d] and [B, 1, H, L, L], the bias also in fp32."""
    scale = problem.width**-0.5

    def attention(bias: Tensor) -> Attention:
        return lambda q, k, v: kernel(q, k, v, bias, scale=scale)

    return {
        f"d={width} bias {dtype}".replace("torch.", ""): partial(
            padded_setup,
            problem,
            Padded(with_row_axis(head_first(problem, width)), scale, dtype, row_axis=1),
            attention,
        )
        for width in widths(problem)
        for dtype in dict.fromkeys((torch.float32, problem.dtype))
    }
