"""The radial table: exact at knots, fourth order between, right derivatives of first and second order."""

from __future__ import annotations

import math

import pytest
import torch
from dig_kernels.radial_table import (
    DirectForm,
    KnotGrid,
    RadialTable,
    build_table,
    evaluate_pieces,
    hermite_pieces,
    table_error,
)
from torch import Tensor


def smooth(u: Tensor) -> tuple[Tensor, Tensor]:
    """Two channels and their derivatives."""
    return torch.stack([torch.sin(u), torch.exp(-u / 3)], -1), torch.stack([torch.cos(u), -torch.exp(-u / 3) / 3], -1)


def table(knots: int) -> tuple[Tensor, KnotGrid]:
    grid = KnotGrid(0.0, 5.0, knots)
    return hermite_pieces(*smooth(grid.positions(torch.zeros(1, dtype=torch.float64))), grid), grid


def test_knots_are_reproduced_exactly() -> None:
    pieces, grid = table(33)
    u = grid.positions(pieces)
    assert torch.allclose(evaluate_pieces(pieces, u, grid), smooth(u)[0], atol=1e-14)


def test_error_falls_with_the_fourth_power_of_the_step() -> None:
    u = torch.linspace(0.01, 4.99, 1777, dtype=torch.float64)
    errors = []
    for knots in (17, 33, 65):
        pieces, grid = table(knots)
        errors.append(float((evaluate_pieces(pieces, u, grid) - smooth(u)[0]).abs().max()))
    assert math.log2(errors[1] / errors[2]) == pytest.approx(4, abs=0.2)


@pytest.mark.parametrize("shape", [(1,), (17,), (3, 5)])
def test_first_and_second_derivatives_agree_with_finite_differences(shape: tuple[int, ...]) -> None:
    pieces, grid = table(9)
    generator = torch.Generator().manual_seed(0)
    u = (0.1 + 4.8 * torch.rand(shape, generator=generator, dtype=torch.float64)).requires_grad_()
    pieces = pieces.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda p, v: evaluate_pieces(p, v, grid), (pieces, u))
    assert torch.autograd.gradgradcheck(lambda p, v: evaluate_pieces(p, v, grid), (pieces, u))


def test_outside_the_grid_the_ends_hold_and_nothing_pulls() -> None:
    pieces, grid = table(9)
    u = torch.tensor([-3.0, 9.0], dtype=torch.float64, requires_grad=True)
    values = evaluate_pieces(pieces, u, grid)
    ends = smooth(torch.tensor([0.0, 5.0], dtype=torch.float64))[0]
    assert torch.allclose(values, ends, atol=1e-12)
    values.sum().backward()
    assert u.grad is not None and not u.grad.any()


def test_values_without_gradient_are_the_same() -> None:
    pieces, grid = table(9)
    u = torch.linspace(0, 5, 31, dtype=torch.float64)
    with torch.no_grad():
        quiet = evaluate_pieces(pieces, u, grid)
    assert torch.equal(quiet, evaluate_pieces(pieces.clone().requires_grad_(), u, grid))


def test_a_smooth_function_gets_a_table_and_a_sharp_one_keeps_the_direct_form() -> None:
    grid, like = KnotGrid(0.0, 5.0, 129), torch.zeros(1)
    built = build_table(smooth, grid, like)
    assert isinstance(built, RadialTable) and built.error < 1e-6
    assert torch.equal(built.pieces, hermite_pieces(*smooth(grid.positions(like)), grid))
    sharp = build_table(
        lambda u: (torch.sin(200 * u).unsqueeze(-1), 200 * torch.cos(200 * u).unsqueeze(-1)), grid, like
    )
    assert isinstance(sharp, DirectForm) and sharp.error > 1e-2


def test_the_table_error_is_the_worst_channel_relative_to_its_range() -> None:
    grid = KnotGrid(0.0, 5.0, 33)
    pieces, _ = table(33)
    mid = grid.positions(pieces)[:-1] + grid.step / 2
    gap = (evaluate_pieces(pieces, mid, grid) - smooth(mid)[0]).abs().amax(0)
    both = torch.cat([smooth(mid)[0], pieces[:, 0]])
    expected = (gap / (both.amax(0) - both.amin(0))).max()
    assert table_error(smooth, pieces, grid) == pytest.approx(float(expected), rel=1e-9)
    assert table_error(lambda u: (1e3 * smooth(u)[0], 1e3 * smooth(u)[1]), 1e3 * pieces, grid) == pytest.approx(
        float(expected), rel=1e-9
    )


def test_constant_channels_pass_and_values_that_are_not_numbers_do_not() -> None:
    grid, like = KnotGrid(0.0, 5.0, 33), torch.zeros(1)
    flat = build_table(lambda u: (torch.full((len(u), 2), 7.3), torch.zeros(len(u), 2)), grid, like)
    assert isinstance(flat, RadialTable)
    broken = build_table(lambda u: (torch.full((len(u), 2), math.nan), torch.zeros(len(u), 2)), grid, like)
    assert isinstance(broken, DirectForm)


def test_the_table_passes_gradients_to_the_function_it_tabulates() -> None:
    weight = torch.tensor(0.5, requires_grad=True)
    built = build_table(lambda u: (weight * smooth(u)[0], weight * smooth(u)[1]), KnotGrid(0.0, 5.0, 65), weight)
    assert isinstance(built, RadialTable)
    u = torch.linspace(0, 5, 11)
    evaluate_pieces(built.pieces, u, built.grid).sum().backward()
    assert weight.grad is not None and float(weight.grad) == pytest.approx(float(smooth(u)[0].sum()), rel=1e-5)
