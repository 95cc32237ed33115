"""Launches of the attention kernels: tile and warps by shape, compile-time arguments, grids; and the compile gate's cases.

In: tensors and a Call (attention_call.py). Out: fresh contiguous tensors. Knows no autograd. Also the pieces that the
deferred gradient's launch (deferred_kernels.py) shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from dig_kernels.attention_call import Call, Saved, Writing
from dig_kernels.attention_kernels import STORE, forward_kernel, key_gradient_kernel, query_gradient_kernel
from dig_kernels.bias_source import Source, SourceKind
from dig_kernels.compiling import CompileCase

HOPPER = (9, 0)


@dataclass(frozen=True)
class LaunchConfig:
    """Warps of a program and software-pipelining depth."""

    warps: int
    stages: int


CONFIGS = {
    ("forward", 16): LaunchConfig(1, 2),
    ("forward", 32): LaunchConfig(2, 2),
    ("forward", 64): LaunchConfig(4, 2),
    ("query_gradient", 16): LaunchConfig(2, 2),
    ("query_gradient", 32): LaunchConfig(4, 2),
    ("query_gradient", 64): LaunchConfig(4, 2),
    ("key_gradient", 16): LaunchConfig(2, 2),
    ("key_gradient", 32): LaunchConfig(4, 2),
    ("key_gradient", 64): LaunchConfig(4, 2),
    ("deferred", 16): LaunchConfig(2, 2),
    ("deferred", 32): LaunchConfig(4, 2),
    ("deferred", 64): LaunchConfig(8, 2),
}
"""By kernel and tile, chosen by registers and spills as the assembler reports them."""

TABULATED_CONFIGS = {16: LaunchConfig(2, 1), 32: LaunchConfig(4, 1), 64: LaunchConfig(8, 1)}
"""By tile, where the bias comes from a table: pipelined gathers would only fill shared memory."""


def config_of(kernel: str, tile: int, kind: SourceKind) -> LaunchConfig:
    """Launch configuration of a kernel."""
    return TABULATED_CONFIGS[tile] if kind in (SourceKind.GIVEN, SourceKind.GEOMETRY) else CONFIGS[kernel, tile]


def tile_of(call: Call, q: Tensor) -> int:
    """Rows and keys a program takes at once: no larger than the longest sample needs or the registers hold."""
    if call.tile:
        return call.tile
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else HOPPER
    needed = min(64, max(16, triton.next_power_of_2(call.max_length)))
    return min(needed, largest_tile(call.source.kind, q.shape[2], q.element_size(), capability))


def largest_tile(kind: SourceKind, width: int, element_size: int, capability: tuple[int, int]) -> int:
    """The tile at which no kernel spills registers."""
    if element_size > 2:
        return 32 if width <= 32 else 16
    tabulated = kind in (SourceKind.GIVEN, SourceKind.GEOMETRY)
    return 32 if capability < HOPPER or (tabulated and width > 32) else 64


def padded_width(width: int) -> int:
    """Head width as the matrix units take it: 16, 32 or 64."""
    return max(16, triton.next_power_of_2(width))


def kernel_source(source: Source, filler: Tensor) -> tuple[Any, ...]:
    """The `source` tuple of the kernels; `filler` stands where a kind has no tensor."""
    pointers = [filler] * 7
    n_types = n_pieces = 1
    if source.kind is SourceKind.DENSE:
        pointers[0] = source.tensors[0]
    elif source.kind is not SourceKind.NONE:
        pointers[1 : 1 + len(source.tensors)] = source.tensors
        n_pieces = source.tensors[0].shape[1]
        n_types = source.tensors[3].shape[0] if source.kind is SourceKind.GEOMETRY else 1
    if source.static is not None:
        pointers[6] = source.static
    return (*pointers, n_types, n_pieces, source.start, 1.0 / source.step)


def programs(call: Call, q: Tensor, sites: int) -> tuple[int]:
    """Grid: one program per head and tile of this many sites."""
    return ((sites // tile_of(call, q) + call.batch) * q.shape[1],)


def options(call: Call, q: Tensor, kernel: str) -> dict[str, Any]:
    """Compile-time arguments and launch configuration."""
    tile = tile_of(call, q)
    config = config_of(kernel, tile, call.source.kind)
    return {
        "KIND": int(call.source.kind),
        "STATIC": call.source.static is not None,
        "HAS_MASK": call.key_mask is not None,
        "UPCAST": not q.is_cuda,
        "WIDTH": q.shape[2],
        "PADDED": padded_width(q.shape[2]),
        "TILE": tile,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def mask_pointer(call: Call) -> Tensor:
    """The key mask as bytes, or something to stand for it."""
    return call.packing[0] if call.key_mask is None else call.key_mask.view(torch.uint8)


def _row_strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def launch_forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Output [T, H, d] and log-sum-exp [H, T] fp32."""
    sites, heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(heads, sites, dtype=torch.float32, device=q.device)
    if q.numel():
        forward_kernel[programs(call, q, sites)](
            q, k, v, out, lse, kernel_source(call.source, lse), mask_pointer(call), tuple(call.packing),
            *_row_strides(q, k, v), call.batch, heads, sites, call.scale, **options(call, q, "forward"),
        )  # fmt: skip
    return out, lse


