"""features -> trunk -> heads: the score network of every kind of system.

It maps noised structures on the scale of the data (Geometry, Å), the static context and the noise level (noise_std, Å per
coordinate) to numbers of order 1 per site. It knows no schedule; diffusion.composition turns its output into a score.
SE(3)-equivariant, not reflection-equivariant; permutation-equivariant; sites that are not present change nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dig_scale.batch import Context, Geometry, Score
from dig_scale.config import Model
from dig_scale.model.encoder import Encoder
from dig_scale.model.heads import FrameHead, StrainHead, VectorHead
from dig_scale.model.pair_operators import ImageOperators


class ScoreModel(Encoder):
    """Graphormer score network; see the module's header. Call: (Geometry, Context, noise level [B] Å) -> Score of order 1."""

    def __init__(self, config: Model) -> None:
        super().__init__(config)
        self.head = VectorHead(config)
        self.frame_head = FrameHead(config) if config.sites == "residues" else None
        self.strain_head = StrainHead(config) if config.sites == "crystal" else None

    def forward(self, seen: Geometry, context: Context, noise_std: Tensor) -> Score:
        """Answers for the fields that config.sites names; those of absent sites are 0."""
        found = self.encode(seen, context, noise_std)
        tokens, pairs = found.tokens, found.pairs
        vectors = self.head(tokens, pairs, found.guides, found.ledgers) * context.present.unsqueeze(-1)
        if self.frame_head is not None:
            assert seen.rotations is not None
            held, rotations = (part * context.present.unsqueeze(-1) for part in self.frame_head(tokens, seen.rotations))
            return Score(vectors + held, rotations=rotations)
        if self.strain_head is not None:
            assert seen.cell is not None and isinstance(pairs, ImageOperators)
            edge = torch.linalg.det(seen.cell).abs().clamp(min=1e-3) ** (1 / 3)
            fractional = vectors @ seen.cell.mT / edge[:, None, None]
            return Score(fractional=fractional, lattice=self.strain_head(tokens, pairs.tensors, context.present))
        return Score(positions=vectors)


def count_parameters(config: Model) -> int:
    """Parameters of a model of this size, counted on the meta device (no memory is used)."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in ScoreModel(config).parameters())
