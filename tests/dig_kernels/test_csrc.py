"""The CUDA C++ kernels against the fp64 oracle: the sources that ship, executed on the CPU.

g++ builds kernels/csrc/host/driver.cpp, in which every CUDA thread is a fiber; its functions serve the operators on CPU
tensors here, so that the registered gradients are those of the kernels.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from ctypes import CDLL, c_size_t
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import pytest
import torch
from dig_kernels import cuda_extension, reference
from dig_kernels.bias_source import PairTable, dense_bias, table_source
from dig_kernels.layout import Packing, pack_lengths
from dig_kernels.pair_source import GivenScalar, PairGeometry
from dig_kernels.radial_table import KnotGrid, hermite_pieces
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.dig_kernels.csrc_host import Host, build

CSRC = cuda_extension.source_folder()
GRID = KnotGrid(0.0, 6.0, 24)
SEEDS = (0, 1)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> CDLL:
    return build(CSRC, tmp_path_factory.mktemp("driver") / "driver.so", "-O1")


@pytest.fixture(scope="module")
def operators(library: CDLL) -> Iterator[Host]:
    """The operators work on CPU tensors while this lives."""
    host = Host(library)
    registered = torch.library.Library("dig_kernels_cuda", "IMPL")
    registered.impl("table_attention", host.table, "CPU")
    registered.impl("table_attention_backward", host.table_backward, "CPU")
    registered.impl("small_block_attention", host.small, "CPU")
    registered.impl("small_block_attention_backward", host.small_backward, "CPU")
    yield host
    registered._destroy()


@dataclass(frozen=True)
class Case:
    """One packed problem in fp64."""

    packing: Packing
    qkv: Tensor
    d_out: Tensor
    pieces: Tensor
    geometry: PairGeometry
    u: Tensor
    bias: Tensor
    key_mask: Tensor


def problem(lengths: tuple[int, ...], heads: int = 3, width: int = 24, magnitude: float = 1.0) -> Case:
    """Some keys are masked, in the last sample all of them."""
    generator = torch.Generator().manual_seed(sum(lengths) + width)
    system = [0] * len(lengths) if len(set(lengths)) == 1 else None
    packing = pack_lengths(lengths, system=system)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    n = packing.sites
    types = torch.randint(0, 3, (n,), generator=generator)
    geometry = PairGeometry(2 * normal(n, 3), types, 1 + 0.1 * normal(3, 3), 0.2 * normal(3, 3))
    mask = torch.rand(n, generator=generator) > 0.3
    if len(lengths) > 1:
        mask[n - lengths[-1] :] = False
    pieces = hermite_pieces(magnitude * normal(GRID.knots, heads + 1), normal(GRID.knots, heads + 1), GRID)
    u = 8 * torch.rand(packing.pairs, dtype=torch.float64, generator=generator) - 1
    bias = magnitude * normal(heads * packing.pairs)
    return Case(packing, normal(n, 3, heads, width), normal(n, heads, width), pieces, geometry, u, bias, mask)


def cast(case: Case, dtype: torch.dtype) -> Case:
    """Site tensors and dense bias in `dtype`, table and geometry in fp32 (fp64 for fp64)."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    old = case.geometry
    geometry = PairGeometry(old.positions.to(exact), old.types, old.gain.to(exact), old.shift.to(exact))
    site = (case.qkv.to(dtype), case.d_out.to(dtype))
    return Case(
        case.packing, *site, case.pieces.to(exact), geometry, case.u.to(exact), case.bias.to(dtype), case.key_mask
    )


Run = Callable[[Case, Tensor, Tensor], Tensor]
"""Output from the case, qkv [T, 3, H, d] and the bias that gets a gradient."""


def scale_of(case: Case) -> float:
    return case.qkv.shape[-1] ** -0.5


def run_small(case: Case, qkv: Tensor, bias: Tensor) -> Tensor:
    return cuda_extension._fused_small_block_attention(*small_operands(case, qkv, bias))


def small_operands(case: Case, qkv: Tensor, bias: Tensor) -> tuple[object, ...]:
    return cuda_extension._small_operands(*qkv.unbind(1), bias, case.packing, scale_of(case), case.key_mask)


def oracle_small(case: Case, qkv: Tensor, bias: Tensor) -> Tensor:
    return reference.packed_attention(*qkv.unbind(1), bias, case.packing, scale_of(case), case.key_mask)[0]


