"""Attention with a dense shared bias for processors: flash forward, hand-written backward, one bias gradient for all layers.

The bias [B, H, N, N] is shared by all layers, so only the sum over layers of its gradient is wanted. A *ledger* carries
it: `open_ledger(bias)` gives a zero of the bias's shape that takes no memory; every layer takes the ledger in and gives
it on; in the backward pass each layer adds its part in place to the ledger's gradient, and the last to be reached hands the
sum to the bias. Nothing is kept per layer but q, k, v, the output and the log-sum-exp. Small samples (N <= SMALL) go
through PyTorch's own operators, whose saved probabilities cost nothing there.

Also `pair_sum`, the other consumer of a shared pair tensor: out_i = sum_j w_ij rhs_j, with the same ledger.
First derivatives only by hand; with create_graph=True the same expressions are evaluated in differentiable operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dig_kernels.dispatch import log_slow_path

SMALL = 48
"""Sites up to which probabilities are kept for the backward pass instead of recomputed."""
CHUNK = 2**19
"""Elements of one working tile of the backward pass: two fit in a core's share of the cache."""


def open_ledger(shared: Tensor) -> Tensor:
    """The ledger of a shared tensor: a zero of its shape without memory, whose gradient becomes the tensor's."""
    return torch.ops.dig_kernels.open_dense_ledger(shared)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, ledger: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d) + bias) v [B, H, N, d] and the ledger, from q, k, v [B, H, N, d], bias and ledger [B, H, N, N]."""
    if q.shape[2] <= SMALL:
        return small_attention(q, k, v, bias), ledger
    out, _, ledger = torch.ops.dig_kernels.dense_attention(q, k, v, bias, ledger)
    return out, ledger


def small_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The same attention through three batched products; the bias gets its gradient from autograd."""
    batch, heads, n, d = q.shape
    rows = [tensor.reshape(-1, n, d) for tensor in (q, k, v)]
    logits = torch.baddbmm(bias.reshape(-1, n, n), rows[0], rows[1].transpose(1, 2), alpha=d**-0.5)
    return torch.bmm(torch.softmax(logits, dim=-1), rows[2]).view(batch, heads, n, d)


def pair_sum(weights: Tensor, rows: Tensor, ledger: Tensor) -> tuple[Tensor, Tensor]:
    """sum_j weights_ij rows_j [B, M, N, c] and the ledger of `weights`, from weights [B, M, N, N] and rows [B, M, N, c]."""
    return torch.ops.dig_kernels.pair_sum(weights, rows, ledger)


@torch.library.custom_op("dig_kernels::open_dense_ledger", mutates_args=())
def _open(shared: Tensor) -> Tensor:
    return shared.new_zeros(()).expand(shared.shape)


@_open.register_fake
def _open_fake(shared: Tensor) -> Tensor:
    return shared.new_empty(()).expand(shared.shape)


_open.register_autograd(lambda ctx, grad: grad)


