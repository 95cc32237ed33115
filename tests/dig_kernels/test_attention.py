"""Packed biased attention: values and every gradient against the fp64 reference, its symmetries, and its slow paths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from dig_kernels import attention_kernels, attention_launch, deferred_kernels
from dig_kernels.attention import biased_attention
from dig_kernels.bias_gradient import Settings, packing_tensors
from dig_kernels.dispatch import Backend
from dig_kernels.layout import Packing, blocks_from_dense, dense_from_blocks, pack_lengths, pitch_of, uniform_packing
from dig_kernels.reference import MASKED, packed_attention
from torch import Tensor

from tests.dig_kernels.mutants import mutant

TILE = 16
BACKENDS = [Backend.CPU, Backend.TRITON]
RAGGED = (17, 0, 1, 2, 16, 33)


@dataclass(frozen=True)
class Problem:
    """One attention call: qkv [T, 3, H, d] whose slices are the rows, flat bias, key mask, weights of the loss [T, H, d]."""

    qkv: Tensor
    bias: Tensor
    packing: Packing
    key_mask: Tensor | None
    weights: Tensor

    @property
    def heads(self) -> int:
        return self.qkv.shape[2]


def problem(
    lengths: tuple[int, ...], heads: int = 1, width: int = 24, magnitude: float = 1.0, masked: bool = False
) -> Problem:
    """Random problem of this shape; with `masked`, about a fifth of the keys and all of the first sample's but one."""
    generator = torch.Generator().manual_seed(sum(lengths) + 7 * heads + width)
    packing = pack_lengths(lengths)
    sites = packing.sites
    mask = torch.rand(sites, generator=generator) > 0.2
    mask[1 : lengths[0]] = False
    mask[0] = True
    return Problem(
        torch.randn(sites, 3, heads, width, generator=generator),
        magnitude * torch.randn(heads * packing.pairs, generator=generator),
        packing,
        mask if masked else None,
        torch.randn(sites, heads, width, generator=generator),
    )


def loss_gradients(call: Callable[..., Tensor], given: Problem, dtype: torch.dtype) -> list[Tensor]:
    """Output, gradient of qkv and gradient of the bias (as dense blocks) of a call in `dtype`, in fp64."""
    qkv = given.qkv.to(dtype).requires_grad_()
    bias = given.bias.to(dtype).requires_grad_()
    out = call(*qkv.unbind(1), bias, given.packing, given.key_mask)
    d_qkv, d_bias = torch.autograd.grad((out * given.weights.to(dtype)).sum(), (qkv, bias))
    blocks = [block.flatten() for block in dense_from_blocks(d_bias, given.packing, given.heads)]
    return [tensor.detach().double() for tensor in (out, d_qkv, torch.cat(blocks))]


def reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, packing: Packing, key_mask: Tensor | None) -> Tensor:
    return packed_attention(q, k, v, bias, packing, q.shape[2] ** -0.5, key_mask)[0]


def fused(backend: Backend) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, packing: Packing, key_mask: Tensor | None) -> Tensor:
        return biased_attention(q, k, v, bias, packing, key_mask=key_mask, tile=TILE, backend=backend)

    return call


def gate(given: Problem, backend: Backend) -> None:
    """Values within 1e-5, gradients within 1e-4 of their largest, of fp64."""
    found = loss_gradients(fused(backend), given, torch.float32)
    expected = loss_gradients(reference, given, torch.float64)
    assert (found[0] - expected[0]).abs().max() < 1e-5
    for mine, right in zip(found[1:], expected[1:], strict=True):
        assert (mine - right).abs().max() < 1e-4 * right.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [8, 24, 64])
