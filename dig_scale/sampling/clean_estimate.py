"""E[x_0 | x_t] of every field from its score: Tweedie's formula on vectors, its first order on rotations and the torus.

In: a noised State and its Score. Out: a clean State, and the Geometry it stands for. Differentiable in both.
"""

from __future__ import annotations

from torch import Tensor

from dig_scale.batch import Context, Geometry, Score, State, fields_of
from dig_scale.diffusion.composition import Composition
from dig_scale.diffusion.euclidean import per_sample


def clean_estimate(composition: Composition, state: State, score: Score, t: Tensor) -> State:
    """Clean states [B] that a state at t [B] and its score imply: move(x, sigma² score)/alpha."""
    given, found = fields_of(score), {}
    for name, x in fields_of(state).items():
        process = composition.fields[name].process
        level = process.coefficients(t)
        tangent = per_sample(level.sigma, given[name]) ** 2 * given[name]
        found[name] = process.move(x, tangent) / per_sample(level.alpha, x)
    return State(**found)


def geometry_of(composition: Composition, state: State, context: Context) -> Geometry:
    """The structures, in Å, of clean states."""
    arrays = composition.arrays(state, context)
    return Geometry(arrays["positions"], arrays.get("rotations"), arrays.get("cell"))
