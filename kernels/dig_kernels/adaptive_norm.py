"""Residual, layer norm and modulation by a sample's condition in one pass.

    residual = x + gate_b update          out = LayerNorm(residual) (1 + scale_b) + shift_b

x and update are [T, D] over the sites of a packed batch, gate, shift and scale [B, D], one row per sample; the norm has no
weights of its own. One read and one write of each [T, D] tensor each way; statistics in fp32, of the residual as stored.
Whether this or torch.compile of the reference is faster is a matter of measurement on the GPU at hand; both give the same.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dig_kernels import reference_heads as reference
from dig_kernels.dispatch import Backend, backend_for, log_slow_path, wants_reference
from dig_kernels.layout import Packing

if TYPE_CHECKING:
    from dig_kernels.compiling import CompileCase

FORWARD_ROWS = 8
BACKWARD_ROWS = 32
"""Sites of a program, which share one load of the condition; the backward leaves one partial sum per program."""
WIDEST = 4096
"""Channels that a program can hold; wider norms run unfused."""


def _shape(width: int) -> dict[str, int]:
    """Block of channels, and warps enough to keep 8 of them to a thread: 16 spill."""
    block = max(16, 1 << (width - 1).bit_length())
    return {"WIDTH": width, "BLOCK_D": block, "num_warps": min(16, max(1, block // 256)), "num_stages": 2}


@torch.library.custom_op("dig_kernels::adaptive_norm", mutates_args=())
def _adaptive_norm(
    x: Tensor, update: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, cu: Tensor,
    max_length: int, epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """residual (empty without an update), out, mean [T] and inverse standard deviation [T]."""
    from dig_kernels import adaptive_norm_kernels as kernels

    residual = torch.empty_like(x) if update is not None else x.new_empty(0)
    out, mean = torch.empty_like(x), x.new_empty(len(x), dtype=torch.float32)
    inverse, chunks = torch.empty_like(mean), -(-max_length // FORWARD_ROWS)
    if len(x):
        kernels.forward[(chunks * (len(cu) - 1),)](
            x, x if update is None else update, x if gate is None else gate, shift, scale, cu, residual, out, mean,
            inverse, chunks, epsilon, ROWS=FORWARD_ROWS, HAS_UPDATE=update is not None, **_shape(x.shape[1]),
        )  # fmt: skip
    return residual, out, mean, inverse


@_adaptive_norm.register_fake
def _(x: Tensor, update: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    statistic = x.new_empty(len(x), dtype=torch.float32)
    residual = torch.empty_like(x) if update is not None else x.new_empty(0)
    return residual, torch.empty_like(x), statistic, torch.empty_like(statistic)


@torch.library.custom_op("dig_kernels::adaptive_norm_backward", mutates_args=())
def _adaptive_norm_backward(
    d_residual: Tensor, d_out: Tensor, residual: Tensor, mean: Tensor, inverse: Tensor, update: Tensor | None,
    gate: Tensor | None, shift: Tensor, scale: Tensor, cu: Tensor, max_length: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, update and gate (empty without them), shift and scale."""
    from dig_kernels import adaptive_norm_kernels as kernels

    batch, width, chunks = len(cu) - 1, residual.shape[1], -(-max_length // BACKWARD_ROWS)
    dx = torch.empty_like(residual)
    d_update = torch.empty_like(residual) if update is not None else residual.new_empty(0)
    partials = mean.new_empty(batch, chunks, 3, width)
    if batch * chunks:
        kernels.backward[(chunks * batch,)](
            d_residual.contiguous(), d_out.contiguous(), residual, residual if update is None else update,
            residual if gate is None else gate, scale, cu, mean, inverse, dx, d_update, partials, chunks,
            ROWS=BACKWARD_ROWS, HAS_UPDATE=update is not None, **_shape(width),
        )  # fmt: skip
    d_shift, d_scale, d_gate = partials.sum(1).unbind(1)
    d_gate = d_gate.to(gate.dtype, copy=True) if gate is not None else residual.new_empty(0)
    return dx, d_update, d_gate, d_shift.to(shift.dtype, copy=True), d_scale.to(scale.dtype, copy=True)


@_adaptive_norm_backward.register_fake
def _(
    d_residual: Tensor, d_out: Tensor, residual: Tensor, mean: Tensor, inverse: Tensor, update: Tensor | None,
    gate: Tensor | None, shift: Tensor, scale: Tensor, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    absent = residual.new_empty(0)
    d_update = torch.empty_like(residual) if update is not None else absent
    d_gate = torch.empty_like(gate) if gate is not None else torch.empty_like(absent)
    return torch.empty_like(residual), d_update, d_gate, torch.empty_like(shift), torch.empty_like(scale)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6], output[0], *output[2:])
    ctx.max_length, ctx.epsilon = inputs[6:]


