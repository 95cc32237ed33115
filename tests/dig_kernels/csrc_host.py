"""kernels/csrc/host/driver.cpp through ctypes, with the signatures of the operators of dig_kernels/cuda_extension.py.

The structures mirror kernels/csrc/arguments.hpp. Outputs start as NaN, so that an element left unwritten is seen.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor


class SiteTensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("site_stride", ctypes.c_int64), ("head_stride", ctypes.c_int64))


class PairTensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("dtype", ctypes.c_int32), ("reserved", ctypes.c_int32))


class Packed(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("cu_seqlens", "pair_offsets", "system", "static_offsets", "key_mask")),
        ("sites", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("batch", "max_length", "heads", "width")),
    )


class Attention(ctypes.Structure):
    _fields_ = (
        ("packed", Packed),
        *((name, SiteTensor) for name in ("q", "k", "v", "out", "d_out", "d_q", "d_k", "d_v")),
        *((name, ctypes.c_void_p) for name in ("lse", "delta")),
        ("scale", ctypes.c_float),
        ("dtype", ctypes.c_int32),
    )


class TableAttention(ctypes.Structure):
    _fields_ = (
        ("base", Attention),
        *((name, ctypes.c_void_p) for name in ("knots", "u", "positions", "types", "gain", "shift")),
        ("fixed", PairTensor),
        *((name, ctypes.c_int32) for name in ("n_types", "n_knots")),
        *((name, ctypes.c_float) for name in ("start", "inverse_step")),
    )


class SmallBlockAttention(ctypes.Structure):
    _fields_ = (("base", Attention), ("bias", PairTensor), ("d_bias", PairTensor))


def address(tensor: Tensor | None) -> int | None:
    return tensor.data_ptr() if tensor is not None else None


def sites(tensor: Tensor) -> SiteTensor:
    return SiteTensor(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def pairs(tensor: Tensor | None) -> PairTensor:
    return PairTensor(address(tensor), int(tensor is not None and tensor.dtype == torch.bfloat16), 0)


@dataclass(frozen=True)
class Host:
    """The kernels executed on the CPU, with the signatures of the operators; `seed` orders the threads."""

    library: ctypes.CDLL
    seed: int = 0

    @torch.compiler.disable  # what runs inside an operator is not for the compiler to trace
    def call(self, name: str, arguments: ctypes.Structure, backward: int) -> None:
        status = getattr(self.library, name)(ctypes.byref(arguments), backward, ctypes.c_uint(self.seed))
        assert status == 0, (
            f"{name}: status {status} (1 unsupported, 2 deadlock, 3 shared memory overrun, 4 misaligned)"
        )

    def table(self, q: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        out, lse = filled(q), filled(q, (q.shape[1], q.shape[0]), torch.float32)
        self.call("dig_table_attention", table_arguments({"q": q, "out": out}, lse, q, *rest), 0)
        return out, lse

    def table_backward(self, d_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, *rest: object) -> tuple[Tensor, ...]:
        d_q, d_k, d_v, d_out = filled(q), filled(q), filled(q), d_out.contiguous()
        delta = torch.full_like(lse, torch.nan)
        tensors = {"q": q, "out": out, "d_out": d_out, "d_q": d_q, "d_k": d_k, "d_v": d_v}
        arguments = table_arguments(tensors, lse, q, *rest)
        arguments.base.delta = address(delta)
        self.call("dig_table_attention", arguments, 1)
        return d_q, d_k, d_v

    def small(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *rest: object) -> tuple[Tensor, Tensor]:
        out, lse = filled(q), filled(q, (q.shape[1], q.shape[0]), torch.float32)
        base = attention({"q": q, "k": k, "v": v, "out": out}, lse, *rest)
        self.call("dig_small_block_attention", SmallBlockAttention(base, pairs(bias), pairs(None)), 0)
        return out, lse

    def small_backward(
        self,
        d_out: Tensor,
        out: Tensor,
        lse: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        *rest: object,
    ) -> tuple[Tensor, ...]:
        d_q, d_k, d_v, d_out = filled(q), filled(q), filled(q), d_out.contiguous()
        d_bias = filled(bias) if bias is not None else None
        tensors = {"q": q, "k": k, "v": v, "out": out, "d_out": d_out, "d_q": d_q, "d_k": d_k, "d_v": d_v}
        base = attention(tensors, lse, *rest)
        self.call("dig_small_block_attention", SmallBlockAttention(base, pairs(bias), pairs(d_bias)), 1)
        return d_q, d_k, d_v, d_bias if d_bias is not None else q.new_empty(0)


def filled(like: Tensor, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """An output that shows every element left unwritten."""
    return torch.full(shape if shape is not None else like.shape, torch.nan, dtype=dtype or like.dtype)


def attention(tensors: dict[str, Tensor], lse: Tensor, *packed: object) -> Attention:
    mask, cu_seqlens, pair_offsets, max_length, scale = packed
    q = tensors["q"]
    assert isinstance(cu_seqlens, Tensor)
    places = (address(x) for x in (cu_seqlens, pair_offsets, None, None, mask))  # type: ignore[arg-type]
    packing = Packed(*places, len(q), len(cu_seqlens) - 1, max_length, q.shape[1], q.shape[2])
    of_sites = {name: sites(tensor) for name, tensor in tensors.items()}
    return Attention(packed=packing, **of_sites, lse=address(lse), scale=scale, dtype=int(q.dtype == torch.bfloat16))


def table_arguments(tensors: dict[str, Tensor], lse: Tensor, q: Tensor, *rest: object) -> TableAttention:
    k, v, knots, u, positions, types, gain, shift, static, mask, cu_seqlens, pair_offsets, system, static_offsets = (
        rest[:14]
    )
    max_length, scale, start, step = rest[14:]
    base = attention({**tensors, "k": k, "v": v}, lse, mask, cu_seqlens, pair_offsets, max_length, scale)  # type: ignore[dict-item]
    base.packed.system, base.packed.static_offsets = address(system), address(static_offsets)  # type: ignore[arg-type]
    n_types = len(gain) if isinstance(gain, Tensor) else 0
    places = (address(x) for x in (knots, u, positions, types, gain, shift))  # type: ignore[arg-type]
    return TableAttention(base, *places, pairs(static), n_types, knots.shape[1], start, 1.0 / step)  # type: ignore[arg-type, union-attr, operator]


def build(source: Path, target: Path, *options: str) -> ctypes.CDLL:
    """The driver of the sources at `source` with these compiler options, loaded; the test skips without a compiler."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler ({compiler}): the CUDA sources are not executed here")
    command = [
        "nice",
        "-n",
        "19",
        compiler,
        "-std=c++20",
        *options,
        "-shared",
        "-fPIC",
        str(source / "host/driver.cpp"),
    ]
    subprocess.run([*command, "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))
