"""The shared bias gradient: equal to autograd's over layers in every mode, through checkpoints and compilers, and lean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from dig_kernels import bias_gradient, deferred_kernels
from dig_kernels.attention import Ledger, LedgerMode, PairTable, layer_attention, open_ledger, table_attention
from dig_kernels.dispatch import Backend
from dig_kernels.layout import Packing, dense_from_blocks, pack_lengths
from dig_kernels.pair_source import GivenScalar, PairGeometry
from dig_kernels.radial_table import KnotGrid
from dig_kernels.reference import packed_attention
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.dig_kernels.mutants import mutant

LAYERS, HEADS, WIDTH, TILE = 3, 2, 8, 16
Gradients = list[Tensor]


@dataclass(frozen=True)
class Stack:
    """Three residual attention layers: tokens [T, H d], projections, a flat bias, a key mask."""

    packing: Packing
    tokens: Tensor
    projections: tuple[Tensor, ...]
    bias: Tensor
    key_mask: Tensor


def stack(lengths: tuple[int, ...] = (17, 0, 1, 5)) -> Stack:
    generator = torch.Generator().manual_seed(5)
    packing = pack_lengths(lengths)
    width = HEADS * WIDTH
    return Stack(
        packing,
        torch.randn(packing.sites, width, generator=generator),
        tuple(torch.randn(width, 3 * width, generator=generator) / 4 for _ in range(LAYERS)),
        torch.randn(HEADS * packing.pairs, generator=generator),
        torch.rand(packing.sites, generator=generator) > 0.2,
    )


def rows(tokens: Tensor, projection: Tensor) -> tuple[Tensor, ...]:
    return (tokens @ projection).view(len(tokens), 3, HEADS, WIDTH).unbind(1)


def block(tokens: Tensor, projection: Tensor, ledger: Ledger) -> tuple[Tensor, Ledger]:
    out, ledger = layer_attention(*rows(tokens, projection), ledger)
    return tokens + out.flatten(1), ledger


def gradients(model: Callable[..., Tensor], given: Stack, dtype: torch.dtype) -> Gradients:
    """Gradients of tokens, bias (dense blocks) and projections, in fp64."""
    tokens, bias = (tensor.to(dtype).clone().requires_grad_() for tensor in (given.tokens, given.bias))
    projections = [projection.to(dtype).clone().requires_grad_() for projection in given.projections]
    model(tokens, projections, bias).square().sum().backward()
    assert tokens.grad is not None and bias.grad is not None
    blocks = [part.flatten() for part in dense_from_blocks(bias.grad, given.packing, HEADS)]
    return [
        grad.double() for grad in (tokens.grad, torch.cat(blocks), *(p.grad for p in projections if p.grad is not None))
    ]


def reference_model(given: Stack) -> Callable[..., Tensor]:
    def run(tokens: Tensor, projections: list[Tensor], bias: Tensor) -> Tensor:
        for projection in projections:
            out, _ = packed_attention(*rows(tokens, projection), bias, given.packing, WIDTH**-0.5, given.key_mask)
            tokens = tokens + out.flatten(1)
        return tokens

    return run


def opened(given: Stack, bias: Tensor, mode: LedgerMode, backend: Backend, layers: int = LAYERS) -> Ledger:
    return open_ledger(
        bias, given.packing, layers=layers, heads=HEADS, width=WIDTH, dtype=bias.dtype, mode=mode,
        key_mask=given.key_mask, tile=TILE, backend=backend,
    )  # fmt: skip


def ledger_model(
    given: Stack, mode: LedgerMode, backend: Backend = Backend.CPU, step: Callable[..., tuple[Tensor, Ledger]] = block
) -> Callable[..., Tensor]:
    def run(tokens: Tensor, projections: list[Tensor], bias: Tensor) -> Tensor:
        ledger = opened(given, bias, mode, backend)
        for projection in projections:
            tokens, ledger = step(tokens, projection, ledger)
        return tokens

    return run


def assert_close(found: Gradients, expected: Gradients, tolerance: float = 1e-4) -> None:
    for mine, right in zip(found, expected, strict=True):
        assert (mine - right).abs().max() < tolerance * right.abs().max()


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """No compiled code from one test to the next."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", list(LedgerMode))
@pytest.mark.parametrize("backend", list(Backend))
def test_the_sum_over_layers_is_that_of_autograd(mode: LedgerMode, backend: Backend) -> None:
    given = stack() if backend is not Backend.TRITON else stack((17, 0, 1))
    expected = gradients(reference_model(given), given, torch.float64)
    assert_close(gradients(ledger_model(given, mode, backend), given, torch.float32), expected)


