"""Pair operators of periodic systems against the sum over every image, written out; and supercells against their cell."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dig_scale.batch import Context, Geometry
from dig_scale.geometry.lattice import symmetric_matrix
from dig_scale.model.features import featurise
from dig_scale.model.images import MIN_IMAGE_DISTANCE, image_geometry
from dig_scale.model.pair_bias import PairBias
from dig_scale.model.pair_operators import ImageOperators, split_heads
from dig_scale.model.score_model import ScoreModel
from dig_scale.model.select import PairWidths
from dig_scale.system import SystemKind
from tests.kinds import case, doubled, lively_model, system_of

CUTOFF = 4.5
HEADS, FILTERS = 4, 3
WIDTHS = PairWidths(HEADS, FILTERS, FILTERS, layers=2, head_width=5, attention_dtype=torch.float64)


def pair_bias() -> PairBias:
    """The exact function, without a table."""
    model = lively_model("crystal", radial_knots=0, heads=HEADS, vector_channels=FILTERS)
    return model.pair_bias


def problem(kind: str) -> tuple[Geometry, Context]:
    """A batch of a kind, or `large`: fifty atoms, beyond the size for which probabilities are kept."""
    if kind != "large":
        found = case(kind)
        cell = found.frames.get("cell", found.context.cell.expand(3, 3, 3))
        return Geometry(found.frames["positions"], cell=cell), found.context
    generator = torch.Generator().manual_seed(1)
    cell = torch.diag(torch.tensor([7.0, 8.0, 9.0])).double() + 0.3 * torch.randn(1, 3, 3, generator=generator).double()
    inside = torch.rand(1, 50, 3, generator=generator).double()
    elements = [6, 14] * 25
    system = system_of("large", SystemKind.CRYSTAL, elements, 0 * inside[0].numpy(), periodic=(True, True, True))
    return Geometry(inside @ cell, cell=cell), doubled(featurise(system))


class Explicit:
    """All images [K] of all sites, shift by shift, with their bias, filters and directions; nothing is folded."""

    def __init__(self, bias: PairBias, seen: Geometry, context: Context) -> None:
        n = seen.positions.shape[1]
        reach = 1 if n > 10 else 4  # of cells wider than the cutoff, and of small ones
        steps = [torch.arange(-reach, reach + 1) if free else torch.zeros(1).long() for free in context.periodic[0]]
        shifts = torch.cartesian_prod(*steps)
        self.site = torch.arange(n).repeat(len(shifts))
        moved = torch.einsum("sk,bkx->bsx", shifts.double(), seen.cell)
        images = (seen.positions.unsqueeze(1) + moved.unsqueeze(2)).flatten(1, 2)
        self.offset = seen.positions.unsqueeze(2) - images.unsqueeze(1)  # r_i - r_image
        length = self.offset.norm(dim=-1)
        home = (shifts == 0).all(1).repeat_interleave(n)
        itself = home & (self.site == torch.arange(n)[:, None])
        soft = torch.sqrt(length**2 + MIN_IMAGE_DISTANCE**2)
        first = context.element[0].unsqueeze(1).expand(n, len(self.site))
        u = bias.image_scalar(soft, first, context.element[0, self.site])
        attention, filters, node = bias.radial(u)[0].split([HEADS, FILTERS, FILTERS], dim=-1)
        envelope = torch.where(length < CUTOFF, 0.5 * (1 + torch.cos(math.pi * length / CUTOFF)), 0.0)
        envelope = torch.where(itself, 0.0, envelope).unsqueeze(-1)
        path = context.path_length[0][:, self.site].clamp(max=bias.max_path + 1)
        path = torch.where(self.site == torch.arange(n)[:, None], bias.max_path + 1, path)
        static = (bias.path(path) + bias.bond(context.bond_order[0][:, self.site]))[..., :HEADS]
        logits = attention + static + torch.log(envelope)
        self.logits = torch.where(itself.unsqueeze(-1), 0.0, logits)  # [B, N, K, H]
        self.weights = filters * envelope / soft.unsqueeze(-1)
        self.unit = self.offset / soft.unsqueeze(-1)
        self.node = (node * envelope).sum(2)

    def attend(self, qkv: Tensor) -> Tensor:
        q, k, v = split_heads(qkv, HEADS)
        k, v = (values[:, :, self.site] for values in (k, v))
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5 + self.logits.permute(0, 3, 1, 2), dim=-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    def gather(self, keys: Tensor) -> Tensor:
        return torch.einsum("bikm,bkm,bikx->bxmi", self.weights, keys[:, self.site], self.offset)

    def gather_vectors(self, values: Tensor) -> Tensor:
        return torch.einsum("bikm,bkmx->bxmi", self.weights, values[:, self.site])

    def tensors(self) -> Tensor:
        return torch.einsum("bikm,bikx,biky->bimxy", self.weights, self.unit, self.unit)


def gradient(work: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.clone().requires_grad_()
    return torch.autograd.grad(torch.sin(work(at)).sum(), at)[0]


@pytest.mark.parametrize("attention", ["dense", "formula"])
@pytest.mark.parametrize("kind", ["crystal", "catalyst", "large"])
def test_folded_operators_are_sums_over_every_image(kind: str, attention: str) -> None:
    (seen, context), bias, generator = problem(kind), pair_bias(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        wanted = Explicit(bias, seen, context)
    made, node = image_geometry(bias, WIDTHS, seen, context, CUTOFF)
    assert made.dense
    made = replace(made, dense=attention == "dense")
    batch, n = seen.positions.shape[:2]
    draw = lambda *shape: torch.randn(batch, n, *shape, generator=generator, dtype=torch.float64)  # noqa: E731
    qkv, keys, values = draw(3 * HEADS * 5), draw(FILTERS), draw(FILTERS, 3)
    close = lambda a, b: torch.allclose(a, b, rtol=1e-9, atol=1e-9)  # noqa: E731
    assert close(made.attend(qkv, HEADS, made.open())[0], wanted.attend(qkv))
    attended = gradient(lambda x: made.attend(x, HEADS, made.open())[0], qkv)
    assert close(attended, gradient(wanted.attend, qkv))
    assert close(made.gather(keys, made.open())[0], wanted.gather(keys))
    assert close(made.gather_vectors(values, made.open())[0], wanted.gather_vectors(values))
    assert close(symmetric_matrix(made.tensors), wanted.tensors())
    assert close(node, wanted.node)


def test_images_beyond_the_cutoff_fade_out_smoothly() -> None:
    """The answer has no step where an image passes the cutoff: it moves by no more than the atom does."""
    model, (seen, context) = lively_model("crystal", cutoff=CUTOFF), problem("crystal")
    apart = seen.positions[0, 1] - seen.positions[0, 0] + 2 * seen.cell[0, 0]
    unit = apart / apart.norm()
    answers = []
    for step in (-1e-4, 0.0, 1e-4):
        x = seen.positions.clone()
        x[0, 1] += unit * (CUTOFF - apart.norm() + step)
        answers.append(answer_of(model, Geometry(x, cell=seen.cell), context)[0])
    first, second = (b - a for a, b in itertools.pairwise(answers))
    assert (second - first).abs().max() < 1e-4 * answers[1].abs().max()


def answer_of(model: ScoreModel, seen: Geometry, context: Context) -> tuple[Tensor, Tensor]:
    """Forces on fractional coordinates in Cartesian axes [B, N, 3], and strains [B, 6]."""
    level = torch.full((len(seen.positions),), 0.1, dtype=torch.float64)
    with torch.no_grad():
        answer = model(seen, context, level)
    edge = torch.linalg.det(seen.cell).abs()[:, None, None] ** (1 / 3)
    return torch.linalg.solve(seen.cell.mT, answer.fractional * edge, left=False), answer.lattice


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("repeats", [(2, 1, 1), (1, 2, 2)])
def test_a_supercell_has_the_answer_of_its_cell_at_every_site(repeats: tuple[int, int, int], kernels: str) -> None:
    found, model = case("crystal"), lively_model("crystal", kernels=kernels)
    shifts = torch.cartesian_prod(*(torch.arange(count) for count in repeats))
    positions, cell, n = found.frames["positions"], found.frames["cell"], found.system.n_sites
    moved = torch.einsum("sk,bkx->bsx", shifts.double(), cell)
    copies = (positions.unsqueeze(1) + moved.unsqueeze(2)).flatten(1, 2)
    larger = Geometry(copies, cell=cell * torch.tensor(repeats).double()[:, None])
    elements = found.system.elements.tolist() * len(shifts)
    system = system_of("supercell", SystemKind.CRYSTAL, elements, 0 * copies[0].numpy(), periodic=(True, True, True))
    vectors, strain = answer_of(model, Geometry(positions, cell=cell), found.context)
    again, strain_again = answer_of(model, larger, doubled(featurise(system)))
    assert vectors.abs().max() > 1e-2
    for copy in again.split(n, dim=1):
        assert torch.allclose(copy, vectors, atol=1e-9)
    assert torch.allclose(strain_again, strain, atol=1e-9)


def test_a_slab_does_not_see_itself_across_the_vacuum() -> None:
    found, model = case("catalyst"), lively_model("anchored", cutoff=7.0)
    level = torch.full((3,), 0.1, dtype=torch.float64)

    def vectors(cell: Tensor) -> Tensor:
        with torch.no_grad():
            return model(Geometry(found.frames["positions"]), replace(found.context, cell=cell), level).positions

    cell = found.context.cell
    thin, wide = cell.clone(), cell.clone()
    thin[0, 2] /= 5
    wide[0, 0] *= 1.2
    assert torch.allclose(vectors(thin), vectors(cell), atol=1e-9)
    assert (vectors(wide) - vectors(cell)).abs().max() > 1e-3


def test_operators_of_images_are_those_of_periodic_systems_alone() -> None:
    geometries = []
    for kind in ("pocket", "catalyst"):
        found = case(kind)
        level = torch.full((3,), 0.1, dtype=torch.float64)
        seen = Geometry(found.frames["positions"])
        geometries.append(lively_model("anchored").geometry(seen, found.context, level, torch.float64)[0])
    assert [isinstance(one, ImageOperators) for one in geometries] == [False, True]
