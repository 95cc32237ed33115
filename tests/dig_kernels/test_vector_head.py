"""The vector head: fused, CPU and reference forms agree, in value and in every derivative."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from head_checks import bf16_is_no_worse_than_eager, error, evaluate, mutant, passes, second_derivative
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from dig_kernels import vector_head as module
from dig_kernels.dispatch import Backend
from dig_kernels.layout import Packing, blocks_from_dense, dense_from_blocks, pack_lengths, uniform_packing
from dig_kernels.vector_head import Direction, ImageKeys, Tiles, image_keys, vector_head

HEADS, WIDTH = 2, 5
RAGGED = (17, 0, 1, 3)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FORWARD_TILES", {32: Tiles(16, 16, 4), 64: Tiles(16, 16, 4)})
    monkeypatch.setattr(module, "BACKWARD_TILES", {32: Tiles(16, 16, 4), 64: Tiles(16, 16, 4)})


def inputs_for(packing: Packing, pairs: int | None = None, width: int = WIDTH, seed: int = 0) -> list[Tensor]:
    """q, k, s, bias, positions."""
    generator = torch.Generator().manual_seed(seed)
    sites, pairs = packing.sites, packing.pairs if pairs is None else pairs
    shapes = ((sites, HEADS, width), (sites, HEADS, width), (sites, HEADS), (HEADS * pairs,), (sites, 3))
    q, k, s, bias, positions = (torch.randn(shape, generator=generator) for shape in shapes)
    return [q, k, s, bias, 3 * positions]


class Head:
    """The operator of a packing as a function of its five differentiable inputs."""

    def __init__(
        self,
        packing: Packing,
        key_mask: Tensor | None = None,
        images: ImageKeys | None = None,
        direction: Direction = Direction.TOWARDS_KEY,
    ) -> None:
        self.packing, self.key_mask, self.images, self.direction = packing, key_mask, images, direction

    def __call__(self, inputs: Sequence[Tensor], backend: Backend) -> tuple[Tensor, ...]:
        q, k, s, bias, positions = inputs
        out = vector_head(
            q, k, s, bias, positions, self.packing, direction=self.direction, key_mask=self.key_mask, images=self.images,
            backend=backend,
        )  # fmt: skip
        return (out,)


def images_of(packing: Packing, seed: int = 3) -> ImageKeys:
    """0 to 3 copies of each site, anywhere."""
    generator = torch.Generator().manual_seed(seed)
    copies = torch.randint(0, 4, (packing.sites,), generator=generator)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), copies.cumsum(0)])
    return image_keys(starts, 4 * torch.randn(int(starts[-1]), 3, generator=generator), packing)


@pytest.mark.parametrize("lengths", [(1,), (2,), (15, 16), (33,), RAGGED, ()])
def test_kernels_agree_with_the_oracle(lengths: tuple[int, ...]) -> None:
    packing = pack_lengths(lengths)
    if packing.sites:
        assert passes(Head(packing), inputs_for(packing), Backend.TRITON)
    else:
        assert Head(packing)(inputs_for(packing), Backend.TRITON)[0].shape == (0, 3)


@pytest.mark.parametrize("direction", Direction)
def test_masked_keys_have_no_part(direction: Direction) -> None:
    packing = pack_lengths(RAGGED)
    mask = torch.rand(packing.sites, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[17:] = False
    head, inputs = Head(packing, mask, direction=direction), inputs_for(packing)
    assert passes(head, inputs, Backend.TRITON)
    (out,), (_, dk, ds, _, _) = evaluate(head, inputs, Backend.TRITON)
    assert not out[17:].any() and not dk[~mask].any() and not ds[~mask].any()


@pytest.mark.parametrize("backend", [Backend.TRITON, Backend.CPU])
def test_periodic_copies_are_keys_of_their_own(backend: Backend) -> None:
    packing = pack_lengths((18, 2, 0))
    images = images_of(packing)
    mask = torch.rand(packing.sites, generator=torch.Generator().manual_seed(1)) > 0.2
    assert passes(Head(packing, mask, images), inputs_for(packing, images.pairs), backend)


def test_copies_at_home_are_the_sites_themselves() -> None:
    packing = pack_lengths((17, 1))
    starts = torch.arange(packing.sites + 1)
    images, inputs = image_keys(starts, torch.zeros(packing.sites, 3), packing), inputs_for(packing)
    plain = evaluate(Head(packing), inputs, Backend.TRITON)
    copied = evaluate(Head(packing, None, images), inputs, Backend.TRITON)
    for a, b in zip((*plain[0], *plain[1]), (*copied[0], *copied[1]), strict=True):
        assert error(a, b.double()) <= 1e-5


@pytest.mark.parametrize("block_elements", [1 << 20, 40])
def test_the_cpu_form_agrees_with_the_oracle(block_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block_elements)
    packing = pack_lengths((33, 0, 1, 16))
    assert passes(Head(packing), inputs_for(packing), Backend.CPU)
    assert passes(Head(packing, torch.rand(packing.sites) > 0.5), inputs_for(packing), Backend.CPU)


@pytest.mark.parametrize("width", [24, 64])
def test_bf16_is_as_good_as_eager_bf16(width: int) -> None:
    packing = pack_lengths((17, 2))
    inputs = inputs_for(packing, width=width)
    low = [x.bfloat16() for x in inputs[:4]]
    assert bf16_is_no_worse_than_eager(Head(packing), [*low, inputs[4]])


def test_no_bias_and_a_constant_bias_are_allowed() -> None:
    packing = pack_lengths((17,))
    q, k, s, bias, positions = inputs_for(packing)
    for given in (None, bias):
        query = q.clone().requires_grad_()
        found, expected = (
            vector_head(query, k, s, given, positions, packing, direction=Direction.FROM_KEY, backend=backend)
            for backend in (Backend.TRITON, Backend.REFERENCE)
        )
        assert error(found, expected.double()) <= 1e-5
        (a,) = torch.autograd.grad(found.sum(), query)
        (b,) = torch.autograd.grad(expected.sum(), query)
        assert error(a, b.double()) <= 1e-4


def test_slices_of_a_joint_projection_are_read_in_place() -> None:
    packing = pack_lengths((17,))
    q, k, s, bias, positions = inputs_for(packing)
    joint = torch.stack([q, k], dim=1)
    found = Head(packing)((joint[:, 0], joint[:, 1], s, bias, positions), Backend.TRITON)[0]
    assert torch.equal(found, Head(packing)((q, k, s, bias, positions), Backend.TRITON)[0])


def test_extreme_biases_and_far_or_coincident_sites() -> None:
    packing = pack_lengths((17,))
    q, k, s, bias, positions = inputs_for(packing)
    positions = torch.cat([positions[:8], positions[:8], positions[16:]]) + 1000
    assert passes(Head(packing), (q, k, s, 300 * bias, positions), Backend.TRITON)


def test_two_backwards_are_bitwise_equal_and_a_sample_knows_no_other() -> None:
    packing, inputs = pack_lengths((17, 5)), inputs_for(pack_lengths((17, 5)))
    first, second = (evaluate(Head(packing), inputs, Backend.TRITON) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True))
    alone = pack_lengths((5,))
    q, k, s, _, positions = (x[17:] for x in inputs)
    bias = inputs[3][HEADS * int(packing.pair_offsets[1]) :]
    assert torch.equal(Head(alone)((q, k, s, bias, positions), Backend.TRITON)[0], first[0][0][17:])


def test_packed_equals_padded() -> None:
    packing = pack_lengths((16, 5))
    q, k, s, bias, positions = inputs_for(packing)
    packed = Head(packing)((q, k, s, bias, positions), Backend.TRITON)[0]
    place = torch.cat([torch.arange(16), 16 + torch.arange(5)])
    padded = [torch.zeros(32, *x.shape[1:]).index_copy(0, place, x) for x in (q, k, s, positions)]
    blocks = [torch.zeros(HEADS, 16, 16), torch.zeros(HEADS, 16, 16)]
    for block, dense in zip(blocks, dense_from_blocks(bias, packing, HEADS), strict=True):
        block[:, : dense.shape[1], : dense.shape[2]] = dense
    mask = torch.zeros(32, dtype=torch.bool).index_fill(0, place, True)
    arguments = (*padded[:3], blocks_from_dense(blocks), padded[3])
    found = Head(uniform_packing(2, 16), mask)(arguments, Backend.TRITON)[0]
    assert torch.allclose(found[place], packed, atol=1e-6)


def test_vectors_turn_with_the_molecule_and_sites_may_be_renumbered() -> None:
    packing = pack_lengths((17,))
    q, k, s, bias, positions = inputs_for(packing)
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2)))
    still = Head(packing)((q, k, s, bias, positions), Backend.TRITON)[0]
    turned = Head(packing)((q, k, s, bias, positions @ turn + 1), Backend.TRITON)[0]
    assert torch.allclose(turned, still @ turn, atol=2e-5)
    order = torch.randperm(17, generator=torch.Generator().manual_seed(2))
    dense = dense_from_blocks(bias, packing, HEADS)[0][:, order][:, :, order]
    moved = (q[order], k[order], s[order], blocks_from_dense([dense]), positions[order])
    assert torch.allclose(Head(packing)(moved, Backend.TRITON)[0], still[order], atol=2e-5)


@pytest.mark.parametrize("backend", [Backend.TRITON, Backend.CPU])
def test_second_derivatives_are_the_references(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 12)
    packing = pack_lengths((3, 2))
    inputs, head = inputs_for(packing), Head(packing, torch.tensor([True, True, False, True, True]))
    expected = second_derivative(head, [x.double() for x in inputs], Backend.REFERENCE)
    assert all(error(a, b) <= 1e-4 for a, b in zip(second_derivative(head, inputs, backend), expected, strict=True))


def test_the_reference_is_right_to_second_order() -> None:
    packing = pack_lengths((3,))
    inputs = [x.double().requires_grad_() for x in inputs_for(packing, width=2)]
    function = lambda *x: Head(packing)(x, Backend.REFERENCE)[0]  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_a_forward_derivative_runs_through_the_reference() -> None:
    packing = pack_lengths((3,))
    q, k, s, bias, positions = inputs_for(packing)
    function = lambda x: Head(packing)((q, k, s, bias, x), Backend.TRITON)[0]  # noqa: E731
    _, tangent = torch.func.jvp(function, (positions,), (torch.ones_like(positions),))
    assert tangent.abs().max() < 1e-5


def test_operator_registration_compilation_and_checkpointing() -> None:
    packing = pack_lengths((5, 1))
    inputs, mask = inputs_for(packing), torch.tensor([True] * 5 + [False])
    q, k, s, bias, positions = (x.clone().requires_grad_() for x in inputs)
    cu, offsets = packing.cu_seqlens, packing.pair_offsets
    arguments = (q, k, s, bias, positions, mask, cu, cu, offsets, None, None, None, 0.4, 1.0, 5, 5)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(module._vector_head, arguments, test_utils=checks)
    head = Head(packing, mask)
    plain = evaluate(head, inputs, Backend.TRITON)
    compiled = torch.compile(lambda x: head(x, Backend.TRITON), backend="aot_eager", fullgraph=True)
    again = evaluate(lambda x, _: compiled(x), inputs, Backend.TRITON)
    saved = evaluate(lambda x, b: checkpoint(head, x, b, use_reentrant=False), inputs, Backend.TRITON)
    for other in (again, saved):
        assert all(torch.equal(a, b) for a, b in zip((*plain[0], *plain[1]), (*other[0], *other[1]), strict=True))


@pytest.mark.parametrize(
    ("original", "changed"),
    [
        ("dx, dy, dz = xi - xj, yi - yj, zi - zj", "dx, dy, dz = xi + xj, yi - yj, zi - zj"),
        ("logits += bias_scale *", "logits -= bias_scale *"),
        ("dlogits = p * (signed * along -", "dlogits = p * (signed * along +"),
        ("pull * (gx - radial * dx)", "pull * (gx + radial * dx)"),
        ("ay -= tl.sum(ty, 1)", "ay += tl.sum(ty, 1)"),
        ("scalar += tl.sum(dscalar, 1)", "scalar -= tl.sum(dscalar, 1)"),
    ],
)
def test_a_wrong_sign_does_not_pass(
    original: str, changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packing = pack_lengths((4,))
    mutant(monkeypatch, tmp_path, "vector_head_kernels", original, changed)
    assert not passes(Head(packing), inputs_for(packing), Backend.TRITON)


def test_wrong_shapes_are_named() -> None:
    packing = pack_lengths((3,))
    q, k, s, bias, positions = inputs_for(packing)
    with pytest.raises(ValueError, match=r"s has shape \(3, 1\), expected \(3, 2\)"):
        Head(packing)((q, k, s[:, :1], bias, positions), Backend.CPU)
    with pytest.raises(ValueError, match="bias has shape"):
        Head(packing)((q, k, s, bias[:-1], positions), Backend.CPU)
    with pytest.raises(ValueError, match="key_mask has shape"):
        Head(packing, torch.ones(2, dtype=torch.bool))((q, k, s, bias, positions), Backend.CPU)
    with pytest.raises(ValueError, match="image starts end at 3"):
        image_keys(torch.arange(4), torch.zeros(2, 3), packing)
