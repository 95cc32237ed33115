"""Regression on noised structures: the negative log-likelihood of a property of the clean structure, at every noise level.

Its minimum over all q(c | x_t) of a family is the one nearest, in relative entropy, to the distribution that x_t leaves of
the property; of Normals that is the mean E[c | x_t] and the variance about it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dig_scale.batch import Batch, State
from dig_scale.diffusion.composition import Composition
from dig_scale.predictions import PropertyPredictor


@dataclass(frozen=True)
class Labels:
    """The property of every clean structure: values [B] of order 1, and known [B], which of them are."""

    values: Tensor
    known: Tensor


def regression_loss(
    predictor: PropertyPredictor, composition: Composition, batch: Batch, t: Tensor, noise: State, labels: Labels
) -> Tensor:
    """-log q [B] in nat of the labels of clean states that are noised to t [B]; 0 of structures without a label."""
    noised = composition.perturb(batch.state, t, noise)
    found = predictor(composition.seen(noised, batch.context, t), batch.context, composition.noise_level(t))
    surprise = -found.log_density(labels.values)
    return torch.where(labels.known, surprise, torch.zeros_like(surprise))
