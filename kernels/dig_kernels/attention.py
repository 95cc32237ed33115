"""Attention over packed batches with an additive pair bias, streamed or made from a table; first derivatives fused.

softmax(scale q k^T + bias) v within each sample of a Packing (layout.py). Nothing of size L² is kept for the backward. A
bias used once gets its own dense gradient; one shared by many layers goes through a Ledger (bias_gradient.py). Keys where
`key_mask` is False have weight exactly 0; a row without any key gives 0 and takes no gradient. Head widths up to 64.

The same sample gives bitwise the same result alone and in a pack when the tile is the same: by default it follows the
longest sample, `tile` fixes it. Second derivatives, forward mode and functorch transforms run the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dig_kernels.attention_call import Saved, Writing
from dig_kernels.bias_gradient import (
    CARRIER,
    CARRIERS,
    Ledger,
    LedgerMode,
    Settings,
    call_of,
    check_tile,
    needs_reference,
    open_ledger,
    packing_tensors,
    settings_of,
    wide_dtype,
    with_progress,
)
from dig_kernels.bias_source import PairTable, Source, dense_bias, dense_source, source_from_flat
from dig_kernels.dispatch import Backend, backend_for, log_slow_path
from dig_kernels.layout import Packing
from dig_kernels.reference import packed_attention

WIDEST = 64

__all__ = ["Ledger", "LedgerMode", "PairTable", "biased_attention", "layer_attention", "open_ledger", "table_attention"]


def _implementation(fused: bool) -> ModuleType:
    if fused:
        from dig_kernels import attention_launch

        return attention_launch
    from dig_kernels import attention_cpu

    return attention_cpu


@torch.library.custom_op("dig_kernels::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, source: Sequence[Tensor], slot: Sequence[Tensor], packing: Sequence[Tensor],
    key_mask: Tensor | None, real: bool,
    kind: int, start: float, step: float, scale: float, max_length: int, tile: int, fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    call = call_of(source, packing, key_mask, Settings(kind, start, step, scale, max_length, tile, fused))
    rows = (_last_dense(tensor) for tensor in (q, k, v))
    return *_implementation(fused).launch_forward(*rows, call), _next_carrier(q, slot, real)


@_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, source: Sequence[Tensor], slot: Sequence[Tensor], packing: Sequence[Tensor],
    key_mask: Tensor | None, real: bool,
    kind: int, start: float, step: float, scale: float, max_length: int, tile: int, fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=wide_dtype(q.dtype))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse, _next_carrier(q, slot, real)


def _last_dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _next_carrier(q: Tensor, slot: Sequence[Tensor], real: bool) -> Tensor:
    """The next link of an accumulating ledger's chain; nothing for other calls."""
    return CARRIER[real](slot[0].shape, slot[0].dtype, q.device) if len(slot) == 1 else q.new_empty(0)


def _attention_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, source, slot, packing, key_mask = inputs[:7]
    out, lse, chain = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*([lse] if len(slot) == 1 else [lse, chain]))
    ctx.save_for_backward(q, k, v, out, lse, key_mask, *packing, *source)
    ctx.slots, ctx.packings, ctx.settings = len(slot), len(packing), Settings(*inputs[8:])
    ctx.slot_like = (slot[0].shape, slot[0].dtype) if len(slot) == 1 else None


