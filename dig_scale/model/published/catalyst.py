"""DiG's released network for adsorbates on catalyst slabs (Zheng et al. 2023; microsoft/Graphormer), 51.4 M parameters.

In: positions (Å), the initial positions of the same atoms, the cell, rows of the embedding tables, the step t (0..4999,
0 is the least noisy). Out: the noise of `positions - initial` per atom, and the network's one-shot guess of the whole
displacement (`force_proj`, kept from its pre-training, not used in sampling). The eight in-plane neighbour cells are looked
at within 6 Å of any atom. Translation invariant; turns and mirrors with its input. Knows no noise schedule.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dig_scale.model.published.graphormer_v1 import (
    DistanceBias,
    Encoder,
    GraphEncoder,
    GraphormerSizes,
    GraphRows,
    RadialKernels,
    VectorReadOut,
    image_keys,
    unit_vectors,
    whole_bias,
)
from dig_scale.model.published.structure import sinusoids

CUTOFF = 6.0
CATALYST_SIZES = GraphormerSizes(tags=4)
"""Tags: 0 padding, 1 sub-surface, 2 surface, 3 adsorbate."""


class TwoChannels(DistanceBias):
    """Distances of current and of reference positions, each with its own kernels, through one MLP."""

    def __init__(self, sizes: GraphormerSizes) -> None:
        super().__init__(sizes, RadialKernels(sizes.kernels))
        self.dist_feature_extractor_init = RadialKernels(sizes.kernels)


class CatalystNet(nn.Module):
    """See the module's header."""

    def __init__(self, sizes: GraphormerSizes = CATALYST_SIZES) -> None:
        super().__init__()
        self.sizes = sizes
        self.encoder = Encoder(sizes, GraphEncoder(sizes))
        self.graph_3d_bias = TwoChannels(sizes)
        self.force_proj = VectorReadOut(sizes)
        self.force_proj_delta_pos = VectorReadOut(sizes)

    def forward(
        self, positions: Tensor, initial: Tensor, cell: Tensor, rows: GraphRows, step: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Noise and displacement [B, N, 3] from positions, initial [B, N, 3], cell [B, 3, 3] (rows), step [B]."""
        graph, distances = self.encoder.graph_encoder, self.graph_3d_bias
        present = rows.present.unsqueeze(-1)
        positions, initial = (torch.where(present, x, 0.0) for x in (positions, initial))
        keys = image_keys(positions, cell, rows.present, in_plane_cells(cell.device), CUTOFF)
        now, near = distances(distances.dist_feature_extractor, positions, keys, rows.atoms)
        before, near_before = distances(distances.dist_feature_extractor_init, initial, keys, rows.atoms)
        assert rows.degree is not None
        atoms = graph.graph_node_feature.atom_encoder(rows.atoms).sum(-2)
        atoms = atoms + graph.graph_node_feature.degrees(rows.degree) + graph.tag_embedding(rows.tags)
        tokens = graph.graph_node_feature.with_graph_token(atoms + near + near_before)
        tokens = tokens + sinusoids(step, self.sizes.width).to(tokens.dtype).unsqueeze(1)
        trunk, whole = whole_bias(graph.graph_attn_bias(rows), now + before, keys)
        x, units = self.encoder(tokens, trunk), unit_vectors(positions, keys)
        return self.force_proj_delta_pos(x, whole, units, keys), self.force_proj(x, whole, units, keys)


def in_plane_cells(device: torch.device | str = "cpu") -> Tensor:
    """The eight neighbour cells [8, 3] along the first two cell vectors."""
    steps = torch.tensor([-1, 0, 1], device=device)
    cells = torch.cartesian_prod(steps, steps, torch.zeros(1, dtype=steps.dtype, device=device))
    return cells[(cells != 0).any(1)]
