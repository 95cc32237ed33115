"""The trained model as one replica holds it, and what the walkers of one system share.

In: a checkpoint file and a System. Out: ServedModel and Bench (context, processes, score function on the device). It
knows no requests, no scheduler and no HTTP.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dig_scale.batch import Context, ScoreFn
from dig_scale.config import Recipe, Sample
from dig_scale.diffusion.composition import Composition, composition_for, require_sites
from dig_scale.errors import UserError
from dig_scale.model.checkpoint import FILE_NAME, build_score_model, load_checkpoint
from dig_scale.model.features import features_read, featurise, require_features
from dig_scale.model.score_model import ScoreModel
from dig_scale.sampling.guidance import classifier_free
from dig_scale.system import System

PAIRS_PER_BATCH = 8_000_000
"""Site pairs of one batch: attention holds several [heads, pairs] arrays, so larger systems get fewer rows."""
BENCHES_KEPT = 64


@dataclass(frozen=True)
class ServedModel:
    """Network in eval mode on `device`, its recipe, training systems by name; checkpoint_id is a hash of the file."""

    checkpoint_id: str
    network: ScoreModel
    recipe: Recipe
    systems: Mapping[str, System]
    training_step: int
    training_cost: Mapping[str, Any]
    device: torch.device
    frames: Mapping[str, int] = field(default_factory=dict)
    """Training frames by name of the system; empty where the checkpoint does not say."""

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.network.parameters())


@dataclass(frozen=True)
class Wanted:
    """Properties that samples shall have, by name, and the weight of classifier-free guidance towards them."""

    conditions: Mapping[str, float] = field(default_factory=dict)
    guidance: float = 1.0

    @property
    def listed(self) -> tuple[tuple[str, float], ...]:
        """The properties in the order of their names."""
        return tuple(sorted(self.conditions.items()))

    @property
    def evaluations(self) -> int:
        """Network evaluations for one score."""
        return 1 if not self.conditions or self.guidance in (0, 1) else 2


ANYTHING = Wanted()
"""No property is asked for."""


@dataclass(frozen=True)
class Bench:
    """What all walkers of one system share: context (b = 1) and score function on the device, and the processes."""

    system: System
    system_id: str
    context: Context
    composition: Composition
    score_fn: ScoreFn


def load_served_model(path: Path, device: torch.device) -> ServedModel:
    """The model of a checkpoint file or training folder; raises UserError naming the file."""
    checkpoint = load_checkpoint(path)
    return ServedModel(
        checkpoint_id=checkpoint_hash(path),
        network=build_score_model(checkpoint).to(device).requires_grad_(False),
        recipe=checkpoint.recipe,
        systems={system.name: system for system in checkpoint.systems},
        training_step=checkpoint.step,
        training_cost=checkpoint.training_cost,
        device=device,
        frames={one.name: count for one, count in zip(checkpoint.systems, checkpoint.frames, strict=False)},
    )


def best_device() -> torch.device:
    """The GPU that this process was given, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build_bench(model: ServedModel, system: System, wanted: Wanted = ANYTHING) -> Bench:
    """The bench of a system; raises UserError for a kind of system, or a property, that the model cannot take."""
    composition = composition_for(system.kind, model.recipe.diffusion)
    found = featurise(system)
    require_sites(composition, found, model.recipe.model.sites, system.name)
    require_features(system, model.recipe.model)
    context = _conditioned(features_read(found, model.recipe.model), model.recipe, wanted).to(model.device)
    score_fn = composition.as_score_fn(model.network)
    if wanted.conditions:
        score_fn = classifier_free(score_fn, wanted.guidance)
    return Bench(system, system.system_id, context, composition, score_fn)


def wanted_by(settings: Sample, conditions: Mapping[str, float] | None = None, guidance: float | None = None) -> Wanted:
    """The properties that settings ask for, or a request in their place; the guidance of settings waits for a wish."""
    asked = settings.conditions if conditions is None else conditions
    unsaid = settings.guidance if asked else 1.0
    return Wanted(asked, unsaid if guidance is None else guidance)


def require_wanted(recipe: Recipe, wanted: Wanted) -> None:
    """Raises UserError where the model of a recipe cannot be asked for these properties."""
    known = [condition.name for condition in recipe.model.conditions]
    for name, value in wanted.conditions.items():
        if name not in known:
            listed = f"its properties are {', '.join(known)}" if known else "it was trained without properties"
            raise UserError(f"condition {name!r}: the model of recipe {recipe.name!r} does not know it; {listed}")
        if not math.isfinite(value):
            raise UserError(f"condition {name!r}: {value} is not a finite number")
    if wanted.guidance != 1 and not wanted.conditions:
        raise UserError(f"guidance {wanted.guidance:g} towards nothing: ask for a property with --condition NAME=VALUE")


def _conditioned(context: Context, recipe: Recipe, wanted: Wanted) -> Context:
    """The context with the wanted properties in units of their spread; those not asked for are unknown."""
    require_wanted(recipe, wanted)
    conditions = recipe.model.conditions
    if not conditions:
        return context
    known = torch.tensor([[one.name in wanted.conditions for one in conditions]])
    values = [(wanted.conditions.get(one.name, one.centre) - one.centre) / one.spread for one in conditions]
    return replace(context, condition=torch.tensor([values]), known=known)


def rows_that_fit(n_sites: int, max_batch: int) -> int:
    """Rows of one batch of a system of `n_sites`: at least 1, at most max_batch, bounded by PAIRS_PER_BATCH."""
    return max(1, min(max_batch, PAIRS_PER_BATCH // n_sites**2))


class Benches:
    """Benches by system and wanted properties, the last BENCHES_KEPT of them; safe to use from several threads."""

    def __init__(self, model: ServedModel, wanted: Wanted = ANYTHING) -> None:
        self._model = model
        self._wanted = wanted
        self._kept: OrderedDict[tuple[Any, ...], Bench] = OrderedDict()
        self._lock = threading.Lock()

    def bench(self, system: System, wanted: Wanted | None = None) -> Bench:
        """The bench of a system, built on first use, for `wanted` or what all are for; raises what build_bench raises."""
        asked = self._wanted if wanted is None else wanted
        key = (system.system_id, asked.listed, asked.guidance)
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                return found
        built = build_bench(self._model, system, asked)
        with self._lock:
            self._kept[key] = built
            while len(self._kept) > BENCHES_KEPT:
                self._kept.popitem(last=False)
        return built


def checkpoint_hash(path: Path) -> str:
    """What identifies a checkpoint file, or the one in a training folder, by its content."""
    with (path / FILE_NAME if path.is_dir() else path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]
