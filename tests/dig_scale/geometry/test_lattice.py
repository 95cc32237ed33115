"""Cells: neighbours through the walls against brute force, reduction, and the logarithm of a cell as plain coordinates."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dig_scale.errors import UserError
from dig_scale.geometry import lattice

CUTOFF = 4.0


def random_cells(count: int, seed: int, spread: float = 0.35) -> Tensor:
    """Cells of about 60 Å³, some of them squashed, in random orientation."""
    generator = torch.Generator().manual_seed(seed)
    cells = lattice.cell_from_log(spread * torch.randn(count, 6, generator=generator, dtype=torch.float64))
    turn = torch.linalg.qr(torch.randn(count, 3, 3, generator=generator, dtype=torch.float64)).Q
    return 3.9 * cells @ (turn * torch.sign(torch.det(turn))[:, None, None])


def random_batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    present = torch.arange(5)[None] < torch.tensor([[1], [3], [5], [4]])
    # outside [0, 1) on purpose
    coordinates = 3 * torch.rand(4, 5, 3, generator=generator, dtype=torch.float64) - 1
    return coordinates, random_cells(4, seed), present


def brute_force(
    coordinates: np.ndarray, cell: np.ndarray, cutoff: float, periodic: tuple[bool, ...]
) -> set[tuple[int, ...]]:
    """Every (i, j, shift) with a distance below the cutoff, from more images than can matter."""
    reach = [12 if open_ else 0 for open_ in periodic]
    shifts = np.array(list(itertools.product(*[range(-n, n + 1) for n in reach])))
    found = set()
    for i, j in itertools.product(range(len(coordinates)), repeat=2):
        distances = np.linalg.norm((coordinates[j] - coordinates[i] + shifts) @ cell, axis=1)
        for shift in shifts[distances < cutoff]:
            if i != j or shift.any():
                found.add((i, j, *map(int, shift)))
    return found


def edge_set(edges: lattice.Edges, sample: int) -> set[tuple[int, ...]]:
    rows = torch.cat([edges.i[:, None], edges.j[:, None], edges.shift], 1)[edges.sample == sample]
    assert len({tuple(row) for row in rows.tolist()}) == len(rows)
    return {tuple(row) for row in rows.tolist()}


@pytest.mark.parametrize("periodic", [(True, True, True), (True, True, False), (False, False, False)])
def test_edges_are_exactly_those_of_brute_force(periodic: tuple[bool, bool, bool]) -> None:
    coordinates, cell, present = random_batch(seed=1)
    edges = lattice.periodic_edges(coordinates, cell, present, CUTOFF, periodic)
    for b in range(len(cell)):
        n = int(present[b].sum())
        expected = brute_force(coordinates[b, :n].numpy(), cell[b].numpy(), CUTOFF, periodic)
        assert edge_set(edges, b) == expected
    if all(periodic):
        assert (edges.i == edges.j).any()
    assert (edges.distances < CUTOFF).all()


def test_edges_do_not_depend_on_how_the_search_is_cut_into_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = random_batch(seed=2)
    whole = lattice.periodic_edges(*batch, CUTOFF)
    monkeypatch.setattr(lattice, "_CANDIDATES_AT_ONCE", 50)
    pieces = lattice.periodic_edges(*batch, CUTOFF)
    assert torch.equal(whole.shift, pieces.shift) and torch.equal(whole.distances, pieces.distances)


def test_edges_are_sorted_by_sample_and_sites_and_come_in_both_directions() -> None:
    edges = lattice.periodic_edges(*random_batch(seed=3), CUTOFF)
    order = (edges.sample * 5 + edges.i) * 5 + edges.j
    assert (order.diff() >= 0).all()
    there = {tuple(r) for r in torch.cat([torch.stack([edges.sample, edges.i, edges.j], 1), edges.shift], 1).tolist()}
    assert there == {(b, j, i, -x, -y, -z) for b, i, j, x, y, z in there}


def test_edges_of_no_sites_are_none() -> None:
    coordinates, cell, present = random_batch(seed=3)
    edges = lattice.periodic_edges(coordinates, cell, torch.zeros_like(present), CUTOFF)
    assert edges.vectors.shape == (0, 3)


def test_gradients_of_distances_match_finite_differences() -> None:
    coordinates, cell, present = random_batch(seed=4)

    def energy(x: Tensor, rows: Tensor) -> Tensor:
        r = lattice.periodic_edges(x, rows, present, CUTOFF).distances
        return (torch.relu(CUTOFF - r) ** 3).sum()

    inputs = (coordinates.requires_grad_(), cell.requires_grad_())
    assert torch.autograd.gradcheck(energy, inputs, atol=1e-4)


def test_image_shifts_reach_every_edge_of_wrapped_sites() -> None:
    coordinates, cell, present = random_batch(seed=5)
    coordinates = lattice.wrap(coordinates)
    listed = {tuple(row) for row in lattice.image_shifts(cell, CUTOFF).tolist()}
    assert {tuple(row) for row in lattice.periodic_edges(coordinates, cell, present, CUTOFF).shift.tolist()} <= listed
    assert listed == {(-x, -y, -z) for x, y, z in listed}
    assert {row[2] for row in lattice.image_shifts(cell, CUTOFF, (True, True, False)).tolist()} == {0}


def test_minimum_image_is_the_shortest_of_all_in_skewed_cells() -> None:
    cell = random_cells(6, seed=6, spread=0.7)
    cell[0] = torch.tensor([[3.0, 0, 0], [2.9, 0.8, 0], [1.0, 0.7, 5.0]])
    vectors = 9 * torch.randn(6, 20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    found = lattice.minimum_image(vectors, cell)
    shifts = torch.cartesian_prod(*[torch.arange(-14, 15, dtype=torch.float64)] * 3)
    start = lattice.wrap(lattice.fractional(vectors, cell))
    every = lattice.cartesian(start, cell)[:, :, None] + lattice.cartesian(shifts.expand(6, -1, -1), cell)[:, None]
    torch.testing.assert_close(found.norm(dim=-1), every.norm(dim=-1).amin(-1))
    whole = lattice.fractional(found - vectors, cell)
    torch.testing.assert_close(whole, whole.round(), atol=1e-9, rtol=0)


def test_fractional_and_cartesian_are_inverse_and_wrap_stays_below_one() -> None:
    coordinates, cell, _ = random_batch(seed=8)
    torch.testing.assert_close(lattice.fractional(lattice.cartesian(coordinates, cell), cell), coordinates)
    wrapped = lattice.wrap(torch.tensor([-1e-9, 1.0, -0.25, 2.75]))
    assert torch.equal(wrapped, torch.tensor([0.0, 0.0, 0.75, 0.75]))


def test_niggli_reduction_keeps_the_lattice_in_place() -> None:
    cell = np.array([[4.0, 0, 0], [11.9, 4.1, 0], [-4.2, 8.0, 5.0]])
    for rows in (cell, -cell):
        reduced = lattice.niggli_reduced(rows)
        steps = reduced @ np.linalg.inv(rows)
        np.testing.assert_allclose(steps, np.round(steps), atol=1e-9)
        assert np.linalg.det(reduced) == pytest.approx(abs(np.linalg.det(rows)))
        assert np.linalg.norm(reduced, axis=1).max() < np.linalg.norm(rows, axis=1).max()


@pytest.mark.parametrize("rows", [np.ones((3, 3)), np.full((3, 3), np.nan), np.zeros((3, 3))])
def test_a_cell_without_volume_is_refused(rows: np.ndarray) -> None:
    with pytest.raises(UserError, match="spans no volume"):
        lattice.niggli_reduced(rows)


def test_the_symmetric_cell_is_a_rotation_away_and_has_the_same_distances() -> None:
    coordinates, cell, present = random_batch(seed=9)
    symmetric, rotation = lattice.cell_to_symmetric(cell), lattice.rotation_to_symmetric(cell)
    torch.testing.assert_close(symmetric, symmetric.mT)
    assert (torch.linalg.eigvalsh(symmetric) > 0).all()
    torch.testing.assert_close(cell @ rotation, symmetric)
    torch.testing.assert_close(torch.det(rotation), torch.ones(4, dtype=torch.float64))
    before = lattice.periodic_edges(coordinates, cell, present, CUTOFF)
    after = lattice.periodic_edges(coordinates, symmetric, present, CUTOFF)
    torch.testing.assert_close(before.distances, after.distances)


def test_log_cell_and_its_inverse_agree_and_forget_orientation() -> None:
    cell = random_cells(20, seed=10, spread=0.6)
    logarithm = lattice.log_cell(cell)
    torch.testing.assert_close(lattice.cell_from_log(logarithm), lattice.cell_to_symmetric(cell))
    torch.testing.assert_close(lattice.log_cell(lattice.cell_from_log(logarithm)), logarithm)
    torch.testing.assert_close(logarithm[:, 0], torch.log(torch.det(cell)) / math.sqrt(3))
    single = lattice.log_cell(cell.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), logarithm, atol=1e-5, rtol=0)


def test_coordinates_are_isometric_and_a_permutation_of_vectors_turns_them() -> None:
    matrices = torch.randn(7, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(11))
    symmetric = matrices + matrices.mT
    coordinates = lattice.symmetric_coordinates(symmetric)
    torch.testing.assert_close(coordinates.norm(dim=-1), torch.linalg.matrix_norm(symmetric))
    torch.testing.assert_close(lattice.symmetric_matrix(coordinates), symmetric)
    cell = random_cells(2, seed=12)
    first, second = lattice.log_cell(cell), lattice.log_cell(cell[:, [2, 0, 1]])
    torch.testing.assert_close((first[0] - first[1]).norm(), (second[0] - second[1]).norm())


@pytest.mark.parametrize("edges", [(3.0, 3.0, 3.0), (3.0, 3.0, 5.0), (3.0, 3.0 + 1e-9, 5.0), (2.0, 4.0, 7.0)])
def test_derivatives_of_the_logarithm_hold_where_edges_are_equal(edges: tuple[float, float, float]) -> None:
    cell = torch.diag(torch.tensor(edges, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lattice.log_cell, cell)
    assert torch.autograd.gradgradcheck(lattice.log_cell, cell)
    coordinates = lattice.log_cell(cell).detach().requires_grad_()
    assert torch.autograd.gradcheck(lattice.cell_from_log, coordinates)
    assert torch.autograd.gradgradcheck(lattice.cell_from_log, coordinates)


def test_forward_and_backward_derivatives_agree_under_vmap() -> None:
    cell = random_cells(3, seed=13)
    backward = torch.func.vmap(torch.func.jacrev(lattice.log_cell))(cell)
    forward = torch.func.vmap(torch.func.jacfwd(lattice.log_cell))(cell)
    torch.testing.assert_close(backward, forward)
