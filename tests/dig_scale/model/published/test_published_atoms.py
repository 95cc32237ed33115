"""The networks of catalysts, ligands and carbon: numbers of the published modules, symmetries, padding, images, graphs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from dig_scale.errors import UserError
from dig_scale.model.published.carbon import (
    CARBON_SIZES,
    CarbonNet,
    carbon_rows,
    cell_of,
    completed,
    reference_sites,
)
from dig_scale.model.published.catalyst import CATALYST_SIZES, CatalystNet, in_plane_cells
from dig_scale.model.published.graph_rows import catalyst_rows, graph_rows, ligand_rows, shortest_paths
from dig_scale.model.published.graphormer_v1 import GraphRows, folded, image_keys
from dig_scale.model.published.ligand import LIGAND_SIZES, LigandNet, ligand_first
from dig_scale.system import SiteRole, System, SystemKind
from tests.dig_scale.model.published.published_files import (
    SMALL,
    atom_positions,
    carbon_table,
    catalyst_table,
    formula_rows,
    ligand_table,
    random_state,
    rotations_of,
    slab_cell,
    wave,
    waves,
)

ATOMS, STEP = 6, torch.tensor([77])
TURN = rotations_of(torch.tensor([[0.4, -0.9, 1.3]]))[0]
MIRROR = torch.diag(torch.tensor([1.0, -1.0, 1.0]))
SHIFT = torch.tensor([3.0, -8.0, 5.0])
SMALLER = {**SMALL, "hidden": 64}


def catalyst() -> tuple[CatalystNet, GraphRows]:
    net = CatalystNet(replace(CATALYST_SIZES, **SMALLER))
    net.load_state_dict(waves(catalyst_table(**SMALL), 0.1))
    rows = formula_rows(ATOMS, 1, 1)
    return net.eval(), GraphRows(tags=(1 + torch.arange(ATOMS) % 3).unsqueeze(0), **rows)


def ligand() -> tuple[LigandNet, GraphRows]:
    net = LigandNet(replace(LIGAND_SIZES, **SMALLER))
    net.load_state_dict(waves(ligand_table(**SMALL), 0.1))
    return net.eval(), GraphRows(tags=ligand_first(2, ATOMS).unsqueeze(0), **formula_rows(ATOMS, 3, 2))


def carbon() -> tuple[CarbonNet, GraphRows, Tensor]:
    net = CarbonNet(replace(CARBON_SIZES, **SMALLER))
    net.load_state_dict(waves(carbon_table(**SMALL), 0.1))
    positions = completed(reference_sites(4).unsqueeze(0) + wave(torch.sin, 1.3, 1, 12, 3))
    return net.eval(), carbon_rows(4), positions


@torch.no_grad()
def test_numbers_of_the_published_catalyst_network() -> None:
    net, rows = catalyst()
    noise, displacement = net(*atom_positions(ATOMS), slab_cell(), rows, STEP)
    expected = [[0.15725298, -2.14981031, -1.59253228], [-1.17273903, -2.09312725, 0.32792598]]
    torch.testing.assert_close(noise[0, [0, 5]], torch.tensor(expected), atol=1e-5, rtol=1e-5)
    expected = [[0.12596926, -1.73809111, -1.28829169], [-0.94889307, -1.69242907, 0.26248801]]
    torch.testing.assert_close(displacement[0, [0, 5]], torch.tensor(expected), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_numbers_of_the_published_ligand_network() -> None:
    net, rows = ligand()
    expected = [[-0.39749038, 5.11174631, 3.13226271], [3.49832582, 4.86098814, -0.89770854]]
    found = net(*atom_positions(ATOMS), rows, STEP)[0, [0, 5]]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_numbers_of_the_published_carbon_network() -> None:
    net, rows, positions = carbon()
    expected = [[0.03243900, 0.01994867, 0.03191555], [0.17307869, -0.37000912, -0.54505908]]
    found = net(positions, rows, STEP)[0, [0, 11]]
    torch.testing.assert_close(found, torch.tensor(expected), atol=2e-5, rtol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("turn", [TURN, MIRROR])
def test_the_catalyst_network_turns_and_mirrors_with_its_input(turn: Tensor) -> None:
    net, rows = catalyst()
    positions, initial = atom_positions(ATOMS)
    cell = 1.01 * slab_cell()  # no image at exactly the cut-off
    noise, displacement = net(positions, initial, cell, rows, STEP)
    moved = net(positions @ turn.T + SHIFT, initial @ turn.T - SHIFT, cell @ turn.T, rows, STEP)
    torch.testing.assert_close(moved[0], noise @ turn.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(moved[1], displacement @ turn.T, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("turn", [TURN, MIRROR])
def test_the_ligand_network_turns_and_mirrors_with_its_input(turn: Tensor) -> None:
    net, rows = ligand()
    positions, crystal = atom_positions(ATOMS)
    noise = net(positions, crystal, rows, STEP)
    moved = net(positions @ turn.T + SHIFT, crystal @ turn.T + SHIFT, rows, STEP)
    torch.testing.assert_close(moved, noise @ turn.T, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_true_pose_of_a_ligand_is_not_looked_at() -> None:
    net, rows = ligand()
    positions, crystal = atom_positions(ATOMS)
    elsewhere = crystal.clone()
    elsewhere[:, :2] += 7.0
    assert torch.equal(net(positions, crystal, rows, STEP), net(positions, elsewhere, rows, STEP))
    elsewhere[:, 3] += 1.0
    assert (net(positions, crystal, rows, STEP) - net(positions, elsewhere, rows, STEP)).abs().max() > 1e-3


@torch.no_grad()
def test_the_carbon_network_does_not_see_where_atoms_of_a_cell_are_numbered() -> None:
    net, rows, positions = carbon()
    order = torch.tensor([2, 0, 3, 1, *range(4, 12)])
    noise = net(positions, rows, STEP)
    torch.testing.assert_close(net(positions[:, order], rows, STEP), noise[:, order], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_carbon_read_out_turns_with_its_input() -> None:
    """About the fixed reference the whole network is not equivariant; its read-out is, but for the norm's 1e-5."""
    net, _, positions = carbon()
    net.load_state_dict(random_state(carbon_table(**SMALL), scale=0.2))
    x = wave(torch.sin, 0.9, 1, 12, 64)
    vectors = net._read_out(x, positions)
    turned = net._read_out(x, positions @ TURN.T + SHIFT)
    assert vectors.abs().max() > 0.05
    torch.testing.assert_close(turned, vectors @ TURN.T, atol=2e-3, rtol=1e-2)


