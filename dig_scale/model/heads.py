"""Equivariant read-outs: tokens and geometry -> a vector per site, a rotation of its frame, a strain of the cell.

F_i = sum_m a_im V_im + sum_m c_im (V_im × V_im'): the sum of pair directions of DiG's head with signed weights, and axial
vectors with weights that may be pseudo-scalars, so that the read-out is SE(3)- but not reflection-equivariant. Sites with
frames add a vector held in their frame, and answer with a rotation in it (local components); a cell's strain is a mean
over sites of sum_m e_im T_im, with T_im = sum_j w_ijm u_ij u_ijᵀ over neighbours in directions u.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dig_scale.config import Model
from dig_scale.geometry.lattice import symmetric_coordinates
from dig_scale.model.graphormer import Guides, cross, soft_unit
from dig_scale.model.leaves import ChannelMix, SmallLinear
from dig_scale.model.pair_operators import Ledgers, PairOperators


class VectorHead(nn.Module):
    """Vectors [B, N, 3] of order 1 from tokens [B, N, D]."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        m, brought = config.vector_channels, config.guide_vectors
        self.keys = nn.Linear(config.width, m)
        self.polar = SmallLinear(config.width, m + brought)
        self.axial = SmallLinear(config.width, m)
        self.mix = ChannelMix(m + brought, 2 * m)

    def forward(self, tokens: Tensor, pairs: PairOperators, guides: Guides, ledgers: Ledgers) -> Tensor:
        """[B, N, 3]."""
        vectors, _ = pairs.gather(self.keys(tokens), ledgers)
        if guides.vector is not None:
            vectors = torch.cat([vectors, guides.vector], dim=2)
        a, b = soft_unit(self.mix(vectors)).chunk(2, dim=2)
        polar = self.polar(tokens).transpose(1, 2).unsqueeze(1) * vectors
        axial = self.axial(tokens).transpose(1, 2).unsqueeze(1) * cross(a, b)
        return (polar.sum(dim=2) + axial.sum(dim=2)).transpose(1, 2)


class FrameHead(nn.Module):
    """Tokens -> a vector [B, N, 3] in global axes and a rotation [B, N, 3] in local ones, both of order 1."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(config.width, config.width), nn.GELU())
        self.out = SmallLinear(config.width, 6)

    def forward(self, tokens: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Vector and rotation."""
        local, rotation = self.out(self.hidden(tokens)).to(frames.dtype).split([3, 3], dim=-1)
        return torch.einsum("bnca,bna->bnc", frames, local), rotation


class StrainHead(nn.Module):
    """Tokens and summed pair tensors -> six coordinates [B, 6] of a symmetric tensor of order 1, a mean over present sites."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.weights = SmallLinear(config.width, config.vector_channels)
        self.isotropic = SmallLinear(config.width, 1)

    def forward(self, tokens: Tensor, tensors: Tensor, present: Tensor) -> Tensor:
        """[B, 6] from tokens [B, N, D] and tensors [B, N, M, 6] in geometry.lattice's symmetric coordinates."""
        of_sites = torch.einsum("bnm,bnmk->bnk", self.weights(tokens).to(tensors.dtype), tensors)
        unit = symmetric_coordinates(torch.eye(3, dtype=tensors.dtype, device=tensors.device))
        of_sites = of_sites + self.isotropic(tokens) * unit
        share = present.to(tensors.dtype) / present.sum(1, keepdim=True).clamp(min=1)
        return (share.unsqueeze(-1) * of_sites).sum(1)
