"""BioEmu's network against numbers of its published module, and the two doors: nm and AlphaFold2's axes."""

from __future__ import annotations

import pytest
import torch

from dig_scale.errors import UserError
from dig_scale.geometry.rotations import frames_from_backbone
from dig_scale.model.published.bioemu import (
    IDEAL_C,
    IDEAL_N,
    BioEmu,
    BioEmuConfig,
    ResidueTables,
    alphafold_axes,
    residue_codes,
)
from dig_scale.model.published.conditioned import frames_network
from dig_scale.model.published.structure import Pose, StructureSizes
from tests.dig_scale.model.published.published_files import (
    bioemu_table,
    protein_inputs,
    rotations_of,
    small_protein_table,
    waves,
)

SIZES = StructureSizes(width=64, pair_width=16, layers=2, heads=4, hidden=32)
SEQUENCE = "GAVLIFY"
POSITIONS = {
    ResidueTables.NONE: [[0.29484230, 0.14525709, 0.09151153], [0.00513148, -0.28637648, -0.00796932]],
    ResidueTables.PER_LAYER: [[0.31962720, 0.19761221, 0.10057171], [0.01083260, -0.28487206, -0.00645942]],
}
ROTATIONS = {
    ResidueTables.NONE: [[0.37766311, 0.21382663, 0.04726622], [-0.00851573, -0.10687024, -0.20357753]],
    ResidueTables.PER_LAYER: [[0.41499197, 0.25060621, 0.08299519], [-0.00205093, -0.10374821, -0.20384078]],
}
"""Of the published module, in nm and AlphaFold2's axes, filled with `waves(..., 0.1)`, at t = 0.3."""


def network(tables: ResidueTables) -> BioEmu:
    net = BioEmu(BioEmuConfig(SIZES, tables))
    shapes = bioemu_table(small_protein_table(), 2, 64, 16, int(tables is ResidueTables.PER_LAYER))
    net.load_state_dict(waves(shapes, 0.1))
    return net.eval()


@pytest.mark.parametrize("tables", ResidueTables)
def test_numbers_of_the_published_network(tables: ResidueTables) -> None:
    net, axes = network(tables), alphafold_axes()
    single, pair, positions, inverse = protein_inputs(7)
    frames = inverse.mT @ axes.T  # the published frames are inverse.mT, of AlphaFold2's axes, and tenths of positions
    with torch.no_grad():
        translation, rotation = net(
            Pose(positions.unsqueeze(0), frames.unsqueeze(0)),
            torch.tensor([0.3]),
            net.condition(single, pair, SEQUENCE),
        )
    torch.testing.assert_close(translation[0, [0, 6]], torch.tensor(POSITIONS[tables]), atol=1e-5, rtol=0)
    torch.testing.assert_close(rotation[0, [0, 6]] @ axes, torch.tensor(ROTATIONS[tables]), atol=1e-5, rtol=0)


def test_axes_turn_alphafold_frames_into_this_projects() -> None:
    generator = torch.Generator().manual_seed(0)
    alphafold = rotations_of(torch.randn(5, 3, generator=generator))
    carbon = torch.randn(5, 3, generator=generator)
    n, c = (alphafold @ torch.tensor(local) + carbon for local in (IDEAL_N, IDEAL_C))
    frames, _ = frames_from_backbone(n, carbon, c)
    torch.testing.assert_close(alphafold @ alphafold_axes().T, frames, atol=1e-5, rtol=0)


def test_turning_and_moving_a_chain_turns_translations_and_leaves_rotations() -> None:
    single, pair, positions, inverse = protein_inputs(7)
    net = frames_network(network(ResidueTables.NONE), single, pair)
    turn = rotations_of(torch.tensor([[1.0, 0.2, -0.7]]))[0]
    positions, frames, t = positions.unsqueeze(0), inverse.mT.unsqueeze(0), torch.tensor([0.6])
    with torch.no_grad():
        a, u = net(positions, frames, t)
        b, v = net(positions @ turn.T + 30.0, turn @ frames, t)
    torch.testing.assert_close(b, a @ turn.T, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(v, u, atol=1e-5, rtol=1e-4)


def test_version_1_2_asks_for_the_sequence_and_the_sequence_matters() -> None:
    single, pair, positions, inverse = protein_inputs(7)
    net = network(ResidueTables.PER_LAYER)
    with pytest.raises(UserError, match="give the sequence"):
        frames_network(net, single, pair)
    with pytest.raises(UserError, match="3 residues for representations of 7"):
        frames_network(net, single, pair, "GAV")
    given = (positions.unsqueeze(0), inverse.mT.unsqueeze(0), torch.tensor([0.2]))
    with torch.no_grad():
        first = frames_network(net, single, pair, SEQUENCE)(*given)[0]
        other = frames_network(net, single, pair, "WWWWWWW")(*given)[0]
    assert (first - other).abs().max() > 1e-3


def test_residue_codes_are_the_published_ones() -> None:
    assert residue_codes("ARNDCQEGHILKMFPSTWYVUOXBZ").tolist() == [
        1, 15, 12, 3, 2, 14, 4, 6, 7, 8, 10, 9, 11, 5, 13, 16, 17, 19, 20, 18, 21, 22, 0, 23, 25
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"\['J'\]"):
        residue_codes("AJ")
