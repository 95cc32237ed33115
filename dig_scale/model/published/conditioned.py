"""Published networks bound to one system: callables of what diffuses and the step alone, as the samplers take them.

The static features are computed once, without gradients to the network's parameters unless the caller asks for them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dig_scale.errors import UserError
from dig_scale.model.published.bioemu import BioEmu, ResidueTables
from dig_scale.model.published.carbon import CarbonNet
from dig_scale.model.published.catalyst import CatalystNet
from dig_scale.model.published.graphormer_v1 import GraphRows
from dig_scale.model.published.ligand import LigandNet
from dig_scale.model.published.protein import ProteinNet
from dig_scale.model.published.structure import PAIR_WIDTH, SINGLE_WIDTH, Pose

FramesNetwork = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(positions [B,N,3] Å, rotations [B,N,3,3], step or t [B]) -> (translation, rotation) [B,N,3]."""
AtomsNetwork = Callable[[Tensor, Tensor], Tensor]
"""(positions [B,N,3] Å, step [B]) -> noise [B,N,3]."""


def frames_network(
    net: ProteinNet | BioEmu, single: Tensor, pair: Tensor, sequence: str | None = None
) -> FramesNetwork:
    """DiG's (of step k) or BioEmu's (of time t) network for one protein, from single [N, 384] and pair [N, N, 128].

    Raises UserError on shapes that disagree and where BioEmu 1.2 is not given the sequence.
    """
    residues = single.shape[0]
    if single.shape != (residues, SINGLE_WIDTH) or pair.shape != (residues, residues, PAIR_WIDTH):
        raise UserError(
            f"representations of shapes {tuple(single.shape)} and {tuple(pair.shape)}, expected (N, {SINGLE_WIDTH}) "
            f"and (N, N, {PAIR_WIDTH}): AlphaFold2's single and pair"
        )
    if sequence is not None and len(sequence) != residues:
        raise UserError(f"a sequence of {len(sequence)} residues for representations of {residues}")
    if isinstance(net, BioEmu) and net.config.tables is ResidueTables.PER_LAYER and sequence is None:
        raise UserError("this BioEmu network takes residue types: give the sequence of the protein")
    with torch.no_grad():
        protein = net.condition(single, pair, sequence) if isinstance(net, BioEmu) else net.condition(single, pair)

    def network(positions: Tensor, rotations: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        return net(Pose(positions, rotations), step, protein)

    return network


def catalyst_network(net: CatalystNet, initial: Tensor, cell: Tensor, rows: GraphRows) -> AtomsNetwork:
    """DiG's catalyst network for one slab: initial [N, 3] Å and cell [3, 3] Å; answers with the noise of displacements."""

    def network(positions: Tensor, step: Tensor) -> Tensor:
        batch = len(positions)
        noise, _ = net(positions, initial.expand_as(positions), cell.expand(batch, 3, 3), _repeated(rows, batch), step)
        return noise

    return network


def ligand_network(net: LigandNet, crystal: Tensor, rows: GraphRows) -> AtomsNetwork:
    """DiG's ligand network for one pocket: crystal [N, 3] Å about the pocket's centre, the ligand's rows unused."""

    def network(positions: Tensor, step: Tensor) -> Tensor:
        return net(positions, crystal.expand_as(positions), _repeated(rows, len(positions)), step)

    return network


def carbon_network(net: CarbonNet, rows: GraphRows) -> AtomsNetwork:
    """DiG's carbon network for structures of one number of atoms."""

    def network(positions: Tensor, step: Tensor) -> Tensor:
        return net(positions, _repeated(rows, len(positions)), step)

    return network


def _repeated(rows: GraphRows, batch: int) -> GraphRows:
    fields = (rows.atoms, rows.tags, rows.degree, rows.spatial, rows.hops)
    return GraphRows(*(f.expand(batch, *f.shape[1:]) if f is not None else None for f in fields))  # type: ignore[arg-type]
