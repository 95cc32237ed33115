"""The module that is trained: one object whose forward pass gives losses, as DeepSpeed wants it.

In: a micro-batch of noised data, with labels where a predictor is trained, or candidates of physics-informed training. Out:
losses [B]. Knows no optimizer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dig_scale.batch import Context, Geometry
from dig_scale.objectives.denoising import denoising_loss
from dig_scale.objectives.physics_informed import physics_informed_loss
from dig_scale.objectives.regression import regression_loss
from dig_scale.training.data import MicroBatch
from dig_scale.training.physics import PhysicsBatch
from dig_scale.tree import tree_map


class Objective(nn.Module):
    """The trained module: a micro-batch -> denoising loss of every row, or -log q of its label; candidates -> their
    physics-informed loss.

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
        clean = (micro.composition, micro.batch, micro.t, micro.noise)
        if micro.labels is not None:
            return regression_loss(self._answer, *clean, micro.labels)
        return denoising_loss(self._answer, *clean)

    def _answer(self, seen: Geometry, context: Context, noise_std: Tensor) -> Any:
        """A Score, or of predictors a Prediction."""
        if self.precision == "fp32":
            return self.network(seen, context, noise_std)
        with torch.autocast(noise_std.device.type, dtype=torch.bfloat16):
            answer = self.network(seen, context, noise_std)
        return tree_map(torch.Tensor.float, answer)