@pytest.mark.parametrize("mode", list(LedgerMode))
def test_checkpointed_layers_give_bitwise_the_same_gradients(mode: LedgerMode) -> None:
    given = stack()

    def again(*arguments: object) -> tuple[Tensor, Ledger]:
        return checkpoint(block, *arguments, use_reentrant=False)  # type: ignore[return-value]

    plain = gradients(ledger_model(given, mode), given, torch.float32)
    kept = gradients(ledger_model(given, mode, step=again), given, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))


@pytest.mark.parametrize("mode", list(LedgerMode))
def test_a_compiled_model_gives_the_same_gradients(mode: LedgerMode) -> None:
    given = stack()
    plain = gradients(ledger_model(given, mode), given, torch.float32)
    compiled = torch.compile(ledger_model(given, mode), backend="aot_eager", fullgraph=True)
    assert_close(gradients(compiled, given, torch.float32), plain, 1e-6)


@pytest.mark.parametrize("mode", list(LedgerMode))
def test_ledgers_cross_the_borders_of_compiled_regions(mode: LedgerMode) -> None:
    given = stack()

    def broken(tokens: Tensor, projection: Tensor, ledger: Ledger) -> tuple[Tensor, Ledger]:
        tokens, ledger = block(tokens, projection, ledger)
        torch._dynamo.graph_break()
        return tokens, ledger

    plain = gradients(ledger_model(given, mode), given, torch.float32)
    by_block = ledger_model(given, mode, step=torch.compile(block, backend="aot_eager", fullgraph=True))
    assert_close(gradients(by_block, given, torch.float32), plain, 1e-6)
    in_parts = torch.compile(ledger_model(given, mode, step=broken), backend="aot_eager")
    assert_close(gradients(in_parts, given, torch.float32), plain, 1e-6)


@pytest.mark.parametrize("mode", list(LedgerMode))
def test_second_derivatives_through_a_ledger_are_those_of_the_reference(mode: LedgerMode) -> None:
    given = stack((4, 2))

    def curvature(model: Callable[..., Tensor]) -> list[Tensor]:
        tokens, bias = (tensor.double().requires_grad_() for tensor in (given.tokens, given.bias))
        out = model(tokens, [projection.double() for projection in given.projections], bias)
        slopes = torch.autograd.grad(out.square().sum(), (tokens, bias), create_graph=True)
        return list(torch.autograd.grad(sum(slope.square().sum() for slope in slopes), (tokens, bias)))

    assert_close(curvature(ledger_model(given, mode)), curvature(reference_model(given)), 1e-9)


def test_forward_mode_through_a_ledger_runs_the_reference() -> None:
    given = stack((4, 2))
    projections = [projection.double() for projection in given.projections]
    tokens, push = given.tokens.double(), torch.ones_like(given.bias).double().cumsum(0) / len(given.bias)

    def slope(model: Callable[..., Tensor]) -> Tensor:
        return torch.func.jvp(lambda bias: model(tokens, projections, bias), (given.bias.double(),), (push,))[1]

    assert_close([slope(ledger_model(given, LedgerMode.DEFER))], [slope(reference_model(given))], 1e-9)


