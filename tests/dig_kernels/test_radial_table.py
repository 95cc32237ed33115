"""The radial table: exact at knots, fourth order between, right derivatives of first and second order."""

from __future__ import annotations

import math

import pytest
import torch
from dig_kernels.radial_table import KnotGrid, evaluate_pieces, hermite_pieces
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
    assert (u.grad == 0).all()


def test_values_without_gradient_are_the_same() -> None:
    pieces, grid = table(9)
    u = torch.linspace(0, 5, 31, dtype=torch.float64)
    with torch.no_grad():
        quiet = evaluate_pieces(pieces, u, grid)
    assert torch.equal(quiet, evaluate_pieces(pieces.clone().requires_grad_(), u, grid))
