"""Equivariant read-outs: tokens and geometry -> a vector per site that rotates with the molecule.

F_i = sum_m a_im V_im + sum_m c_im (V_im × V_im'): the sum of pair directions of DiG's head with signed weights, and axial
vectors with weights that may be pseudo-scalars, so that the read-out is SE(3)- but not reflection-equivariant.
"""

from __future__ import annotations

from torch import Tensor, nn

from dig_scale.config import Model
from dig_scale.model.graphormer import cross, soft_unit
from dig_scale.model.leaves import ChannelMix, SmallLinear
from dig_scale.model.pair_operators import Ledgers, PairOperators


class VectorHead(nn.Module):
    """Vectors [B, N, 3] of order 1 from tokens [B, N, D]."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        m = config.vector_channels
        self.keys = nn.Linear(config.width, m)
        self.polar = SmallLinear(config.width, m)
        self.axial = SmallLinear(config.width, m)
        self.mix = ChannelMix(m, 2 * m)

    def forward(self, tokens: Tensor, pairs: PairOperators, ledgers: Ledgers) -> Tensor:
        """[B, N, 3]."""
        vectors, _ = pairs.gather(self.keys(tokens), ledgers)
        a, b = soft_unit(self.mix(vectors)).chunk(2, dim=2)
        polar = self.polar(tokens).transpose(1, 2).unsqueeze(1) * vectors
        axial = self.axial(tokens).transpose(1, 2).unsqueeze(1) * cross(a, b)
        return (polar + axial).sum(dim=2).transpose(1, 2)