def test_two_backwards_are_bitwise_equal() -> None:
    given = stack((5, 2))
    model = ledger_model(given, LedgerMode.DEFER, Backend.TRITON)
    first, second = (gradients(model, given, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_carriers_take_no_memory_and_one_buffer_gathers_the_sum() -> None:
    given = stack()
    bias = given.bias.clone().requires_grad_()
    ledger = opened(given, bias, LedgerMode.ACCUMULATE, Backend.CPU)
    tokens, buffers = given.tokens, []
    for projection in given.projections:
        carrier = ledger.carriers[0][0]
        assert carrier.untyped_storage().nbytes() == 4 and carrier.shape == bias.shape
        carrier.register_hook(lambda grad: buffers.append(grad.data_ptr()))
        tokens, ledger = block(tokens, projection, ledger)
    tokens.square().sum().backward()
    assert len(buffers) == LAYERS and len(set(buffers)) == 1


def test_deferred_layers_leave_their_rows_where_they_are() -> None:
    given = stack()
    ledger = opened(given, given.bias.clone().requires_grad_(), LedgerMode.DEFER, Backend.CPU)
    assert all(carrier.untyped_storage().nbytes() == 4 for slot in ledger.carriers for carrier in slot)
    q, k, v = rows(given.tokens, given.projections[0].clone().requires_grad_())
    places: list[int] = []
    for carrier in ledger.carriers[0][:3]:
        carrier.register_hook(lambda grad: places.append(grad.data_ptr()))
    layer_attention(q, k, v, ledger)[0].square().sum().backward()
    assert set(places) == {q.data_ptr(), k.data_ptr(), v.data_ptr()}


@pytest.mark.parametrize("mode", list(LedgerMode))
def test_layers_that_were_not_called_add_nothing(mode: LedgerMode) -> None:
    given = stack()
    used = given.projections[:2]

    def gradient_of_bias(layers: int) -> Tensor:
        bias = given.bias.clone().requires_grad_()
        tokens, ledger = given.tokens, opened(given, bias, mode, Backend.CPU, layers)
        for projection in used:
            tokens, ledger = block(tokens, projection, ledger)
        return torch.autograd.grad(tokens.square().sum(), bias)[0]

    assert torch.equal(gradient_of_bias(2), gradient_of_bias(5))


def test_without_gradients_a_ledger_keeps_nothing() -> None:
    given = stack()
    assert opened(given, given.bias, LedgerMode.DEFER, Backend.CPU).carriers == ()
    with torch.no_grad():
        ledger = opened(given, given.bias.clone().requires_grad_(), LedgerMode.DEFER, Backend.CPU)
    assert ledger.carriers == ()


def test_misuse_of_a_ledger_is_named() -> None:
    given = stack()
    bias = given.bias.clone().requires_grad_()
    ledger = opened(given, bias, LedgerMode.DEFER, Backend.CPU, layers=1)
    q, k, v = rows(given.tokens, given.projections[0])
    _, spent = layer_attention(q, k, v, ledger)
    with pytest.raises(ValueError, match="opened for 1 layers"):
        layer_attention(q, k, v, spent)
    with pytest.raises(ValueError, match=r"opened for torch\.float32"):
        layer_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), ledger)
    with pytest.raises(ValueError, match="opened for 2 of 8"):
        layer_attention(q[:, :1], k[:, :1], v[:, :1], ledger)


GRID = KnotGrid(-1.0, 6.0, 9)


@dataclass(frozen=True)
class Tabulated:
    """Rows, and the leaves of a table by name; three channels, of which two are the bias; samples 0 and 3 share a system."""

    packing: Packing
    leaves: dict[str, Tensor]
    types: Tensor
    key_mask: Tensor
    weights: Tensor


def tabulated(lengths: tuple[int, ...], system: tuple[int, ...]) -> Tabulated:
    generator = torch.Generator().manual_seed(9)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    packing = pack_lengths(lengths, system=system)
    sites = packing.sites
    positions = 2 * normal(sites, 3)
    positions[1] = positions[0]
    leaves = {
        "q": normal(sites, HEADS, WIDTH),
        "k": normal(sites, HEADS, WIDTH),
        "v": normal(sites, HEADS, WIDTH),
        "pieces": normal(GRID.knots - 1, 4, HEADS + 1) / 3,
        "static": normal(HEADS * int(packing.static_offsets[-1])),
        "u": 9 * torch.rand(packing.pairs, generator=generator) - 2,
        "positions": positions,
        "gain": 0.5 + torch.rand(3, 3, generator=generator),
        "shift": torch.rand(3, 3, generator=generator),
    }
    types = torch.randint(0, 3, (sites,), generator=generator)
    mask = torch.rand(sites, generator=generator) > 0.2
    return Tabulated(packing, leaves, types, mask, normal(sites, HEADS, WIDTH))


