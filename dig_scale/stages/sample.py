"""From a trained model to ensembles of its systems, or of others that it is given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dig_scale.config import Sample
from dig_scale.ensemble import Ensemble
from dig_scale.errors import UserError
from dig_scale.progress import stage
from dig_scale.system import System

if TYPE_CHECKING:
    from dig_scale.config import Model
    from dig_scale.serving.offline import Draws


def sample_stage(wanted: Sequence[Draws]) -> list[Ensemble]:
    """Draw samples offline, of every system that is asked for."""
    from dig_scale.serving.offline import sample_ensembles

    with stage("sample") as report:
        return sample_ensembles(wanted, lambda done, total: report(done, total, f"{done} of {total} samples"))


def shared_out(
    checkpoint: Path, wanted: str | None, settings: Sample, out: Path, representation: str | None = None
) -> list[Draws]:
    """What to sample: the system that is named, or the only one, into `out`; else settings.num samples shared among the
    training systems as their training frames are, each into a folder OUT/<system>; those that get none are left out.
    `representation` (what importers.representations.represented takes) gives one system's features in the place of its own.
    """
    import torch

    from dig_scale.serving.offline import Draws
    from dig_scale.serving.served import load_served_model
    from dig_scale.serving.shares import folder_names, shares

    model = load_served_model(checkpoint, torch.device("cpu"))
    if wanted is not None or len(model.systems) == 1:
        system = trained_system(checkpoint, wanted)
        if representation is not None:
            system = _represented(system, representation, model.recipe.model)
        return [Draws(checkpoint, system, settings, out)]
    if representation is not None:
        raise UserError(f"--representation {representation} is of one system: name it with --system")
    if set(model.frames) != set(model.systems):
        raise UserError(
            f"{checkpoint} was trained on {len(model.systems)} systems ({', '.join(list(model.systems)[:4])}, ...) and does "
            "not say on how many frames of each: name one with --system"
        )
    counts = {name: count for name, count in shares(settings.num, model.frames).items() if count}
    folders = folder_names(counts)
    return [
        Draws(checkpoint, model.systems[name], settings.model_copy(update={"num": count}), out / folders[name])
        for name, count in counts.items()
    ]


def _represented(system: System, representation: str, model: Model) -> System:
    from dig_scale.importers.representations import represented

    if not model.site_features and not model.pair_features:
        raise UserError(
            f"--representation {representation}: this model reads none (its model.site_features and model.pair_features are 0)"
        )
    return represented(system, representation)


def trained_system(checkpoint: Path, wanted: str | None) -> System:
    """The system to sample: a training system by name, a file, or a sequence; the only training system when None."""
    import torch

    from dig_scale.importers.sampled import Reading, is_file_name, system_from_file
    from dig_scale.records import packed_system
    from dig_scale.serving.catalogue import Catalogue
    from dig_scale.serving.schema import SamplesRequest
    from dig_scale.serving.served import load_served_model

    model = load_served_model(checkpoint, torch.device("cpu"))
    if wanted is None:
        if len(model.systems) == 1:
            return next(iter(model.systems.values()))
        raise UserError(f"{checkpoint} was trained on {', '.join(model.systems)}: say which with --system")
    if wanted in model.systems:
        return model.systems[wanted]
    if is_file_name(wanted):
        kinds = frozenset(str(system.kind) for system in model.systems.values())
        reading = Reading(model.recipe.model.sites, kinds, model.recipe.simulate)
        system = system_from_file(Path(wanted), reading)
        return system if wanted.lower().endswith(".json") else packed_system(system, model.recipe.pack)
    if model.recipe.model.sites in ("anchored", "crystal"):
        known = ", ".join(list(model.systems)[:8])
        raise UserError(f"--system {wanted!r}: no file, and no training system of that name; {checkpoint} has {known}")
    return Catalogue(model).system(SamplesRequest(sequence=wanted, num=1))
