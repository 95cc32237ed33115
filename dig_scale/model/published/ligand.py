"""DiG's released network for ligands in pockets (Zheng et al. 2023; microsoft/Graphormer), 58.0 M parameters.

In: centred positions (Å) of all heavy atoms, ligand first, the crystal positions of the pocket (centred on it), rows of the
embedding tables, the step t (0..499, 0 is the least noisy). Out: the noise of every atom, pocket included. The crystal
positions are a second distance channel with kernels and MLP of its own, in which the ligand's atoms stand where they are
now, so that its true pose cannot leak. Time enters at the input and in each layer. Knows no noise schedule.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from dig_scale.model.published.graphormer_v1 import (
    DistanceBias,
    Encoder,
    FlatRadialKernels,
    GraphEncoder,
    GraphormerLayer,
    GraphormerSizes,
    GraphRows,
    Keys,
    VectorReadOut,
    unit_vectors,
    whole_bias,
)
from dig_scale.model.published.structure import StepEmbedding

LIGAND_TAG = 1
LIGAND_SIZES = GraphormerSizes(tags=3)
"""Tags: 0 pocket, 1 ligand, 2 padding."""


class TimeEmbedding(nn.Module):
    """Step [B] -> [B, D] through an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.time_proj = StepEmbedding(width)
        self.time_embedding = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, step: Tensor) -> Tensor:
        """[B, D]."""
        return self.time_embedding(self.time_proj(step))


class TimedLayer(GraphormerLayer):
    """A layer that adds the projected time after attention."""

    def __init__(self, sizes: GraphormerSizes) -> None:
        super().__init__(sizes)
        self.time_emb_layer = nn.Sequential(nn.GELU(), nn.Linear(sizes.width, sizes.width))

    def forward(self, x: Tensor, bias: Tensor, time: Tensor | None) -> Tensor:
        """[B, N+1, D]; the time embedding [B, D] is needed."""
        assert time is not None
        shifted = x + self.self_attn(x, bias) + self.time_emb_layer(time).unsqueeze(1)
        return self.feed_forward(self.self_attn_layer_norm(shifted))


class TimedEncoder(GraphEncoder):
    """The stack of timed layers and the time's own embedding."""

    def __init__(self, sizes: GraphormerSizes) -> None:
        super().__init__(sizes, TimedLayer)
        self.timestep_encoder = TimeEmbedding(sizes.width)


class LigandNet(nn.Module):
    """See the module's header."""

    def __init__(self, sizes: GraphormerSizes = LIGAND_SIZES) -> None:
        super().__init__()
        self.sizes = sizes
        self.encoder = Encoder(sizes, TimedEncoder(sizes))
        self.graph_3d_bias = DistanceBias(sizes, FlatRadialKernels(sizes.kernels))
        self.graph_3d_bias_crystal = DistanceBias(sizes, FlatRadialKernels(sizes.kernels))
        self.force_proj = VectorReadOut(sizes)

    def forward(self, positions: Tensor, crystal: Tensor, rows: GraphRows, step: Tensor) -> Tensor:
        """Noise [B, N, 3] from positions and crystal positions [B, N, 3], step [B]."""
        graph = self.encoder.graph_encoder
        assert isinstance(graph, TimedEncoder) and rows.degree is not None
        positions = torch.where(rows.present.unsqueeze(-1), positions, 0.0)
        crystal = torch.where((rows.tags == LIGAND_TAG).unsqueeze(-1), positions, crystal)
        crystal = torch.where(rows.present.unsqueeze(-1), crystal, 0.0)
        keys = Keys.of_atoms(rows.present)
        channels = ((self.graph_3d_bias, positions), (self.graph_3d_bias_crystal, crystal))
        (now, near), (then, near_then) = (c(c.dist_feature_extractor, x, keys, rows.atoms) for c, x in channels)
        time = graph.timestep_encoder(step)
        atoms = graph.graph_node_feature.atom_encoder(rows.atoms).mean(-2)
        atoms = atoms + graph.graph_node_feature.degrees(rows.degree) + graph.tag_embedding(rows.tags)
        tokens = graph.graph_node_feature.with_graph_token(atoms + (near + near_then) / 2) + time.unsqueeze(1)
        total, _ = whole_bias(graph.graph_attn_bias(rows), now + then, keys)
        x = self.encoder(tokens, total / 3, time)
        return self.force_proj(x, total[:, :, 1:, 1:] / 3, -unit_vectors(positions, keys), keys)


def ligand_first(ligand: int, atoms: int) -> Tensor:
    """Tags [N] of a pocket whose first `ligand` atoms are the ligand's."""
    return functional.pad(torch.full((ligand,), LIGAND_TAG), (0, atoms - ligand))