def launch_backward(
    saved: Saved, call: Call, d_bias: Tensor | None, writing: Writing
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and delta [H, T]; stores dS in `d_bias` (flat as the bias) or adds it there."""
    q, k, v = saved.q, saved.k, saved.v
    sites, heads, _ = q.shape
    d_q, d_k, d_v = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (q, k, v))
    delta = torch.empty_like(saved.lse)
    if not q.numel():
        return d_q, d_k, d_v, delta
    source, mask, packing = kernel_source(call.source, delta), mask_pointer(call), tuple(call.packing)
    numbers = (*_row_strides(q, k, v), call.batch, heads, sites, call.scale)
    bias_gradient = 0 if d_bias is None else int(writing)
    query_gradient_kernel[programs(call, q, sites)](
        q, k, v, saved.out, saved.lse, saved.d_out, d_q, delta, delta if d_bias is None else d_bias, source, mask, packing,
        *numbers, BIAS_GRADIENT=bias_gradient, **options(call, q, "query_gradient"),
    )  # fmt: skip
    key_gradient_kernel[programs(call, q, sites)](
        q, k, v, saved.lse, saved.d_out, delta, d_k, d_v, source, mask, packing, *numbers,
        **options(call, q, "key_gradient"),
    )  # fmt: skip
    return d_q, d_k, d_v, delta


@dataclass(frozen=True)
class CaseShape:
    """One compiled shape: bias kind, head width, tile, element type, and the GPU that gets this tile."""

    kind: str
    width: int
    tile: int
    capability: int
    element: str = "bf16"


SHAPES = (
    CaseShape("dense", 24, 64, 90),
    CaseShape("dense", 64, 64, 90),
    CaseShape("geometry", 24, 64, 90),
    CaseShape("dense", 64, 32, 80),
)
"""What the compile gate looks at: the largest tile of each bias kind and width."""


def case(function: Any, kernel: str, shape: CaseShape, extra: dict[str, Any]) -> CompileCase:
    """CompileCase of a kernel whose arguments carry the names used in this package."""
    kind = SourceKind[shape.kind.upper()]
    config = config_of(kernel, shape.tile, kind)
    constants = {
        "KIND": int(kind),
        "STATIC": shape.kind in ("given", "geometry"),
        "HAS_MASK": False,
        "UPCAST": False,
        "WIDTH": shape.width,
        "PADDED": padded_width(shape.width),
        "TILE": shape.tile,
        **extra,
    }
    strides = frozenset(["q_row", "q_head", "k_row", "k_head", "v_row", "v_head"])
    return CompileCase(
        name=f"{kernel} {shape.kind} width {shape.width} tile {shape.tile} {shape.element}",
        function=function,
        signature={name: _types(shape.element, constants).get(name, "i32") for name in function.arg_names},
        constexprs=constants,
        num_warps=config.warps,
        num_stages=config.stages,
        needs_tensor_cores=shape.element != "fp32",
        divisible_by_16=strides if shape.width % 8 == 0 else frozenset(),
        capabilities=(shape.capability,),
    )


def _types(element: str, constants: dict[str, Any]) -> dict[str, Any]:
    rows, single = f"*{element}", "*fp32"
    return {
        "source": (rows, single, single, "*i32", single, single, single, "i32", "i32", "fp32", "fp32"),
        "packing": ("*i32", "*i64", "*i32", "*i64"),
        **dict.fromkeys(["lse", "delta"], single),
        "key_mask": "*u8",
        "offsets": "*i64",
        "bounds": "*i32",
        "scale": "fp32",
        **dict.fromkeys(["q", "k", "v", "out", "d_out", "d_q", "d_k", "d_v", "d_bias"], rows),
        **dict.fromkeys(constants, "constexpr"),
    }


def compile_cases() -> list[CompileCase]:
    """Configurations in use; dQ with the bias gradient stored where the bias is dense."""
    gradient = {kind: {"BIAS_GRADIENT": STORE.value if kind == "dense" else 0} for kind in ("dense", "geometry")}
    return [
        *(case(forward_kernel, "forward", shape, {}) for shape in SHAPES),
        *(case(query_gradient_kernel, "query_gradient", shape, gradient[shape.kind]) for shape in SHAPES),
        *(case(key_gradient_kernel, "key_gradient", shape, {}) for shape in SHAPES),
    ]
