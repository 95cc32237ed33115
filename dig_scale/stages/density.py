"""Log-densities, energies and Boltzmann weights of structures: `dig-scale density`.

In: a checkpoint and an ensemble, a packed dataset or trajectories. Out: the folder of an Ensemble with log_density and its
error, with energy where it is asked for, and with log_weights where both are there and the structures are samples of this very
model: log w = -u - log p, and for steered or combined ones their own weights back to the model on top. A stage of the
command line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dig_scale.config import Recipe, Simulate
from dig_scale.ensemble import BOLTZMANN, FILE_NAME, STRATA, Ensemble, read_ensemble
from dig_scale.errors import UserError
from dig_scale.progress import stage
from dig_scale.run_record import claim
from dig_scale.stages.density_sources import Source, structures_of
from dig_scale.system import System

if TYPE_CHECKING:
    from dig_scale.sampling.likelihood import LikelihoodSettings
    from dig_scale.serving.densities import DensityRun
    from dig_scale.serving.served import ServedModel, Wanted
    from dig_scale.simulation.potential import Potential


@dataclass(frozen=True)
class Energies:
    """Which recipe's [simulate] section energies follow (None: the checkpoint's), and the folder of a prepared system."""

    recipe: Recipe | None = None
    prepared: Path | None = None


@dataclass(frozen=True)
class Asked:
    """The structures and the model, how densities are computed, and whether energies are wanted (None: no)."""

    source: Source
    checkpoint: Path
    settings: LikelihoodSettings
    energies: Energies | None = None
    batch: int = 64
    workers: int | None = None


@dataclass(frozen=True)
class Found:
    """The ensemble as it was written, and in words what its numbers say, line by line."""

    ensemble: Ensemble
    words: tuple[str, ...] = field(default=())


def density_stage(asked: Asked, out: Path) -> Found:
    """Write the ensemble into `out`, carried on if there; raises UserError where there is no density or no energy."""
    import torch

    from dig_scale.outputs.ensembles import write_ensemble_folder
    from dig_scale.serving.densities import discard_parts
    from dig_scale.serving.served import load_served_model

    with stage("density") as report:
        model = load_served_model(asked.checkpoint, torch.device("cpu"))
        given = structures_of(asked.source, asked.checkpoint, model)
        potential = _potential(asked.energies, model, given.system)
        run, count = _run(asked, given, model), given.n_samples
        report(0, 1, f"{count} structures of {given.system.name}")
        ensemble = _with_densities(
            given, run, out, lambda done, total: report(done, total, f"{done} of {count} structures")
        )
        if potential is not None:
            ensemble = _with_energies(ensemble, potential)
            ensemble = _with_weights(ensemble, given, potential, model)
        write_ensemble_folder(ensemble, out)
        discard_parts(out)
        report(1, 1, f"{count} structures")
    return Found(ensemble, tuple(_in_words(ensemble)))


def _run(asked: Asked, given: Ensemble, model: ServedModel) -> DensityRun:
    from dig_scale.model.features import require_features
    from dig_scale.serving.densities import DensityRun, Structures
    from dig_scale.serving.served import require_wanted

    wanted = _wanted(given)
    require_wanted(model.recipe, wanted)
    require_features(given.system, model.recipe.model)
    structures = Structures(given.system, given.positions, given.rotations, given.cell)
    return DensityRun(
        asked.checkpoint, model.checkpoint_id, structures, asked.settings, wanted, asked.batch, asked.workers
    )


def _potential(energies: Energies | None, model: ServedModel, system: System) -> Potential | None:
    """What gives energies, if they are asked for; also refuses systems whose densities are singular."""
    from dig_scale.simulation.potential import PotentialOptions, density_space_check, potential_for

    recipe = model.recipe if energies is None or energies.recipe is None else energies.recipe
    simulate = recipe.simulate
    if energies is None:
        _require_flexible(simulate, system)
        return None
    if simulate is None:
        raise UserError(
            f"recipe {recipe.name!r} has no [simulate] section, which energies follow: give a recipe that has one, --recipe"
        )
    density_space_check(system, simulate)
    return potential_for(system, simulate, PotentialOptions(prepared=energies.prepared))


def _require_flexible(simulate: Simulate | None, system: System) -> None:
    """Refuse what density_space_check refuses of a density alone; missing atoms or a solvent are no obstacle to that."""
    from dig_scale.simulation.potential import density_space_check

    atoms = bool((system.elements > 0).all())
    if simulate is not None and atoms and ((system.elements == 1).any() or any(system.periodic)):
        density_space_check(system, simulate.model_copy(update={"explicit_solvent": None}))


def _wanted(ensemble: Ensemble) -> Wanted:
    """The properties that the samples were asked for: their density is conditioned likewise."""
    from dig_scale.serving.served import ANYTHING, Wanted

    conditions = ensemble.provenance.get("conditions")
    return Wanted(conditions, float(ensemble.provenance.get("guidance", 1.0))) if conditions else ANYTHING


def _with_densities(given: Ensemble, run: DensityRun, out: Path, progress: Callable[[int, int], None]) -> Ensemble:
    """The ensemble with log-densities: those that an earlier run wrote into `out`, else computed."""
    from dig_scale.serving.densities import identity_of, log_densities

    claim(out, identity_of(run))
    if (out / FILE_NAME).is_file():
        return _carried_on(given, read_ensemble(out))
    found = log_densities(run, out, progress)
    told: dict[str, Any] = {
        "checkpoint": run.checkpoint_id,
        "integration": asdict(run.settings.integration),
        "divergence": type(run.settings.divergence).__name__.lower(),
        "evaluations": found.evaluations,
        "cpu_seconds": found.cpu_seconds,
    }
    return replace(
        given,
        log_density=found.log_density,
        log_density_error=found.standard_error,
        provenance=given.provenance | {"density": told},
    )


def _carried_on(given: Ensemble, written: Ensemble) -> Ensemble:
    """What was written before; its densities alone where the same structures were chosen in another way, so weigh differently."""
    if written.provenance.get(STRATA) == given.provenance.get(STRATA):
        return written
    return replace(
        given,
        log_density=written.log_density,
        log_density_error=written.log_density_error,
        provenance=given.provenance | {"density": written.provenance["density"]},
    )


def _with_energies(ensemble: Ensemble, potential: Potential) -> Ensemble:
    from dig_scale.simulation.potential import label_ensemble

    begin = time.process_time()
    labelled = label_ensemble(ensemble, potential)
    told = {"temperature_K": potential.temperature, "energy_cpu_seconds": time.process_time() - begin}
    return replace(labelled, provenance=labelled.provenance | told)


def _with_weights(ensemble: Ensemble, given: Ensemble, potential: Potential, model: ServedModel) -> Ensemble:
    """log w = -u - log p of samples of this model; structures without a density have none (NaN)."""
    if not _are_samples(given, model):
        return replace(ensemble, log_weights=None)
    assert ensemble.log_density is not None and ensemble.energy is not None
    log_weights = -ensemble.energy / potential.kT_ev - ensemble.log_density
    if given.is_tilted:
        log_weights = log_weights + _to_the_model(given)
    return replace(ensemble, log_weights=log_weights, provenance=ensemble.provenance | {"log_weights": BOLTZMANN})


def _to_the_model(given: Ensemble) -> np.ndarray:
    """log-weights [S] from a steered or combined ensemble to what the model samples without steering."""
    found = given.correcting_log_weights
    if found is None or given.log_weights_towards == BOLTZMANN:
        raise UserError(
            f"the ensemble of {given.system.name!r} was steered and its weights were changed since: give it as it was sampled"
            " or combined"
        )
    return found


def _are_samples(given: Ensemble, model: ServedModel) -> bool:
    """Whether log p is the density that drew the samples: of this model, and not pushed by a guide."""
    told = given.provenance
    return "solver" in told and told.get("checkpoint") == model.checkpoint_id and "guide" not in told


def _in_words(ensemble: Ensemble) -> Iterator[str]:
    from dig_scale.evaluation.weights import agreement_in_words, diagnosed

    assert ensemble.log_density is not None and ensemble.log_density_error is not None
    known = np.isfinite(ensemble.log_density)
    values, errors = ensemble.log_density[known], ensemble.log_density_error[known]
    without = f"; {int((~known).sum())} structures have none" if not known.all() else ""
    yield f"log p: mean {values.mean():.2f}, standard deviation {values.std():.2f}, largest error {errors.max():.2g}{without}"
    if ensemble.energy is not None:
        yield agreement_in_words(ensemble)
    if ensemble.log_weights is not None and ensemble.energy is not None:
        yield f"weights: {diagnosed(ensemble).in_words()}"
    elif ensemble.energy is not None:
        yield "no weights: this model did not draw these structures as it is (trajectories, another model, guided samples)"
