"""Point attention of the protein model: logits from scalars, a pair bias and distances between points in the global frame.

    logit_hij = scale q_i . k_j + bias_scale bias_hij - w_h sum_p rho(q_ip - k_jp)

rho is the distance (the published Distributional Graphormer; not the invariant point attention of AlphaFold) or its square
(AlphaFold, BioEmu). The published constants: scale = (3 d) ** -0.5, bias_scale = 3 ** -0.5,
w_h = 0.5 softplus(gamma_h) / sqrt(3 P 9 / 2). Distances are formed point by point from fp32 differences, never expanded into
products, and epsilon (Å²) stands inside the square root, so that coincident points have gradient 0.

In: q, k, v [T, H, d]; points [T, H, P or Pv, 3] in Å, best about the sample's centre; w [H]; a flat bias. Out: values
[T, H, d], points [T, H, Pv, 3] in the global frame (the caller applies the inverse frame) and, where asked for, the weights
as a flat pair tensor, for pair values. Gradients of all of these; memory beyond that is O(T). Knows no frames, no residues.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dig_kernels import reference_heads as reference
from dig_kernels.dispatch import Backend, backend_for, log_slow_path, wants_reference
from dig_kernels.layout import Packing, blocks_from_dense
from dig_kernels.vector_head import (
    KERNEL_TYPES,
    Tiles,
    fitting,
    kernel_case,
    over_keys,
    over_queries,
    padded_width,
    query_blocks,
)

if TYPE_CHECKING:
    from dig_kernels.compiling import CompileCase


class PointMetric(Enum):
    """What of two points' difference enters the logits."""

    DISTANCE = "distance"
    """|q - k|: the published protein model."""
    SQUARED = "squared"
    """|q - k|²: AlphaFold, BioEmu."""


@dataclass(frozen=True)
class Coefficients:
    """Of logits: of q . k, of the bias, epsilon (Å²) inside the square root, and the metric of points."""

    scale: float
    bias_scale: float = 1.0
    epsilon: float = 1e-12
    metric: PointMetric = PointMetric.DISTANCE


FORWARD_TILES = {32: Tiles(64, 32, 4, 1), 64: Tiles(64, 16, 4, 1)}
BACKWARD_TILES = {32: Tiles(64, 16, 4, 1), 64: Tiles(32, 16, 4, 1)}
"""By padded head width: chosen so that nothing spills on sm_80 and sm_90."""
PRECISION = "tf32x3"
"""Of products with value points: three TF32 terms have fp32 accuracy at the speed of tensor cores."""


def _power_of_two(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def _constants(q: Tensor, bias: Tensor | None, key_mask: Tensor | None, squared: bool) -> dict[str, Any]:
    return {
        "WIDTH": q.shape[-1],
        "BLOCK_D": padded_width(q.shape[-1]),
        "HAS_BIAS": bias is not None,
        "HAS_MASK": key_mask is not None,
        "SQUARED": squared,
    }


def _value_constants(v_points: Tensor) -> dict[str, Any]:
    width = 3 * v_points.shape[2]
    return {"VALUE_WIDTH": width, "BLOCK_V": _power_of_two(width), "PRECISION": PRECISION}


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in (tensor.stride(0), tensor.stride(1))]


def _transposed(points: Tensor) -> Tensor:
    """[H, P, 3, T]: one coordinate of neighbouring sites side by side."""
    return points.permute(1, 2, 3, 0).contiguous()


