"""Attention in CUDA C++ (kernels/csrc) for what Triton's registers cannot hold; compiled at first use, never by default.

Two operators on packed batches (layout.py), fp32 or bf16, d <= 64, fp32 sums, no atomics:
`table_attention` looks its bias up in a radial table inside the kernel, the pair scalar being shared by a group of heads;
`small_block_attention` gives a whole (sample, head) to one thread block and makes all gradients in one pass.
Nothing chooses them by itself: they are for machines where a measurement (kernels/bench) shows them faster than the
Triton kernels. They need a GPU of compute capability 8.0 or more, nvcc and a C++ compiler. Neither runs on a CPU; the
tests execute the same sources there.

First derivatives in q, k, v (and the dense bias) are fused. Those of a table, u, geometry or static bias, and whatever
more is asked (create_graph=True, forward mode, functorch), are evaluated by the reference, which one log line says.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dig_kernels import reference
from dig_kernels.bias_source import PairTable, Source, SourceKind, dense_bias, table_source
from dig_kernels.dispatch import log_slow_path, wants_reference
from dig_kernels.layout import Packing

MAX_WIDTH = 64
"""Widest head the kernels take."""

_PACKED = "Tensor? key_mask, Tensor cu_seqlens, Tensor pair_offsets"
_TABLE = (
    "Tensor q, Tensor k, Tensor v, Tensor knots, Tensor? u, Tensor? positions, Tensor? types, Tensor? gain, Tensor? shift,"
    f" Tensor? static, {_PACKED}, Tensor system, Tensor static_offsets, int max_length, float scale, float start, float step"
)
_SMALL = f"Tensor q, Tensor k, Tensor v, Tensor? bias, {_PACKED}, int max_length, float scale"
_SAVED = "Tensor d_out, Tensor out, Tensor lse"
_SOURCE_PLACES = (3, 4, 5, 7, 8, 9)
"""Operands of table_attention that make the bias and are differentiable: knots, u, positions, gain, shift, static."""
_NAMESPACE = "dig_kernels_cuda"
torch.library.define(f"{_NAMESPACE}::table_attention", f"({_TABLE}) -> (Tensor, Tensor)")
torch.library.define(f"{_NAMESPACE}::table_attention_backward", f"({_SAVED}, {_TABLE}) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    f"{_NAMESPACE}::table_attention_source_backward",
    f"(Tensor d_out, {_TABLE}, bool[] needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(f"{_NAMESPACE}::small_block_attention", f"({_SMALL}) -> (Tensor, Tensor)")
torch.library.define(
    f"{_NAMESPACE}::small_block_attention_backward", f"({_SAVED}, {_SMALL}) -> (Tensor, Tensor, Tensor, Tensor)"
)


def source_folder() -> Path:
    """Where the CUDA sources stand: in the package once installed, beside it in a checkout. Raises RuntimeError elsewhere."""
    return sources_of(Path(__file__).resolve().parent)


def sources_of(package: Path) -> Path:
    """The CUDA sources of the package at this path. Raises RuntimeError, naming the places, where they are not."""
    places = (package / "csrc", package.parent / "csrc")
    for folder in places:
        if (folder / "binding.cpp").is_file():
            return folder
    looked = " nor ".join(str(place) for place in places)
    raise RuntimeError(
        f"CUDA sources are not at {looked}: install dig-scale again, or from a checkout (pip install -e .)"
    )


def is_available() -> bool:
    """Whether this machine can build and run the extension: a GPU of capability 8.0 or more, nvcc, and the sources."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return False
    with contextlib.suppress(RuntimeError):
        source_folder()
        return _nvcc() is not None
    return False


def _nvcc() -> str | None:
    from torch.utils.cpp_extension import CUDA_HOME  # slow to import

    beside = shutil.which("nvcc", path=str(Path(CUDA_HOME) / "bin")) if CUDA_HOME else None
    return beside or shutil.which("nvcc")