def test_values_and_gradients_are_those_of_the_reference(backend: Backend, width: int) -> None:
    gate(problem((17, 0, 1, 2, 15), width=width), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ragged_masked_packs_with_two_heads_are_those_of_the_reference(backend: Backend) -> None:
    gate(problem(RAGGED if backend is Backend.CPU else (17, 0, 1, 16), heads=2, masked=True), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_bias_attention_is_plain_softmax(backend: Backend) -> None:
    given = problem((5, 18))
    out = biased_attention(*given.qkv.unbind(1), None, given.packing, tile=TILE, backend=backend)
    right = reference(*given.qkv.double().unbind(1), torch.zeros(given.packing.pairs).double(), given.packing, None)
    assert (out - right).abs().max() < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_of_a_thousand_costs_no_more_than_the_rounding_of_the_logits(backend: Backend) -> None:
    given = problem((18,))
    offset = 1e3 * torch.linspace(-1, 1, 18).view(1, 18, 1).expand(1, 18, 18)
    given = replace(given, bias=given.bias + blocks_from_dense([offset]))
    found = loss_gradients(fused(backend), given, torch.float32)
    expected = loss_gradients(reference, given, torch.float64)
    # one rounding of a logit of 1e3 in fp32 is 3e-5 of a weight, in base 2 4e-5; the kernels make up to four of them
    for mine, right in zip(found, expected, strict=True):
        assert (mine - right).abs().max() < 2e-4 * right.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_biases_a_thousand_apart_pick_one_key(backend: Backend) -> None:
    given = problem((18,), magnitude=1e3)
    found = loss_gradients(fused(backend), given, torch.float32)
    expected = loss_gradients(reference, given, torch.float64)
    assert (found[0] - expected[0]).abs().max() < 1e-4
    assert all(tensor.isfinite().all() for tensor in found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_is_as_exact_as_bf16_eager(backend: Backend) -> None:
    given = problem((17, 4), masked=True)
    half = replace(given, qkv=given.qkv.bfloat16().float(), bias=given.bias.bfloat16().float())
    exact = loss_gradients(reference, half, torch.float64)
    eager = loss_gradients(reference, half, torch.bfloat16)
    for mine, plain, right in zip(loss_gradients(fused(backend), half, torch.bfloat16), eager, exact, strict=True):
        assert (mine - right).abs().max() <= 2 * (plain - right).abs().max() + 1e-2 * right.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_keys_gives_zero_and_takes_no_gradient(backend: Backend) -> None:
    given = problem((4, 3))
    given = replace(given, key_mask=torch.tensor([False] * 4 + [True] * 3))
    out, d_qkv, d_bias = loss_gradients(fused(backend), given, torch.float32)
    assert not out[:4].any() and not d_qkv[:4].any() and not d_bias[:16].any()
    assert out[4:].all() and d_bias[16:].any()
    settings = Settings(1, 0.0, 1.0, 0.2, 4, TILE, backend is Backend.TRITON)
    rows, packing = given.qkv.unbind(1), packing_tensors(given.packing)
    _, lse, _ = torch.ops.dig_kernels.attention(*rows, [given.bias], [], packing, given.key_mask, False, *settings)
    assert (lse[:, :4] == torch.tensor(MASKED)).all() and lse[:, 4:].abs().max() < 100


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_of_the_bias_is_not_read_and_its_gradient_is_zero(backend: Backend) -> None:
    given = problem((5, 3))
    padding = blocks_from_dense([torch.ones(1, 5, 5), torch.ones(1, 3, 3)]) == 0
    bias = torch.where(padding, torch.nan, given.bias).requires_grad_()
    out = fused(backend)(*given.qkv.unbind(1), bias, given.packing, None)
    out.square().sum().backward()
    assert out.isfinite().all() and bias.grad is not None
    assert bias.grad.isfinite().all() and not bias.grad[padding].any()


def test_slices_of_one_projection_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem((5, 3))
    seen: list[tuple[int, ...]] = []
    kernel = attention_launch.forward_kernel

    class Recorder:
        """Notes where the rows lie, then launches."""

        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            def launch(q: Tensor, k: Tensor, v: Tensor, *rest: object, **options: object) -> None:
                seen.append((q.data_ptr(), k.data_ptr(), v.data_ptr()))
                kernel[grid](q, k, v, *rest, **options)

            return launch

    monkeypatch.setattr(attention_launch, "forward_kernel", Recorder())
    rows = given.qkv.unbind(1)
    fused(Backend.TRITON)(*rows, given.bias, given.packing, None)
    assert seen == [tuple(row.data_ptr() for row in rows)]


def test_a_sample_alone_is_bitwise_the_sample_in_a_pack() -> None:
    given = problem((18, 3, 20))
    packed = fused(Backend.TRITON)(*given.qkv.unbind(1), given.bias, given.packing, None)
    start = 18 * pitch_of(18) + 3 * pitch_of(3)
    alone = fused(Backend.TRITON)(*given.qkv[21:].unbind(1), given.bias[start:], pack_lengths([20]), None)
    assert torch.equal(packed[21:], alone)


def test_a_padded_batch_equals_the_packed_one() -> None:
    given = problem((5, 18))
    padded = uniform_packing(2, 18)
    qkv, mask = torch.zeros(36, *given.qkv.shape[1:]), torch.zeros(36, dtype=torch.bool)
    places = torch.cat([torch.arange(5), 18 + torch.arange(18)])
    qkv[places], mask[places] = given.qkv, True
    dense = dense_from_blocks(given.bias, given.packing, 1)
    bias = blocks_from_dense([torch.nn.functional.pad(dense[0], (0, 13, 0, 13)), dense[1]])
    out = fused(Backend.TRITON)(*qkv.unbind(1), bias, padded, mask)
    assert (
        out[places] - fused(Backend.TRITON)(*given.qkv.unbind(1), given.bias, given.packing, None)
    ).abs().max() < 1e-6


def test_permuted_sites_give_permuted_results() -> None:
    given = problem((18,))
    order = torch.randperm(18, generator=torch.Generator().manual_seed(1))
    dense = dense_from_blocks(given.bias, given.packing, 1)[0]
    moved = blocks_from_dense([dense[:, order][:, :, order]])
    out = fused(Backend.TRITON)(*given.qkv.unbind(1), given.bias, given.packing, None)
    permuted = fused(Backend.TRITON)(*given.qkv[order].unbind(1), moved, given.packing, None)
    assert (out[order] - permuted).abs().max() < 1e-6


def test_two_backwards_are_bitwise_equal() -> None:
    given = problem((18,), masked=True)
    first, second = (loss_gradients(fused(Backend.TRITON), given, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_first_and_second_derivatives_pass_gradcheck() -> None:
    given = problem((3, 1, 4), heads=2, width=2, masked=True)
    inputs = [tensor.double().requires_grad_() for tensor in (*given.qkv.unbind(1), given.bias)]

    def call(*tensors: Tensor) -> Tensor:
        return fused(Backend.CPU)(*tensors, given.packing, given.key_mask)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_second_derivatives_of_the_fused_form_are_those_of_the_reference() -> None:
    given = problem((4, 2), masked=True)

    def curvature(call: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
        qkv, bias = given.qkv.to(dtype).requires_grad_(), given.bias.to(dtype).requires_grad_()
        out = call(*qkv.unbind(1), bias, given.packing, given.key_mask)
        slopes = torch.autograd.grad(out.square().sum(), (qkv, bias), create_graph=True)
        return torch.autograd.grad(sum(slope.square().sum() for slope in slopes), qkv)[0].double()

    right = curvature(reference, torch.float64)
    assert (curvature(fused(Backend.TRITON), torch.float32) - right).abs().max() < 1e-4 * right.abs().max()


def test_forward_mode_runs_the_reference() -> None:
    given = problem((4, 2))
    q, k, v = given.qkv.double().unbind(1)
    bias, push = given.bias.double(), given.weights.double()

    def call(rows: Tensor) -> Tensor:
        return fused(Backend.CPU)(rows, k, v, bias, given.packing, None)

    _, tangent = torch.func.jvp(call, (q,), (push,))
    difference = (call(q + 1e-6 * push) - call(q - 1e-6 * push)) / 2e-6
    assert (tangent - difference).abs().max() < 1e-8


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_operator_keeps_the_contract_of_custom_operators(backend: Backend) -> None:
    given = problem((3, 2), masked=True)
    rows = [row.detach().clone().requires_grad_() for row in given.qkv.unbind(1)]
    bias = given.bias.clone().requires_grad_()
    settings = Settings(1, 0.0, 1.0, 0.2, 3, TILE, backend is Backend.TRITON)
    arguments = (*rows, [bias], [], packing_tensors(given.packing), given.key_mask, False, *settings)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.dig_kernels.attention.default, arguments, test_utils=checks)


def test_compiled_and_plain_calls_agree() -> None:
    given = problem((17, 0, 3), masked=True)
    compiled = torch.compile(fused(Backend.CPU), backend="aot_eager", fullgraph=True)
    plain = loss_gradients(fused(Backend.CPU), given, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(loss_gradients(compiled, given, torch.float32), plain, strict=True))


def test_an_empty_batch_gives_an_empty_result() -> None:
    for backend in BACKENDS:
        given = problem((1,))
        empty = pack_lengths([0, 0])
        out = fused(backend)(*given.qkv[:0].unbind(1), given.bias[:0], empty, None)
        assert out.shape == (0, 1, 24)


def test_disagreeing_shapes_are_named() -> None:
    given = problem((3,))
    q, k, v = given.qkv.unbind(1)
    call = fused(Backend.CPU)
    with pytest.raises(ValueError, match=r"bias has shape \(5,\)"):
        call(q, k, v, given.bias[:5], given.packing, None)
    with pytest.raises(ValueError, match="k is"):
        call(q, k[:2], v, given.bias, given.packing, None)
    with pytest.raises(ValueError, match="key_mask is"):
        call(q, k, v, given.bias, given.packing, torch.ones(3))
    with pytest.raises(ValueError, match="q has shape"):
        call(q, k, v, given.bias, pack_lengths([4]), None)
    with pytest.raises(ValueError, match="tile is 24"):
        biased_attention(q, k, v, None, given.packing, tile=24, backend=Backend.CPU)


MUTATIONS = [
    ("forward_kernel", "shrink[:, None] + product", "shrink[:, None] - product"),
    ("query_gradient_kernel", "- row_delta[:, None]", "+ row_delta[:, None]"),
    ("key_gradient_kernel", "- row_delta[None, :]", "+ row_delta[None, :]"),
    (
        "key_gradient_kernel",
        "d_k + own, keys, heads * WIDTH, k_sum * scale",
        "d_k + own, keys, heads * WIDTH, -k_sum * scale",
    ),
]


def test_the_gate_passes_on_the_problem_that_mutants_get() -> None:
    gate(problem((3, 2)), Backend.TRITON)


@pytest.mark.parametrize(("kernel", "right", "wrong"), MUTATIONS)
def test_the_gate_fails_when_a_sign_in_the_kernel_flips(
    kernel: str, right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = problem((3, 2))
    changed = mutant(attention_kernels, right, wrong, tmp_path)
    monkeypatch.setattr(attention_launch, kernel, getattr(changed, kernel))
    with pytest.raises(AssertionError):
        gate(given, Backend.TRITON)


def test_tiles_follow_the_longest_sample_and_never_spill() -> None:
    given = problem((3,))
    call = attention_launch.Call(
        attention_launch.Source(attention_launch.SourceKind.NONE), packing_tensors(given.packing), None, 1.0, 3
    )
    q = given.qkv[:, 0].bfloat16()
    tiles = [attention_launch.tile_of(replace(call, max_length=length), q) for length in (1, 16, 17, 33, 500)]
    assert tiles == [16, 16, 32, 64, 64]
    assert attention_launch.tile_of(replace(call, max_length=500), given.qkv[:, 0]) == 32
    assert {tile for _, tile in attention_launch.CONFIGS} == {16, 32, 64}
    assert deferred_kernels.VECTOR_BYTES == 16
