"""Adaptive norm: fused, CPU and reference forms agree, in value and in every derivative."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from head_checks import bf16_is_no_worse_than_eager, error, evaluate, mutant, passes, second_derivative
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from dig_kernels import adaptive_norm as module
from dig_kernels.adaptive_norm import adaptive_norm
from dig_kernels.dispatch import Backend
from dig_kernels.layout import Packing, pack_lengths


def inputs_for(packing: Packing, width: int) -> list[Tensor]:
    """x, update, gate, shift, scale."""
    generator = torch.Generator().manual_seed(0)
    x, update = 2 * torch.randn(2, packing.sites, width, generator=generator) + 1
    gate, shift, scale = torch.randn(3, packing.batch, width, generator=generator)
    return [x, update, gate, shift, scale]


class Norm:
    """The operator of a packing as a function of its five differentiable inputs."""

    def __init__(self, packing: Packing) -> None:
        self.packing = packing

    def __call__(self, inputs: Sequence[Tensor], backend: Backend) -> tuple[Tensor, ...]:
        x, update, gate, shift, scale = inputs
        return adaptive_norm(x, update, gate, shift, scale, self.packing, backend=backend)


class WithoutUpdate(Norm):
    """The norm alone."""

    def __call__(self, inputs: Sequence[Tensor], backend: Backend) -> tuple[Tensor, ...]:
        x, _, _, shift, scale = inputs
        return adaptive_norm(x, None, None, shift, scale, self.packing, backend=backend)


@pytest.mark.parametrize("backend", [Backend.TRITON, Backend.CPU])
@pytest.mark.parametrize("operator", [Norm, WithoutUpdate])
@pytest.mark.parametrize(("lengths", "width"), [((1,), 2), ((35, 0, 1, 7), 17), ((2, 9), 1536)])
def test_it_agrees_with_the_oracle(
    lengths: tuple[int, ...], width: int, operator: type[Norm], backend: Backend
) -> None:
    packing = pack_lengths(lengths)
    assert passes(operator(packing), inputs_for(packing, width), backend)


@pytest.mark.parametrize("lengths", [(), (0, 0)])
def test_an_empty_batch_passes_through(lengths: tuple[int, ...]) -> None:
    packing = pack_lengths(lengths)
    outputs, grads = evaluate(Norm(packing), [*inputs_for(packing, 4)], Backend.REFERENCE)
    residual, out = Norm(packing)(inputs_for(packing, 4), Backend.TRITON)
    assert residual.shape == out.shape == (0, 4) and not outputs and not any(g.any() for g in grads)


def test_bf16_is_as_good_as_eager_bf16() -> None:
    packing = pack_lengths((20, 3))
    assert bf16_is_no_worse_than_eager(Norm(packing), [x.bfloat16() for x in inputs_for(packing, 40)])


def test_two_backwards_are_bitwise_equal_and_a_sample_knows_no_other() -> None:
    packing = pack_lengths((40, 5))
    inputs = inputs_for(packing, 20)
    first, second = (evaluate(Norm(packing), inputs, Backend.TRITON) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True))
    alone = [x[40:] for x in inputs[:2]] + [x[1:] for x in inputs[2:]]
    for a, b in zip(Norm(pack_lengths((5,)))(alone, Backend.TRITON), first[0], strict=True):
        assert torch.equal(a, b[40:])


def test_wider_norms_than_a_program_holds_run_unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WIDEST", 16)
    monkeypatch.setattr(module, "_adaptive_norm", None)
    packing = pack_lengths((3,))
    assert passes(Norm(packing), inputs_for(packing, 17), Backend.TRITON)


@pytest.mark.parametrize("operator", [Norm, WithoutUpdate])
def test_second_derivatives_are_the_references(operator: type[Norm]) -> None:
    packing = pack_lengths((3, 2))
    inputs = inputs_for(packing, 5)
    used = inputs if operator is Norm else [inputs[0], *inputs[3:]]
    place = (lambda x: x) if operator is Norm else (lambda x: (x[0], None, None, *x[1:]))
    function = lambda x, backend: operator(packing)(place(x), backend)  # noqa: E731
    expected = second_derivative(function, [x.double() for x in used], Backend.REFERENCE)
    found = second_derivative(function, used, Backend.TRITON)
    assert all(error(a, b) <= 1e-4 for a, b in zip(found, expected, strict=True))


def test_the_reference_is_right_to_second_order() -> None:
    packing = pack_lengths((2, 1))
    inputs = [x.double().requires_grad_() for x in inputs_for(packing, 3)]
    function = lambda *x: Norm(packing)(x, Backend.REFERENCE)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_operator_registration_compilation_and_checkpointing() -> None:
    packing = pack_lengths((5, 1))
    inputs = inputs_for(packing, 6)
    leaves = [x.clone().requires_grad_() for x in inputs]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(module._adaptive_norm, (*leaves, packing.cu_seqlens, 5, 1e-5), test_utils=checks)
    operator = Norm(packing)
    plain = evaluate(operator, inputs, Backend.TRITON)
    compiled = torch.compile(lambda x: operator(x, Backend.TRITON), backend="aot_eager", fullgraph=True)
    again = evaluate(lambda x, _: compiled(x), inputs, Backend.TRITON)
    saved = evaluate(lambda x, b: checkpoint(operator, x, b, use_reentrant=False), inputs, Backend.TRITON)
    for other in (again, saved):
        assert all(torch.equal(a, b) for a, b in zip((*plain[0], *plain[1]), (*other[0], *other[1]), strict=True))


@pytest.mark.parametrize(
    ("original", "changed"),
    [
        ("value += opened *", "value -= opened *"),
        ("narrow * gain + offset", "narrow * gain - offset"),
        ("d_scale += dy * normal", "d_scale -= dy * normal"),
        ("dn - tl.sum(dn, 0) / WIDTH -", "dn + tl.sum(dn, 0) / WIDTH -"),
        ("d_gate += flow", "d_gate -= flow"),
    ],
)
def test_a_wrong_sign_does_not_pass(
    original: str, changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packing = pack_lengths((3,))
    mutant(monkeypatch, tmp_path, "adaptive_norm_kernels", original, changed)
    assert not passes(Norm(packing), inputs_for(packing, 6), Backend.TRITON)


def test_wrong_shapes_are_named() -> None:
    packing = pack_lengths((3, 2))
    x, update, gate, shift, scale = inputs_for(packing, 4)
    with pytest.raises(ValueError, match=r"shift has shape \(1, 4\), expected \(2, 4\)"):
        adaptive_norm(x, update, gate, shift[:1], scale, packing)
    with pytest.raises(ValueError, match="update and gate go together"):
        adaptive_norm(x, update, None, shift, scale, packing)
    with pytest.raises(ValueError, match=r"x has shape \(4, 4\), expected \[5, D\]"):
        adaptive_norm(x[1:], update, gate, shift, scale, packing)
