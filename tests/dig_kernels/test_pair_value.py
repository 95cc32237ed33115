"""Pair values: aggregation before projection equals projection before aggregation, and makes no large tensor."""

from __future__ import annotations

import pytest
import torch
from dig_kernels.dispatch import Backend
from dig_kernels.layout import blocks_from_dense, dense_from_blocks, pack_lengths
from dig_kernels.pair_value import packed_pair_value, pair_value, system_runs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

HEADS, CHANNELS, WIDTH = 2, 4, 3


def inputs_for(samples: int, length: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(samples, HEADS, length, keys, generator=generator).softmax(-1)
    pair = torch.randn(length, keys, CHANNELS, generator=generator)
    return weights, pair, torch.randn(HEADS, WIDTH, CHANNELS, generator=generator)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize(("samples", "length", "keys"), [(1, 1, 1), (1, 17, 17), (3, 5, 5), (2, 4, 9), (1, 0, 0)])
def test_value_and_gradients_are_those_of_the_projected_form(samples: int, length: int, keys: int) -> None:
    inputs = inputs_for(samples, length, keys)
    results = []
    for backend, dtype in ((Backend.REFERENCE, torch.float64), (None, torch.float32)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = pair_value(*leaves, backend=backend)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        results.append([out, *torch.autograd.grad(out, leaves, cotangent)])
    assert results[1][0].shape == (samples, length, HEADS, WIDTH)
    for found, expected in zip(results[1], results[0], strict=True):
        assert torch.allclose(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_it_is_right_to_second_order() -> None:
    inputs = [x.double().requires_grad_() for x in inputs_for(2, 2, 3)]
    assert torch.autograd.gradcheck(pair_value, inputs)
    assert torch.autograd.gradgradcheck(pair_value, inputs)


def test_no_tensor_of_pairs_times_heads_times_width_is_made() -> None:
    length, heads, width = 24, 8, 6
    weights = torch.rand(2, heads, length, length, requires_grad=True)
    pair = torch.randn(length, length, CHANNELS, requires_grad=True)
    projection = torch.randn(heads, width, CHANNELS, requires_grad=True)
    projected, aggregated = LargestTensor(), LargestTensor()
    with projected:
        pair_value(weights, pair, projection, backend=Backend.REFERENCE).sum().backward()
    with aggregated:
        pair_value(weights, pair, projection).sum().backward()
    assert projected.elements >= length * length * heads * width
    assert aggregated.elements <= max(weights.numel(), pair.numel())


def test_samples_of_one_system_share_its_pair_tensor_in_a_packed_batch() -> None:
    lengths, systems = (5, 5, 0, 3, 5), (0, 0, 1, 2, 0)
    packing = pack_lengths(lengths, system=systems)
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.rand(HEADS, n, n, generator=generator) for n in lengths]
    pairs = [torch.randn(n, n, CHANNELS, generator=generator).requires_grad_() for n in (5, 0, 3)]
    projection = torch.randn(HEADS, WIDTH, CHANNELS, generator=generator)
    flat = blocks_from_dense(blocks).requires_grad_()
    runs = system_runs(packing)
    assert [(run.system, run.samples) for run in runs] == [(0, 2), (1, 1), (2, 1), (0, 1)]
    out = packed_pair_value(flat, pairs, projection, runs)
    expected = torch.cat([
        torch.einsum("hij,ijk,hck->ihc", block, pairs[system], projection) for block, system in zip(blocks, systems, strict=True)
    ])  # fmt: skip
    assert torch.allclose(out, expected, atol=1e-5)
    (found,) = torch.autograd.grad(out.sum(), flat, retain_graph=True)
    per_key = [torch.einsum("ijk,hck->hij", pairs[system], projection) for system in systems]
    for a, b in zip(dense_from_blocks(found, packing, HEADS), per_key, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_wrong_shapes_are_named() -> None:
    weights, pair, projection = inputs_for(1, 3, 3)
    with pytest.raises(ValueError, match=r"pair \(3, 2, 4\)"):
        pair_value(weights, pair[:, :2], projection)
