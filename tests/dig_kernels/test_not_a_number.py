"""A coordinate that is not a number shows in every value that depends on it, on every path that reads a table.

Triton's interpreter takes the maximum of a number and NaN to be NaN; a GPU takes the number. The tests run as a GPU does.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from dig_kernels.attention import PairTable, table_attention
from dig_kernels.dispatch import Backend
from dig_kernels.layout import pack_lengths
from dig_kernels.pair_bias import pair_channels
from dig_kernels.pair_source import GivenScalar, PairGeometry, PairSource
from dig_kernels.radial_table import KnotGrid, evaluate_pieces, hermite_pieces
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

GRID = KnotGrid(0.0, 6.0, 12)
PACKING = pack_lengths([18, 3])
BROKEN = 1
"""A site of the first sample."""
HEADS, WIDTH = 2, 8


@pytest.fixture(autouse=True)
def comparisons_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InterpreterBuilder, "create_maxnumf", lambda self, a, b: self.binary_op(a, b, np.fmax))
    monkeypatch.setattr(InterpreterBuilder, "create_minnumf", lambda self, a, b: self.binary_op(a, b, np.fmin))


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def pieces() -> Tensor:
    return hermite_pieces(normal(GRID.knots, HEADS), normal(GRID.knots, HEADS), GRID)


def geometry() -> PairGeometry:
    positions = normal(PACKING.sites, 3)
    positions[BROKEN, 2] = torch.nan
    return PairGeometry(positions, torch.zeros(PACKING.sites, dtype=torch.int64), torch.ones(1, 1), torch.zeros(1, 1))


def scalar() -> GivenScalar:
    """As of `geometry`: the row and the column of the site."""
    u = 3 + normal(PACKING.pairs)
    first = u[: 18 * 24].view(18, 24)
    first[BROKEN], first[:, BROKEN] = torch.nan, torch.nan
    return GivenScalar(u)


@pytest.mark.parametrize("backend", Backend)
@pytest.mark.parametrize("source", [geometry, scalar])
def test_attention_from_a_table_is_nan_where_a_coordinate_is(
    backend: Backend, source: Callable[[], PairSource]
) -> None:
    qkv = normal(PACKING.sites, 3, HEADS, WIDTH).requires_grad_()
    out = table_attention(*qkv.unbind(1), PairTable(pieces(), GRID, source()), PACKING, backend=backend)
    assert out[:18].isnan().all() and out[18:].isfinite().all()
    (d_qkv,) = torch.autograd.grad(out.sum(), qkv)
    assert d_qkv[:18].isnan().all() and d_qkv[18:].isfinite().all()


@pytest.mark.parametrize("backend", Backend)
def test_attention_does_not_see_a_masked_site_that_is_not_a_number(backend: Backend) -> None:
    q, k, v = normal(PACKING.sites, 3, HEADS, WIDTH).unbind(1)
    mask = torch.arange(PACKING.sites) != BROKEN
    out = table_attention(q, k, v, PairTable(pieces(), GRID, geometry()), PACKING, key_mask=mask, backend=backend)
    assert out[mask].isfinite().all() and out[~mask].isnan().sum() in (0, out[~mask].numel())


@pytest.mark.parametrize("backend", Backend)
def test_generated_channels_and_their_gradient_are_nan_where_a_coordinate_is(backend: Backend) -> None:
    made_from = geometry()
    made_from.positions.requires_grad_()
    bias, node = pair_channels(pieces(), GRID, made_from, None, PACKING, 1, backend=backend)
    assert bias[: 18 * 24].view(18, 24)[0, BROKEN].isnan() and bias[: 18 * 24].view(18, 24)[0, 0].isfinite()
    assert node[:18].isnan().all() and node[18:].isfinite().all()
    (d_positions,) = torch.autograd.grad(node.sum(), made_from.positions)
    assert d_positions[:18].isnan().any() and d_positions[18:].isfinite().all()


def test_a_table_at_nan_is_nan_and_so_are_its_gradients() -> None:
    u, table = torch.tensor([1.0, torch.nan, 2.0], requires_grad=True), pieces().requires_grad_()
    values = evaluate_pieces(table, u, GRID)
    assert values.isnan().all(-1).tolist() == [False, True, False]
    d_u, d_table = torch.autograd.grad(values.sum(), (u, table))
    assert d_u.isnan().tolist() == [False, True, False] and d_table.isnan().any()
