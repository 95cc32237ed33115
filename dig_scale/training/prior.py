"""Whether the noise at t = 1 hides the data: what sampling starts from must be what training ends at.

In: a recipe and a packed dataset. Out: a warning in words, or nothing. A sample starts from noise alone, the network was shown
alpha x + sigma noise: the Kullback-Leibler divergence between the two is half of |alpha x / sigma|² at most, which grows with
the number of sites, so that noise beyond every site's own reach may still show a large structure as a whole.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from dig_shards import ShardReader
from dig_shards.manifest import TRAIN, load_manifest

from dig_scale.config import Recipe
from dig_scale.diffusion.composition import composition_for
from dig_scale.model.features import featurise
from dig_scale.system import System

MOST_NATS = 5.0
"""Divergence of the prior from noised data that is passed over in silence."""
_SYSTEMS, _FRAMES = 16, 8


def prior_warning(recipe: Recipe, dataset: Path) -> str | None:
    """What to say where positions show through the noise at t = 1, of the system where they do most; else None.

    A few frames of a few systems are looked at.
    """
    if not load_manifest(dataset).frames(TRAIN):
        return None
    reader = ShardReader(dataset, TRAIN)
    chosen = np.unique(np.linspace(0, len(reader.systems) - 1, _SYSTEMS).round().astype(int))
    found = {int(number): _divergence(reader, int(number), recipe) for number in chosen}
    worst = max(found, key=lambda number: found[number])
    if found[worst] <= MOST_NATS:
        return None
    wanted = recipe.diffusion.noise_max * (found[worst] / 2) ** 0.5
    name = System.from_json(reader.sidecar(worst)).name
    return (
        f"structures of {name!r} show through the noise that samples start from ({found[worst]:.0f} nats): samples will be "
        f"worse than the training loss tells; diffusion.noise_max = {wanted:.0f} would hide them"
    )


def _divergence(reader: ShardReader, number: int, recipe: Recipe) -> float:
    """Half of |alpha x / sigma|² at t = 1, the mean over some frames of a system; 0 where no positions diffuse as vectors."""
    system = System.from_json(reader.sidecar(number))
    composition = composition_for(system.kind, recipe.diffusion)
    low, high = reader.offsets[number], reader.offsets[number + 1]
    if "positions" not in composition.fields or low == high:
        return 0.0
    ids = np.unique(np.linspace(low, high - 1, _FRAMES).round().astype(np.int64))
    arrays = {name: torch.from_numpy(reader.read_batch(ids, name)).float() for name in composition.stored}
    state = composition.state(arrays, featurise(system), torch.zeros(len(ids)))
    level = composition.fields["positions"].process.coefficients(torch.ones(1))
    assert state.positions is not None
    squared = state.positions.square().sum((1, 2)).mean()
    return float(0.5 * squared * (level.alpha / level.sigma) ** 2)
