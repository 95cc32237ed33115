"""Equivariant read-out: attention weights times one scalar per (head, key) times the unit vector between the two sites.

    out_i = sum_h sum_j p_hij s_hj (x_j - x_i) / (|x_i - x_j| + 1e-5)      (or x_i - x_j: Direction)

p = softmax_j(scale q_i . k_j + bias_hij). A bias-free linear map D -> 1 after the head needs no more than s_hj = v_hj . f_h,
f_h being its slice for head h, so values have one column instead of three times d. Keys are the sites of the sample or, with
ImageKeys, all their periodic copies: these share q, k and s with their site and have their own displacement and bias.

In: q, k, s, bias, positions (Å). Out: a vector per site. Gradients of all of these; copies' offsets are constants. A pair at
distance 0 has no direction and passes no gradient to the positions. Nothing of size L x L x 3 is made, and of size
H x L x L nothing but the bias and its gradient. Knows no chemistry, no diffusion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dig_kernels import reference_heads as reference
from dig_kernels.dispatch import Backend, backend_for, log_slow_path, wants_reference
from dig_kernels.layout import Packing, pitch_of

if TYPE_CHECKING:
    from dig_kernels.compiling import CompileCase


class Direction(Enum):
    """Which way the unit vectors point."""

    TOWARDS_KEY = -1.0
    """x_j - x_i."""
    FROM_KEY = 1.0
    """x_i - x_j."""


@dataclass(frozen=True)
class ImageKeys:
    """Periodic copies as keys, those of a site in sequence: copy e stands at positions[sources[e]] + offsets[e].

    starts [T+1] and bounds [B+1] int32 are the first copies of each site and sample; pair_offsets [B+1] int64 the starts of
    the samples' blocks [H, L_b, pitch(E_b)] in a flat bias, of one head; longest and pairs as in Packing.
    """

    sources: Tensor
    offsets: Tensor
    starts: Tensor
    bounds: Tensor
    pair_offsets: Tensor
    longest: int
    pairs: int


def image_keys(starts: Tensor, offsets: Tensor, packing: Packing) -> ImageKeys:
    """ImageKeys from starts [T+1] and offsets [E, 3] Å of each site's copies (itself, at 0, among them); waits for the device."""
    if starts.shape != (packing.sites + 1,) or offsets.ndim != 2 or offsets.shape[-1] != 3:
        raise ValueError(
            f"image starts {tuple(starts.shape)} and offsets {tuple(offsets.shape)} should be [{packing.sites + 1}] and [E, 3]"
        )
    if int(starts[-1]) != len(offsets):
        raise ValueError(f"image starts end at {int(starts[-1])}, but there are {len(offsets)} offsets")
    bounds = starts[packing.cu_seqlens.long()].to(torch.int32)
    counts, lengths = bounds.diff().tolist(), packing.cu_seqlens.diff().tolist()
    sizes = [length * pitch_of(count) for length, count in zip(lengths, counts, strict=True)]
    sites = torch.arange(packing.sites, dtype=torch.int32, device=starts.device)
    return ImageKeys(
        sources=torch.repeat_interleave(sites, starts.diff().long()),
        offsets=offsets.float().contiguous(),
        starts=starts.to(torch.int32),
        bounds=bounds,
        pair_offsets=torch.tensor([0, *sizes]).cumsum(0).to(starts.device),
        longest=max(counts, default=0),
        pairs=sum(sizes),
    )


@dataclass(frozen=True)
class Tiles:
    """Sites that a program owns, sites it meets at a time, warps and pipeline stages of a kernel."""

    own: int
    met: int
    warps: int
    stages: int = 2


FORWARD_TILES = {32: Tiles(64, 32, 4), 64: Tiles(64, 32, 4)}
BACKWARD_TILES = {32: Tiles(64, 16, 4, 1), 64: Tiles(64, 16, 4, 1)}
"""By padded head width: chosen so that nothing spills on sm_80 and sm_90."""

