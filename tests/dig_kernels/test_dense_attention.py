"""Attention for processors: right values, one right bias gradient over layers, second order through the slow path."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from dig_kernels import dense_attention as module
from dig_kernels.dense_attention import dense_attention, open_ledger, pair_sum, small_attention
from dig_kernels.reference import attention
from head_checks import error
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LAYERS = 3


def inputs(n: int, dtype: torch.dtype = torch.float64, size: float = 1.0) -> list[Tensor]:
    """q, k, v [2, 3, n, 24], bias [2, 3, n, n] with gradients, from a fixed seed."""
    generator = torch.Generator().manual_seed(n)
    shapes = [(2, 3, n, 24)] * 3 + [(2, 3, n, n)]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    drawn[3] *= size
    return [tensor.to(dtype).requires_grad_() for tensor in drawn]


def stack_of_layers(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Layers that share the bias, through the ledger."""
    ledger = open_ledger(bias)
    for _ in range(LAYERS):
        q, ledger = dense_attention(q, k, v, bias, ledger)
    return q


def stack_by_formula(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The same layers through the oracle."""
    for _ in range(LAYERS):
        q = torch.stack([attention(*rows, scale=q.shape[-1] ** -0.5)[0] for rows in zip(q, k, v, bias, strict=True)])
    return q


def gradients(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    out = function(*tensors)
    direction = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, tensors, direction)]


def worst(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max(error(f.detach(), w.detach()) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("n", [1, 2, 17, 48, 49, 64, 127])
@pytest.mark.parametrize("size", [1.0, 1e3])
def test_output_and_every_gradient_agree_with_the_oracle(n: int, size: float) -> None:
    wanted = gradients(stack_by_formula, inputs(n, size=size))
    assert worst(gradients(stack_of_layers, inputs(n, size=size)), wanted) < 1e-10
    if size == 1.0:
        assert worst(gradients(stack_of_layers, inputs(n, torch.float32)), wanted) < 1e-4


def test_working_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gradients(stack_of_layers, inputs(64))
    monkeypatch.setattr(module, "CHUNK", 64 * 64)
    assert worst(gradients(stack_of_layers, inputs(64)), whole) < 1e-14


def test_two_backward_passes_are_bitwise_equal() -> None:
    first, second = (gradients(stack_of_layers, inputs(65, torch.float32)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_second_derivatives_come_from_the_differentiable_path() -> None:
    def square_of_gradients(layers: Callable[..., Tensor]) -> list[Tensor]:
        tensors = inputs(50)
        out = layers(*tensors)
        first = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), tensors))

    assert worst(square_of_gradients(stack_of_layers), square_of_gradients(stack_by_formula)) < 1e-9


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    def checkpointed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        ledger = open_ledger(bias)
        for _ in range(LAYERS):
            q, ledger = checkpoint(dense_attention, q, k, v, bias, ledger, use_reentrant=False)
        return q

    pairs = zip(gradients(checkpointed, inputs(50)), gradients(stack_of_layers, inputs(50)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_compiled_and_eager_agree() -> None:
    compiled = torch.compile(stack_of_layers, backend="aot_eager", fullgraph=True)
    assert worst(gradients(compiled, inputs(50)), gradients(stack_of_layers, inputs(50))) < 1e-12


@pytest.mark.parametrize("n", [50])
def test_operators_keep_the_contract_of_the_library(n: int) -> None:
    q, k, v, bias = inputs(n)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.dig_kernels.dense_attention, (q, k, v, bias, open_ledger(bias)), test_utils=checks)
    torch.library.opcheck(torch.ops.dig_kernels.pair_sum, (bias, q, open_ledger(bias)), test_utils=checks)


def test_a_shared_pair_tensor_collects_the_gradient_of_all_its_sums() -> None:
    def through_ledger(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
        ledger = open_ledger(weights)
        a, ledger = pair_sum(weights, q, ledger)
        b, ledger = pair_sum(weights, k * a, ledger)
        return b * v

    def by_formula(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
        return (weights @ (k * (weights @ q))) * v

    assert worst(gradients(through_ledger, inputs(9)), gradients(by_formula, inputs(9))) < 1e-12


def test_the_gate_sees_a_flipped_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = gradients(stack_by_formula, inputs(50))
    honest = torch.cat
    flipped = lambda parts, dim=0: honest([parts[0], parts[1].abs()], dim)  # noqa: E731 (-lse and -delta become positive)
    monkeypatch.setattr(module.torch, "cat", flipped)
    assert not worst(gradients(stack_of_layers, inputs(50)), wanted) < 1e-2


def test_small_samples_take_the_same_values() -> None:
    q, k, v, bias = inputs(20)
    out, _ = dense_attention(q, k, v, bias, open_ledger(bias))
    assert torch.equal(out, small_attention(q, k, v, bias))
    assert math.isclose(float(out.detach().abs().sum()), float(stack_by_first_layer(q, k, v, bias)), rel_tol=1e-12)


def stack_by_first_layer(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Sum of one layer's absolute outputs by the oracle."""
    rows = [attention(*row, scale=q.shape[-1] ** -0.5)[0] for row in zip(q, k, v, bias, strict=True)]
    return torch.stack(rows).detach().abs().sum()