def padded(rows: GraphRows, extra: int) -> GraphRows:
    def widened(values: Tensor | None, axes: int) -> Tensor | None:
        if values is None:
            return None
        shape = list(values.shape)
        shape[1 : 1 + axes] = [n + extra for n in shape[1 : 1 + axes]]
        wide = values.new_zeros(shape)
        wide[(slice(None), *(slice(0, n) for n in values.shape[1 : 1 + axes]))] = values
        return wide

    wide = [
        widened(v, a) for v, a in ((rows.atoms, 1), (rows.tags, 1), (rows.degree, 1), (rows.spatial, 2), (rows.hops, 2))
    ]
    return GraphRows(*wide)  # type: ignore[arg-type]


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    positions, reference = atom_positions(ATOMS)
    junk = torch.full((1, 3, 3), 2.5)
    wide_positions, wide_reference = torch.cat([positions, junk], 1), torch.cat([reference, junk], 1)
    net, rows = catalyst()
    plain = net(positions, reference, slab_cell(), rows, STEP)[0]
    wide = net(wide_positions, wide_reference, slab_cell(), padded(rows, 3), STEP)[0]
    torch.testing.assert_close(wide[:, :ATOMS], plain, atol=1e-5, rtol=1e-5)
    other, rows = ligand()
    plain = other(positions, reference, rows, STEP)
    wide = other(wide_positions, wide_reference, padded(rows, 3), STEP)
    torch.testing.assert_close(wide[:, :ATOMS], plain, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_slabs_of_different_surroundings_share_a_batch() -> None:
    net, rows = catalyst()
    positions, initial = atom_positions(ATOMS)
    cells = torch.cat([slab_cell(), 40 * torch.eye(3).unsqueeze(0)])
    both = GraphRows(*(v.expand(2, *v.shape[1:]) for v in vars(rows).values()))
    together = net(positions.expand(2, -1, -1), initial.expand(2, -1, -1), cells, both, STEP.expand(2))[0]
    assert (together[0] - together[1]).abs().max() > 1e-3
    for b in range(2):
        alone = net(positions, initial, cells[b : b + 1], rows, STEP)[0]
        torch.testing.assert_close(together[b : b + 1], alone, atol=1e-5, rtol=1e-5)


def test_images_are_those_near_any_atom() -> None:
    positions = torch.tensor([[[0.5, 5.0, 0.0], [5.0, 5.0, 0.0]]])
    cell = 10 * torch.eye(3).unsqueeze(0)
    keys = image_keys(positions, cell, torch.ones(1, 2, dtype=torch.bool), in_plane_cells(), 6.0)
    images = {(int(s), *o.tolist()) for s, o, t in zip(keys.source[0], keys.offset[0], keys.taken[0], strict=True) if t}
    assert images == {(0, 0, 0, 0), (1, 0, 0, 0), (0, 10, 0, 0), (1, -10, 0, 0)}


def test_folding_images_leaves_attention_as_it_is() -> None:
    generator = torch.Generator().manual_seed(1)
    source = torch.tensor([[0, 1, 2, 2, 0, 1, 1]])
    bias = 3 * torch.randn(1, 2, 4, 7, generator=generator)
    bias[..., 5] = float("-inf")
    logits, values = torch.randn(1, 2, 4, 3, generator=generator), torch.randn(3, 5, generator=generator)
    whole = torch.softmax(logits[..., source[0]] + bias, -1) @ values[source[0]]
    short = torch.softmax(logits + folded(bias, source, 3), -1) @ values
    torch.testing.assert_close(short, whole, atol=1e-6, rtol=1e-5)


def test_corners_follow_from_four_of_them() -> None:
    corners = torch.randn(1, 9, 3, generator=torch.Generator().manual_seed(2))
    whole = completed(corners)
    a, b, c = cell_of(whole)[0]
    sums = [0 * a, c, b, b + c, a, a + c, a + b, a + b + c]
    torch.testing.assert_close(whole[0, 1:], corners[0, 1] + torch.stack(sums))
    torch.testing.assert_close(completed(whole), whole)
    assert torch.equal(cell_of(reference_sites(3).unsqueeze(0))[0], 4 * torch.eye(3))


def test_rows_of_a_graph_are_numbered_as_published() -> None:
    # a chain 1-2-3 with a label of its own on each bond, and a separate atom 0
    atoms, bonds = np.array([[8], [6], [6], [1]]), np.array([[1, 2], [2, 3]])
    rows = graph_rows(atoms, bonds, np.array([[0, 1], [3, 0]]), torch.tensor([1, 1, 2, 3]))
    assert rows.atoms[0, :, 0].tolist() == [10, 8, 8, 3]
    assert rows.degree is not None and rows.degree[0].tolist() == [1, 2, 3, 2]
    assert rows.spatial is not None and rows.spatial[0, 1].tolist() == [511, 1, 2, 3]
    assert rows.hops is not None
    assert rows.hops[0, 1, 3].tolist() == [[3, 516], [6, 515], [0, 0], [0, 0], [0, 0]]
    assert rows.hops[0, 0].eq(0).all()


def test_paths_through_the_first_atom_count_as_one_unlabelled_edge() -> None:
    rows = graph_rows(
        np.array([[6], [6], [6]]), np.array([[0, 1], [0, 2]]), np.zeros((2, 1), int), torch.ones(3).long()
    )
    assert rows.spatial is not None and rows.hops is not None
    assert rows.spatial[0, 1, 2] == 3
    assert rows.hops[0, 1, 2, :, 0].tolist() == [1, 0, 0, 0, 0]
    lengths, via = shortest_paths(np.array([[0, 1, 1], [1, 0, 0], [1, 0, 0]], bool))
    assert lengths[1, 2] == 2 and via[1, 2] == 0


def test_ligand_and_pocket_are_512_apart() -> None:
    rows = ligand_rows(np.full((4, 2), 6), np.array([[0, 1], [2, 3]]), np.zeros((2, 1), int), 2)
    assert rows.spatial is not None
    assert rows.spatial[0].tolist() == [[1, 2, 512, 512], [2, 1, 512, 512], [512, 512, 1, 2], [512, 512, 2, 1]]
    assert rows.tags[0].tolist() == [1, 1, 0, 0]


def slab() -> System:
    roles = (SiteRole.SUBSURFACE, SiteRole.SURFACE, SiteRole.SURFACE, SiteRole.ADSORBATE, SiteRole.ADSORBATE)
    positions = np.array([[0, 0, 0], [0, 0, 2], [3, 0, 2], [0, 0, 4], [0, 0, 5]], float)
    return System(
        name="slab",
        kind=SystemKind.CATALYST,
        elements=np.array([29, 29, 29, 6, 8]),
        atom_names=("Cu", "Cu", "Cu", "C", "O"),
        residue_names=("SLB",) * 5,
        residue_index=np.zeros(5, int),
        chain_index=np.zeros(5, int),
        bonds=np.array([[3, 4]]),
        bond_orders=np.array([0]),
        formal_charges=np.zeros(5, int),
        stereocentres=np.zeros((0, 4), int),
        mobile=np.array([False, True, True, True, True]),
        reference_positions=positions,
        roles=np.array([int(role) for role in roles]),
        cell=np.diag([6.0, 7.0, 20.0]),
        periodic=(True, True, False),
    )


@torch.no_grad()
def test_a_slab_becomes_rows_that_the_network_takes() -> None:
    rows, net = catalyst_rows(slab()), catalyst()[0]
    assert rows.tags[0].tolist() == [1, 2, 2, 3, 3]
    assert rows.atoms[0, :, 0].tolist() == [31, 31, 31, 8, 10]
    positions = torch.from_numpy(slab().reference_positions).float().unsqueeze(0)
    noise, _ = net(positions, positions, slab_cell(), rows, STEP)
    assert torch.isfinite(noise).all()
    with pytest.raises(UserError, match=r"'slab', roles: sites that are \['plain'\]"):
        catalyst_rows(replace(slab(), roles=np.zeros(5, int)))
