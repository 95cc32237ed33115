"""ScoreFn -> ScoreFn: classifier-free guidance (Ho & Salimans 2022), s(x) + w (s(x|c) - s(x)), for conditioned models.

Knows what a Context asks for, not what a property is.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dig_scale.batch import Context, Score, ScoreFn, State
from dig_scale.tree import tree_map


def classifier_free(score_fn: ScoreFn, weight: float) -> ScoreFn:
    """The score with the wanted properties weighted by `weight`; at 1 it is the conditioned score, called once."""
    if weight == 1:
        return score_fn

    def guided(state: State, context: Context, t: Tensor) -> Score:
        unconditioned = replace(context, known=torch.zeros_like(context.known))
        free = score_fn(state, unconditioned, t)
        if weight == 0:
            return free
        return tree_map(lambda a, b: a + weight * (b - a), free, score_fn(state, context, t))

    return guided