def _backward(ctx: Any, d_residual: Tensor, d_out: Tensor, *unused: Tensor) -> tuple[Any, ...]:
    x, update, gate, shift, scale, cu, residual, mean, inverse = ctx.saved_tensors
    need = ctx.needs_input_grad
    if torch.is_grad_enabled():
        log_slow_path("adaptive_norm", "create_graph=True")
        packing = Packing(cu, cu, cu, cu, ctx.max_length, len(x), 0)
        function = partial(_reference_of, packing, ctx.epsilon)
        cotangents = (d_residual, d_out) if update is not None else (d_out,)
        found = reference.gradients_through(function, (x, update, gate, shift, scale), need[:5], cotangents)
    else:
        stored = residual if update is not None else x
        arguments = (d_residual, d_out, stored, mean, inverse, update, gate, shift, scale, cu, ctx.max_length)
        grads = _adaptive_norm_backward(*arguments)
        found = tuple(g if needed else None for g, needed in zip(grads, need, strict=False))
    return (*found, None, None, None)


def _reference_of(packing: Packing, epsilon: float, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The reference from the differentiable arguments of the operator, without the residual where that is x."""
    outputs = reference.adaptive_norm(*inputs, packing, epsilon)  # type: ignore[call-arg, arg-type]
    return outputs if inputs[1] is not None else outputs[1:]


_adaptive_norm.register_autograd(_backward, setup_context=_save)


def adaptive_norm(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    packing: Packing,
    *,
    epsilon: float = 1e-5,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """New residual and modulated norm, both [T, D], from x, update [T, D] and gate, shift, scale [B, D].

    Without update and gate (both None) the residual is x itself. Raises ValueError on shapes that disagree.
    """
    _check(x, update, gate, shift, scale, packing)
    chosen = backend or backend_for(x)
    unfused = chosen is not Backend.TRITON or x.shape[1] > WIDEST or x.dtype == torch.float64
    if chosen is Backend.REFERENCE or wants_reference("adaptive_norm", x, update, gate, shift, scale):
        residual, out = reference.adaptive_norm(x, update, gate, shift, scale, packing, epsilon)
        return residual.to(x.dtype), out.to(x.dtype)
    if unfused:
        return _unfused(x, update, gate, shift, scale, packing, epsilon)
    arguments = [None if t is None else t.contiguous() for t in (x, update, gate, shift, scale)]
    residual, out, _, _ = _adaptive_norm(*arguments, packing.cu_seqlens, packing.max_length, epsilon)
    return x if update is None else residual, out


def _unfused(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    packing: Packing,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """The CPU form, and that of very wide norms: PyTorch's own layer norm and fused multiply-adds."""
    sample = reference.sample_of_site(packing)
    residual = x if update is None or gate is None else torch.addcmul(x, gate[sample], update).to(x.dtype)
    normal = torch.nn.functional.layer_norm(residual, residual.shape[-1:], eps=epsilon)
    return residual, torch.addcmul(shift[sample], normal, 1 + scale[sample]).to(x.dtype)


def _check(
    x: Tensor, update: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, packing: Packing
) -> None:
    if (update is None) != (gate is None):
        raise ValueError("update and gate go together: give both or neither")
    if x.ndim != 2 or len(x) != packing.sites:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected [{packing.sites}, D]")
    if update is not None and update.shape != x.shape:
        raise ValueError(f"update has shape {tuple(update.shape)}, expected {tuple(x.shape)} like x")
    for name, condition in {"gate": gate, "shift": shift, "scale": scale}.items():
        if condition is not None and condition.shape != (packing.batch, x.shape[1]):
            raise ValueError(f"{name} has shape {tuple(condition.shape)}, expected {(packing.batch, x.shape[1])}")


def compile_cases() -> list[CompileCase]:
    """The launch configurations to compile for GPUs that are not here: bf16 at 768, 1536 and the widest."""
    from dig_kernels import adaptive_norm_kernels as kernels
    from dig_kernels.compiling import CompileCase

    types = {"cu": "*i32", "chunks": "i32", "epsilon": "fp32"}
    types |= dict.fromkeys(("mean", "inverse", "partials"), "*fp32")
    cases = []
    for width in (768, 1536, WIDEST):
        shape = _shape(width)
        warps, stages = shape.pop("num_warps"), shape.pop("num_stages")
        for name, function, rows in (
            ("forward", kernels.forward, FORWARD_ROWS),
            ("backward", kernels.backward, BACKWARD_ROWS),
        ):
            constants: dict[str, Any] = {**shape, "ROWS": rows, "HAS_UPDATE": True}
            arguments = function.arg_names
            signature = {arg: "constexpr" if arg in constants else types.get(arg, "*bf16") for arg in arguments}
            cases.append(CompileCase(f"adaptive_norm D={width} {name}", function, signature, constants, warps, stages))
    return cases