@torch.library.custom_op("dig_kernels::point_attention", mutates_args=())
def _point_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_points: Tensor,
    k_points: Tensor,
    v_points: Tensor,
    head_weights: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    cu: Tensor,
    pair_offsets: Tensor,
    scale: float,
    bias_scale: float,
    epsilon: float,
    squared: bool,
    max_length: int,
    weight_pairs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """values, points, weights (of H * weight_pairs elements: none if that is 0) and the log-sum-exp [H, T]."""
    from dig_kernels import point_attention_kernels as kernels

    sites, heads, width = q.shape
    values, points = v.new_empty(sites, heads, width), torch.empty_like(v_points)
    weights, lse = v.new_empty(heads * weight_pairs), v_points.new_empty(heads, sites)
    qp, kp, w = _transposed(q_points), _transposed(k_points), head_weights.float()
    masks = [q if x is None else x for x in (bias, key_mask)]
    tiles = fitting(FORWARD_TILES[padded_width(width)], max_length)
    per_sample = -(-max_length // tiles.own)
    grid = (per_sample * (len(cu) - 1), heads)
    numbers = (heads, sites, per_sample, scale, bias_scale, q_points.shape[2], epsilon)
    constants = _constants(q, bias, key_mask, squared) | over_queries(tiles)
    if sites:
        kernels.forward[grid](
            q, k, v, qp, kp, v_points, w, *masks, cu, pair_offsets, values, points, lse, *_strides(q, k, v), *numbers,
            **_value_constants(v_points), **constants,
        )  # fmt: skip
    if sites and weight_pairs:
        kernels.write_weights[grid](
            q, k, qp, kp, w, *masks, cu, pair_offsets, lse, weights, *_strides(q, k), *numbers, **constants
        )
    return values, points, weights, lse


@_point_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, qp: Tensor, kp: Tensor, v_points: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    sites, heads, width = q.shape
    values = v.new_empty(sites, heads, width)
    return values, torch.empty_like(v_points), v.new_empty(heads * rest[-1]), v_points.new_empty(heads, sites)


@torch.library.custom_op("dig_kernels::point_attention_backward", mutates_args=())
def _point_attention_backward(
    d_values: Tensor, d_points: Tensor, d_weights: Tensor, values: Tensor, points: Tensor, weights: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, q_points: Tensor, k_points: Tensor, v_points: Tensor, head_weights: Tensor,
    bias: Tensor | None, key_mask: Tensor | None, cu: Tensor, pair_offsets: Tensor, scale: float, bias_scale: float,
    epsilon: float, squared: bool, max_length: int, weight_pairs: int, bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, the three kinds of points, head weights and bias (empty where not asked for)."""
    from dig_kernels import point_attention_kernels as kernels

    (sites, heads, width), n_points = q.shape, q_points.shape[2]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dqp, dkp, dvp = (torch.empty_like(x) for x in (q_points, k_points, v_points))
    d_head = v_points.new_zeros(heads, sites)
    dbias = torch.empty_like(bias) if bias is not None and bias_gradient else q.new_empty(0)
    d_values, d_points, d_weights = d_values.contiguous(), d_points.contiguous(), d_weights.contiguous()
    delta = ((d_values.float() * values).sum(-1) + (d_points * points).sum((-2, -1))).transpose(0, 1).contiguous()
    qp, kp, w = _transposed(q_points), _transposed(k_points), head_weights.float()
    masks = [q if x is None else x for x in (bias, key_mask)]
    tiles = fitting(BACKWARD_TILES[padded_width(width)], max_length)
    per_sample = -(-max_length // tiles.own)
    grid = (per_sample * (len(cu) - 1), heads)
    numbers = (*_strides(q, k, v), heads, sites, per_sample, scale, bias_scale, n_points, epsilon)
    inputs = (q, k, v, qp, kp, v_points, w, *masks, cu, pair_offsets, d_values, d_points, d_weights, lse, delta)
    constants = _constants(q, bias, key_mask, squared) | _value_constants(v_points)
    constants |= {"BLOCK_P": _power_of_two(3 * n_points), "HAS_WEIGHTS": weight_pairs > 0}
    if sites and weight_pairs:
        kernels.row_dot[grid](
            weights, d_weights, cu, pair_offsets, delta, heads, sites, per_sample, **over_queries(tiles)
        )
    if sites:
        kernels.query_gradient[grid](
            *inputs, dq, dqp, d_head, dbias, *numbers, BIAS_GRADIENT=bias_gradient, **constants, **over_queries(tiles)
        )
        kernels.key_gradient[grid](*inputs, dk, dv, dkp, dvp, *numbers, **constants, **over_keys(tiles))
    return dq, dk, dv, dqp, dkp, dvp, d_head.sum(1).to(head_weights.dtype), dbias


@_point_attention_backward.register_fake
def _(dv: Tensor, dp: Tensor, dw: Tensor, o: Tensor, op: Tensor, w: Tensor, lse: Tensor, *inputs: Any) -> Any:
    bias = inputs[7]
    dbias = torch.empty_like(bias) if bias is not None and inputs[-1] else inputs[0].new_empty(0)
    return (*(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs[:7]), dbias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:11], *output)
    ctx.numbers = inputs[11:]


def _backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # once: checkpointing unpacks a tensor one time
    inputs, outputs = saved[:11], saved[11:]
    need = ctx.needs_input_grad
    if torch.is_grad_enabled():
        log_slow_path("point_attention", "create_graph=True")
        function = partial(_reference_of, inputs[8:], ctx.numbers)
        found = reference.gradients_through(function, inputs[:8], need[:8], grads[: 3 if ctx.numbers[-1] else 2])
    else:
        computed = _point_attention_backward(*grads[:3], *outputs, *inputs, *ctx.numbers, need[7])
        found = tuple(g if needed else None for g, needed in zip(computed, need, strict=False))
    return (*found, *[None] * (len(need) - len(found)))


def _reference_of(rest: tuple[Any, ...], numbers: tuple[Any, ...], *inputs: Tensor) -> tuple[Tensor, ...]:
    """The reference from the arguments of the operator."""
    key_mask, cu, pair_offsets = rest
    scale, bias_scale, epsilon, squared, max_length, weight_pairs = numbers
    packing = Packing(cu, pair_offsets, cu, cu, max_length, len(inputs[0]), 0)
    outputs = reference.point_attention(*inputs, packing, scale, bias_scale, epsilon, 1 + squared, key_mask)  # type: ignore[call-arg, arg-type]
    return outputs if weight_pairs else outputs[:2]


_point_attention.register_autograd(_backward, setup_context=_save)


def _blockwise(
    inputs: tuple[Tensor, ...], bias: Tensor | None, packing: Packing, of: Coefficients, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The CPU form: queries in blocks, points one after another, each block recomputed in the backward."""
    q, k, v, q_points, k_points, v_points, head_weights = inputs
    cu, blocks = packing.cu_seqlens.tolist(), reference.bias_blocks(bias, packing, None, q.shape[1])
    values, points, weights = [v[:0]], [v_points[:0]], [v.new_zeros(1, 0, 0)]
    for begin, end, block in zip(cu[:-1], cu[1:], blocks, strict=True):
        keys, shares = slice(begin, end), [v.new_zeros(q.shape[1], 0, end - begin)]
        mask = key_mask[keys] if key_mask is not None else None
        slices = query_blocks(end - begin, q.shape[1] * (end - begin))
        for rows in slices:
            at = slice(begin + rows.start, begin + rows.stop)
            part = block[:, rows] if block is not None else None
            arguments = (
                q[at],
                k[keys],
                v[keys],
                q_points[at],
                k_points[keys],
                v_points[keys],
                head_weights,
                part,
                mask,
                of,
            )
            found = _rows(*arguments) if len(slices) == 1 else checkpoint(_rows, *arguments, use_reentrant=False)
            values.append(found[0])
            points.append(found[1])
            shares.append(found[2])
        weights.append(torch.cat(shares, 1))
    return torch.cat(values), torch.cat(points), blocks_from_dense(weights)


def _rows(
    q: Tensor, k: Tensor, v: Tensor, q_points: Tensor, k_points: Tensor, v_points: Tensor, head_weights: Tensor,
    bias: Tensor | None, mask: Tensor | None, of: Coefficients,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    logits = torch.einsum("ihd,jhd->hij", q * of.scale, k)
    logits = logits if bias is None else logits + of.bias_scale * bias
    for a, b in zip(q_points.permute(2, 3, 1, 0), k_points.permute(2, 3, 1, 0), strict=True):
        apart = sum(
            ((x.unsqueeze(-1) - y.unsqueeze(-2)) ** 2 for x, y in zip(a, b, strict=True)), torch.zeros_like(logits)
        )
        distance = apart if of.metric is PointMetric.SQUARED else torch.sqrt(apart + of.epsilon)
        logits = logits - head_weights[:, None, None] * distance
    share = reference.masked_softmax(logits, mask)
    points = torch.einsum("hij,jhpc->ihpc", share.to(v_points.dtype), v_points)
    return torch.einsum("hij,jhd->ihd", share.to(v.dtype), v), points, share.to(v.dtype)


def point_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_points: Tensor,
    k_points: Tensor,
    v_points: Tensor,
    head_weights: Tensor,
    bias: Tensor | None,
    packing: Packing,
    of: Coefficients,
    *,
    key_mask: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Values [T, H, d] and points [T, H, Pv, 3] (Å, fp32) of point attention within each sample of a packed batch.

    q, k, v [T, H, d] of one dtype; q_points, k_points [T, H, P, 3] and v_points [T, H, Pv, 3] Å; head_weights [H]; bias flat
    [H * pairs]; key_mask [T] bool. Raises ValueError on shapes or dtypes that disagree. Kernels hold d up to 64 and no fp64;
    what they do not hold runs through the CPU form.
    """
    inputs = (q, k, v, q_points, k_points, v_points, head_weights)
    return _dispatch(inputs, bias, packing, of, key_mask, backend, 0)[:2]


def point_attention_with_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_points: Tensor,
    k_points: Tensor,
    v_points: Tensor,
    head_weights: Tensor,
    bias: Tensor | None,
    packing: Packing,
    of: Coefficients,
    *,
    key_mask: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """point_attention and its weights, flat [H * pairs] in the dtype of v, differentiable as well (for pair values)."""
    inputs = (q, k, v, q_points, k_points, v_points, head_weights)
    return _dispatch(inputs, bias, packing, of, key_mask, backend, packing.pairs)


def _dispatch(
    inputs: tuple[Tensor, ...], bias: Tensor | None, packing: Packing, of: Coefficients, key_mask: Tensor | None,
    backend: Backend | None, weight_pairs: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _check(inputs, bias, packing, key_mask)
    q, k, v, *points, head_weights = inputs
    squared = of.metric is PointMetric.SQUARED
    numbers = (of.scale, of.bias_scale, of.epsilon)
    chosen = backend or backend_for(q)
    if chosen is Backend.TRITON and (q.shape[-1] > 64 or q.dtype == torch.float64 or points[0].dtype != torch.float32):
        chosen = Backend.CPU
    if chosen is Backend.REFERENCE or wants_reference("point_attention", *inputs, bias):
        values, found, weights = reference.point_attention(*inputs, bias, packing, *numbers, 1 + squared, key_mask)  # type: ignore
        return values, found, weights.to(v.dtype)
    if chosen is Backend.CPU:
        return _blockwise(inputs, bias, packing, of, key_mask)
    rows = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v)]
    flat = bias.contiguous() if bias is not None else None
    values, found, weights, _ = _point_attention(
        *rows, *[x.contiguous() for x in points], head_weights, flat, key_mask, packing.cu_seqlens, packing.pair_offsets,
        *numbers, squared, packing.max_length, weight_pairs,
    )  # fmt: skip
    return values, found, weights


def _check(inputs: tuple[Tensor, ...], bias: Tensor | None, packing: Packing, key_mask: Tensor | None) -> None:
    q, k, v, q_points, k_points, v_points, head_weights = inputs
    sites, heads, width = packing.sites, *q.shape[1:]
    expected: dict[str, tuple[Tensor, tuple[int, ...]]]
    expected = {"q": (q, (sites, heads, width)), "k": (k, (sites, heads, width)), "v": (v, (sites, heads, width))}
    expected["q_points"] = (q_points, (sites, heads, q_points.shape[2], 3))
    expected["k_points"] = (k_points, tuple(q_points.shape))
    expected["v_points"] = (v_points, (sites, heads, v_points.shape[2], 3))
    expected["head_weights"] = (head_weights, (heads,))
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v should have one dtype, found {q.dtype}, {k.dtype} and {v.dtype}")
    if bias is not None and bias.shape != (heads * packing.pairs,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({heads * packing.pairs},): flat pair blocks")
    if key_mask is not None and key_mask.shape != (sites,):
        raise ValueError(f"key_mask has shape {tuple(key_mask.shape)}, expected ({sites},)")


def compile_cases() -> list[CompileCase]:
    """The launch configurations to compile for GPUs that are not here: bf16, bias and mask, 4 query and 8 value points."""
    from dig_kernels import point_attention_kernels as kernels

    types = KERNEL_TYPES | dict.fromkeys(("values", "weights", "d_values", "d_weights"), "*bf16")
    cases = []
    for width in (24, 64):
        block = padded_width(width)
        constants: dict[str, Any] = {"WIDTH": width, "BLOCK_D": block, "BLOCK_P": 16, "VALUE_WIDTH": 24, "BLOCK_V": 32}
        constants |= {"HAS_BIAS": True, "HAS_MASK": True, "HAS_WEIGHTS": True, "BIAS_GRADIENT": True}
        constants |= {"SQUARED": False, "PRECISION": PRECISION}
        forward, backward = over_queries(FORWARD_TILES[block]), over_queries(BACKWARD_TILES[block])
        launches = {"forward": forward, "write_weights": forward, "query_gradient": backward}
        launches["key_gradient"] = over_keys(BACKWARD_TILES[block])
        for name, shape in launches.items():
            title = f"point_attention d={width} {name}"
            cases.append(kernel_case(title, getattr(kernels, name), constants | shape, types))
    return cases