BLOCK_ELEMENTS = 8 << 20
"""Elements of the largest temporary of the CPU form."""


def padded_width(width: int) -> int:
    """Head width in a tile: 32 or 64."""
    return 32 if width <= 32 else 64


def fitting(tiles: Tiles, longest: int) -> Tiles:
    """The same tiles, owning no more sites than short samples have (16 at least, for the tensor cores).

    What is met at a time stays, so that a sample's sums are taken in the same order in any batch.
    """
    own = min(tiles.own, max(16, 1 << max(longest - 1, 0).bit_length()))
    return Tiles(own, tiles.met, tiles.warps, tiles.stages)


def over_queries(tiles: Tiles) -> dict[str, int]:
    """Launch arguments of a kernel whose programs own queries."""
    return {"BLOCK_M": tiles.own, "BLOCK_N": tiles.met, "num_warps": tiles.warps, "num_stages": tiles.stages}


def over_keys(tiles: Tiles) -> dict[str, int]:
    """Launch arguments of a kernel whose programs own keys."""
    return {"BLOCK_M": tiles.met, "BLOCK_N": tiles.own, "num_warps": tiles.warps, "num_stages": tiles.stages}


def query_blocks(length: int, row_elements: int) -> list[slice]:
    """Slices over queries whose rows of `row_elements` elements stay within BLOCK_ELEMENTS together."""
    rows = max(1, BLOCK_ELEMENTS // max(row_elements, 1))
    return [slice(start, min(start + rows, length)) for start in range(0, length, rows)]


def _constants(q: Tensor, bias: Tensor | None, key_mask: Tensor | None, offsets: Tensor | None) -> dict[str, Any]:
    return {
        "WIDTH": q.shape[-1],
        "BLOCK_D": padded_width(q.shape[-1]),
        "HAS_BIAS": bias is not None,
        "HAS_MASK": key_mask is not None,
        "IMAGES": offsets is not None,
    }


def _strides(q: Tensor, k: Tensor) -> tuple[int, int, int, int]:
    return q.stride(0), q.stride(1), k.stride(0), k.stride(1)


def _present(q: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """Pointers for a kernel: an absent tensor, which it will not read, is stood for by q."""
    return [q if tensor is None else tensor for tensor in tensors]


def _segment_sum(values: Tensor, starts: Tensor | None, like: Tensor) -> Tensor:
    """Sums over the copies of each site, in order; values [E, ...] -> [T, ...] in the dtype of `like`."""
    if starts is None:
        return values.to(like.dtype)
    return torch.segment_reduce(values.flatten(1), "sum", offsets=starts.long(), initial=0).view_as(like).to(like.dtype)


@torch.library.custom_op("dig_kernels::vector_head", mutates_args=())
def _vector_head(
    q: Tensor,
    k: Tensor,
    s: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    key_mask: Tensor | None,
    cu: Tensor,
    bounds: Tensor,
    pair_offsets: Tensor,
    starts: Tensor | None,
    sources: Tensor | None,
    offsets: Tensor | None,
    scale: float,
    sign: float,
    max_length: int,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [T, 3], the parts [H, T, 3] it is the sum of, and the log-sum-exp [H, T]."""
    from dig_kernels import vector_head_kernels as kernels

    sites, heads, width = q.shape
    parts, lse = positions.new_empty(heads, sites, 3), positions.new_empty(heads, sites)
    tiles = fitting(FORWARD_TILES[padded_width(width)], max(max_length, longest))
    per_sample = -(-max_length // tiles.own)
    if sites:
        kernels.forward[(per_sample * (len(cu) - 1), heads)](
            *_present(q, q, k, s, bias, positions, key_mask, cu, bounds, pair_offsets, sources, offsets, parts, lse),
            *_strides(q, k), heads, sites, per_sample, scale, sign, **_constants(q, bias, key_mask, offsets),
            **over_queries(tiles),
        )  # fmt: skip
    return parts.sum(0), parts, lse


@_vector_head.register_fake
def _(q: Tensor, k: Tensor, s: Tensor, bias: Tensor | None, positions: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    sites, heads = q.shape[:2]
    return torch.empty_like(positions), positions.new_empty(heads, sites, 3), positions.new_empty(heads, sites)


@torch.library.custom_op("dig_kernels::vector_head_backward", mutates_args=())
def _vector_head_backward(
    grad: Tensor,
    parts: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    s: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    key_mask: Tensor | None,
    cu: Tensor,
    bounds: Tensor,
    pair_offsets: Tensor,
    starts: Tensor | None,
    sources: Tensor | None,
    offsets: Tensor | None,
    scale: float,
    sign: float,
    max_length: int,
    longest: int,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, s, bias (empty where not asked for) and positions."""
    from dig_kernels import vector_head_kernels as kernels

    sites, heads, width = q.shape
    keys = sites if sources is None else len(sources)
    delta = (parts * grad).sum(-1)
    grad = sign * grad.contiguous()
    dq, dbias = torch.empty(q.shape, dtype=q.dtype, device=q.device), _bias_like(bias, bias_gradient, q)
    dk = q.new_empty(keys, heads, width, dtype=k.dtype if sources is None else torch.float32)
    ds = q.new_empty(keys, heads, dtype=s.dtype if sources is None else torch.float32)
    dx_query, dx_key = positions.new_empty(heads, sites, 3), positions.new_empty(heads, keys, 3)
    inputs = _present(q, q, k, s, bias, positions, key_mask, cu, bounds, pair_offsets, sources, offsets)
    constants = _constants(q, bias, key_mask, offsets)
    tiles = fitting(BACKWARD_TILES[padded_width(width)], max(max_length, longest))
    if sites:
        per_sample = -(-max_length // tiles.own)
        kernels.query_gradient[(per_sample * (len(cu) - 1), heads)](
            *inputs, grad, lse, delta, dq, dbias, dx_query, *_strides(q, k), heads, sites, per_sample, scale,
            BIAS_GRADIENT=bias_gradient, **constants, **over_queries(tiles),
        )  # fmt: skip
    if keys:
        per_sample = -(-longest // tiles.own)
        kernels.key_gradient[(per_sample * (len(cu) - 1), heads)](
            *inputs, grad, lse, delta, dk, ds, dx_key, *_strides(q, k), heads, sites, keys, per_sample, scale,
            **constants, **over_keys(tiles),
        )  # fmt: skip
    d_positions = dx_query.sum(0) + _segment_sum(dx_key.sum(0), starts, positions)
    return dq, _segment_sum(dk, starts, k), _segment_sum(ds, starts, s), dbias, d_positions


def _bias_like(bias: Tensor | None, wanted: bool, q: Tensor) -> Tensor:
    """Room for the gradient of a bias, or nothing."""
    return torch.empty_like(bias) if bias is not None and wanted else q.new_empty(0)


@_vector_head_backward.register_fake
def _(grad: Tensor, parts: Tensor, lse: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    q, k, s, bias, positions = inputs[:5]
    dq, dk, ds = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, s))
    return dq, dk, ds, _bias_like(bias, inputs[-1], q), torch.empty_like(positions)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:12], *output[1:])
    ctx.numbers = inputs[12:]


def _backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Any, ...]:
    *inputs, parts, lse = ctx.saved_tensors
    need = ctx.needs_input_grad
    if torch.is_grad_enabled():
        log_slow_path("vector_head", "create_graph=True")
        function = partial(_reference_of, tuple(inputs[5:]), ctx.numbers)
        found = reference.gradients_through(function, inputs[:5], need[:5], (grad,))
    else:
        grads = _vector_head_backward(grad, parts, lse, *inputs, *ctx.numbers, need[3])
        found = tuple(g if needed else None for g, needed in zip(grads, need, strict=False))
    return (*found, *[None] * (len(need) - len(found)))


def _reference_of(rest: tuple[Any, ...], numbers: tuple[Any, ...], *inputs: Tensor) -> Tensor:
    """The reference from the arguments of the operator."""
    q, k, s, bias, positions = inputs
    key_mask, cu, bounds, pair_offsets, starts, sources, offsets = rest
    scale, sign, max_length, longest = numbers
    packing = Packing(cu, pair_offsets, cu, cu, max_length, len(q), 0)
    images = ImageKeys(sources, offsets, starts, bounds, pair_offsets, longest, 0) if sources is not None else None
    return reference.vector_head(q, k, s, bias, positions, packing, scale, sign, key_mask, images)


_vector_head.register_autograd(_backward, setup_context=_save)


def _blockwise(
    q: Tensor, k: Tensor, s: Tensor, bias: Tensor | None, positions: Tensor, packing: Packing, scale: float, sign: float,
    key_mask: Tensor | None, images: ImageKeys | None,
) -> Tensor:  # fmt: skip
    """The CPU form: heads summed before vectors are formed, queries in blocks, each recomputed in the backward."""
    cu, blocks = packing.cu_seqlens.tolist(), reference.bias_blocks(bias, packing, images, q.shape[1])
    bounds = images.bounds.tolist() if images is not None else cu
    outs = [positions[:0]]
    for b, block in enumerate(blocks):
        keys = images.sources[bounds[b] : bounds[b + 1]].long() if images is not None else slice(cu[b], cu[b + 1])
        shift = images.offsets[bounds[b] : bounds[b + 1]] if images is not None else None
        mask = key_mask[keys] if key_mask is not None else None
        slices = query_blocks(cu[b + 1] - cu[b], q.shape[1] * (bounds[b + 1] - bounds[b]))
        for rows in slices:
            at = slice(cu[b] + rows.start, cu[b] + rows.stop)
            part = block[:, rows] if block is not None else None
            arguments = (q[at], k[keys], s[keys], part, positions[at], positions[keys], shift, mask, scale)
            out = _rows(*arguments) if len(slices) == 1 else checkpoint(_rows, *arguments, use_reentrant=False)
            outs.append(sign * out)
    return torch.cat(outs)


def _rows(
    q: Tensor, k: Tensor, s: Tensor, bias: Tensor | None, x: Tensor, keys: Tensor, shift: Tensor | None,
    mask: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    logits = torch.einsum("ihd,jhd->hij", q * scale, k)
    weights = reference.masked_softmax(logits if bias is None else logits + bias, mask)
    signed = torch.einsum("hij,jh->ij", weights.to(x.dtype), s.to(x.dtype))
    displacement = x.unsqueeze(1) - keys
    units = reference.unit_vectors(displacement if shift is None else displacement - shift)
    return torch.einsum("ij,ijc->ic", signed, units)


def vector_head(
    q: Tensor,
    k: Tensor,
    s: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    packing: Packing,
    *,
    direction: Direction,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    images: ImageKeys | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Vectors [T, 3] from q, k [T, H, d], s [T, H], bias flat [H * pairs] or None, positions [T, 3] Å, key_mask [T] bool.

    scale defaults to d ** -0.5. With images, bias is flat [H * images.pairs]. Raises ValueError on shapes that disagree.
    Kernels hold d up to 64 and no fp64; what they do not hold runs through the CPU form.
    """
    _check(q, k, s, bias, positions, packing, key_mask, images)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = backend or backend_for(q)
    if chosen is Backend.TRITON and (q.shape[-1] > 64 or positions.dtype != torch.float32):
        chosen = Backend.CPU
    if chosen is Backend.REFERENCE or wants_reference("vector_head", q, k, s, bias, positions):
        return reference.vector_head(q, k, s, bias, positions, packing, scale, direction.value, key_mask, images)
    if chosen is Backend.CPU:
        return _blockwise(q, k, s, bias, positions, packing, scale, direction.value, key_mask, images)
    rows = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k)]
    flat, cu = bias.contiguous() if bias is not None else None, packing.cu_seqlens
    keys = (cu, packing.pair_offsets, None, None, None) if images is None else (
        images.bounds, images.pair_offsets, images.starts, images.sources, images.offsets
    )  # fmt: skip
    longest = packing.max_length if images is None else images.longest
    out, _, _ = _vector_head(
        *rows, s.contiguous(), flat, positions.contiguous(), key_mask, cu, *keys, scale, direction.value,
        packing.max_length, longest,
    )  # fmt: skip
    return out


def _check(
    q: Tensor, k: Tensor, s: Tensor, bias: Tensor | None, positions: Tensor, packing: Packing,
    key_mask: Tensor | None, images: ImageKeys | None,
) -> None:  # fmt: skip
    sites, heads, width = packing.sites, q.shape[1], q.shape[2]
    expected = {"q": (sites, heads, width), "k": (sites, heads, width), "s": (sites, heads), "positions": (sites, 3)}
    for name, tensor in {"q": q, "k": k, "s": s, "positions": positions}.items():
        if tensor.shape != expected[name]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected[name]}")
    pairs = heads * (packing.pairs if images is None else images.pairs)
    if bias is not None and bias.shape != (pairs,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({pairs},): {heads} heads of flat pair blocks")
    if key_mask is not None and key_mask.shape != (sites,):
        raise ValueError(f"key_mask has shape {tuple(key_mask.shape)}, expected ({sites},)")


KERNEL_TYPES = {
    **dict.fromkeys(("q", "k", "v", "s", "bias", "dq", "dk", "dv", "ds", "dbias"), "*bf16"),
    **dict.fromkeys(("cu", "bounds", "sources"), "*i32"),
    "pair_offsets": "*i64",
    "mask": "*i1",
    **dict.fromkeys(("q_site", "q_head", "k_site", "k_head", "v_site", "v_head"), "i32"),
    **dict.fromkeys(("heads", "sites", "all_keys", "tiles", "n_points"), "i32"),
    **dict.fromkeys(("scale", "sign", "bias_scale", "epsilon"), "fp32"),
}
"""Types of kernel arguments in bf16 models, to compile for; those not named are pointers to fp32."""


def kernel_case(
    name: str, function: Any, values: Mapping[str, Any], types: Mapping[str, str] = KERNEL_TYPES
) -> CompileCase:
    """Compile case of a kernel; its constants are those of `values` (constants and launch arguments) that it takes."""
    from dig_kernels.compiling import CompileCase

    own = {argument: values[argument] for argument in function.arg_names if argument in values}
    signature = {arg: "constexpr" if arg in own else types.get(arg, "*fp32") for arg in function.arg_names}
    divisible = frozenset({"heads", "q_site", "k_site", "v_site"} & set(signature))
    return CompileCase(name, function, signature, own, values["num_warps"], values["num_stages"], True, divisible)


def compile_cases() -> list[CompileCase]:
    """The launch configurations to compile for GPUs that are not here: bf16, bias and mask, with and without images."""
    from dig_kernels import vector_head_kernels as kernels

    cases = []
    for width, images in ((24, False), (24, True), (64, False)):
        block = padded_width(width)
        constants: dict[str, Any] = {"WIDTH": width, "BLOCK_D": block, "IMAGES": images}
        constants |= {"HAS_BIAS": True, "HAS_MASK": True, "BIAS_GRADIENT": True}
        name = f"vector_head d={width}{' images' if images else ''}"
        forward, backward = FORWARD_TILES[block], BACKWARD_TILES[block]
        cases.append(kernel_case(f"{name} forward", kernels.forward, constants | over_queries(forward)))
        cases.append(kernel_case(f"{name} query", kernels.query_gradient, constants | over_queries(backward)))
        cases.append(kernel_case(f"{name} key", kernels.key_gradient, constants | over_keys(backward)))
    return cases
