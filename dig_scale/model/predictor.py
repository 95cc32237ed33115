"""features -> trunk -> pooled head: a network that tells a property of a structure from its noised form.

The encoder of the score model, told the noise level as that is, and a head over all sites; so its answer is the same
however a structure is turned or shifted, and of a crystal about whatever origin. Sites that the encoder cannot tell apart,
such as the hydrogens of a methyl group, it cannot tell apart either. What the model is conditioned on it does not read.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dig_scale.batch import Context, Geometry
from dig_scale.config import Model
from dig_scale.model.encoder import Encoder
from dig_scale.model.leaves import SmallLinear
from dig_scale.model.score_model import ScoreModel
from dig_scale.predictions import AnglePrediction, Family, NormalPrediction, Predicted, prediction_from


class PooledHead(nn.Module):
    """Tokens [B, N, D] -> two numbers [B, 2] of order 1, near 0 at first: attention over the sites that are present, and their
    mean."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.heads = config.heads
        self.keys = nn.Linear(config.width, config.heads)
        self.values = nn.Linear(config.width, config.width)
        self.hidden = nn.Sequential(nn.Linear(2 * config.width, config.width), nn.GELU())
        self.out = SmallLinear(config.width, 2)

    def forward(self, tokens: Tensor, present: Tensor) -> Tensor:
        """[B, 2]."""
        there = present.unsqueeze(-1)
        weights = torch.softmax(self.keys(tokens).masked_fill(~there, -torch.inf), dim=1)
        values = self.values(tokens).unflatten(-1, (self.heads, -1))
        attended = torch.einsum("bnh,bnhd->bhd", weights, values).flatten(1)
        mean = (tokens * there).sum(1) / there.sum(1).clamp(min=1)
        return self.out(self.hidden(torch.cat([attended, mean], dim=-1)))


class Predictor(Encoder):
    """Call: (noised Geometry on the scale of the data, Context, noise level [B] Å) -> q(c | x_t) in units of order 1."""

    def __init__(self, config: Model, family: Family) -> None:
        super().__init__(config.model_copy(update={"conditions": ()}))
        self.family = family
        self.pooled = PooledHead(config)

    def forward(self, seen: Geometry, context: Context, noise_std: Tensor) -> NormalPrediction | AnglePrediction:
        """The prediction for every structure [B]."""
        tokens = self.encode(seen, context, noise_std).tokens
        with torch.autocast(tokens.device.type, enabled=False):  # a mean needs its digits
            numbers = self.pooled(tokens.to(seen.positions.dtype), context.present)
            return prediction_from(self.family, numbers)


def network_for(config: Model, predicts: Predicted | None) -> Encoder:
    """The network of a recipe's [model]: a predictor of a property, or where there is none a score model."""
    return ScoreModel(config) if predicts is None else Predictor(config, predicts.family)
