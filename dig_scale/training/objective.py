"""The module that is trained: one object whose forward pass gives losses, as DeepSpeed wants it.

In: a micro-batch of noised data, or candidates of physics-informed training. Out: losses [B]. Knows no optimizer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dig_scale.batch import Context, Geometry, Score
from dig_scale.objectives.denoising import denoising_loss
from dig_scale.objectives.physics_informed import physics_informed_loss
from dig_scale.training.data import MicroBatch
from dig_scale.training.physics import PhysicsBatch
from dig_scale.tree import tree_map


class Objective(nn.Module):
    """The trained module: a micro-batch -> denoising loss of every row, candidates -> their physics-informed loss.

    Only the network runs in bf16, where asked, and never for derivatives of scores.
    """

    def __init__(self, network: nn.Module, precision: str) -> None:
        super().__init__()
        self.network = network
        self.precision = precision

    def forward(self, micro: MicroBatch | PhysicsBatch) -> Tensor:
        """Losses [B]."""
        if isinstance(micro, PhysicsBatch):
            score_fn = micro.composition.as_score_fn(self.network)
            return physics_informed_loss(score_fn, micro.composition, micro.candidates, micro.draws, micro.settings)
        return denoising_loss(self._answer, micro.composition, micro.batch, micro.t, micro.noise)

    def _answer(self, seen: Geometry, context: Context, noise_std: Tensor) -> Score:
        if self.precision == "fp32":
            return self.network(seen, context, noise_std)
        with torch.autocast(noise_std.device.type, dtype=torch.bfloat16):
            score: Score = self.network(seen, context, noise_std)
        return tree_map(torch.Tensor.float, score)
