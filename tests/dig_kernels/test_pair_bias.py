"""The pair bias generator against its fp64 oracle: outputs, every gradient, derivatives of second order, determinism."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from dig_kernels import pair_bias, pair_bias_kernels, pair_contract, pair_contract_kernels, pair_moments, reference
from dig_kernels.dispatch import Backend
from dig_kernels.layout import Packing, dense_from_blocks, pack_lengths, uniform_packing
from dig_kernels.pair_bias import (
    GivenScalar,
    PairGeometry,
    PairGradients,
    PairSource,
    Wanted,
    pair_channels,
    periodic_images,
)
from dig_kernels.radial_table import KnotGrid, hermite_pieces

GRID = KnotGrid(0.0, 4.0, 9)
BIASED, CHANNELS = 3, 12
RAGGED, SYSTEMS = (3, 0, 1, 2, 2), (0, 1, 2, 3, 3)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles small enough that these sizes need several, and buffers small enough that they need several windows."""
    monkeypatch.setattr(pair_bias_kernels, "LAUNCH", pair_bias_kernels.ChannelsLaunch(keys=8, channels=2, warps=1))
    launch = pair_contract.ContractLaunch(keys=8, channels=4, sites=8, static=8, warps=1)
    monkeypatch.setattr(pair_contract, "LAUNCH", launch)
    monkeypatch.setattr(pair_contract, "WORKSPACE_BYTES", 100 * (72 + 4 * BIASED))
    monkeypatch.setattr(pair_moments, "LAUNCH", pair_moments.MomentsLaunch(chunk=64, tile=256, channels=8, warps=1))


