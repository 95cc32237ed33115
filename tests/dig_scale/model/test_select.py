"""Every implementation of the pair operators is the same model: same values, same gradients, one checkpoint."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dig_scale.batch import Context, Geometry, collate
from dig_scale.config import Model
from dig_scale.errors import UserError
from dig_scale.importers.protein import system_from_sequence
from dig_scale.model.features import featurise
from dig_scale.model.score_model import ScoreModel
from dig_scale.system import System
from tests.molecules import five_beads

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported

SMALL = Model(layers=2, width=32, heads=4, feed_forward=48, radial_kernels=24, radial_knots=2048, vector_channels=4)
SEQUENCES = {"small": "ACE-ALA-NME", "large": "ACE-ALA-SER-ALA-GLY-ALA-NME"}


@cache
def system(size: str) -> System:
    if size == "beads":
        return five_beads()
    return system_from_sequence(size, SEQUENCES[size])


def doubled(context: Context) -> Context:
    return Context(**{k: v.double() if v.is_floating_point() else v for k, v in vars(context).items()})


def model_with(kernels: str, dtype: torch.dtype = torch.float64) -> ScoreModel:
    torch.manual_seed(0)
    model = ScoreModel(SMALL.model_copy(update={"kernels": kernels}))
    with torch.no_grad():
        for layer in (model.head.polar, model.head.axial):
            layer.weight.normal_(std=0.3)
    return model.to(dtype)


def batch_of(sizes: tuple[str, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Context]:
    context = collate([featurise(system(size)) for size in sizes])
    x = torch.zeros(len(sizes), context.n_sites, 3, dtype=dtype)
    for row, size in zip(x, sizes, strict=True):
        positions = torch.as_tensor(system(size).reference_positions, dtype=dtype)
        row[: len(positions)] = positions - positions.mean(0)
    generator = torch.Generator().manual_seed(1)
    x = x + 0.3 * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype)
    return x, doubled(context) if dtype == torch.float64 else context


def value_and_gradients(model: ScoreModel, positions: Tensor, context: Context) -> dict[str, Tensor]:
    positions = positions.clone().requires_grad_()
    out = model(Geometry(positions), context, torch.full((len(positions),), 0.2, dtype=positions.dtype)).positions
    assert out is not None
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(out.square().sum(), [positions, *parameters.values()], allow_unused=True)
    named = zip(("positions", *parameters), found, strict=True)
    return {"out": out.detach(), **{name: g for name, g in named if g is not None}}


def largest_difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    assert found.keys() == wanted.keys()
    scale = max(float(w.abs().max()) for name, w in wanted.items() if name != "out")
    errors = [
        (float((found[name] - w).abs().max()) / (float(w.abs().max()) + 1e-4 * scale), name)
        for name, w in wanted.items()
    ]
    return max(errors)


def test_a_compiled_model_is_the_fast_form_with_its_values_and_gradients() -> None:
    from torch._dynamo.backends.debugging import aot_eager  # imports Triton

    x, context = batch_of(("large",))
    wanted = value_and_gradients(model_with("auto"), x, context)
    called: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        called.extend(
            str(node.target).removesuffix(".default") for node in graph.graph.nodes if node.op == "call_function"
        )
        return aot_eager(graph, inputs)

    compiled = model_with("auto")
    compiled.compile(backend=backend)
    torch.compiler.reset()
    found = value_and_gradients(compiled, x, context)
    assert called.count("dig_kernels.dense_attention") == SMALL.layers
    assert called.count("dig_kernels.pair_sum") == SMALL.layers + 1
    error, name = largest_difference(found, wanted)
    assert error < 1e-9, name


@pytest.mark.parametrize("sizes", [("small", "small"), ("large", "large"), ("large", "small")])
def test_the_fast_form_has_the_values_and_gradients_of_the_reference(sizes: tuple[str, ...]) -> None:
    x, context = batch_of(sizes)
    wanted = value_and_gradients(model_with("reference"), x, context)
    error, name = largest_difference(value_and_gradients(model_with("auto"), x, context), wanted)
    assert error < 1e-4, name


@pytest.mark.parametrize("sizes", [("beads", "beads"), ("small", "beads")])
def test_the_fused_kernels_have_the_values_and_gradients_of_the_reference(sizes: tuple[str, ...]) -> None:
    x, context = batch_of(sizes, torch.float32)
    wanted = value_and_gradients(model_with("reference"), x.double(), doubled(context))
    found = value_and_gradients(model_with("triton", torch.float32), x, context)
    error, name = largest_difference({key: value.double() for key, value in found.items()}, wanted)
    assert error < 1e-3, name


class OperandDtypes(TorchDispatchMode):
    """Notes the dtypes of q, k, v and the bias of every call of the packed attention operator."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[set[torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.dig_kernels.attention.default:
            self.seen.append({tensor.dtype for tensor in (*args[:3], args[3][0])})
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("products_of_bf16")
def test_under_autocast_fused_attention_gets_bf16_and_distances_stay_fp32() -> None:
    from dig_scale.model.fused_operators import FusedOperators

    x, context = batch_of(("beads", "beads"), torch.float32)
    model = model_with("triton", torch.float32)
    wanted = value_and_gradients(model_with("reference", torch.float32), x, context)
    with torch.autocast("cpu", dtype=torch.bfloat16), OperandDtypes() as operands:
        found = value_and_gradients(model, x, context)
    assert operands.seen == SMALL.layers * [{torch.bfloat16}]
    with torch.autocast("cpu", enabled=False):
        operators, node = model.geometry(Geometry(x), context, torch.full((2,), 0.2), torch.bfloat16)
    assert isinstance(operators, FusedOperators)
    assert (operators.bias.dtype, operators.filters.dtype, node.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    for name in ("out", "positions"):
        assert torch.allclose(found[name].float(), wanted[name], atol=5e-2 * float(wanted[name].abs().max())), name


def test_fused_kernels_without_a_table_are_refused_with_the_way_out() -> None:
    x, context = batch_of(("small",), torch.float32)
    model = ScoreModel(SMALL.model_copy(update={"kernels": "triton", "radial_knots": 0}))
    with pytest.raises(UserError, match=r"model\.radial_knots"):
        model(Geometry(x), context, torch.full((1,), 0.5))


def test_a_checkpoint_of_one_runs_with_the_other() -> None:
    trained = model_with("reference", torch.float32)
    other = ScoreModel(SMALL)
    other.load_state_dict(trained.state_dict(), strict=True)
    x, context = batch_of(("large", "large"), torch.float32)
    level = torch.full((2,), 0.5)
    with torch.no_grad():
        a, b = (m.eval()(Geometry(x), context, level).positions for m in (trained, other))
    assert a is not None and b is not None
    assert torch.allclose(a, b, atol=1e-4 * float(a.abs().max()))


def test_recomputed_blocks_have_the_same_gradients() -> None:
    x, context = batch_of(("large", "large"))
    plain, recomputed = model_with("auto"), model_with("auto")
    for block in recomputed.trunk.blocks:
        forward = block.forward
        block.forward = lambda *given, forward=forward: checkpoint(forward, *given, use_reentrant=False)
    wanted = value_and_gradients(plain, x, context)
    found = value_and_gradients(recomputed, x, context)
    assert all(torch.equal(found[name], w) for name, w in wanted.items())


def test_forward_mode_derivatives_fall_back_to_the_reference(caplog: pytest.LogCaptureFixture) -> None:
    x, context = batch_of(("large",))
    model, level = model_with("auto"), torch.full((1,), 0.2, dtype=torch.float64)
    tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)

    def score(positions: Tensor) -> Tensor:
        out = model(Geometry(positions), context, level).positions
        assert out is not None
        return out

    _, derivative = torch.func.jvp(score, (x,), (tangent,))
    with torch.no_grad():
        step = 1e-5
        difference = (score(x + step * tangent) - score(x - step * tangent)) / (2 * step)
    assert torch.allclose(derivative, difference, atol=1e-4 * float(derivative.detach().abs().max()))


def test_second_derivatives_agree_with_those_of_the_reference() -> None:
    x, context = batch_of(("large",))

    def curvature(kernels: str) -> Tensor:
        positions = x.clone().requires_grad_()
        out = model_with(kernels)(Geometry(positions), context, torch.full((1,), 0.2, dtype=x.dtype)).positions
        assert out is not None
        (first,) = torch.autograd.grad(out.square().sum(), positions, create_graph=True)
        return torch.autograd.grad(first.square().sum(), positions)[0]

    wanted = curvature("reference")
    assert (curvature("auto") - wanted).abs().max() < 2e-2 * wanted.abs().max()  # the table's f'' is piecewise linear