@torch.library.custom_op("dig_kernels::dense_attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, ledger: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=bias)
    return out.contiguous(), lse.contiguous(), ledger.new_zeros(()).expand(ledger.shape)


@_attention.register_fake
def _attention_fake(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, ledger: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(v, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3]), _open_fake(ledger)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, bias, _ = inputs
    ctx.save_for_backward(q, k, v, bias, output[0], output[1])


def _attention_gradient(ctx, d_out, _d_lse, d_ledger):  # type: ignore[no-untyped-def]
    q, k, v, bias, out, lse = ctx.saved_tensors
    if torch.is_grad_enabled():
        log_slow_path("dense_attention", "create_graph=True")
        return _differentiable_gradient(q, k, v, bias, d_out, d_ledger)
    total = d_ledger.contiguous()
    dq, dk, dv = torch.ops.dig_kernels.dense_attention_backward(q, k, v, bias, out, lse, d_out, total)
    return dq, dk, dv, None, total


_attention.register_autograd(_attention_gradient, setup_context=_save)


@torch.library.custom_op("dig_kernels::dense_attention_backward", mutates_args=("total",))
def _attention_backward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV; adds dS to `total`. Tiles of whole (sample, head) matrices that stay in the cache.

    The row terms -lse and -delta ride as one more column of the products: S - lse = [scale q, -lse] [k, 1]^T + bias.
    """
    n, d = q.shape[2:]
    scale = d**-0.5
    ones = q.new_ones(*q.shape[:3], 1)
    delta = (out * d_out).sum(-1, keepdim=True)
    flat = lambda tensor: tensor.reshape(-1, n, tensor.shape[-1])  # noqa: E731
    scaled, keys, grads = flat(q * scale), flat(k), flat(d_out)
    q_row, k_row = flat(torch.cat([q * scale, -lse.unsqueeze(-1)], -1)), flat(torch.cat([k, ones], -1))
    g_row, v_row = flat(torch.cat([d_out, -delta], -1)), flat(torch.cat([v, ones], -1))
    biases, totals = bias.expand(*q.shape[:3], n).reshape(-1, n, n), total.view(-1, n, n)
    dq, dk, dv = (torch.empty_like(keys) for _ in range(3))
    chunk = max(1, CHUNK // (n * n))
    for begin in range(0, len(keys), chunk):
        part = slice(begin, begin + chunk)
        p = torch.baddbmm(biases[part], q_row[part], k_row[part].transpose(1, 2)).exp_()
        torch.bmm(p.transpose(1, 2), grads[part], out=dv[part])
        ds = torch.bmm(g_row[part], v_row[part].transpose(1, 2)).mul_(p)
        totals[part] += ds
        torch.bmm(ds, keys[part], out=dq[part])
        torch.bmm(ds.transpose(1, 2), scaled[part], out=dk[part])
    return dq.mul_(scale).view(q.shape), dk.view(q.shape), dv.view(q.shape)


@_attention_backward.register_fake
def _attention_backward_fake(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _differentiable_gradient(q, k, v, bias, d_out, d_ledger):  # type: ignore[no-untyped-def]
    scale = q.shape[-1] ** -0.5
    p = torch.softmax(scale * q @ k.transpose(-1, -2) + bias, dim=-1)
    dp = d_out @ v.transpose(-1, -2)
    ds = p * (dp - (dp * p).sum(-1, keepdim=True))
    return scale * ds @ k, scale * ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ d_out, None, d_ledger + ds


@torch.library.custom_op("dig_kernels::pair_sum", mutates_args=())
def _pair_sum(weights: Tensor, rows: Tensor, ledger: Tensor) -> tuple[Tensor, Tensor]:
    return weights @ rows, ledger.new_zeros(()).expand(ledger.shape)


@_pair_sum.register_fake
def _pair_sum_fake(weights: Tensor, rows: Tensor, ledger: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty(*weights.shape[:-1], rows.shape[-1]), _open_fake(ledger)


def _save_pair_sum(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(inputs[0], inputs[1])


def _pair_sum_gradient(ctx, d_out, d_ledger):  # type: ignore[no-untyped-def]
    weights, rows = ctx.saved_tensors
    d_rows = weights.transpose(-1, -2) @ d_out
    if torch.is_grad_enabled():
        return None, d_rows, d_ledger + d_out @ rows.transpose(-1, -2)
    total = d_ledger.contiguous()
    torch.ops.dig_kernels.add_outer(total, d_out, rows)
    return None, d_rows, total


_pair_sum.register_autograd(_pair_sum_gradient, setup_context=_save_pair_sum)


@torch.library.custom_op("dig_kernels::add_outer", mutates_args=("total",))
def _add_outer(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right^T, [..., N, N] from [..., N, c]."""
    n, c = left.shape[-2:]
    total.view(-1, n, n).baddbmm_(left.reshape(-1, n, c), right.reshape(-1, n, c).transpose(1, 2))


@_add_outer.register_fake
def _add_outer_fake(total: Tensor, left: Tensor, right: Tensor) -> None:
    return None
