"""Point attention: fused, CPU and reference forms agree, in value and in every derivative."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from head_checks import bf16_is_no_worse_than_eager, error, evaluate, mutant, passes, second_derivative
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from dig_kernels import point_attention as module
from dig_kernels import vector_head
from dig_kernels.dispatch import Backend
from dig_kernels.layout import Packing, blocks_from_dense, dense_from_blocks, pack_lengths, uniform_packing
from dig_kernels.point_attention import (
    Coefficients,
    PointMetric,
    point_attention,
    point_attention_with_weights,
)
from dig_kernels.reference import attention
from dig_kernels.vector_head import Tiles

HEADS, WIDTH, POINTS, VALUE_POINTS = 2, 5, 2, 3
DISTANCE, SQUARED = (Coefficients(0.4, 0.6, metric=metric) for metric in PointMetric)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FORWARD_TILES", {32: Tiles(16, 16, 4), 64: Tiles(16, 16, 4)})
    monkeypatch.setattr(module, "BACKWARD_TILES", {32: Tiles(16, 16, 4), 64: Tiles(16, 16, 4)})


def inputs_for(packing: Packing, width: int = WIDTH, points: int = POINTS) -> list[Tensor]:
    """q, k, v, q_points, k_points, v_points, head_weights, bias."""
    generator = torch.Generator().manual_seed(0)
    sites = packing.sites
    q, k, v = torch.randn(3, sites, HEADS, width, generator=generator)
    q_points, k_points = 3 * torch.randn(2, sites, HEADS, points, 3, generator=generator)
    v_points = 5 * torch.randn(sites, HEADS, VALUE_POINTS, 3, generator=generator)
    bias = torch.randn(HEADS * packing.pairs, generator=generator)
    return [q, k, v, q_points, k_points, v_points, 0.1 + torch.rand(HEADS, generator=generator), bias]


class Points:
    """The operator of a packing as a function of its eight differentiable inputs."""

    def __init__(self, packing: Packing, of: Coefficients = DISTANCE, key_mask: Tensor | None = None) -> None:
        self.packing, self.of, self.key_mask = packing, of, key_mask

    def __call__(self, inputs: Sequence[Tensor], backend: Backend) -> tuple[Tensor, ...]:
        q, k, v, qp, kp, vp, w, bias = inputs
        return point_attention(
            q, k, v, qp, kp, vp, w, bias, self.packing, self.of, key_mask=self.key_mask, backend=backend
        )


class WithWeights(Points):
    """The same, giving the weights as well."""

    def __call__(self, inputs: Sequence[Tensor], backend: Backend) -> tuple[Tensor, ...]:
        q, k, v, qp, kp, vp, w, bias = inputs
        values, points, weights = point_attention_with_weights(
            q, k, v, qp, kp, vp, w, bias, self.packing, self.of, key_mask=self.key_mask, backend=backend
        )
        return values, points, weights


@pytest.mark.parametrize("lengths", [(1,), (2,), (15, 16), (33,), (17, 0, 1, 3), ()])
def test_kernels_agree_with_the_oracle(lengths: tuple[int, ...]) -> None:
    packing = pack_lengths(lengths)
    if packing.sites:
        assert passes(Points(packing), inputs_for(packing), Backend.TRITON)
    else:
        values, points = Points(packing)(inputs_for(packing), Backend.TRITON)
        assert values.shape == (0, HEADS, WIDTH) and points.shape == (0, HEADS, VALUE_POINTS, 3)


@pytest.mark.parametrize("of", [DISTANCE, SQUARED])
def test_weights_come_with_their_own_gradient_and_masked_keys_have_none(of: Coefficients) -> None:
    packing = pack_lengths((17, 2))
    mask = torch.rand(packing.sites, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[17:] = False
    operator, inputs = WithWeights(packing, of, mask), inputs_for(packing)
    assert passes(operator, inputs, Backend.TRITON)
    (values, points, weights), grads = evaluate(operator, inputs, Backend.TRITON)
    assert not values[17:].any() and not points[17:].any() and not grads[1][~mask].any() and not grads[4][~mask].any()
    blocks = dense_from_blocks(weights, packing, HEADS)
    assert torch.allclose(blocks[0].sum(-1), torch.ones(HEADS, 17)) and not blocks[1].any()


def test_no_points_distance_leaves_biased_attention() -> None:
    packing = pack_lengths((17,))
    q, k, v, qp, kp, vp, w, bias = inputs_for(packing)
    values, points = Points(packing)((q, k, v, qp, kp, vp, 0 * w, bias), Backend.TRITON)
    dense = 0.6 * dense_from_blocks(bias, packing, HEADS)[0]
    rows = [x.transpose(0, 1) for x in (q, k, v, vp.flatten(2))]
    assert torch.allclose(values, attention(*rows[:3], dense, 0.4)[0].transpose(0, 1), atol=1e-5)
    expected = attention(rows[0], rows[1], rows[3], dense, 0.4)[0].transpose(0, 1)
    assert torch.allclose(points.flatten(2), expected, atol=1e-5)


def test_the_squared_form_is_the_published_invariant_point_attention() -> None:
    packing = pack_lengths((6,))
    q, k, v, qp, kp, vp, w, bias = inputs_for(packing)
    expanded = [torch.cat([x, 2**0.5 * (w[:, None, None] * y if i == 0 else y).flatten(2)], -1)
                for i, (x, y) in enumerate(((0.4 * q, qp), (k, kp)))]  # fmt: skip
    norms = -w[:, None, None] * (qp**2).sum((2, 3)).T.unsqueeze(-1) - w[:, None, None] * (kp**2).sum(
        (2, 3)
    ).T.unsqueeze(1)
    rows = [x.transpose(0, 1) for x in (*expanded, v)]
    dense = 0.6 * dense_from_blocks(bias, packing, HEADS)[0] + norms
    values, _ = Points(packing, SQUARED)((q, k, v, qp, kp, vp, w, bias), Backend.TRITON)
    assert torch.allclose(values, attention(*rows, dense, 1.0)[0].transpose(0, 1), atol=1e-4)


@pytest.mark.parametrize("block_elements", [1 << 20, 40])
@pytest.mark.parametrize("of", [DISTANCE, SQUARED])
def test_the_cpu_form_agrees_with_the_oracle(
    block_elements: int, of: Coefficients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vector_head, "BLOCK_ELEMENTS", block_elements)
    packing = pack_lengths((33, 0, 1, 16))
    mask = torch.rand(packing.sites, generator=torch.Generator().manual_seed(1)) > 0.4
    assert passes(WithWeights(packing, of, mask), inputs_for(packing), Backend.CPU)


def test_bf16_is_as_good_as_eager_bf16() -> None:
    packing = pack_lengths((17,))
    q, k, v, *points, bias = inputs_for(packing, width=24, points=4)
    low = [q.bfloat16(), k.bfloat16(), v.bfloat16(), *points, bias.bfloat16()]
    assert bf16_is_no_worse_than_eager(Points(packing), low)


def test_coincident_points_and_far_molecules() -> None:
    packing = pack_lengths((17,))
    q, k, v, qp, kp, vp, w, bias = inputs_for(packing)
    kp = torch.cat([qp[:3], kp[3:]])
    assert passes(Points(packing), (q, k, v, qp + 100, kp + 100, vp, w, 100 * bias), Backend.TRITON)


def test_two_backwards_are_bitwise_equal_and_a_sample_knows_no_other() -> None:
    packing = pack_lengths((17, 3))
    inputs = inputs_for(packing)
    first, second = (evaluate(WithWeights(packing), inputs, Backend.TRITON) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True))
    alone = [*(x[17:] for x in inputs[:6]), inputs[6], inputs[7][HEADS * int(packing.pair_offsets[1]) :]]
    values, points = Points(pack_lengths((3,)))(alone, Backend.TRITON)
    assert torch.equal(values, first[0][0][17:]) and torch.equal(points, first[0][1][17:])


def test_packed_equals_padded() -> None:
    packing, place = pack_lengths((16, 5)), torch.cat([torch.arange(16), 16 + torch.arange(5)])
    inputs = inputs_for(packing)
    padded = [torch.zeros(32, *x.shape[1:]).index_copy(0, place, x) for x in inputs[:6]]
    blocks = [torch.zeros(HEADS, 16, 16), torch.zeros(HEADS, 16, 16)]
    for block, dense in zip(blocks, dense_from_blocks(inputs[7], packing, HEADS), strict=True):
        block[:, : dense.shape[1], : dense.shape[2]] = dense
    mask = torch.zeros(32, dtype=torch.bool).index_fill(0, place, True)
    found = Points(uniform_packing(2, 16), DISTANCE, mask)(
        [*padded, inputs[6], blocks_from_dense(blocks)], Backend.TRITON
    )
    for a, b in zip(found, Points(packing)(inputs, Backend.TRITON), strict=True):
        assert torch.allclose(a[place], b, atol=1e-5)


def test_values_stay_and_points_follow_a_rigid_motion() -> None:
    packing = pack_lengths((17,))
    q, k, v, qp, kp, vp, w, bias = inputs_for(packing)
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2)))
    still = Points(packing)((q, k, v, qp, kp, vp, w, bias), Backend.TRITON)
    moved = Points(packing)((q, k, v, *(x @ turn + 2 for x in (qp, kp, vp)), w, bias), Backend.TRITON)
    assert torch.allclose(moved[0], still[0], atol=2e-5) and torch.allclose(moved[1], still[1] @ turn + 2, atol=1e-4)


@pytest.mark.parametrize("backend", [Backend.TRITON, Backend.CPU])
def test_second_derivatives_are_the_references(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_head, "BLOCK_ELEMENTS", 12)
    packing = pack_lengths((3, 2))
    inputs, operator = inputs_for(packing), WithWeights(packing)
    expected = second_derivative(operator, [x.double() for x in inputs], Backend.REFERENCE)
    assert all(error(a, b) <= 1e-4 for a, b in zip(second_derivative(operator, inputs, backend), expected, strict=True))


def test_the_reference_is_right_to_second_order() -> None:
    packing = pack_lengths((2,))
    inputs = [x.double().requires_grad_() for x in inputs_for(packing, width=2, points=1)]
    function = lambda *x: Points(packing)(x, Backend.REFERENCE)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_operator_registration_compilation_and_checkpointing() -> None:
    packing = pack_lengths((5, 1))
    inputs, mask = inputs_for(packing), torch.tensor([True] * 5 + [False])
    leaves = [x.clone().requires_grad_() for x in inputs]
    arguments = (*leaves, mask, packing.cu_seqlens, packing.pair_offsets, 0.4, 0.6, 1e-12, False, 5, packing.pairs)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(module._point_attention, arguments, test_utils=checks)
    operator = WithWeights(packing, DISTANCE, mask)
    plain = evaluate(operator, inputs, Backend.TRITON)
    compiled = torch.compile(lambda x: operator(x, Backend.TRITON), backend="aot_eager", fullgraph=True)
    again = evaluate(lambda x, _: compiled(x), inputs, Backend.TRITON)
    saved = evaluate(lambda x, b: checkpoint(operator, x, b, use_reentrant=False), inputs, Backend.TRITON)
    for other in (again, saved):
        assert all(torch.equal(a, b) for a, b in zip((*plain[0], *plain[1]), (*other[0], *other[1]), strict=True))


@pytest.mark.parametrize(
    ("original", "changed"),
    [
        ("- weight * distance\n        logits", "+ weight * distance\n        logits"),
        ("scale * products - weight * distance", "scale * products + weight * distance"),
        ("p * (value_products - tl.load(delta", "p * (value_products + tl.load(delta"),
        ("point_acc, -weight * dlogits", "point_acc, weight * dlogits"),
        ("point_acc, weight * dlogits", "point_acc, -weight * dlogits"),
        ("residual * mean - head_acc", "residual * mean + head_acc"),
        ("vp_acc += tl.dot", "vp_acc -= tl.dot"),
        ("bias_scale * dlogits, mask", "-bias_scale * dlogits, mask"),
        ("total += tl.sum(product", "total -= tl.sum(product"),
        ("tl.exp(logits - row_lse)", "tl.exp(logits + row_lse)"),
    ],
)
def test_a_wrong_sign_does_not_pass(
    original: str, changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packing = pack_lengths((4,))
    mutant(monkeypatch, tmp_path, "point_attention_kernels", original, changed)
    assert not passes(WithWeights(packing), inputs_for(packing), Backend.TRITON)


def test_wrong_shapes_and_dtypes_are_named() -> None:
    packing = pack_lengths((3,))
    q, k, v, qp, kp, vp, w, bias = inputs_for(packing)
    with pytest.raises(ValueError, match=r"k_points has shape \(3, 2, 1, 3\), expected \(3, 2, 2, 3\)"):
        Points(packing)((q, k, v, qp, kp[:, :, :1], vp, w, bias), Backend.CPU)
    with pytest.raises(ValueError, match="q, k and v should have one dtype"):
        Points(packing)((q, k, v.bfloat16(), qp, kp, vp, w, bias), Backend.CPU)
    with pytest.raises(ValueError, match="bias has shape"):
        Points(packing)((q, k, v, qp, kp, vp, w, bias[:-1]), Backend.CPU)
