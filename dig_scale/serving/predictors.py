"""Predictors that guide samples: read from their training folders, and held against the model that they guide.

In: a guide's settings, the system and the processes of the score model. Out: a Guide. The predictor reads the system's features
by itself, so the two networks may differ in size and in what they read beside the structure. Knows no requests and no files of
samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dig_scale.batch import Context, Geometry
from dig_scale.config import Recipe
from dig_scale.config_properties import GuideSpec, predictor_of
from dig_scale.diffusion.composition import Composition, composition_for, require_sites
from dig_scale.errors import UserError
from dig_scale.model.checkpoint import build_predictor, load_checkpoint
from dig_scale.model.features import features_read, featurise, require_features
from dig_scale.model.predictor import Predictor
from dig_scale.predictions import Predicted, Prediction
from dig_scale.sampling.collective_variables import counts_sites
from dig_scale.sampling.from_settings import guide_by
from dig_scale.sampling.guidance import Guide
from dig_scale.serving.served import checkpoint_hash
from dig_scale.system import System

_TOLERANCE = 1.01
"""Noise levels beyond those of the predictor's training by this factor are within them."""


@dataclass(frozen=True)
class ServedPredictor:
    """Network in eval mode on `device`, its recipe, training systems and property; checkpoint_id is a hash of the file."""

    checkpoint_id: str
    network: Predictor
    recipe: Recipe
    systems: tuple[System, ...]
    predicts: Predicted
    device: torch.device


def load_predictor(guide: GuideSpec | None, device: torch.device) -> ServedPredictor | None:
    """The predictor that a guide names, None where it names none; raises UserError naming the folder."""
    path = predictor_of(guide)
    if path is None:
        return None
    checkpoint = load_checkpoint(path)
    try:
        network = build_predictor(checkpoint).to(device)
    except UserError as error:
        raise UserError(f"--guide predictor:{path}: {error}") from None
    assert checkpoint.predicts is not None
    read = (checkpoint.recipe, checkpoint.systems, checkpoint.predicts)
    return ServedPredictor(checkpoint_hash(path), network, *read, device)


def guide_with(predictor: ServedPredictor, spec: GuideSpec, system: System, composition: Composition) -> Guide:
    """The guide of a system's samples under the processes `composition` of the score model.

    Raises UserError for a system that the predictor cannot read, for other processes, and for noise that it never saw.
    """
    own, found = composition_for(system.kind, predictor.recipe.diffusion), featurise(system)
    try:
        require_sites(own, found, predictor.recipe.model.sites, system.name)
        require_features(system, predictor.recipe.model)
    except UserError as error:
        raise UserError(f"--guide {spec.property}: {error}") from None
    _require_known(predictor, spec, system)
    _require_processes(own, spec, composition)
    _require_levels(own, spec, composition)
    context, network = features_read(found, predictor.recipe.model).to(predictor.device), predictor.network

    def predict(geometry: Geometry, _: Context, level: Tensor) -> Prediction:
        return network(geometry, context, level)

    return guide_by(predict, predictor.predicts, spec)


def _require_known(predictor: ServedPredictor, spec: GuideSpec, system: System) -> None:
    """Site numbers and training systems' names mean the same to both networks only where the sites are the same."""
    told, names = predictor.predicts.property, [one.name for one in predictor.systems]
    if any(_sites(one) == _sites(system) for one in predictor.systems):
        return
    if counts_sites(told) or system.name in names:
        known = ", ".join(f"{one.name!r} ({one.n_sites} sites)" for one in predictor.systems[:4])
        raise UserError(
            f"--guide {spec.property}: the predictor tells {told!r} of {known}, and not of {system.name!r}, whose "
            f"{system.n_sites} sites are others: train one on frames of this system, packed as the model's were"
        )


def _sites(system: System) -> tuple[object, ...]:
    return system.elements.tolist(), system.atom_names, system.residue_names


def _require_processes(own: Composition, spec: GuideSpec, composition: Composition) -> None:
    """Both networks are told the noise of the first field; where there are more, that must say the noise of the others."""
    ours, theirs = ({name: field.process for name, field in one.fields.items()} for one in (own, composition))
    same = ours.keys() == theirs.keys() and (
        len(ours) == 1 or (ours, own.coordinates) == (theirs, composition.coordinates)
    )
    if not same:
        raise UserError(
            f"--guide {spec.property}: the predictor was trained with another noise of {', '.join(ours)} than the model's of "
            f"{', '.join(theirs)}; train it with the [diffusion] section of the model"
        )


def _require_levels(own: Composition, spec: GuideSpec, composition: Composition) -> None:
    low, high = own.noise_level(torch.tensor([0.0, 1.0])).tolist()
    first, last = composition.noise_level(torch.tensor([spec.end, spec.start])).tolist()
    if first * _TOLERANCE < low or last > high * _TOLERANCE:
        raise UserError(
            f"--guide {spec.property}: the guide acts at noise from {first:.3g} to {last:.3g}, and the predictor was trained "
            f"from {low:.3g} to {high:.3g}: train it with the [diffusion] section of the model, or narrow --guide-start and "
            "--guide-end"
        )
