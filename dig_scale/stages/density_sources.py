"""Structures that a log-density is asked of: an ensemble, the held-out frames of a packed dataset, or trajectories.

In: a path and the model. Out: an Ensemble of the model's own system, with what was known of each structure. Knows no densities.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dig_scale.ensemble import FILE_NAME, Ensemble, read_ensemble
from dig_scale.errors import UserError
from dig_scale.records import CELL, POSITIONS, ROTATIONS, evenly_spread
from dig_scale.stages.sample import trained_system
from dig_scale.system import Frames, System

if TYPE_CHECKING:
    from dig_scale.sampling.from_settings import State
    from dig_scale.serving.served import ServedModel

_MANIFEST = "manifest.json"
_FIELDS = (POSITIONS, ROTATIONS, CELL)


@dataclass(frozen=True)
class Source:
    """Where structures come from, of which system (None: the only one), and how many of them, evenly spread (None: all).

    With states, so many of each of them, weighted by how many samples each stands for.
    """

    path: Path
    system: str | None = None
    num: int | None = None
    states: tuple[State, ...] = ()


def structures_of(source: Source, checkpoint: Path, model: ServedModel) -> Ensemble:
    """The structures of a source; raises UserError naming what does not fit the model."""

    path = source.path
    if path.suffix == ".npz" or (path / FILE_NAME).is_file():
        found = _of_the_model(read_ensemble(path), model)
    elif not path.is_dir():
        raise UserError(
            f"{path} is no ensemble and no folder of trajectories or of a packed dataset: for another trajectory file run "
            "`dig-scale import TOPOLOGY TRAJECTORY` first"
        )
    else:
        system = trained_system(checkpoint, source.system)
        given = _held_out(path, system) if (path / _MANIFEST).is_file() else _trajectories(path, system, model)
        count = len(given[POSITIONS])
        provenance = {"source": str(path), "recipe": model.recipe.model_dump(mode="json")}
        found = Ensemble(system, index=np.arange(count), seed=0, provenance=provenance, **given)
    if source.num is None:
        return found
    if source.states:
        from dig_scale.evaluation.strata import stratified

        return stratified(found, source.states, source.num)
    return found.take(evenly_spread(found.n_samples, source.num))


def _of_the_model(ensemble: Ensemble, model: ServedModel) -> Ensemble:
    """The ensemble with the model's own system, which has features of other networks where the model reads them."""
    own = model.systems.get(ensemble.system.name)
    if own is None or own.system_id != ensemble.system.system_id:
        return ensemble
    return replace(ensemble, system=own)


def _held_out(dataset: Path, system: System) -> Mapping[str, Any]:
    """The frames of a system in a dataset's validation split."""
    from dig_shards import ShardReader
    from dig_shards.manifest import VALIDATION

    reader = ShardReader(dataset, VALIDATION)
    for number, entry in enumerate(reader.systems):
        ids = np.arange(reader.offsets[number], reader.offsets[number + 1])
        if entry.id == system.system_id and len(ids):
            stored = {spec.name for spec in entry.fields}
            return {name: reader.read_batch(ids, name) for name in _FIELDS if name in stored}
    raise UserError(f"{dataset}: its validation split has no frames of {system.name!r}; raise pack.validation_fraction")


def _trajectories(folder: Path, system: System, model: ServedModel) -> Mapping[str, Any]:
    """The frames of a system's trajectories at the model's temperature, as what the model reads of them."""
    from dig_scale.evaluation.reference_files import reference_frames
    from dig_scale.importers.backbone import backbone_of

    read = reference_frames(folder, None, _temperature(model), system)
    frames, there = read.frames, read.system
    if model.recipe.model.sites == "residues" and any(one.rotations is None for one in frames):
        pairs = [backbone_of(there, one) for one in frames]
        there, frames = pairs[0][0], [one for _, one in pairs]
    return _joined(frames, _rows(system, there), model.recipe.model.sites)


def _joined(frames: list[Frames], rows: np.ndarray, sites: str) -> Mapping[str, Any]:
    kept = {POSITIONS: [one.positions[:, rows] for one in frames]}
    if sites == "residues":
        kept[ROTATIONS] = [one.rotations[:, rows] for one in frames if one.rotations is not None]
    if sites == "crystal":
        kept[CELL] = [one.cell for one in frames if one.cell is not None]
    return {name: np.concatenate(parts) for name, parts in kept.items()}


def _rows(system: System, there: System) -> np.ndarray:
    from dig_scale.evaluation.reference import match_sites

    if there.system_id == system.system_id:
        return np.arange(system.n_sites)
    return match_sites(system, there)


def _temperature(model: ServedModel) -> float | None:
    recipe = model.recipe
    if recipe.pack is not None and recipe.pack.temperature is not None:
        return recipe.pack.temperature
    return None if recipe.simulate is None else recipe.simulate.temperature