def table_gradients(
    given: Tabulated, geometry: bool, backend: Backend, dtype: torch.dtype, layers: int
) -> dict[str, Tensor]:
    """The output and the gradient of every leaf in use."""
    leaves = {name: tensor.to(dtype).clone().requires_grad_() for name, tensor in given.leaves.items()}
    source: GivenScalar | PairGeometry = GivenScalar(leaves["u"])
    if geometry:
        source = PairGeometry(leaves["positions"], given.types, leaves["gain"], leaves["shift"])
    table = PairTable(leaves["pieces"], GRID, source, leaves["static"])
    ledger = open_ledger(
        table, given.packing, layers=layers, heads=HEADS, width=WIDTH, dtype=dtype, key_mask=given.key_mask,
        tile=TILE, backend=backend,
    )  # fmt: skip
    mixed = leaves["q"]
    for _ in range(layers):
        out, ledger = layer_attention(mixed, leaves["k"], leaves["v"], ledger)
        mixed = mixed + out
    (mixed * given.weights.to(dtype)).sum().backward()
    found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"out": mixed.detach(), **found}


def assert_table_gradients(given: Tabulated, geometry: bool, backend: Backend, layers: int) -> None:
    expected = table_gradients(given, geometry, Backend.REFERENCE, torch.float64, layers)
    found = table_gradients(given, geometry, backend, torch.float32, layers)
    assert found.keys() == expected.keys() and len(found) == (9 if geometry else 7)
    for name, right in expected.items():
        if name == "u":
            right, found[name] = (dense_from_blocks(x[name], given.packing, 1)[0] for x in (expected, found))
        assert (found[name] - right).abs().max() < 1e-4 * right.abs().max(), name


@pytest.mark.parametrize("geometry", [False, True])
def test_gradients_of_a_table_are_those_of_the_reference(geometry: bool) -> None:
    assert_table_gradients(tabulated((9, 0, 1, 18, 9), (0, 1, 2, 3, 0)), geometry, Backend.CPU, 2)


@pytest.mark.parametrize("geometry", [False, True])
def test_fused_gradients_of_a_table_are_those_of_the_reference(geometry: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given = tabulated((4, 1, 4), (0, 1, 0))
    monkeypatch.setattr(bias_gradient, "TABLE_BLOCK_BYTES", 4 * HEADS * 8 * 6)
    assert_table_gradients(given, geometry, Backend.TRITON, 1)


def test_one_call_with_a_table_needs_no_ledger() -> None:
    given = tabulated((5, 3), (0, 1))
    table = PairTable(given.leaves["pieces"], GRID, GivenScalar(given.leaves["u"]))
    q, k, v = (given.leaves[name].clone().requires_grad_() for name in "qkv")
    outs = [
        table_attention(q, k, v, table, given.packing, backend=backend) for backend in (Backend.CPU, Backend.REFERENCE)
    ]
    assert (outs[0] - outs[1]).abs().max() < 1e-5
    with pytest.raises(ValueError, match="no dense gradient"):
        open_ledger(table, given.packing, layers=1, heads=HEADS, width=WIDTH, dtype=q.dtype, mode=LedgerMode.ACCUMULATE)


def test_the_deferred_gate_fails_when_a_sign_in_the_kernel_flips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = stack((3, 2))
    expected = gradients(reference_model(given), given, torch.float64)
    model = ledger_model(given, LedgerMode.DEFER, Backend.TRITON)
    assert_close(gradients(model, given, torch.float32), expected)
    changed = mutant(deferred_kernels, "- row_delta[:, None]", "+ row_delta[:, None]", tmp_path)
    monkeypatch.setattr(deferred_kernels, "deferred_kernel", changed.deferred_kernel)
    with pytest.raises(AssertionError):
        assert_close(gradients(model, given, torch.float32), expected)
