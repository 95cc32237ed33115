"""A template laid on the noised chain: where and how turned each residue would be if the protein were its template as it lies.

In: noised residues, and in their context's site features the template's places and turns (template_layout says where they
stand). Out: two vectors of every residue, to its place in the template and from the centre to that place, and what its frame
sees of both and of the template's frame. The superposition is Kabsch's, so all turns with the chain; residues that the template
lacks have zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dig_scale.batch import Context, Geometry
from dig_scale.config import Model
from dig_scale.geometry.rotations import nearest_rotations
from dig_scale.template_layout import LENGTH, PLACES, TURNS

_NEAR, _WIDE = 4.0, 10.0
"""Widths of noise beyond which a displacement is only a direction; Å of a place from the centre."""
_SEEN = 3 + 3 + 9 + 1


@dataclass(frozen=True)
class Laid:
    """Vectors [B, 3, 2, N] of order 1 in space, and numbers [B, N, 16] that each residue's frame sees."""

    vectors: Tensor
    seen: Tensor


class TemplateReader(nn.Linear):
    """What frames see of a laid template -> tokens [B, N, D]."""

    def __init__(self, config: Model) -> None:
        super().__init__(_SEEN, config.width)


def laid_template(seen: Geometry, context: Context, noise_std: Tensor) -> Laid:
    """The template of the context on noised structures at noise levels [B] Å."""
    assert seen.rotations is not None
    features = context.site_features.to(seen.positions.dtype).expand(len(seen.positions), -1, -1)
    turns = features[..., TURNS].unflatten(-1, (3, 3))
    there = ((turns != 0).any(-1).any(-1) & context.present).to(features.dtype).unsqueeze(-1)
    rotation, centre, places = _superposed(LENGTH * features[..., PLACES], seen.positions, there)
    to_place = (centre + places - seen.positions) * torch.rsqrt(1 + noise_std**2)[:, None, None]
    near = to_place * torch.rsqrt(1 + (to_place / _NEAR).square().sum(-1, keepdim=True))
    vectors = torch.stack([near, places / _WIDE], dim=2) * there.unsqueeze(-1)
    held = torch.einsum("bnca,bnmc->bnma", seen.rotations, vectors).flatten(2)
    turned = torch.einsum("bnca,bcd,bnde->bnae", seen.rotations, rotation, turns).flatten(2)
    return Laid(vectors.permute(0, 3, 2, 1), torch.cat([held, turned, there], dim=-1))


def _superposed(template: Tensor, positions: Tensor, there: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Proper rotation [B, 3, 3] of the template [B, N, 3] Å onto positions, their centre [B, 1, 3], turned places about it."""
    share = there / there.sum(1, keepdim=True).clamp(min=1)
    centre = (share * positions).sum(1, keepdim=True)
    own = template - (share * template).sum(1, keepdim=True)
    rotation = nearest_rotations((share * (positions - centre)).mT @ own)
    return rotation, centre, own @ rotation.mT
