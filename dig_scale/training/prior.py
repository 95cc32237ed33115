"""Whether the noise at t = 1 hides the data: what sampling starts from must be what training ends at.

In: the training split. Out: a warning in words, or nothing. A sample starts from noise alone, the network was shown
alpha x + sigma noise: the Kullback-Leibler divergence between the two is half of |alpha x / sigma|² at most, which grows with
the number of sites, so that noise beyond every site's own reach may still show a large structure as a whole.
"""

from __future__ import annotations

import torch

from dig_scale.config import Recipe
from dig_scale.records import evenly_spread
from dig_scale.training.data import TrainingData

MOST_NATS = 5.0
"""Divergence of the prior from noised data that is passed over in silence."""
_SYSTEMS, _FRAMES = 16, 8


def prior_warning(recipe: Recipe, data: TrainingData) -> str | None:
    """What to say where positions show through the noise at t = 1, of the system where they do most; else None.

    A few frames of a few systems are looked at.
    """
    found = {row: _divergence(data, row) for row in evenly_spread(len(data.systems), _SYSTEMS).tolist()}
    worst = max(found, key=lambda number: found[number])
    if found[worst] <= MOST_NATS:
        return None
    wanted = recipe.diffusion.noise_max * (found[worst] / 2) ** 0.5
    return (
        f"structures of {data.systems[worst].name!r} show through the noise that samples start from ({found[worst]:.0f} "
        f"nats): samples will be worse than the training loss tells; diffusion.noise_max = {wanted:.0f} would hide them"
    )


def _divergence(data: TrainingData, row: int) -> float:
    """Half of |alpha x / sigma|² at t = 1, the mean over some frames of a system; 0 where no positions diffuse as vectors."""
    field = data.compositions[row].fields.get("positions")
    if field is None or not data.frames[row]:
        return 0.0
    positions = data.clean(int(data.reader.offsets[row]) + evenly_spread(data.frames[row], _FRAMES)).positions
    assert positions is not None
    level = field.process.coefficients(torch.ones(1))
    return float(0.5 * positions.square().sum((1, 2)).mean() * (level.alpha / level.sigma) ** 2)