@functools.cache
def load_extension() -> None:
    """Builds the extension (torch's extension cache; a minute or two the first time) and loads it; once per process.

    Raises RuntimeError saying what is missing where the machine has no fitting GPU or no nvcc.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("the CUDA kernels need a GPU, and torch sees none; use dig_kernels.attention instead")
    if torch.cuda.get_device_capability() < (8, 0):
        raise RuntimeError(f"the CUDA kernels need compute capability 8.0, found {torch.cuda.get_device_capability()}")
    if _nvcc() is None:
        raise RuntimeError(
            "nvcc is not on PATH nor under CUDA_HOME; install the CUDA toolkit that torch was built with"
        )
    from torch.utils.cpp_extension import load

    folder = source_folder()
    load(
        name="dig_kernels_cuda",
        sources=[str(folder / "binding.cpp"), str(folder / "instantiate.cu")],
        extra_cflags=["-O2", "-std=c++20"],
        extra_cuda_cflags=["-O3", "-std=c++20"],
        is_python_module=False,
    )


def table_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: PairTable,
    packing: Packing,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T + bias) v within each sample, [T, H, d], from q, k, v [T, H, d] on a GPU.

    The table's pieces must come from radial_table.hermite_pieces: values and slopes continuous at the knots. key_mask [T]
    is True where a key takes part; a row without keys gives 0. `scale` defaults to d**-0.5. Raises ValueError for shapes,
    dtypes or devices that do not fit, RuntimeError where the extension cannot be built.
    """
    _check_sites(q, k, v, packing, key_mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    operands = _table_operands(q, k, v, table, packing, scale, key_mask)
    if wants_reference("cuda.table_attention", *(x for x in operands if isinstance(x, Tensor))):
        return _table_reference(*operands)
    _check_cuda(q)
    load_extension()
    return _fused_table_attention(*operands)


def small_block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    packing: Packing,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T + bias) v within each sample of at most about 128 sites, [T, H, d], from [T, H, d] on a GPU.

    bias is flat [H * pairs], fp32 or bf16, and gets a gradient in its dtype. The longest sample is set by the shared
    memory of the GPU: with 227 KB and a gradient to come, 192 sites for d <= 32 in bf16, 112 for d > 32 in fp32; without,
    more than twice as many. A longer one raises RuntimeError, here and not in the backward pass.
    Otherwise as table_attention.
    """
    _check_sites(q, k, v, packing, key_mask)
    if bias is not None:
        _check_pairs("bias", bias, q.shape[1] * packing.pairs)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    operands = _small_operands(q, k, v, bias, packing, scale, key_mask)
    if wants_reference("cuda.small_block_attention", q, k, v, bias):
        return _small_reference(*operands)
    _check_cuda(q)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (q, k, v, bias)):
        limit = torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin  # type: ignore[attr-defined]
        check_small_backward(packing.max_length, q.shape[2], q.element_size(), limit)
    load_extension()
    return _fused_small_block_attention(*operands)


def small_backward_bytes(length: int, width: int, element_size: int) -> int:
    """Shared memory that the backward pass of small_block_attention takes for a sample, as csrc lays it out."""
    padded, row = -(-length // 16) * 16, 32 if width <= 32 else MAX_WIDTH
    spread = 16 // element_size
    arrays = [padded * (row + spread) * element_size] * 4 + [padded * (padded + spread) * element_size] * 2
    return sum(-(-size // 128) * 128 for size in (*arrays, 4 * padded, 4 * padded))


def check_small_backward(length: int, width: int, element_size: int, limit: int) -> None:
    """Raises RuntimeError where a device with `limit` bytes of shared memory has no room for a sample's backward pass."""
    needed = small_backward_bytes(length, width, element_size)
    if needed > limit:
        raise RuntimeError(
            f"the gradient of a sample of {length} sites with heads of {width} takes {needed} bytes of shared memory, "
            f"the GPU has {limit}: use shorter samples, dig_kernels.attention, or torch.no_grad() where none is wanted"
        )


def _fused_table_attention(*operands: object) -> Tensor:
    return torch.ops.dig_kernels_cuda.table_attention(*operands)[0]


def _fused_small_block_attention(*operands: object) -> Tensor:
    return torch.ops.dig_kernels_cuda.small_block_attention(*operands)[0]


def _table_operands(
    q: Tensor, k: Tensor, v: Tensor, table: PairTable, packing: Packing, scale: float, key_mask: Tensor | None
) -> tuple[object, ...]:
    source = table_source(table, packing, q.shape[1])
    if source.static is not None:
        _check_element("static", source.static)
    pieces, *scalar = source.tensors
    given = source.kind is SourceKind.GIVEN
    pair_scalar = (scalar[0].float(), None, None, None, None) if given else (None, *_geometry(*scalar))
    fixed = (*_places(packing), packing.max_length, scale, source.start, source.step)
    return (q, k, v, hermite_knots(pieces), *pair_scalar, source.static, _mask_bytes(key_mask), *fixed)