def pair_table(case: Case, source: str, static: Tensor) -> PairTable:
    return PairTable(case.pieces, GRID, GivenScalar(case.u) if source == "given" else case.geometry, static)


def table_operands(case: Case, source: str, qkv: Tensor, static: Tensor) -> tuple[object, ...]:
    table = pair_table(case, source, static)
    return cuda_extension._table_operands(*qkv.unbind(1), table, case.packing, scale_of(case), case.key_mask)


def run_table(source: str) -> Run:
    return lambda case, qkv, static: cuda_extension._fused_table_attention(*table_operands(case, source, qkv, static))


def oracle_table(source: str) -> Run:
    def run(case: Case, qkv: Tensor, static: Tensor) -> Tensor:
        table = pair_table(case, source, static)
        bias = dense_bias(
            table_source(table, case.packing, qkv.shape[2]), cuda_extension._places(case.packing), qkv.shape[2]
        )
        assert bias is not None
        return oracle_small(case, qkv, bias.to(qkv.dtype))

    return run


def evaluate(run: Run, case: Case, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradient of qkv and gradient of the bias (0 in row padding)."""
    qkv, bias = case.qkv.detach().requires_grad_(), bias.detach().requires_grad_()
    out = run(case, qkv, bias)
    out.backward(case.d_out)
    assert qkv.grad is not None and bias.grad is not None
    return out.detach(), qkv.grad, bias.grad


def static_of(case: Case) -> Tensor:
    """As much of the dense bias as one block per system takes."""
    return case.bias[: case.qkv.shape[2] * int(case.packing.static_offsets[-1])]


RUNS = {
    "small": (run_small, oracle_small, lambda case: case.bias),
    "given": (run_table("given"), oracle_table("given"), static_of),
    "geometry": (run_table("geometry"), oracle_table("geometry"), static_of),
}
PACKS = [
    ((1,), 24),
    ((2,), 24),
    ((16,), 24),
    ((17, 17), 24),
    ((33,), 24),
    ((5, 0, 33, 1), 24),
    ((17, 3), 8),
    ((18,), 13),
    ((18,), 64),
]


def furthest(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest element of b, or absolute where b is small."""
    return float((a.double() - b).abs().max() / b.abs().max().clamp_min(1.0)) if b.numel() else 0.0


def assert_close(kind: str, lengths: tuple[int, ...], width: int = 24, magnitude: float = 1.0) -> None:
    run, oracle, bias_of = RUNS[kind]
    exact, single = problem(lengths, 3, width, magnitude), cast(problem(lengths, 3, width, magnitude), torch.float32)
    expected = evaluate(oracle, exact, bias_of(exact))
    found = evaluate(run, single, bias_of(single))
    for name, limit, a, b in zip(("out", "qkv", "bias"), (1e-5, 1e-4, 1e-4), found, expected, strict=True):
        assert furthest(a, b) <= limit, f"{name}: {furthest(a, b):.2e}"


@pytest.mark.parametrize(("lengths", "width"), PACKS)
@pytest.mark.parametrize("kind", RUNS)
def test_fp32_kernels_agree_with_the_oracle(operators: Host, kind: str, lengths: tuple[int, ...], width: int) -> None:
    assert_close(kind, lengths, width)


@pytest.mark.parametrize("kind", RUNS)
def test_a_bias_of_a_thousand_is_no_trouble(operators: Host, kind: str) -> None:
    run, oracle, bias_of = RUNS[kind]
    exact, single = problem((17,), 3, 24, 1e3), cast(problem((17,), 3, 24, 1e3), torch.float32)
    found, expected = run(single, single.qkv, bias_of(single)), oracle(exact, exact.qkv, bias_of(exact))
    assert furthest(found, expected) <= 1e-3  # 1e3 has a spacing of 6e-5 in fp32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", ["given", "geometry"])
def test_a_coordinate_that_is_not_a_number_shows(operators: Host, source: str, dtype: torch.dtype) -> None:
    case = cast(problem((18, 5)), dtype)
    case = replace(case, key_mask=torch.ones_like(case.key_mask))
    case.geometry.positions[1, 0] = torch.nan
    case.u[: 18 * 24].view(18, 24)[:, 1] = torch.nan
    out, d_qkv, _ = evaluate(run_table(source), case, static_of(case))
    assert out[:18].isnan().all() and d_qkv[:18].isnan().all()
    assert out[18:].isfinite().all() and d_qkv[18:].isfinite().all()


@pytest.mark.parametrize(("lengths", "width"), [((33, 5), 24), ((18,), 64)])
@pytest.mark.parametrize("kind", RUNS)
def test_bf16_kernels_err_no_more_than_twice_eager_bf16(
    operators: Host, kind: str, lengths: tuple[int, ...], width: int
) -> None:
    run, oracle, bias_of = RUNS[kind]
    half = cast(problem(lengths, 3, width), torch.bfloat16)
    exact = cast(half, torch.float64)
    expected = evaluate(oracle, exact, bias_of(exact))
    eager = evaluate(oracle, half, bias_of(half))
    found = evaluate(run, half, bias_of(half))
    for name, a, b, c in zip(("out", "qkv", "bias"), found, eager, expected, strict=True):
        assert furthest(a, c) <= 2 * furthest(b, c) + 4e-3, f"{name}: {furthest(a, c):.2e}, eager {furthest(b, c):.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_the_order_of_threads(library: CDLL, dtype: torch.dtype) -> None:
    """Bitwise: no race, no atomics, and a repeated run repeats."""
    case = cast(problem((33, 5)), dtype)
    small = small_operands(case, case.qkv, case.bias)
    table = table_operands(case, "geometry", case.qkv, static_of(case))
    results = []
    for seed in SEEDS:
        host = Host(library, seed)
        first, second = host.small(*small), host.table(*table)  # type: ignore[arg-type]
        gradients = host.small_backward(case.d_out, *first, *small), host.table_backward(case.d_out, *second, *table)  # type: ignore[arg-type]
        results.append([*first, *second, *gradients[0], *gradients[1]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", RUNS)
def test_second_derivatives_are_those_of_the_reference(operators: Host, kind: str) -> None:
    run, oracle, bias_of = RUNS[kind]
    case = cast(problem((5, 3)), torch.float32)

    def second(chosen: Run) -> tuple[Tensor, ...]:
        qkv, bias = case.qkv.clone().requires_grad_(), bias_of(case).clone().requires_grad_()
        first = torch.autograd.grad(chosen(case, qkv, bias), (qkv, bias), case.d_out, create_graph=True)
        return torch.autograd.grad(sum((x**2).sum() for x in first), (qkv, bias))

    for a, b in zip(second(run), second(oracle), strict=True):
        assert furthest(a, b.double()) <= 1e-4


def test_a_table_and_its_geometry_get_gradients(operators: Host) -> None:
    exact, single = problem((7, 5)), cast(problem((7, 5)), torch.float32)

    def gradients(chosen: Run, case: Case) -> tuple[Tensor, ...]:
        old = case.geometry
        wanted = [x.clone().requires_grad_() for x in (case.pieces, old.positions, old.gain, old.shift)]
        moved = Case(
            case.packing, case.qkv, case.d_out, wanted[0], PairGeometry(wanted[1], old.types, *wanted[2:]), *tail(case)
        )
        return torch.autograd.grad(chosen(moved, case.qkv, static_of(case)), wanted, case.d_out)

    found, expected = gradients(run_table("geometry"), single), gradients(oracle_table("geometry"), exact)
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert furthest(a, b) <= 1e-4
    assert furthest(_of_knots(found[0].double()), _of_knots(expected[0])) <= 1e-4


def tail(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    return case.u, case.bias, case.key_mask


def _of_knots(d_pieces: Tensor) -> Tensor:
    """Pieces hold each knot twice, so only the gradient carried on to knot values and slopes is unique."""
    values = torch.zeros(GRID.knots, d_pieces.shape[-1], dtype=torch.float64, requires_grad=True)
    slopes = torch.zeros_like(values, requires_grad=True)
    return torch.stack(torch.autograd.grad(hermite_pieces(values, slopes, GRID), (values, slopes), d_pieces))


def test_operators_are_registered_as_torch_expects(operators: Host) -> None:
    case = cast(problem((5, 3)), torch.float32)
    qkv = case.qkv.clone().requires_grad_()
    table, small = table_operands(case, "geometry", qkv, static_of(case)), small_operands(case, qkv, case.bias)
    utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.dig_kernels_cuda.table_attention.default, table, test_utils=utilities)
    torch.library.opcheck(torch.ops.dig_kernels_cuda.small_block_attention.default, small, test_utils=utilities)


@pytest.mark.parametrize("kind", RUNS)
def test_compiled_and_checkpointed_calls_give_the_same(operators: Host, kind: str) -> None:
    run, _, bias_of = RUNS[kind]
    case = cast(problem((5, 3)), torch.float32)
    bias = bias_of(case)
    compiled = torch.compile(lambda qkv, bias: run(case, qkv, bias), backend="aot_eager", fullgraph=True)
    plain = evaluate(run, case, bias)
    for other in (
        lambda _, qkv, bias: compiled(qkv, bias),
        lambda _, qkv, bias: checkpoint(lambda *x: run(case, *x), qkv, bias, use_reentrant=False),
    ):
        assert all(torch.equal(a, b) for a, b in zip(plain, evaluate(other, case, bias), strict=True))


def test_arguments_that_do_not_fit_are_named() -> None:
    case = cast(problem((5, 3)), torch.float32)
    q, k, v = case.qkv.unbind(1)
    with pytest.raises(ValueError, match="on cpu; the CUDA kernels take tensors on a GPU"):
        cuda_extension.table_attention(q, k, v, pair_table(case, "given", static_of(case)), case.packing)
    with pytest.raises(ValueError, match=r"v is torch.float64 .* q is torch.float32"):
        cuda_extension.small_block_attention(q, k, v.double(), None, case.packing)
    for wrong in (case.bias[:7], case.bias[: 3 * 5 * 8 - 24], torch.cat([case.bias, case.bias[:24]])):
        with pytest.raises(ValueError, match=rf"static has shape \({len(wrong)},\); .* from 120 to 192 elements"):
            cuda_extension.table_attention(q, k, v, pair_table(case, "given", wrong), case.packing)
    with pytest.raises(ValueError, match=r"bias has shape \(7,\); expected"):
        cuda_extension.small_block_attention(q, k, v, case.bias[:7], case.packing)


def test_the_room_a_backward_takes_is_what_the_sources_take(library: CDLL) -> None:
    library.dig_small_backward_bytes.restype = c_size_t
    for length, width, dtype in product((1, 16, 17, 96, 193), (8, 32, 33, 64), (torch.float32, torch.bfloat16)):
        taken = library.dig_small_backward_bytes(length, width, int(dtype == torch.bfloat16))
        assert cuda_extension.small_backward_bytes(length, width, dtype.itemsize) == taken


def test_forward_mode_runs_the_reference(operators: Host) -> None:
    case = cast(problem((5, 3)), torch.float32)
    bias = case.bias
    found = torch.func.jvp(
        lambda qkv: cuda_extension.small_block_attention(*qkv.unbind(1), bias, case.packing, key_mask=case.key_mask),
        (case.qkv,),
        (torch.ones_like(case.qkv),),
    )
    expected = torch.func.jvp(lambda qkv: oracle_small(case, qkv, bias), (case.qkv,), (torch.ones_like(case.qkv),))
    for a, b in zip(found, expected, strict=True):
        assert furthest(a, b.double()) <= 1e-5


MUTATIONS = {
    "forward": (("stripe.cuh", "scale * logit.x + added.x", "scale * logit.x - added.x"),),
    "table": (("radial_table.cuh", "3.0f * rise - 2.0f * left.y", "3.0f * rise + 2.0f * left.y"),),
    "backward": (
        ("table_attention_backward.cuh", "d_weights[0][i] - delta[row]", "d_weights[0][i] + delta[row]"),
        ("table_attention_backward.cuh", "d_weights[0][i] - delta[column]", "d_weights[0][i] + delta[column]"),
        ("small_block_attention.cuh", "d_weights[0][i] - shared.delta[row]", "d_weights[0][i] + shared.delta[row]"),
    ),
    "barrier": (("stripe.cuh", "rows[lane_id() / 2] = keep;\n    __syncwarp();", "rows[lane_id() / 2] = keep;"),),
}
"""Each list is one mutant: a sign or a barrier in each of the passes that can be told apart afterwards."""


def mutant(name: str, folder: Path) -> Host:
    shutil.copytree(CSRC, folder / name)
    for file, old, new in MUTATIONS[name]:
        path = folder / name / file
        text = path.read_text()
        assert text.count(old) == 1, f"{file} holds {old!r} {text.count(old)} times"
        path.write_text(text.replace(old, new))
    return Host(build(folder / name, folder / f"{name}.so", "-O0", "-DDIG_NARROW_FP32_ONLY"))


def errors(host: Host) -> dict[str, float]:
    """Relative errors of the outputs and gradients of both kernels, called directly."""
    exact = problem((17, 3))
    single = cast(exact, torch.float32)
    found: dict[str, float] = {}
    small, table = (
        small_operands(single, single.qkv, single.bias),
        table_operands(single, "given", single.qkv, static_of(single)),
    )
    results = {"small": host.small(*small), "table": host.table(*table)}  # type: ignore[arg-type]
    gradients = {
        "small": host.small_backward(single.d_out, *results["small"], *small),  # type: ignore[arg-type]
        "table": host.table_backward(single.d_out, *results["table"], *table),  # type: ignore[arg-type]
    }
    for kind, run, bias in (("small", oracle_small, exact.bias), ("table", oracle_table("given"), static_of(exact))):
        out, d_qkv, _ = evaluate(run, exact, bias)
        found[f"{kind} out"] = furthest(results[kind][0], out)
        for name, a, b in zip(("d_q", "d_k", "d_v"), gradients[kind], d_qkv.unbind(1), strict=False):
            found[f"{kind} {name}"] = furthest(a, b)
    return found


CAUGHT = {
    "forward": {"small out", "table out"},
    "table": {"table out", "table d_q", "table d_k", "table d_v"},
    "backward": {"small d_q", "small d_k", "table d_q", "table d_k"},
    "barrier": {"small out", "table out"},
}
SPARED = {"table": {"small out", "small d_q"}, "backward": {"small out", "table out", "small d_v", "table d_v"}}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutated_source_is_caught(tmp_path: Path, name: str) -> None:
    found = errors(mutant(name, tmp_path))
    assert all(not found[key] <= 1e-3 for key in CAUGHT[name]), found
    assert all(found[key] <= 1e-4 for key in SPARED.get(name, ())), found


@pytest.mark.gpu
@pytest.mark.skipif(not cuda_extension.is_available(), reason="needs a GPU of capability 8.0 and nvcc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", RUNS)
def test_on_a_gpu_the_kernels_agree_with_the_oracle(kind: str, dtype: torch.dtype) -> None:
    cuda_extension.load_extension()
    run, oracle, bias_of = RUNS[kind]
    single = cast(problem((65, 0, 96, 1)), dtype)
    exact = cast(single, torch.float64)
    expected = evaluate(oracle, exact, bias_of(exact))
    found = evaluate(run, on_gpu(single), bias_of(single).cuda())
    again = evaluate(run, on_gpu(single), bias_of(single).cuda())
    limit = 1e-4 if dtype == torch.float32 else 3e-2
    for a, b, c in zip(found, again, expected, strict=True):
        assert torch.equal(a, b) and furthest(a.cpu(), c) <= limit


@pytest.mark.gpu
@pytest.mark.skipif(not cuda_extension.is_available(), reason="needs a GPU of capability 8.0 and nvcc")
def test_on_a_gpu_a_long_sample_runs_without_its_gradient_and_is_refused_with_it() -> None:
    case = on_gpu(cast(problem((200,)), torch.float32))
    q, k, v = case.qkv.unbind(1)
    assert cuda_extension.small_block_attention(q, k, v, case.bias, case.packing).isfinite().all()
    with pytest.raises(RuntimeError, match="200 sites"):
        cuda_extension.small_block_attention(q.requires_grad_(), k, v, case.bias, case.packing)


def on_gpu(case: Case) -> Case:
    old, packing = case.geometry, case.packing
    moved = {name: getattr(packing, name).cuda() for name in ("cu_seqlens", "pair_offsets", "system", "static_offsets")}
    geometry = PairGeometry(old.positions.cuda(), old.types.cuda(), old.gain.cuda(), old.shift.cuda())
    tensors = (case.qkv, case.d_out, case.pieces, geometry, case.u, case.bias, case.key_mask)
    return Case(replace(packing, **moved), *(x if isinstance(x, PairGeometry) else x.cuda() for x in tensors))  # type: ignore[arg-type]
