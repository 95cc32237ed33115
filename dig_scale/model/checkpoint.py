"""One consolidated file per trained model: `model.safetensors`, with all that sampling needs and nothing that can execute.

Tensors are named `weights/<parameter>` and `ema/<parameter>`, and `systems/<number>/<field>` where systems have features of
other networks, which may be larger than a header; the header holds one JSON text under `dig_scale`: format version, step,
recipe, systems with their numbers of training frames, training cost, and of predictors what they predict. Written atomically.
Knows neither DeepSpeed nor how training goes on after an interruption (see training.run_folder).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dig_scale.config import Recipe
from dig_scale.errors import UserError
from dig_scale.model.encoder import Encoder
from dig_scale.model.predictor import Predictor, network_for
from dig_scale.model.score_model import ScoreModel
from dig_scale.predictions import Family, Predicted
from dig_scale.recipe_files import parse_recipe
from dig_scale.system import System

FORMAT_VERSION = 1
FILE_NAME = "model.safetensors"
_HEADER = "dig_scale"


@dataclass(frozen=True)
class Checkpoint:
    """A trained model: parameters `weights` and their moving average `ema` (same names and shapes), and where they come from."""

    weights: dict[str, Tensor]
    ema: dict[str, Tensor]
    recipe: Recipe
    systems: tuple[System, ...]
    step: int
    training_cost: dict[str, Any] = field(default_factory=dict)
    """CPU seconds, wall seconds, ranks, device and steps so far."""
    frames: tuple[int, ...] = ()
    """Training frames of every system; empty where that was not recorded."""
    predicts: Predicted | None = None
    """The property that it predicts; None of score models."""


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> Path:
    """Write the file atomically (temporary file, fsync, rename) and return its path."""
    tensors = _prefixed("weights", checkpoint.weights) | _prefixed("ema", checkpoint.ema)
    for number, system in enumerate(checkpoint.systems):
        tensors |= _prefixed(f"systems/{number}", _features(system))
    header = {
        "format_version": FORMAT_VERSION,
        "step": checkpoint.step,
        "recipe": checkpoint.recipe.model_dump(mode="json"),
        "systems": [replace(one, site_features=None, pair_features=None).to_dict() for one in checkpoint.systems],
        "training_cost": checkpoint.training_cost,
        "frames": list(checkpoint.frames),
        "predicts": None if checkpoint.predicts is None else asdict(checkpoint.predicts),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary, metadata={_HEADER: json.dumps(header)})
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.replace(path)
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a file, or in the training folder that holds it; raises UserError naming the file."""
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"no trained model at {file}: run `dig-scale train` first, or give a {FILE_NAME}")
    header, tensors = _read(file)
    if header.get("format_version") != FORMAT_VERSION:
        found = header.get("format_version")
        raise UserError(f"{file}: checkpoint format {found!r}, this version reads {FORMAT_VERSION}")
    return Checkpoint(
        weights=_unprefixed("weights", tensors),
        ema=_unprefixed("ema", tensors),
        recipe=parse_recipe(header["recipe"], str(file)),
        systems=tuple(_system(content, number, tensors) for number, content in enumerate(header["systems"])),
        step=header["step"],
        training_cost=header["training_cost"],
        frames=tuple(header.get("frames", ())),
        predicts=_predicted(header.get("predicts")),
    )


def build_score_model(checkpoint: Checkpoint, weights: Literal["ema", "weights"] = "ema") -> ScoreModel:
    """The score model in eval mode with the averaged (default) or the last weights.

    Raises UserError if they do not fit, or are a predictor's.
    """
    require_score_model(checkpoint)
    return cast(ScoreModel, _built(checkpoint, weights))


def require_score_model(checkpoint: Checkpoint) -> None:
    """Raises UserError where a checkpoint is a predictor's."""
    if checkpoint.predicts is not None:
        raise UserError(
            f"a checkpoint of recipe {checkpoint.recipe.name!r} that predicts {checkpoint.predicts.property!r} has no score: "
            "give a score model, and this one to --guide predictor:FOLDER"
        )


def build_predictor(checkpoint: Checkpoint) -> Predictor:
    """The predictor in eval mode with the averaged weights; raises UserError if they do not fit, or are a score model's."""
    if checkpoint.predicts is None:
        raise UserError(
            f"a checkpoint of recipe {checkpoint.recipe.name!r} is a score model and predicts no property: train a predictor "
            "with `dig-scale train` and --set predict.property=PROPERTY"
        )
    return cast(Predictor, _built(checkpoint, "ema"))


def _built(checkpoint: Checkpoint, weights: Literal["ema", "weights"]) -> Encoder:
    model = network_for(checkpoint.recipe.model, checkpoint.predicts)
    try:
        model.load_state_dict(getattr(checkpoint, weights), strict=True)
    except RuntimeError as error:
        problem = " ".join(str(error).split())
        raise UserError(f"the {weights} of this checkpoint do not fit the model of its recipe: {problem}") from None
    model.pair_bias.review_table()
    return model.eval()


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata() or {}
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a safetensors file: {error}") from None
    if _HEADER not in metadata:
        raise UserError(f"{file} was not written by dig-scale: it has no {_HEADER!r} header")
    return json.loads(metadata[_HEADER]), tensors


def _features(system: System) -> dict[str, Tensor]:
    """The features of other networks that a system has, in the half precision that they are exact in."""
    found = {"site_features": system.site_features, "pair_features": system.pair_features}
    return {name: torch.from_numpy(values).half() for name, values in found.items() if values is not None}


def _predicted(content: dict[str, Any] | None) -> Predicted | None:
    return None if content is None else Predicted(**{**content, "family": Family(content["family"])})


def _system(content: dict[str, Any], number: int, tensors: Mapping[str, Tensor]) -> System:
    held = {name: values.numpy() for name, values in _unprefixed(f"systems/{number}", tensors).items()}
    bare = System.from_dict(content)
    return replace(bare, site_features=held.get("site_features"), pair_features=held.get("pair_features"))


def _prefixed(group: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{group}/{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _unprefixed(group: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{group}/"): t for name, t in tensors.items() if name.startswith(f"{group}/")}
