"""Weights of an ensemble: whether to trust them, log Z, entropy, and whether log p follows -u.

In: an Ensemble. Out: frozen dataclasses of numbers, with the sentence that must stand beside them. Energies are reduced by the
temperature that they were computed for. Samples whose weight is not a number are left out and counted; a weight of 0 counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dig_scale.ensemble import BOLTZMANN, Ensemble
from dig_scale.errors import UserError
from dig_scale.evaluation.reference_files import target_temperature
from dig_scale.evaluation.sets import Estimate
from dig_scale.evaluation.torsion_tables import PICTURE
from dig_scale.sampling import reweighting
from dig_scale.units import thermal_energy

_SEED = 1


@dataclass(frozen=True)
class Weights:
    """Weights of S samples towards `towards` (ensemble.BOLTZMANN, or STEERED, MODEL: back to sampling without steering).

    effective_samples and fraction are Kish's, pareto_k the tail's shape (None: not known), in_words what to say of them.
    log_z in nat, entropies in k_B, of the Boltzmann distribution and of the model; None where energies or densities are missing.
    """

    towards: str
    samples: int
    samples_left_out: int
    effective_samples: float
    fraction: float
    pareto_k: float | None
    trusted: str
    """'yes', or 'no' where reweighted numbers must not be trusted."""
    verdict: str
    log_z: Estimate | None
    entropy: Estimate | None
    sampled_entropy: Estimate | None
    log_relative: np.ndarray = field(metadata=PICTURE)
    """log10 of each weight over the mean weight [S]."""

    def in_words(self) -> str:
        """The verdict, as in 'ESS 12.3 % (1230.0 of 10000 samples), Pareto k 0.41'."""
        return self.verdict


@dataclass(frozen=True)
class Agreement:
    """log p against -u [S]: Pearson's r, and mean and standard deviation of -u - log p (0 spread: p is the Boltzmann density)."""

    samples: int
    pearson: float
    mean_difference: float
    standard_deviation: float
    minus_reduced_energy: np.ndarray = field(metadata=PICTURE)
    log_density: np.ndarray = field(metadata=PICTURE)


def usable(ensemble: Ensemble) -> np.ndarray:
    """Samples [S] with finite positions and, where there are weights, with a weight, 0 among them."""
    finite = np.isfinite(ensemble.positions).all(axis=(1, 2))
    weights = ensemble.correcting_log_weights
    return finite if weights is None else finite & ~np.isnan(weights) & (weights < np.inf)


def diagnosed(ensemble: Ensemble) -> Weights:
    """The weights of an ensemble; raises UserError where it has none."""
    rows, log_weights = usable(ensemble), ensemble.correcting_log_weights
    if log_weights is None or not np.isfinite(log_weights[rows]).any():
        raise UserError(
            f"ensemble of {ensemble.system.name!r}: no weights; weights towards the Boltzmann distribution come from "
            "`dig-scale density ENSEMBLE --model MODEL --energy`"
        )
    kept, own = ensemble.take(rows), log_weights[rows]
    found = reweighting.diagnose(own)
    towards = str(ensemble.log_weights_towards)
    energy = _reduced_energy(kept) if towards == BOLTZMANN else None
    return Weights(
        towards=towards,
        samples=found.samples,
        samples_left_out=int((~rows).sum()),
        effective_samples=found.effective,
        fraction=found.fraction,
        pareto_k=found.pareto_k if np.isfinite(found.pareto_k) else None,
        trusted="yes" if reweighting.is_trusted(found) else "no",
        verdict=reweighting.verdict(found),
        log_z=estimate_with(reweighting.log_partition(own, _SEED, kept.replicates)) if towards == BOLTZMANN else None,
        entropy=None if energy is None else estimate_with(reweighting.entropy(energy, own, _SEED, kept.replicates)),
        sampled_entropy=_sampled_entropy(kept),
        log_relative=_log_relative(own),
    )


def agreement(ensemble: Ensemble) -> Agreement | None:
    """How log p follows -u, over samples that have both; None where there are fewer than two."""
    energy, density = _reduced_energy(ensemble), ensemble.log_density
    if energy is None or density is None:
        return None
    rows = np.isfinite(energy) & np.isfinite(density)
    if rows.sum() < 2:
        return None
    minus_u, log_p = -energy[rows], np.asarray(density[rows], np.float64)
    varied = minus_u.std() > 0 and log_p.std() > 0
    return Agreement(
        samples=int(rows.sum()),
        pearson=float(np.corrcoef(minus_u, log_p)[0, 1]) if varied else float("nan"),
        mean_difference=float((minus_u - log_p).mean()),
        standard_deviation=float((minus_u - log_p).std(ddof=1)),
        minus_reduced_energy=minus_u,
        log_density=log_p,
    )


def agreement_in_words(ensemble: Ensemble) -> str:
    """One line: Pearson's r of log p and -u, and the spread of their difference."""
    found = agreement(ensemble)
    if found is None:
        return "log p and -u: fewer than two structures have both"
    return (
        f"log p against -u: Pearson r {found.pearson:.3f} over {found.samples} structures, -u - log p "
        f"{found.mean_difference:.2f} ± {found.standard_deviation:.2f} (standard deviation)"
    )


def estimate_with(found: reweighting.Estimate) -> Estimate:
    """A value with its bootstrap error, as reports keep them."""
    return Estimate(found.value, found.error if np.isfinite(found.error) else None)


def _reduced_energy(ensemble: Ensemble) -> np.ndarray | None:
    kelvin = ensemble.provenance.get("temperature_K") or target_temperature(ensemble)
    if ensemble.energy is None or kelvin is None:
        return None
    return np.asarray(ensemble.energy, np.float64) / thermal_energy(float(kelvin))


def _sampled_entropy(ensemble: Ensemble) -> Estimate | None:
    if ensemble.log_density is None or ensemble.is_tilted or not np.isfinite(ensemble.log_density).all():
        return None
    return estimate_with(reweighting.sampled_entropy(ensemble.log_density, _SEED))


def _log_relative(log_weights: np.ndarray) -> np.ndarray:
    own = np.asarray(log_weights, np.float64)
    top = own.max()
    return np.asarray((own - top - np.log(np.exp(own - top).mean())) / np.log(10))
