"""The property that a predictor learns, of frames: a label that they carry, or a property of their clean structures.

In: a recipe's [predict] and one split of a dataset. Out: what is predicted, with centre and spread of the training split,
and Labels of order 1 for every batch. An energy is a label: what frames store in eV. Knows neither network nor noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dig_scale.batch import State
from dig_scale.config import Recipe
from dig_scale.errors import TrainingError, UserError
from dig_scale.objectives.regression import Labels
from dig_scale.predictions import Family, Predicted
from dig_scale.records import ENERGY, LABEL, MISSING_LABEL, evenly_spread
from dig_scale.sampling.clean_estimate import geometry_of
from dig_scale.sampling.collective_variables import Angle, Dihedral, property_from, require_sites
from dig_scale.sampling.guidance import Property
from dig_scale.training.data import TrainingData

SCALE_FRAMES = 4096
"""Frames, evenly spread over the training split, that centre and spread are taken from."""
_BLOCK = 256


@dataclass(frozen=True)
class Labelling:
    """Frames -> Labels: of the stored field `field`, or of the property `prop` of clean structures."""

    predicts: Predicted
    field: str | None = None
    prop: Property | None = None

    def __call__(self, data: TrainingData, ids: np.ndarray, state: State) -> Labels:
        """Labels [B] of frames of systems of one kind, and their clean states; raises TrainingError for a property that is not
        one number of each."""
        values = self.values(data, ids, state)
        known = np.isfinite(values) & (values != MISSING_LABEL)
        scaled = np.where(known, values - self.predicts.centre, 0.0) / self.predicts.spread
        return Labels(torch.from_numpy(scaled).float(), torch.from_numpy(known))

    def values(self, data: TrainingData, ids: np.ndarray, state: State) -> np.ndarray:
        """In the property's own unit, fp64 [B]; MISSING_LABEL where a label is not known."""
        if self.prop is None:
            assert self.field is not None
            found = np.empty(len(ids))
            for part in data.reader.read(ids, [self.field]):
                found[part.places] = part.arrays[self.field]
            return found
        rows = data.system_of(ids)
        context = data.host_context(rows)
        with torch.no_grad():
            told = self.prop(geometry_of(data.compositions[rows[0]], state, context), context)
        if told.shape != (len(ids),):
            raise TrainingError(
                f"predict.property {self.predicts.property!r} answered with shape {tuple(told.shape)} for {len(ids)} "
                "structures: expected one number for each"
            )
        return told.double().numpy()


def predicted_by(recipe: Recipe, data: TrainingData, dataset: Path) -> Predicted | None:
    """What a recipe predicts, scaled by the training split; None of a score model. Raises TrainingError for a label that is not
    there or known of no frame, a site that is not there, a property that does not vary."""
    wanted = recipe.predict
    if wanted is None:
        return None
    labelling = _unscaled(wanted.property)
    _require_there(labelling, data, dataset)
    predicts = labelling.predicts
    if predicts.family is Family.VON_MISES:
        if wanted.centre is not None or wanted.spread is not None:
            raise TrainingError("predict.centre and predict.spread are not for dihedrals, which have neither")
        return predicts
    centre, spread = (value and value * predicts.unit for value in (wanted.centre, wanted.spread))
    if centre is None or spread is None:
        mean, std = _moments(labelling, data, dataset)
        centre, spread = mean if centre is None else centre, std if spread is None else spread
    return replace(predicts, centre=centre, spread=spread)


def labelled(data: TrainingData, predicts: Predicted | None) -> TrainingData:
    """A split whose batches have labels of what is predicted; as it is where nothing is."""
    if predicts is None:
        return data
    return replace(data, label=replace(_unscaled(predicts.property), predicts=predicts))


def _unscaled(text: str) -> Labelling:
    if ":" not in text:
        return Labelling(Predicted(text), field=ENERGY if text == ENERGY else LABEL + text)
    prop = property_from(text)
    family = Family.VON_MISES if isinstance(prop, Dihedral) else Family.NORMAL
    unit = math.pi / 180 if isinstance(prop, Angle | Dihedral) else 1.0
    return Labelling(Predicted(text, family, unit=unit), prop=prop)


def _require_there(labelling: Labelling, data: TrainingData, dataset: Path) -> None:
    for system, entry in zip(data.systems, data.reader.systems, strict=True):
        if labelling.prop is not None:
            try:
                require_sites(labelling.prop, system.n_sites, system.name)
            except UserError as error:
                raise TrainingError(f"predict.property: {error}") from None
            continue
        stored = [spec.name for spec in entry.fields]
        if labelling.field not in stored:
            labels = [name.removeprefix(LABEL) for name in stored if name.startswith(LABEL) or name == ENERGY]
            raise TrainingError(
                f"{dataset}: frames of system {system.name!r} have no label {labelling.predicts.property!r} to predict; labels "
                f"there: {', '.join(labels) or 'none'}; a property of structures is written as in dihedral:4,6,8,10"
            )


def _moments(labelling: Labelling, data: TrainingData, dataset: Path) -> tuple[float, float]:
    """Mean and standard deviation over training frames, evenly spread, whose label is known."""
    count = int(data.reader.n_frames)
    ids = evenly_spread(count, SCALE_FRAMES)
    rows = data.system_of(ids)
    blocks = [
        mine[low : low + _BLOCK]
        for mine in (ids[rows == row] for row in np.unique(rows))
        for low in range(0, len(mine), _BLOCK)
    ]
    values = np.concatenate([labelling.values(data, block, data.clean(block)) for block in blocks])
    known = values[np.isfinite(values) & (values != MISSING_LABEL)]
    if len(known) < 2 or not known.std() > 0:
        raise TrainingError(
            f"{dataset}: {labelling.predicts.property!r} is known of {len(known)} of {len(values)} training frames and has one "
            "value there; a predictor needs a property that varies"
        )
    return float(known.mean()), float(known.std())
