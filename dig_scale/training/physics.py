"""Candidate structures of physics-informed training: a pure function of (recipe, seed, step), like the denoising batches.

In: a packed dataset whose frames have forces (eV/Å), the recipe's [train.physics_informed]. Out: one PhysicsBatch per step
and rank, with grad u = -force/kT. Frames with the largest forces are left out once, when the dataset is opened.
Knows neither the network nor DeepSpeed nor an engine: forces were computed when the frames were made, or relabelled.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from dig_shards.manifest import TRAIN
from torch import Tensor
from torch.nn.functional import pad

from dig_scale.batch import Batch, State
from dig_scale.config import PhysicsInformed, Recipe
from dig_scale.diffusion.composition import Composition
from dig_scale.errors import TrainingError
from dig_scale.objectives.physics_informed import (
    Candidates,
    PhysicsDraws,
    accepted_candidates,
    draw_physics_times,
    exact_probes,
    random_probes,
    random_signs,
)
from dig_scale.records import FORCES
from dig_scale.training.data import TrainingData, counter_generator, noise_rows, open_split, require_positions_alone
from dig_scale.training.zero import Ranks, rows_per_rank
from dig_scale.units import thermal_energy

_BLOCK = 4096


@dataclass(frozen=True)
class PhysicsBatch:
    """One evaluation of the physics-informed loss."""

    candidates: Candidates
    draws: PhysicsDraws
    composition: Composition
    settings: PhysicsInformed


@dataclass(frozen=True)
class PhysicsData:
    """Candidates of a dataset: the accepted frame ids of every system, and kT in eV."""

    data: TrainingData
    accepted: tuple[np.ndarray, ...]
    thermal_energy: float
    settings: PhysicsInformed
    seed: int

    def batch(self, step: int, ranks: Ranks) -> PhysicsBatch:
        """This rank's candidates of step `step`, all of one system, on its device."""
        ids, first = self._drawn(step, ranks)
        rows = slice(first, first + self.settings.batch // ranks.world_size)
        generator = counter_generator(self.seed, "physics times", step)
        t = draw_physics_times(self.settings.batch, self.settings, generator)[rows]
        noise = noise_rows(self.data, ids[rows], self.seed, f"physics noise {step}", range(rows.start, rows.stop))
        micro = self.data.micro_batch(ids[rows], t, noise).to(ranks.device)
        gradient = State(self._gradient(ids[rows]).to(ranks.device))
        probes = self._probes(step, rows, micro.batch, micro.composition)
        draws = PhysicsDraws(micro.t, micro.noise, probes)
        return PhysicsBatch(Candidates(micro.batch, gradient), draws, micro.composition, self.settings)

    def _drawn(self, step: int, ranks: Ranks) -> tuple[np.ndarray, int]:
        """Frame ids of the whole batch, each system as often as it has candidates, and where this rank's begin."""
        generator = counter_generator(self.seed, "physics frames", step)
        shares = torch.tensor([float(len(ids)) for ids in self.accepted])
        own = self.accepted[int(torch.multinomial(shares, 1, generator=generator))]
        picks = torch.randint(len(own), (self.settings.batch,), generator=generator)
        return own[picks.numpy()], ranks.rank * (self.settings.batch // ranks.world_size)

    def _gradient(self, ids: np.ndarray) -> Tensor:
        """-force/kT [B, N, 3] in 1/Å, sites that pad the context 0."""
        forces = torch.from_numpy(self.data.reader.read_batch(ids, FORCES)).float()
        system = int(self.data.system_of(ids[:1])[0])
        missing = self.data.contexts[system].n_sites - forces.shape[1]
        return -pad(forces, (0, 0, 0, missing)) / self.thermal_energy

    def _probes(self, step: int, rows: slice, batch: Batch, composition: Composition) -> tuple[State, ...]:
        if self.settings.probes is None:
            return exact_probes(composition, batch.state, batch.context)
        generator = counter_generator(self.seed, "physics probes", step)
        width = composition.normals(batch.context)
        signs = random_signs(self.settings.probes, self.settings.batch, width, generator)[:, rows]
        return random_probes(composition, batch.context, signs.to(batch.context.present.device))


def open_candidates(recipe: Recipe, dataset: Path, ranks: Ranks) -> PhysicsData | None:
    """The candidates that a recipe asks for, or None where it does not.

    Raises TrainingError: no forces stored, no temperature known, systems whose state is more than positions, or settings
    under which derivatives of the network's derivatives cannot be had.
    """
    settings = recipe.train.physics_informed if recipe.train else None
    if recipe.train is None or settings is None:
        return None
    _require_settings(recipe, settings, ranks)
    folder = settings.candidates or dataset
    data = open_split(folder, TRAIN, recipe, ranks.device)
    if data is None:
        raise TrainingError(f"{folder}: the train split has no frames to take candidates from; pack it again")
    require_positions_alone(data, "train.physics_informed")
    for system, entry in zip(data.systems, data.reader.systems, strict=True):
        if FORCES not in [spec.name for spec in entry.fields]:
            raise TrainingError(
                f"{folder}: frames of system {system.name!r} have no forces; pack all atoms (pack.atoms = 'all') of "
                "trajectories that have them, or compute them with `dig-scale relabel`"
            )
    kelvin = _temperature(recipe, settings)
    return PhysicsData(data, _accepted(data, settings), thermal_energy(kelvin), settings, recipe.train.seed)


def _require_settings(recipe: Recipe, settings: PhysicsInformed, ranks: Ranks) -> None:
    train = recipe.train
    assert train is not None
    rows_per_rank("train.physics_informed.batch", settings.batch, ranks.world_size)
    if settings.every > 1 and settings.denoising_weight == 0:
        raise TrainingError(
            f"train.physics_informed.every = {settings.every} leaves steps without a loss where denoising_weight = 0; use 1"
        )
    if train.zero_stage == 3 or train.activation_checkpointing != "none":
        raise TrainingError(
            "train.physics_informed differentiates the network twice, which zero_stage = 3 and activation_checkpointing do "
            "not allow; use zero_stage 0 to 2 and 'none'"
        )


def _temperature(recipe: Recipe, settings: PhysicsInformed) -> float:
    kelvin = settings.temperature or (recipe.pack.temperature if recipe.pack else None)
    kelvin = kelvin or (recipe.simulate.temperature if recipe.simulate else None)
    if kelvin is None:
        raise TrainingError(
            "train.physics_informed needs the temperature of the distribution: set its `temperature` (K)"
        )
    return kelvin


def _accepted(data: TrainingData, settings: PhysicsInformed) -> tuple[np.ndarray, ...]:
    """Frame ids of every system whose forces are not among the largest."""
    found = []
    for number in range(len(data.systems)):
        ids = np.arange(int(data.reader.offsets[number]), int(data.reader.offsets[number + 1]))
        if not len(ids):
            found.append(ids)
            continue
        mobile = torch.from_numpy(data.systems[number].mobile)
        norms = [_norms(data, ids[low : low + _BLOCK], mobile) for low in range(0, len(ids), _BLOCK)]
        kept = accepted_candidates(torch.cat(norms), settings.force_decades).numpy()
        if not kept.any():
            raise TrainingError(
                f"system {data.systems[number].name!r}: no candidate has finite forces; relabel its frames"
            )
        found.append(ids[kept])
    return tuple(found)


def _norms(data: TrainingData, ids: np.ndarray, mobile: Tensor) -> Tensor:
    return torch.from_numpy(data.reader.read_batch(ids, FORCES)).double()[:, mobile].flatten(1).norm(dim=1)
