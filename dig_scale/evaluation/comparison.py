"""`evaluate`: an Ensemble against a ReferenceSet, in numbers. Knows neither files nor HTML; words come from verdict.py."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import numpy as np

from dig_scale import __version__, config
from dig_scale.ensemble import BOLTZMANN, Ensemble
from dig_scale.errors import UserError
from dig_scale.evaluation.cost import Costs, cost_table, reference_quality
from dig_scale.evaluation.cost_curve import cost_curve
from dig_scale.evaluation.distribution import Resampling
from dig_scale.evaluation.geometry_tables import angle_table, bond_table, clash_table, energy_table, stereo_table
from dig_scale.evaluation.reference import ReferenceSet, match_sites, ordered_by_time
from dig_scale.evaluation.result import Evaluation, Physics, Reweighting, Settings, Subject
from dig_scale.evaluation.sets import (
    ModelWeights,
    SampleSet,
    Topology,
    md_resampling,
    observe,
    sample_sets,
    topology_of,
)
from dig_scale.evaluation.states import StateTable, state_table, with_reference
from dig_scale.evaluation.thermodynamics import kish_ess, slowest_inefficiency
from dig_scale.evaluation.torsion_tables import MapComparison, TorsionComparison, compare_map, compare_torsion
from dig_scale.evaluation.verdict import with_words
from dig_scale.evaluation.weights import agreement, diagnosed, usable
from dig_scale.sampling.from_settings import states_from
from dig_scale.system import System

MIN_SAMPLES = 2


def evaluate(
    ensemble: Ensemble, reference: ReferenceSet, settings: config.Evaluate, costs: Costs | None = None
) -> Evaluation:
    """Compare `ensemble` with `reference`; sites are matched by name, the ensemble's must all be in the reference.

    Raises UserError when sites do not match or fewer than MIN_SAMPLES samples are finite.
    """
    generator = np.random.default_rng(settings.seed)
    matched = match_sites(ensemble.system, reference.system)
    reference, finite = ordered_by_time(reference), _finite_samples(ensemble)
    subject, ensemble = subject_of(ensemble, int(finite.sum())), ensemble.take(finite)
    topology = topology_of(_with_bonds(ensemble.system, reference.system, matched))
    model = observe(ensemble.positions, topology, _finite_energies(ensemble.energy))
    frames = reference.positions[:, matched]
    md = observe(frames, topology, _finite_energies(reference.energy))
    slow = md.torsions[:, _slow_torsions(topology)]
    inefficiency = slowest_inefficiency(slow, reference.trajectory)
    blocks = md_resampling(reference.trajectory, inefficiency, settings.bootstrap, generator)
    log_weights = ensemble.correcting_log_weights
    sets = sample_sets(model, md, reference.trajectory, _model_weights(ensemble), blocks, generator)
    known = costs or Costs()
    quality = reference_quality(reference, inefficiency, blocks.block_length, blocks.n_blocks)
    return with_words(
        Evaluation(
            subject=subject,
            reference=quality,
            settings=Settings(settings.bins, settings.bootstrap, settings.seed),
            maps=_maps(topology, sets, reference, settings.bins, generator),
            torsions=_torsions(topology, sets, settings.bins, generator),
            bonds=bond_table(topology, sets),
            angles=angle_table(topology, sets),
            stereo=stereo_table(topology, sets),
            clashes=clash_table(sets),
            energy=energy_table(sets, generator),
            cost=cost_table(known, len(model.clashes), quality.independent_frames),
            reweighting=_reweighting(log_weights),
            physics=Physics(
                weights=None if log_weights is None else diagnosed(ensemble),
                agreement=agreement(ensemble),
                states=_states(settings.states, ensemble, frames, blocks),
                cost_curve=cost_curve(topology, sets, reference.trajectory, known, settings.bins),
            ),
        )
    )


def _states(texts: Sequence[str], ensemble: Ensemble, frames: np.ndarray, blocks: Resampling) -> StateTable | None:
    """Free energies between the states that are asked for, of the samples and of the MD frames [F, N, 3]."""
    if not texts:
        return None
    states, md = states_from(texts), Ensemble(ensemble.system, frames, np.arange(len(frames)), seed=0)
    return with_reference(state_table(states, ensemble), states, md, blocks)


def _maps(
    topology: Topology, sets: dict[str, SampleSet], reference: ReferenceSet, bins: int, generator: np.random.Generator
) -> tuple[MapComparison, ...]:
    trajectory, temperature = reference.trajectory, reference.temperature
    return tuple(compare_map(pair, topology, sets, trajectory, temperature, bins, generator) for pair in topology.pairs)


def _torsions(
    topology: Topology, sets: dict[str, SampleSet], bins: int, generator: np.random.Generator
) -> tuple[TorsionComparison, ...]:
    indices = range(len(topology.torsions))
    return tuple(compare_torsion(index, topology, sets, bins, generator) for index in indices)


def _finite_samples(ensemble: Ensemble) -> np.ndarray:
    """Which samples [S] have finite positions and, where there are weights, a weight."""
    finite = usable(ensemble)
    if finite.sum() < MIN_SAMPLES:
        raise UserError(
            f"ensemble of {ensemble.system.name!r}: {int(finite.sum())} of {ensemble.n_samples} samples have finite"
            f" positions, at least {MIN_SAMPLES} are needed; sample again or look at the training log"
        )
    return finite


def _finite_energies(energy: np.ndarray | None) -> np.ndarray | None:
    """Energies of all frames; None when any is missing, for a mean over some frames would mislead."""
    if energy is None or not np.isfinite(energy).all():
        return None
    return np.asarray(energy, np.float64)


def _with_bonds(system: System, reference: System, matched: np.ndarray) -> System:
    """The ensemble's system, with the reference's bonds where it lists none of its own."""
    if len(system.bonds) or not len(reference.bonds):
        return system
    described = reference.select(matched)
    return replace(system, bonds=described.bonds, bond_orders=described.bond_orders)


def _slow_torsions(topology: Topology) -> list[int]:
    """The torsions whose correlations set the block length: those on maps, else all."""
    on_maps = {index for pair in topology.pairs for index in (pair.first, pair.second)}
    return sorted(on_maps) or list(range(len(topology.torsions)))


def _model_weights(ensemble: Ensemble) -> ModelWeights:
    towards = ensemble.log_weights_towards
    return ModelWeights(ensemble.model_log_weights, ensemble.log_weights if towards == BOLTZMANN else None)


def _reweighting(log_weights: np.ndarray | None) -> Reweighting | None:
    if log_weights is None:
        return None
    effective = kish_ess(log_weights)
    return Reweighting(effective, effective / len(log_weights))


def subject_of(ensemble: Ensemble, n_finite: int) -> Subject:
    """What is evaluated, of whose samples n_finite are finite."""
    provenance = ensemble.provenance
    recipe: Any = provenance.get("recipe", "not recorded")
    return Subject(
        system=ensemble.system.name,
        sites=ensemble.system.n_sites,
        samples=n_finite,
        samples_left_out=ensemble.n_samples - n_finite,
        solver=str(provenance.get("solver", "not recorded")),
        steps=str(provenance.get("steps", "not recorded")),
        seed=ensemble.seed,
        recipe=str(recipe.get("name", "not recorded") if isinstance(recipe, dict) else recipe),
        versions={
            "dig-scale": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": _installed("torch"),
        },
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
