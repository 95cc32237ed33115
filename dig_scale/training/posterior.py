"""Pairs of a noised structure and its mean clean one, which stand for denoising below a noise level; see simulation/posterior.py.

In: the packed dataset of `dig-scale posterior` and the recipe's [train.posterior]. Out: one MicroBatch per step and rank, a pure
function of (recipe, seed, step), whose clean structures are the means: the squared error of denoising has its least value
at the mean in any case, so to learn from means is to learn from samples without their spread.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from dig_shards.manifest import TRAIN
from torch import Tensor

from dig_scale.batch import State
from dig_scale.config import Diffusion, Posterior, Recipe
from dig_scale.diffusion.composition import Composition
from dig_scale.diffusion.euclidean import VariancePreserving
from dig_scale.diffusion.schedule import schedule_from
from dig_scale.errors import TrainingError
from dig_scale.records import LABEL, NOISE_STD, NOISED, POSITIONS
from dig_scale.training.data import MicroBatch, TrainingData, counter_generator, open_split, require_positions_alone
from dig_scale.training.zero import Ranks, rows_per_rank


@dataclass(frozen=True)
class PosteriorData:
    """Pairs of a dataset; `share` is the part of all times that they stand for, [0, share] of t."""

    data: TrainingData
    settings: Posterior
    share: float
    seed: int

    def batch(self, step: int, ranks: Ranks) -> MicroBatch:
        """This rank's pairs of step `step`, all of one system, on its device; their noise leads from the mean to the noised."""
        ids, first = self._drawn(step, ranks)
        own = ids[first : first + self.settings.batch // ranks.world_size]
        level = torch.from_numpy(self.data.reader.read_batch(own, LABEL + NOISE_STD)).double()
        system = self.data.system_of(own)
        composition, context = self.data.compositions[system[0]], self.data.host_context(system)
        still = State(torch.zeros(len(own), context.n_sites, 3))
        micro = self.data.micro_batch(own, schedule_time(composition, level).float(), still)
        noised = composition.state({POSITIONS: self.data.stored(own, NOISED)}, context).positions
        assert noised is not None and micro.batch.state.positions is not None
        noise = (noised - micro.batch.state.positions) / level[:, None, None].float()
        return replace(micro, noise=State(noise)).trimmed().to(ranks.device)

    def _drawn(self, step: int, ranks: Ranks) -> tuple[np.ndarray, int]:
        """Pairs of the whole batch, each system as often as it has some, and where this rank's begin."""
        generator, batch = counter_generator(self.seed, "posterior pairs", step), self.settings.batch
        system = int(torch.multinomial(torch.tensor(self.data.frames).double(), 1, generator=generator))
        picks = torch.randint(self.data.frames[system], (batch,), generator=generator).numpy()
        return int(self.data.reader.offsets[system]) + picks, ranks.rank * (batch // ranks.world_size)


def schedule_time(composition: Composition, noise_std: Tensor) -> Tensor:
    """t of noise levels in Å."""
    process = composition.fields[POSITIONS].process
    assert isinstance(process, VariancePreserving)
    return process.schedule.time_of(noise_std)


def share_of_times(diffusion: Diffusion, settings: Posterior) -> float:
    """t at settings.noise_max; raises TrainingError where that leaves nothing to the pairs, or nothing to the frames."""
    share = float(schedule_from(diffusion).time_of(torch.tensor(settings.noise_max, dtype=torch.float64)))
    if not 0 < share < 1:
        raise TrainingError(
            f"train.posterior.noise_max = {settings.noise_max:g} Å is not between the noise levels of [diffusion]"
        )
    return share


def open_posterior(recipe: Recipe, trained: TrainingData, ranks: Ranks) -> PosteriorData | None:
    """The pairs that a recipe learns from, or None where it does not.

    Raises TrainingError: no pairs, levels that leave nothing to the frames, systems whose state is more than positions.
    """
    settings = recipe.train.posterior if recipe.train else None
    if recipe.train is None or settings is None:
        return None
    if settings.pairs is None:
        raise TrainingError("train.posterior.pairs names no dataset; make one with `dig-scale posterior`")
    rows_per_rank("train.posterior.batch", settings.batch, ranks.world_size)
    data = open_split(settings.pairs, TRAIN, recipe, ranks.device)
    if data is None:
        raise TrainingError(f"{settings.pairs}: no pairs; make them again with `dig-scale posterior`")
    for one in (trained, data):
        require_positions_alone(one, "train.posterior")
    for system, entry in zip(data.systems, data.reader.systems, strict=True):
        if NOISED not in [spec.name for spec in entry.fields]:
            raise TrainingError(
                f"{settings.pairs}: frames of system {system.name!r} have no noised structures; it is no dataset of `dig-scale "
                "posterior`"
            )
    return PosteriorData(data, settings, share_of_times(recipe.diffusion, settings), recipe.train.seed)
