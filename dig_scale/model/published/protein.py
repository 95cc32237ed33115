"""DiG's released protein network (Zheng et al. 2023, app. B.3; microsoft/Graphormer): 12 layers, 81.9 M parameters.

In: noised residue frames, the step number k of 500 (0 is the noisiest, t = 1 - k/500), AlphaFold2's single [N, 384] and
pair [N, N, 128] representations. Out: `translation` = sigma_tr times the score of positions (global frame, order 1) and
`rotation` = the score of rotations over its root mean square, as a tangent v of this project's frames, R -> R exp(v).

Frames. DiG stores IR = R^T (global to local) and turns it from the left, IR -> exp(u) IR, which is R -> R exp(-u): its
output changes sign here. Its axes are this project's: e1 = N - CA, e2 towards C, e3 = e1 x e2. Knows no noise schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from dig_scale.model.published.structure import (
    PAIR_WIDTH,
    SINGLE_WIDTH,
    Pose,
    SequenceOffset,
    StepEmbedding,
    StructureModule,
    StructureSizes,
    evoformer_projection,
)

STEPS = 500


@dataclass(frozen=True)
class Conditioned:
    """What a network makes of one protein once for all steps: tokens [N, D], pair [N, N, C], residue types [N] or None."""

    tokens: Tensor
    pair: Tensor
    residues: Tensor | None = None


class ProteinNet(nn.Module):
    """DiG's protein network; see the module's header."""

    def __init__(self, sizes: StructureSizes = StructureSizes()) -> None:
        super().__init__()
        self.sizes = sizes
        self.step_emb = StepEmbedding(sizes.width)
        self.x1d_proj = evoformer_projection(SINGLE_WIDTH, sizes.width)
        self.x2d_proj = evoformer_projection(PAIR_WIDTH, sizes.pair_width)
        self.rp_proj = SequenceOffset(sizes)
        self.st_module = StructureModule(sizes)

    def condition(self, single: Tensor, pair: Tensor) -> Conditioned:
        """The static features of a protein, from single [N, 384] and pair [N, N, 128]."""
        return Conditioned(self.x1d_proj(single), self.x2d_proj(pair) + self.rp_proj(len(single)))

    def forward(self, pose: Pose, step: Tensor, protein: Conditioned) -> tuple[Tensor, Tensor]:
        """translation and rotation [B, N, 3] at steps [B] (0..499); positions of the pose in Å."""
        tokens = protein.tokens + self.step_emb(step).unsqueeze(1)
        translation, rotation = self.st_module(tokens, protein.pair, pose)
        return pose.turned(translation.unsqueeze(2)).squeeze(2), -rotation