def _attention_backward(ctx: Any, d_out: Tensor | None, _: Any, d_chain: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, key_mask, *rest = ctx.saved_tensors
    packing, source = rest[: ctx.packings], rest[ctx.packings :]
    d_source: list[Tensor | None] = [None] * len(source)
    d_slot: list[Tensor | None] = [d_chain] if ctx.slots == 1 else [None] * ctx.slots
    d_rows: tuple[Tensor | None, ...] = (None, None, None)
    if d_out is not None and torch.is_grad_enabled():
        d_rows, d_source = _differentiable_backward(ctx, d_out)
    elif d_out is not None:
        saved = Saved(q.detach(), k.detach(), v.detach(), out, lse, d_out.contiguous())
        if ctx.slots == 1:
            d_slot = [d_chain.contiguous() if d_chain is not None else _zero_sums(ctx.slot_like, q)]
            d_rows = _attention_backward_into(*_fields(saved), source, packing, key_mask, d_slot[0], *ctx.settings)
        else:
            own = ctx.slots == 0 and any(ctx.needs_input_grad[3])
            *d_rows, delta, d_bias = _attention_gradient(*_fields(saved), source, packing, key_mask, own, *ctx.settings)
            d_source = [d_bias] if own else d_source
            d_slot = [saved.q, saved.k, saved.v, saved.d_out, lse, delta] if ctx.slots == CARRIERS else d_slot
    return (*d_rows, d_source, d_slot, [None] * len(packing), *[None] * (2 + len(ctx.settings)))


_attention.register_autograd(_attention_backward, setup_context=_attention_context)


def _fields(saved: Saved) -> tuple[Tensor, ...]:
    return saved.q, saved.k, saved.v, saved.out, saved.lse, saved.d_out


def _zero_sums(like: tuple[torch.Size, torch.dtype], q: Tensor) -> Tensor:
    shape, dtype = like
    return torch.zeros(shape, dtype=dtype, device=q.device)


@torch.library.custom_op("dig_kernels::attention_gradient", mutates_args=())
def _attention_gradient(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor,
    source: Sequence[Tensor], packing: Sequence[Tensor], key_mask: Tensor | None, own: bool,
    kind: int, start: float, step: float, scale: float, max_length: int, tile: int, fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    saved = Saved(_last_dense(q), _last_dense(k), _last_dense(v), out, lse, d_out)
    call = call_of(source, packing, key_mask, Settings(kind, start, step, scale, max_length, tile, fused))
    d_bias = torch.empty_like(source[0]) if own else None
    grads = _implementation(fused).launch_backward(saved, call, d_bias, Writing.STORE)
    return *grads, d_bias if d_bias is not None else q.new_empty(0)


@_attention_gradient.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor,
    source: Sequence[Tensor], packing: Sequence[Tensor], key_mask: Tensor | None, own: bool,
    kind: int, start: float, step: float, scale: float, max_length: int, tile: int, fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_q, d_k, d_v = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (q, k, v))
    return d_q, d_k, d_v, torch.empty_like(lse), torch.empty_like(source[0]) if own else q.new_empty(0)


@torch.library.custom_op("dig_kernels::attention_gradient_into", mutates_args={"sums"})
def _attention_backward_into(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor,
    source: Sequence[Tensor], packing: Sequence[Tensor], key_mask: Tensor | None, sums: Tensor,
    kind: int, start: float, step: float, scale: float, max_length: int, tile: int, fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    saved = Saved(_last_dense(q), _last_dense(k), _last_dense(v), out, lse, d_out)
    call = call_of(source, packing, key_mask, Settings(kind, start, step, scale, max_length, tile, fused))
    d_q, d_k, d_v, _ = _implementation(fused).launch_backward(saved, call, sums, Writing.ADD)
    return d_q, d_k, d_v


@_attention_backward_into.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor,
    source: Sequence[Tensor], packing: Sequence[Tensor], key_mask: Tensor | None, sums: Tensor,
    kind: int, start: float, step: float, scale: float, max_length: int, tile: int, fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    d_q, d_k, d_v = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (q, k, v))
    return d_q, d_k, d_v


def _differentiable_backward(ctx: Any, d_out: Tensor) -> tuple[tuple[Tensor | None, ...], list[Tensor | None]]:
    """Gradients of q, k, v and of the bias's own tensors that can be differentiated again: the reference's."""
    log_slow_path("attention", "create_graph=True")
    q, k, v, _, _, key_mask, *rest = ctx.saved_tensors
    packing, source = rest[: ctx.packings], rest[ctx.packings :]
    needed = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[3]]
    inputs = [tensor.view_as(tensor) for tensor in (q, k, v, *source)]
    whole = Packing(*packing, ctx.settings.max_length, len(q), int(packing[1][-1]))  # type: ignore[call-arg]
    bias = source_from_flat(ctx.settings.kind, inputs[3:], ctx.settings.start, ctx.settings.step)
    out = _reference(inputs[0], inputs[1], inputs[2], bias, whole, ctx.settings.scale, key_mask)
    asked = [tensor for tensor, wanted in zip(inputs, needed, strict=True) if wanted]
    found = iter(torch.autograd.grad(out, asked, d_out, create_graph=True, allow_unused=True))
    grads = [next(found) if wanted else None for wanted in needed]
    return tuple(grads[:3]), grads[3:]


def _reference(
    q: Tensor, k: Tensor, v: Tensor, source: Source, packing: Packing, scale: float, key_mask: Tensor | None
) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    bias = dense_bias(source, packing_tensors(packing), q.shape[1])
    wide_bias = None if bias is None else bias.to(dtype)
    out, _ = packed_attention(q.to(dtype), k.to(dtype), v.to(dtype), wide_bias, packing, scale, key_mask)
    return out.to(q.dtype)


def biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    packing: Packing,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    tile: int | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Attention [T, H, d] from q, k, v [T, H, d] (d <= 64, last stride 1) and a flat bias [H * pairs] or none.

    `scale` defaults to d ** -0.5; key_mask [T] bool is True where a key takes part. A bias that needs a gradient gets
    this call's own dS, dense; share one among layers by `open_ledger` and `layer_attention`. Raises ValueError where
    shapes or dtypes disagree.
    """
    _check(q, k, v, packing, key_mask)
    check_tile(tile)
    source = dense_source(bias, packing, q.shape[1])
    scale = scale if scale is not None else q.shape[2] ** -0.5
    out, _ = _attend(q, k, v, source, (), packing, key_mask, scale, tile or 0, backend or backend_for(q))
    return out


def table_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: PairTable,
    packing: Packing,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    tile: int | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Attention as `biased_attention`, the bias made from a PairTable inside the kernels: O(L) memory with geometry.

    Gradients reach the table's pieces, u or positions, gain, shift and static block.
    """
    _check(q, k, v, packing, key_mask)
    _, heads, width = q.shape
    ledger = open_ledger(
        table, packing, layers=1, heads=heads, width=width, dtype=q.dtype, scale=scale, key_mask=key_mask, tile=tile,
        backend=backend or backend_for(q),
    )  # fmt: skip
    return layer_attention(q, k, v, ledger)[0]


def layer_attention(q: Tensor, k: Tensor, v: Tensor, ledger: Ledger) -> tuple[Tensor, Ledger]:
    """Attention [T, H, d] of one of a ledger's layers, and the ledger for the next layer.

    Raises ValueError where q, k, v [T, H, d] are not what the ledger was opened for, or all its layers were called.
    """
    _check(q, k, v, ledger.packing, ledger.key_mask)
    if q.shape[1:] != (ledger.heads, ledger.width):
        raise ValueError(
            f"q has {q.shape[1]} heads of {q.shape[2]}; the ledger was opened for {ledger.heads} of {ledger.width}"
        )
    if ledger.calls >= ledger.layers:
        raise ValueError(f"the ledger was opened for {ledger.layers} layers and all were called; open it for more")
    slot = ledger.carriers[0] if ledger.carriers else ()
    if slot and len(slot) == CARRIERS and slot[0].dtype != q.dtype:
        raise ValueError(f"q is {q.dtype}; the ledger was opened for {slot[0].dtype}")
    out, chain = _attend(
        q, k, v, ledger.source, slot, ledger.packing, ledger.key_mask, ledger.scale, ledger.tile, ledger.backend
    )
    carriers = ((chain,),) if len(slot) == 1 else (*ledger.carriers[1:], *ledger.carriers[:1])
    return out, with_progress(ledger, carriers, ledger.calls + 1)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, source: Source, slot: tuple[Tensor, ...], packing: Packing,
    key_mask: Tensor | None, scale: float, tile: int, backend: Backend,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if backend is Backend.REFERENCE or needs_reference(q, k, v, *source.flat):
        return _reference(q, k, v, source, packing, scale, key_mask), slot[0] if slot else q.new_empty(0)
    if backend is Backend.TRITON and q.dtype is torch.float64:
        raise ValueError("the fused kernels take fp32, bf16 or fp16; for fp64 pass backend=Backend.REFERENCE")
    settings = settings_of(source, packing, scale, tile, backend)
    real = torch.compiler.is_compiling()
    out, _, chain = _attention(q, k, v, source.flat, slot, packing_tensors(packing), key_mask, real, *settings)
    return out, chain


def _check(q: Tensor, k: Tensor, v: Tensor, packing: Packing, key_mask: Tensor | None) -> None:
    if q.dim() != 3 or q.shape[0] != packing.sites or q.shape[2] > WIDEST:
        raise ValueError(f"q has shape {tuple(q.shape)}, expected [{packing.sites}, heads, width <= {WIDEST}]")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != q.shape or tensor.dtype != q.dtype:
            found, expected = (tuple(tensor.shape), tensor.dtype), (tuple(q.shape), q.dtype)
            raise ValueError(f"{name} is {found}, expected as q {expected}")
    if key_mask is not None and (key_mask.shape != q.shape[:1] or key_mask.dtype is not torch.bool):
        raise ValueError(f"key_mask is {tuple(key_mask.shape)} {key_mask.dtype}, expected ({len(q)},) torch.bool")