@dataclass(frozen=True)
class Case:
    """Inputs by name and how to run them; `seeds` are the gradients that come back to bias and node sums."""

    inputs: dict[str, Tensor]
    packing: Packing
    types: Tensor
    key_mask: Tensor | None
    image_starts: Tensor | None = None
    image_offsets: Tensor | None = None

    def source(self, inputs: dict[str, Tensor]) -> PairSource:
        if "u" in inputs:
            return GivenScalar(inputs["u"])
        images = None
        if self.image_starts is not None and self.image_offsets is not None:
            images = periodic_images(self.image_starts, self.image_offsets, self.packing)
        return PairGeometry(inputs["positions"], self.types, inputs["gain"], inputs["shift"], images)

    def run(
        self, inputs: dict[str, Tensor], backend: Backend, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        source, mask = self.source(inputs), self.key_mask
        static = inputs.get("static")
        return pair_channels(
            inputs["pieces"], GRID, source, static, self.packing, BIASED, key_mask=mask, dtype=dtype, backend=backend
        )


def make_case(
    lengths: Sequence[int] = RAGGED, system: Sequence[int] | None = None, *, kinds: int = 3, given: bool = False,
    images: bool = False, centre: float = 0.0,
) -> Case:  # fmt: skip
    generator = torch.Generator().manual_seed(sum(lengths))
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    packing = pack_lengths(lengths, system=system)
    inputs = {"pieces": hermite_pieces(draw(GRID.knots, CHANNELS), draw(GRID.knots, CHANNELS), GRID)}
    sites = packing.sites
    if given:
        inputs["u"] = 2 + 2 * draw(packing.pairs)
    else:
        inputs["positions"] = centre + 1.5 * draw(sites, 3)
        # u of the diagonal is the shift: below the grid for some types, and far pairs lie beyond its end
        inputs |= {"gain": 1 + 0.2 * draw(kinds, kinds), "shift": 0.5 * draw(kinds, kinds)}
    inputs["static"] = draw(BIASED * int(packing.static_offsets[-1]))
    types = torch.randint(0, kinds, (sites,), generator=generator, dtype=torch.int32)
    mask = torch.rand(sites, generator=generator) > 0.3
    if not images:
        return Case(inputs, packing, types, mask)
    counts = torch.randint(1, 4, (sites,), generator=generator)
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    offsets = 2 * draw(int(starts[-1]), 3)
    offsets[starts[:-1].long()] = 0.0
    return Case(inputs, packing, types, mask, starts, offsets)


CASES: dict[str, Callable[[], Case]] = {
    "given": lambda: make_case(RAGGED, SYSTEMS, given=True),
    "geometry": lambda: make_case((1, 9)),
    "images": lambda: make_case(RAGGED, SYSTEMS, images=True),
    "one type": lambda: make_case((4,), kinds=1),
    "many types": lambda: make_case((5,), kinds=118),
    "far from the origin": lambda: make_case((4,), centre=1e3),
}


def leaves(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in case.inputs.items()}


def readable(bias: Tensor, packing: Packing) -> Tensor:
    """The bias without its padding columns."""
    return torch.cat([block.reshape(-1) for block in dense_from_blocks(bias, packing, BIASED)])


def loss(bias: Tensor, node: Tensor, packing: Packing) -> Tensor:
    """A scalar whose gradient differs from element to element; it is the same function in every dtype."""
    flat = readable(bias, packing).double()
    weight = torch.cos(torch.arange(flat.numel(), dtype=torch.float64))
    heads = torch.sin(torch.arange(node.numel(), dtype=torch.float64)).view_as(node)
    return (flat * weight).sum() + (node.double() * heads).sum()


def outcome(
    case: Case, backend: Backend, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    inputs = leaves(case, dtype)
    bias, node = case.run(inputs, backend)
    gradients = torch.autograd.grad(loss(bias, node, case.packing), list(inputs.values()))
    return readable(bias, case.packing).detach(), node.detach(), dict(zip(inputs, gradients, strict=True))


def gap(found: Tensor, exact: Tensor) -> float:
    if not exact.numel():
        return 0.0
    return float((found.double() - exact.double()).abs().max() / exact.abs().max().clamp(min=1e-3))


def misses(case: Case, backend: Backend = Backend.TRITON) -> list[str]:
    """Names of outputs and gradients beyond the tolerance."""
    (bias, node, gradients), (bias64, node64, exact) = (
        outcome(case, backend),
        outcome(case, Backend.REFERENCE, torch.float64),
    )
    errors = {"bias": gap(bias, bias64) * 10, "node": gap(node, node64) * 10}
    errors |= {name: gap(gradients[name], exact[name]) for name in exact}
    return [f"{name} {error:.1e}" for name, error in errors.items() if not error < 1e-4]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", [Backend.CPU, Backend.TRITON])
def test_channels_and_gradients_match_the_oracle(name: str, backend: Backend) -> None:
    case = CASES[name]()
    assert misses(case if name != "far from the origin" else rounded(case), backend) == []


def rounded(case: Case) -> Case:
    """Positions on multiples of 1/64 Å, which fp32 holds at 1000 Å too: the oracle sees the same ones."""
    positions = (case.inputs["positions"] * 64).round() / 64
    return dataclasses.replace(case, inputs=case.inputs | {"positions": positions})


def test_coincident_atoms_do_not_push() -> None:
    case = make_case((3,))
    case = dataclasses.replace(case, inputs=case.inputs | {"positions": torch.ones(3, 3)})
    _, _, gradients = outcome(case, Backend.TRITON)
    assert not gradients["positions"].any()
    assert misses(case) == []


@pytest.mark.parametrize("backend", [Backend.CPU, Backend.TRITON])
def test_outside_the_grid_the_ends_hold_and_nothing_pulls(backend: Backend) -> None:
    packing = pack_lengths([2])
    u = torch.full((packing.pairs,), -3.0)
    u[8:] = 9.0
    u.requires_grad_()
    pieces = make_case((2,)).inputs["pieces"]
    bias, node = pair_channels(pieces, GRID, GivenScalar(u), None, packing, BIASED, backend=backend)
    assert torch.allclose(dense_from_blocks(bias, packing, BIASED)[0][:, 0, 0], pieces[0, 0, :BIASED])
    assert torch.allclose(node[1], 2 * pieces[-1, :, BIASED:].sum(0), atol=1e-5)
    (pull,) = torch.autograd.grad(bias.sum() + node.sum(), u)
    assert not pull.any()


def test_folded_images_give_the_attention_over_explicit_images() -> None:
    case = make_case((6,), images=True)
    inputs = {name: tensor.double() for name, tensor in case.inputs.items()}
    source = case.source(inputs)
    assert isinstance(source, PairGeometry) and source.images is not None
    counts = source.images.starts.diff().long()
    key = torch.repeat_interleave(torch.arange(6), counts)
    distance = reference.distances(source.positions, source.positions[key] + source.images.offsets.double())
    u = reference.pair_scalar(distance, case.types.long(), case.types.long()[key], source.gain, source.shift)
    explicit = reference.hermite(inputs["pieces"], u, GRID.start, GRID.step).permute(2, 0, 1)[:BIASED]
    q, k, v = torch.randn(3, BIASED, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bias, node = pair_channels(case.inputs["pieces"], GRID, case.source(case.inputs), None, case.packing, BIASED,
                               backend=Backend.TRITON)  # fmt: skip
    folded = dense_from_blocks(bias, case.packing, BIASED)[0].double()
    expected, _ = reference.attention(q, k[:, key], v[:, key], explicit, 0.5)
    assert torch.allclose(reference.attention(q, k, v, folded, 0.5)[0], expected, atol=1e-5)
    everything = reference.hermite(inputs["pieces"], u, GRID.start, GRID.step)[..., BIASED:].sum(1)
    assert torch.allclose(node.double(), everything, atol=1e-4)


@pytest.mark.parametrize("images", [False, True])
def test_two_backwards_give_the_same_bits(images: bool) -> None:
    case = make_case((2, 1) if images else (3, 1), images=images)
    first, second = outcome(case, Backend.TRITON), outcome(case, Backend.TRITON)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert all(torch.equal(first[2][name], second[2][name]) for name in first[2])


def test_a_sample_has_the_same_bits_alone_and_in_a_pack() -> None:
    pack = make_case((2, 9))
    alone_packing = pack_lengths([9])
    begin = BIASED * int(pack.packing.static_offsets[1])
    inputs = pack.inputs | {
        "positions": pack.inputs["positions"][2:],
        "static": pack.inputs["static"][begin:][: BIASED * 9 * 16],
    }
    assert pack.key_mask is not None
    alone = Case(inputs, alone_packing, pack.types[2:], pack.key_mask[2:])
    bias, node = pack.run(pack.inputs, Backend.TRITON)
    own_bias, own_node = alone.run(inputs, Backend.TRITON)
    assert torch.equal(
        dense_from_blocks(bias, pack.packing, BIASED)[1], dense_from_blocks(own_bias, alone_packing, BIASED)[0]
    )
    assert torch.equal(node[2:], own_node)


def test_a_padded_batch_equals_the_packed_one() -> None:
    lengths, longest = (2, 5), 5
    packed = make_case(lengths)
    pieces, kinds = packed.inputs["pieces"], packed.types
    positions, maps = packed.inputs["positions"], (packed.inputs["gain"], packed.inputs["shift"])
    present = torch.tensor([True, True, False, False, False] + [True] * 5)
    padded_positions = torch.full((10, 3), 50.0)
    padded_positions[present] = positions
    padded_kinds = torch.zeros(10, dtype=torch.int32)
    padded_kinds[present] = kinds
    uniform = uniform_packing(2, longest)
    bias, node = pair_channels(
        pieces, GRID, PairGeometry(positions, kinds, *maps), None, packed.packing, BIASED, backend=Backend.TRITON
    )
    wide, wide_node = pair_channels(pieces, GRID, PairGeometry(padded_positions, padded_kinds, *maps), None, uniform, BIASED,
                                    key_mask=present, backend=Backend.TRITON)  # fmt: skip
    assert torch.allclose(wide_node[present], node, atol=1e-6)
    for tight, loose, length in zip(
        dense_from_blocks(bias, packed.packing, BIASED), dense_from_blocks(wide, uniform, BIASED), lengths, strict=True
    ):
        assert torch.equal(loose[:, :length, :length], tight)


def test_bf16_bias_is_the_fp32_bias_in_fewer_digits_and_its_gradients_are_as_close_as_eager() -> None:
    case = make_case((4,))
    halves = {name: tensor.bfloat16() if name == "static" else tensor for name, tensor in case.inputs.items()}
    case = dataclasses.replace(case, inputs={name: tensor.float() for name, tensor in halves.items()})
    full, _ = case.run(case.inputs, Backend.TRITON)
    found, exact = {}, outcome(case, Backend.REFERENCE, torch.float64)[2]
    for backend in (Backend.TRITON, Backend.REFERENCE):
        inputs = {name: tensor.clone().requires_grad_() for name, tensor in halves.items()}
        bias, node = case.run(inputs, backend, torch.bfloat16)
        assert bias.dtype == torch.bfloat16 and node.dtype == torch.float32
        gradients = torch.autograd.grad(loss(bias, node, case.packing), list(inputs.values()))
        found[backend] = dict(zip(inputs, gradients, strict=True))
        if backend is Backend.TRITON:
            # one bf16 step and not half of one: Triton's interpreter cuts digits off where a GPU rounds
            exactly = readable(full, case.packing)
            assert ((readable(bias, case.packing).float() - exactly).abs() <= 2**-7 * exactly.abs()).all()
    for name, gradient in found[Backend.TRITON].items():
        assert gradient.dtype == halves[name].dtype
        assert gap(gradient, exact[name]) <= 2 * gap(found[Backend.REFERENCE][name], exact[name]) + 1e-6


def test_second_derivatives_are_those_of_the_reference() -> None:
    case = make_case((3, 2), images=True)
    seconds = []
    for backend in (Backend.TRITON, Backend.REFERENCE):
        inputs = leaves(case)
        # an upstream operation, so that the saved inputs are not leaves
        bias, node = case.run({name: tensor * 1.0 for name, tensor in inputs.items()}, backend)
        scalar = readable(bias, case.packing).pow(2).sum() + node.pow(2).sum()
        first = torch.autograd.grad(scalar, [inputs["positions"], inputs["shift"]], create_graph=True)
        seconds.append(torch.autograd.grad(torch.stack([g.pow(2).sum() for g in first]).sum(), list(inputs.values())))
    assert all(gap(fused, exact) < 1e-4 for fused, exact in zip(*seconds, strict=True))


def test_the_reference_passes_gradgradcheck() -> None:
    case = make_case((3,), images=True)
    inputs = leaves(case, torch.float64)
    names = list(inputs)

    def channels(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return case.run(dict(zip(names, tensors, strict=True)), Backend.REFERENCE)

    assert torch.autograd.gradcheck(channels, tuple(inputs.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(channels, tuple(inputs.values()), fast_mode=True)


def test_forward_mode_agrees_with_a_finite_difference() -> None:
    case = make_case((4,))
    inputs = {name: tensor.double() for name, tensor in case.inputs.items()}
    along = torch.randn(4, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def node_of(positions: Tensor) -> Tensor:
        return case.run(
            inputs | {"positions": positions}, Backend.TRITON if positions.dtype == torch.float32 else Backend.CPU
        )[1]

    tangent = torch.func.jvp(node_of, (inputs["positions"],), (along,))[1]
    step = 1e-6
    difference = (node_of(inputs["positions"] + step * along) - node_of(inputs["positions"] - step * along)) / (
        2 * step
    )
    assert gap(tangent, difference) < 1e-6


@pytest.mark.parametrize("name", ["given", "images"])
def test_the_operator_meets_the_contract_of_torch_library(name: str) -> None:
    case = make_case((2,), given=name == "given", images=name == "images")
    inputs = leaves(case)
    problem = pair_bias.PairProblem(
        inputs["pieces"], GRID, case.source(inputs), inputs["static"], case.key_mask, case.packing, BIASED
    )
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(pair_bias._pair_channels, (*pair_bias._flatten(problem), torch.bfloat16), test_utils=checks)
    detached = pair_bias._flatten(dataclasses.replace(problem, pieces=inputs["pieces"].detach()))
    seeds = torch.randn(BIASED * case.packing.pairs), torch.randn(case.packing.sites, CHANNELS - BIASED)
    wanted = (Wanted.PIECES | Wanted.PLACES | Wanted.STATIC).value
    operands = [item.detach() if isinstance(item, Tensor) else item for item in detached]
    torch.library.opcheck(
        pair_bias._pair_channels_backward, (*seeds, wanted, *operands), test_utils=("test_schema", "test_faketensor")
    )


def test_compiled_and_checkpointed_calls_give_the_same_gradients(caplog: pytest.LogCaptureFixture) -> None:
    case = make_case((2,))

    def gradients(
        wrap: Callable[[Callable[..., tuple[Tensor, Tensor]]], Callable[..., tuple[Tensor, Tensor]]],
    ) -> list[Tensor]:
        inputs = leaves(case)
        run = wrap(lambda *tensors: case.run(dict(zip(inputs, tensors, strict=True)), Backend.TRITON))
        return list(torch.autograd.grad(loss(*run(*inputs.values()), case.packing), list(inputs.values())))

    plain = gradients(lambda run: run)
    compiled = gradients(lambda run: torch.compile(run, backend="aot_eager"))
    kept = gradients(lambda run: lambda *tensors: checkpoint(run, *tensors, use_reentrant=False))
    assert "slower" not in caplog.text
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(plain, compiled, kept, strict=True))


@pytest.mark.parametrize("given", [False, True])
def test_contracting_blocks_of_rows_adds_up_to_the_whole_gradient(given: bool) -> None:
    case = make_case((3, 2, 1), given=given)
    packing, inputs = case.packing, leaves(case)
    bias, _ = case.run(inputs, Backend.TRITON)
    seed = torch.randn(bias.shape, generator=torch.Generator().manual_seed(1))
    expected = dict(zip(inputs, torch.autograd.grad(bias, list(inputs.values()), seed, allow_unused=True), strict=True))
    rows = torch.zeros(packing.sites, BIASED, 16)
    bounds = packing.cu_seqlens.tolist()
    for begin, block in zip(bounds, dense_from_blocks(seed, packing, BIASED), strict=False):
        rows[begin : begin + block.shape[1], :, : block.shape[2]] = block.transpose(0, 1)
    wanted, total = Wanted.PIECES | Wanted.PLACES | Wanted.MAPS | Wanted.STATIC, None
    for first in (0, 4):
        block = rows[first : first + 4].transpose(0, 1)
        source = case.source({name: tensor.detach() for name, tensor in inputs.items()})
        total = pair_contract.contract(block, first, inputs["pieces"].detach(), GRID, source, packing, wanted,
                                       static=inputs["static"].detach(), into=total)  # fmt: skip
    assert isinstance(total, PairGradients)
    for name, exact in expected.items():
        found = getattr(total, name)
        assert gap(found, exact) < 1e-5, name


def test_the_oracle_agrees_with_the_one_of_a_given_scalar() -> None:
    case = dataclasses.replace(make_case(RAGGED, SYSTEMS, given=True), key_mask=None)
    bias, node = case.run(case.inputs, Backend.REFERENCE)
    pieces, u, static = (case.inputs[name] for name in ("pieces", "u", "static"))
    formula = reference.pair_channels_from_scalar(u, pieces, static, case.packing, GRID.start, GRID.step, BIASED)
    assert torch.equal(bias, formula[0]) and torch.allclose(node, formula[1], atol=1e-6)


def test_a_batch_without_sites_gives_empty_results() -> None:
    for backend in (Backend.CPU, Backend.TRITON):
        case = make_case((0,))
        inputs = leaves(case)
        bias, node = case.run(inputs, backend)
        assert bias.shape == (0,) and node.shape == (0, CHANNELS - BIASED)
        gradients = torch.autograd.grad(bias.sum() + node.sum(), list(inputs.values()), allow_unused=True)
        assert all(gradient is None or not gradient.any() for gradient in gradients)


def test_a_nan_position_shows_in_the_bias() -> None:
    case = make_case((3,))
    broken = case.inputs["positions"].clone()
    broken[1, 0] = torch.nan
    bias, _ = case.run(case.inputs | {"positions": broken}, Backend.TRITON)
    assert dense_from_blocks(bias, case.packing, BIASED)[0][:, 0, 1].isnan().all()


def test_shapes_that_disagree_are_named() -> None:
    case = make_case((3,))
    with pytest.raises(ValueError, match="positions has shape"):
        case.run(case.inputs | {"positions": torch.zeros(4, 3)}, Backend.TRITON)
    with pytest.raises(ValueError, match="9 knots need"):
        case.run(case.inputs | {"pieces": torch.zeros(5, 4, CHANNELS)}, Backend.TRITON)
    with pytest.raises(ValueError, match="compute in fp32"):
        case.run({name: tensor.double() for name, tensor in case.inputs.items()}, Backend.TRITON)
    with pytest.raises(ValueError, match="site 1 has no copy"):
        periodic_images(torch.tensor([0, 1, 1, 2]), torch.zeros(2, 3), case.packing)
    with pytest.raises(ValueError, match="d_bias has shape"):
        pair_contract.contract(torch.zeros(BIASED, 3, 2), 0, case.inputs["pieces"], GRID, case.source(case.inputs),
                               case.packing, Wanted.PIECES)  # fmt: skip


MUTATIONS = [
    ("pair_channels_kernel", "top = value\n", "top = -value\n", "bias"),
    ("pair_channels_kernel", "sum1 += taken_value", "sum1 -= taken_value", "node"),
    ("pair_channels_kernel", "top += tl.load(added", "top -= tl.load(added", "bias"),
    ("pair_gradient_kernel", "slope += tl.sum(row_share", "slope -= tl.sum(row_share", "positions"),
    ("pair_gradient_kernel", "pull += share * rise", "pull -= share * rise", "positions"),
    ("pair_gradient_kernel", "tl.store(distances + slot, distance", "tl.store(distances + slot, -distance", "gain"),
    ("pair_gradient_kernel", "tl.store(fractions + slot, f,", "tl.store(fractions + slot, -f,", "pieces"),
    ("position_gradient_kernel", "dx = x - xo - ox", "dx = xo - x - ox", "positions"),
    ("static_gradient_kernel", "total += tl.load(d_bias", "total -= tl.load(d_bias", "static"),
]


@pytest.mark.parametrize(("kernel", "expression", "mutated", "gate"), MUTATIONS)
def test_a_flipped_sign_is_caught(
    kernel: str, expression: str, mutated: str, gate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = pair_bias_kernels if kernel == "pair_channels_kernel" else pair_contract_kernels
    text = Path(str(original.__file__)).read_text()
    assert expression in text
    path = tmp_path / "mutated_kernels.py"
    path.write_text(text.replace(expression, mutated))
    namespace = {"__name__": original.__name__}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    user = pair_bias_kernels if kernel == "pair_channels_kernel" else pair_contract
    monkeypatch.setattr(user, kernel, namespace[kernel])
    assert gate in [miss.split()[0] for miss in misses(make_case((3,)))]