def _geometry(positions: Tensor, types: Tensor, gain: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
    return positions.float(), types.to(torch.int32), gain.float(), shift.float()


def _small_operands(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, packing: Packing, scale: float, key_mask: Tensor | None
) -> tuple[object, ...]:
    return (q, k, v, bias, _mask_bytes(key_mask), packing.cu_seqlens, packing.pair_offsets, packing.max_length, scale)


def _places(packing: Packing) -> tuple[Tensor, ...]:
    return packing.cu_seqlens, packing.pair_offsets, packing.system, packing.static_offsets


def _mask_bytes(key_mask: Tensor | None) -> Tensor | None:
    return key_mask.to(torch.uint8).contiguous() if key_mask is not None else None


def hermite_knots(pieces: Tensor) -> Tensor:
    """(value, step * slope) at the knots, [H, K, 2] fp32, from continuous cubic pieces [H, K-1, 4]; differentiable."""
    last = pieces[:, -1:]
    values = torch.cat([pieces[..., 0], last.sum(-1)], dim=1)
    slopes = torch.cat([pieces[..., 1], last[..., 1] + 2 * last[..., 2] + 3 * last[..., 3]], dim=1)
    return torch.stack([values, slopes], dim=-1).float()


def _pieces_of(knots: Tensor) -> Tensor:
    values, slopes = knots.unbind(-1)
    rise, s0, s1 = values.diff(dim=1), slopes[:, :-1], slopes[:, 1:]
    return torch.stack([values[:, :-1], s0, 3 * rise - 2 * s0 - s1, s0 + s1 - 2 * rise], dim=-1)


def _table_reference(*operands: object) -> Tensor:
    """The operator from its formula, differentiable in every floating operand."""
    q, k, v, knots, given, *geometry, static, mask = operands[:11]
    *places, max_length, scale, start, step = operands[11:]
    kind = SourceKind.GIVEN if given is not None else SourceKind.GEOMETRY
    scalar = [given] if given is not None else geometry
    static = static.float() if isinstance(static, Tensor) else None
    source = Source(kind, (_pieces_of(knots), *scalar), static, start, step)  # type: ignore[arg-type]
    bias = dense_bias(source, places, q.shape[1])  # type: ignore[arg-type, attr-defined]
    packing = Packing(*places[:4], max_length, len(q), int(places[1][-1]))  # type: ignore[arg-type, call-arg, index]
    return _attention_in_fp32(q, k, v, bias, packing, scale, mask)  # type: ignore[arg-type]


def _small_reference(*operands: object) -> Tensor:
    q, k, v, bias, mask, cu_seqlens, pair_offsets, max_length, scale = operands
    assert isinstance(q, Tensor) and isinstance(pair_offsets, Tensor)
    none = torch.zeros(0, dtype=torch.int64)
    packing = Packing(cu_seqlens, pair_offsets, none, none, max_length, len(q), int(pair_offsets[-1]))  # type: ignore[arg-type]
    bias = bias.float() if isinstance(bias, Tensor) else None
    return _attention_in_fp32(q, k, v, bias, packing, scale, mask)  # type: ignore[arg-type]


def _attention_in_fp32(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, packing: Packing, scale: float, mask: Tensor | None
) -> Tensor:
    key_mask = mask.bool() if mask is not None else None
    out, _ = reference.packed_attention(q.float(), k.float(), v.float(), bias, packing, scale, key_mask)
    return out.to(q.dtype)


def _empty_outputs(q: Tensor, *operands: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _empty_table_gradients(
    d_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, *operands: object
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _empty_small_gradients(
    d_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *operands: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_bias = torch.empty_like(bias) if bias is not None else q.new_empty(0)
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape), d_bias


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    tensors = [x if isinstance(x, Tensor) else None for x in inputs]
    ctx.save_for_backward(*tensors, *output)
    ctx.numbers = [x for x in inputs if x is not None and not isinstance(x, Tensor)]


def _table_backward(ctx, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    operands, out, lse = _operands_of(ctx)
    needed: Sequence[bool] = ctx.needs_input_grad
    if torch.is_grad_enabled():
        return _reference_gradients("cuda.table_attention", _table_reference, operands, needed, d_out)
    fused = torch.ops.dig_kernels_cuda.table_attention_backward(d_out, out, lse, *operands)
    gradients: list[Tensor | None] = [*fused, *[None] * (len(operands) - 3)]
    wanted = [needed[place] for place in _SOURCE_PLACES]
    if any(wanted):
        of_source = torch.ops.dig_kernels_cuda.table_attention_source_backward(d_out, *operands, wanted)
        for place, gradient in zip(_SOURCE_PLACES, of_source, strict=True):
            gradients[place] = gradient
    return tuple(gradient if want else None for gradient, want in zip(gradients, needed, strict=True))


def _source_gradients(d_out: Tensor, *rest: object) -> tuple[Tensor, ...]:
    """Gradients of the operands at _SOURCE_PLACES, empty where not needed; an operator, so that compilers do not look in."""
    *operands, wanted = rest
    needed = [False] * len(operands)
    for place, want in zip(_SOURCE_PLACES, wanted, strict=True):  # type: ignore[call-overload]
        needed[place] = want
    found = _reference_gradients("cuda.table_attention", _table_reference, operands, needed, d_out)
    gradients = [found[place] for place in _SOURCE_PLACES]
    return tuple(x.contiguous() if x is not None else d_out.new_empty(0) for x in gradients)


def _empty_source_gradients(d_out: Tensor, *rest: object) -> tuple[Tensor, ...]:
    *operands, wanted = rest
    tensors = [operands[place] for place in _SOURCE_PLACES]
    return tuple(torch.empty_like(x) if want else d_out.new_empty(0) for x, want in zip(tensors, wanted, strict=True))  # type: ignore[call-overload]


def _small_backward(ctx, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    operands, out, lse = _operands_of(ctx)
    needed: Sequence[bool] = ctx.needs_input_grad
    if torch.is_grad_enabled():
        return _reference_gradients("cuda.small_block_attention", _small_reference, operands, needed, d_out)
    gradients = torch.ops.dig_kernels_cuda.small_block_attention_backward(d_out, out, lse, *operands)
    fused = [gradient if wanted else None for gradient, wanted in zip(gradients, needed[:4], strict=True)]
    return *fused, *[None] * (len(operands) - 4)


def _operands_of(ctx) -> tuple[list[object], Tensor, Tensor]:  # type: ignore[no-untyped-def]
    *tensors, out, lse = ctx.saved_tensors
    return [*tensors[: len(tensors) - len(ctx.numbers)], *ctx.numbers], out, lse


def _reference_gradients(
    name: str, function: Callable[..., Tensor], operands: Sequence[object], needed: Sequence[bool], d_out: Tensor
) -> tuple[Tensor | None, ...]:
    """Vector-Jacobian product through the reference for the operands that are needed, None for the others."""
    if not any(needed):
        return (None,) * len(operands)
    create_graph = torch.is_grad_enabled()
    log_slow_path(name, "create_graph=True" if create_graph else "a gradient of the table, u, geometry or static bias")
    chosen = [i for i, wanted in enumerate(needed) if wanted]
    values = list(operands)
    with torch.enable_grad():
        if not create_graph:
            values = [
                x.detach().requires_grad_(i in chosen) if isinstance(x, Tensor) else x for i, x in enumerate(values)
            ]
        found = torch.autograd.grad(function(*values), [values[i] for i in chosen], d_out, create_graph=create_graph)  # type: ignore[arg-type]
    gradients: list[Tensor | None] = [None] * len(operands)
    for i, gradient in zip(chosen, found, strict=True):
        gradients[i] = gradient
    return tuple(gradients)


def _check_sites(q: Tensor, k: Tensor, v: Tensor, packing: Packing, key_mask: Tensor | None) -> None:
    if q.dim() != 3 or q.shape[0] != packing.sites or not 1 <= q.shape[2] <= MAX_WIDTH:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected [{packing.sites}, H, d] with d <= {MAX_WIDTH}")
    if q.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"q is {q.dtype}; the CUDA kernels take float32 and bfloat16")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != q.shape or tensor.dtype != q.dtype:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; q is {q.dtype} {tuple(q.shape)}")
    if key_mask is not None and key_mask.shape != (packing.sites,):
        raise ValueError(f"key_mask has shape {tuple(key_mask.shape)}; expected ({packing.sites},)")


def _check_pairs(name: str, tensor: Tensor, size: int) -> None:
    if tensor.shape != (size,):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected ({size},), flat as in layout.py")
    _check_element(name, tensor)


def _check_element(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{name} is {tensor.dtype}; expected float32 or bfloat16")


def _check_cuda(q: Tensor) -> None:
    if not q.is_cuda:
        raise ValueError(
            f"q is on {q.device}; the CUDA kernels take tensors on a GPU, use dig_kernels.attention elsewhere"
        )


def _register() -> None:
    table, small = f"{_NAMESPACE}::table_attention", f"{_NAMESPACE}::small_block_attention"
    torch.library.register_fake(table, _empty_outputs)
    torch.library.register_fake(small, _empty_outputs)
    torch.library.register_fake(f"{table}_backward", _empty_table_gradients)
    torch.library.register_fake(f"{table}_source_backward", _empty_source_gradients)
    torch.library.impl(f"{table}_source_backward", "CompositeExplicitAutograd", _source_gradients)
    torch.library.register_fake(f"{small}_backward", _empty_small_gradients)
    torch.library.register_autograd(table, _table_backward, setup_context=_setup_context)
    torch.library.register_autograd(small, _small_backward, setup_context=_setup_context)


_register()
