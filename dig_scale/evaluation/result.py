"""Evaluation: everything that a report says about an ensemble, as frozen dataclasses of plain numbers and words.

Divergences in nat, populations as fractions, free energies in kT and kJ/mol, lengths in Å, angles in degrees, energies in
kJ/mol, costs in CPU seconds. Fields marked PICTURE hold arrays for the pictures; `numbers` gives the rest as JSON-ready data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from dig_scale.evaluation.cost import CostTable, ReferenceQuality
from dig_scale.evaluation.cost_curve import CostCurve
from dig_scale.evaluation.geometry_tables import ClashTable, EnergyTable, GeometryTable, StereoTable
from dig_scale.evaluation.states import StateTable
from dig_scale.evaluation.torsion_tables import Distance, MapComparison, TorsionComparison
from dig_scale.evaluation.weights import Agreement, Weights

FORMAT_VERSION = 1
SIGNIFICANT_DIGITS = 10
"""Of numbers in report.json; sums over frames are not good to more."""


@dataclass(frozen=True)
class Subject:
    """What was evaluated, when and with which versions."""

    system: str
    sites: int
    samples: int
    samples_left_out: int
    """Samples with positions that are not finite; no number contains them."""
    solver: str
    steps: str
    seed: int
    recipe: str
    versions: dict[str, str]
    created: str


@dataclass(frozen=True)
class Settings:
    """How the comparison was made: bins per torsion axis, bootstrap replicates, seed."""

    bins: int
    bootstrap: int
    seed: int


@dataclass(frozen=True)
class Reweighting:
    """Kish effective sample size of the ensemble's Boltzmann weights, and its share of the samples."""

    effective_samples: float
    fraction: float


@dataclass(frozen=True)
class Physics:
    """What weights, log-densities and energies say, where an ensemble has them; free energies of states; error against cost."""

    weights: Weights | None = None
    agreement: Agreement | None = None
    states: StateTable | None = None
    cost_curve: CostCurve | None = None


@dataclass(frozen=True)
class Headline:
    """The one divergence that the verdict is about: a mean over (φ, ψ) maps, else over torsions."""

    about: str
    divergence: Distance


@dataclass(frozen=True)
class Evaluation:
    """An ensemble compared with MD: tables, then the verdict and the warnings in words."""

    subject: Subject
    reference: ReferenceQuality
    settings: Settings
    maps: tuple[MapComparison, ...]
    torsions: tuple[TorsionComparison, ...]
    bonds: GeometryTable | None
    angles: GeometryTable | None
    stereo: StereoTable | None
    clashes: ClashTable
    energy: EnergyTable | None
    cost: CostTable | None
    reweighting: Reweighting | None
    physics: Physics = Physics()
    headline: Headline | None = None
    verdict: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def numbers(evaluation: Any) -> dict[str, Any]:
    """JSON-ready content of an evaluation without its picture arrays; what is not finite is null."""
    return {"format_version": FORMAT_VERSION} | _plain(evaluation)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        kept = [f.name for f in fields(value) if not f.metadata.get("picture")]
        return {name: _plain(getattr(value, name)) for name in kept}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if math.isfinite(value) else None
    return value
