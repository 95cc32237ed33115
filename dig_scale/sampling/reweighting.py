"""From samples with a log-density to the Boltzmann distribution: weights and whether to trust them, averages, free energies.

numpy in, frozen dataclasses out. Energies are reduced (kT), log-weights and log-densities natural logarithms, entropies in
units of k_B. Weights are log w = -u(x) - log p(x), p the density that drew the samples; their mean is the partition function.
Error bars are standard deviations over a Bayesian bootstrap (Rubin 1981: samples get exponential weights, so that no
resample is without a state), which takes samples as independent; or over the columns of `replicates` [S, R], factors on the
weights that a bootstrap over something else has found. No reweighted number should be shown without `verdict`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import logsumexp

from dig_scale.errors import UserError

if TYPE_CHECKING:
    from pymbar import MBAR

SMALLEST_FRACTION = 0.01
"""Of effective samples, below which weights are not to be trusted."""
LARGEST_PARETO_K = 0.7
"""Beyond which importance sampling does not converge at any affordable size (Vehtari et al. 2024)."""
RESAMPLES = 200
_FEWEST_FOR_TAIL = 25
_ITERATIONS = 200
"""Of MBAR, which takes some 10; where states do not overlap more would not help."""


@dataclass(frozen=True)
class Estimate:
    """A value and the standard deviation of its bootstrap."""

    value: float
    error: float


@dataclass(frozen=True)
class Diagnosis:
    """Of S weights: effective samples (Kish), their fraction of S, and Pareto's k of the largest (NaN below 25 weights)."""

    samples: int
    effective: float
    fraction: float
    pareto_k: float


@dataclass(frozen=True)
class Multistate:
    """K states from MBAR: differences [K, K] of free energies (row to column, kT) with errors, normalised log-weights
    [K, S] of all samples in every state, and overlap [K, K], the share of the row's samples that the column might have drawn."""

    differences: np.ndarray
    errors: np.ndarray
    log_weights: np.ndarray
    overlap: np.ndarray


def boltzmann_log_weights(reduced_energy: np.ndarray, log_density: np.ndarray) -> np.ndarray:
    """-u - log p [S], nat, of u [S] in kT and log p [S]; raises UserError for what is not finite (+inf energies weigh 0)."""
    energy, density = np.asarray(reduced_energy, np.float64), np.asarray(log_density, np.float64)
    if energy.shape != density.shape or energy.ndim != 1:
        raise UserError(f"weights need as many energies as log-densities; found {energy.shape} and {density.shape}")
    bad = np.flatnonzero(np.isnan(energy) | np.isneginf(energy) | ~np.isfinite(density))
    if len(bad):
        first = bad[0]
        raise UserError(
            f"weights: {len(bad)} of {len(energy)} samples have no finite energy or log-density (first: sample {first}, "
            f"u = {energy[first]}, log p = {density[first]}); leave them out"
        )
    return -energy - density


def normalised_weights(log_weights: np.ndarray) -> np.ndarray:
    """Weights [S] that sum to 1; raises UserError where none is finite."""
    checked = _checked(log_weights)
    weights = np.exp(checked - checked.max())
    return weights / weights.sum()


def effective_sample_size(log_weights: np.ndarray) -> float:
    """Kish's (sum w)²/sum w², from 1 to S."""
    return float(1 / (normalised_weights(log_weights) ** 2).sum())


def pareto_k(log_weights: np.ndarray) -> float:
    """Shape k of the generalized Pareto distribution of the largest weights, by PSIS (Vehtari, Simpson, Gelman, Yao and Gabry,
    JMLR 25, 2024): of the largest min(S/5, 3 sqrt S), drawn to 1/2 with the weight of 10 values. NaN below 25 weights, or
    where the tail is all the same weight.
    """
    checked = _checked(log_weights)
    count = int(np.ceil(min(0.2 * len(checked), 3 * np.sqrt(len(checked)))))
    if len(checked) < _FEWEST_FOR_TAIL:
        return float("nan")
    ordered = np.exp(np.sort(checked - checked.max())[-count - 1 :])
    exceedances = ordered[1:] - ordered[0]
    exceedances = exceedances[exceedances > 0]
    if len(exceedances) < 5:
        return float("nan")
    shape = generalized_pareto_shape(exceedances)
    return (shape * len(exceedances) + 0.5 * 10) / (len(exceedances) + 10)


def generalized_pareto_shape(exceedances: np.ndarray) -> float:
    """Shape of a generalized Pareto distribution by the empirical Bayes fit of Zhang and Stephens (Technometrics 51, 2009,
    eq. 6-9), positive for heavy tails; exceedances [n] > 0 in any unit.
    """
    ordered = np.sort(exceedances)
    n, grid = len(ordered), 30 + int(np.sqrt(len(ordered)))
    quartile = ordered[int(n / 4 + 0.5) - 1]
    places = 1 - np.sqrt(grid / (np.arange(1, grid + 1) - 0.5))
    theta = 1 / ordered[-1] + places / (3 * quartile)
    shapes = np.log1p(-theta[:, None] * ordered).mean(1)
    profile = n * (np.log(-theta / shapes) - shapes - 1)
    share = np.exp(profile - logsumexp(profile))
    return float(np.log1p(-(share * theta).sum() * ordered).mean())


def diagnose(log_weights: np.ndarray) -> Diagnosis:
    """How far weights [S] can be trusted."""
    effective = effective_sample_size(log_weights)
    count = len(log_weights)
    return Diagnosis(count, effective, effective / count, pareto_k(log_weights))


def is_trusted(diagnosis: Diagnosis) -> bool:
    """Whether averages with these weights mean something: enough effective samples, no heavy tail."""
    heavy = np.isfinite(diagnosis.pareto_k) and diagnosis.pareto_k > LARGEST_PARETO_K
    return diagnosis.fraction >= SMALLEST_FRACTION and not heavy


def verdict(diagnosis: Diagnosis) -> str:
    """One sentence for a report: ESS and Pareto's k, and in words when the weights must not be trusted."""
    k = diagnosis.pareto_k
    tail = f"Pareto k {k:.2f}" if np.isfinite(k) else "Pareto k not known of so few weights"
    facts = f"ESS {100 * diagnosis.fraction:.1f} % ({diagnosis.effective:.1f} of {diagnosis.samples} samples), {tail}"
    reasons = []
    if diagnosis.fraction < SMALLEST_FRACTION:
        reasons.append(f"ESS is below {100 * SMALLEST_FRACTION:.0f} %")
    if np.isfinite(k) and k > LARGEST_PARETO_K:
        reasons.append(f"k is above {LARGEST_PARETO_K}, a few samples carry all the weight")
    return f"{facts}: do not trust reweighted numbers ({'; '.join(reasons)})" if reasons else facts


def weighted_average(
    values: np.ndarray, log_weights: np.ndarray | None, seed: int, replicates: np.ndarray | None = None
) -> Estimate:
    """Self-normalised average of values [S], or the plain one without weights."""
    weights = _weights_of(log_weights, len(values))

    def average(share: np.ndarray) -> float:
        return float((share * weights * values).sum() / (share * weights).sum())

    return _bootstrapped(average, len(values), seed, replicates)


def free_energy_difference(
    in_first: np.ndarray,
    in_second: np.ndarray,
    log_weights: np.ndarray | None,
    seed: int,
    replicates: np.ndarray | None = None,
) -> Estimate:
    """F_second - F_first in kT of two states given as masks [S], reweighted or as sampled; raises UserError for empty ones."""
    first, second = np.asarray(in_first, bool), np.asarray(in_second, bool)
    weights = _weights_of(log_weights, len(first))
    for name, inside in (("first", first), ("second", second)):
        if not (weights * inside).sum() > 0:
            raise UserError(
                f"the {name} state holds none of the {len(inside)} samples: no free energy; draw more, or widen it"
            )

    def difference(share: np.ndarray) -> float:
        return float(np.log((share * weights)[first].sum()) - np.log((share * weights)[second].sum()))

    return _bootstrapped(difference, len(first), seed, replicates)


def log_partition(log_weights: np.ndarray, seed: int, replicates: np.ndarray | None = None) -> Estimate:
    """log Z = log mean w, nat."""
    logarithm = _log_mean(_checked(log_weights))
    return _bootstrapped(logarithm, len(log_weights), seed, replicates)


def entropy(
    reduced_energy: np.ndarray, log_weights: np.ndarray, seed: int, replicates: np.ndarray | None = None
) -> Estimate:
    """Entropy of the Boltzmann distribution, mean u + log Z, in k_B; reweighted samples with u [S] in kT."""
    checked = _checked(log_weights)
    weights, energy = normalised_weights(checked), np.where(np.isneginf(checked), 0.0, reduced_energy)
    logarithm = _log_mean(checked)

    def value(share: np.ndarray) -> float:
        mean = (share * weights * energy).sum() / (share * weights).sum()
        return float(mean) + logarithm(share)

    return _bootstrapped(value, len(checked), seed, replicates)


def sampled_entropy(log_density: np.ndarray, seed: int) -> Estimate:
    """Entropy of the distribution that drew the samples, -mean log p, in k_B."""
    values = -np.asarray(log_density, np.float64)
    return weighted_average(values, None, seed)


def multistate(reduced_energies: np.ndarray, counts: np.ndarray, start: np.ndarray | None = None) -> Multistate:
    """MBAR (Shirts and Chodera 2008; pymbar) of samples [S] drawn in order from states [K], `counts` [K] of each.

    reduced_energies [K, S] are all samples' in every state, log-densities with the sign turned where the model is a state;
    `start` [K] is a guess of the free energies, which also decides between states that nothing connects;
    states without samples, count 0, are those to predict. Differences between states that no overlap connects mean nothing.
    Raises UserError for what does not fit together.
    """
    solved = _solved(reduced_energies, counts, start)
    found = solved.compute_free_energy_differences()
    log_weights = np.log(np.maximum(solved.weights().T, 1e-300))
    return Multistate(found["Delta_f"], found["dDelta_f"], log_weights, solved.compute_overlap()["matrix"])


def multistate_free_energies(
    reduced_energies: np.ndarray, counts: np.ndarray, start: np.ndarray | None = None
) -> np.ndarray:
    """Free energies [K] in kT relative to the first state: of `multistate` only these, which takes a fraction of its time."""
    found = np.asarray(_solved(reduced_energies, counts, start).f_k, np.float64)
    return found - found[0]


def _solved(reduced_energies: np.ndarray, counts: np.ndarray, start: np.ndarray | None) -> MBAR:
    energies, drawn = np.asarray(reduced_energies, np.float64), np.asarray(counts, np.int64)
    if energies.ndim != 2 or len(drawn) != len(energies) or drawn.sum() != energies.shape[1]:
        raise UserError(
            f"MBAR needs reduced energies [states, samples] and one count per state that sum to the samples; found "
            f"{energies.shape} and counts {drawn.tolist()}"
        )
    if not np.isfinite(energies).all():
        raise UserError("MBAR needs finite reduced energies of every sample in every state; leave broken samples out")
    newton = {"method": "adaptive", "options": {"min_sc_iter": 0, "maxiter": _ITERATIONS}}
    with _silent_pymbar():
        from pymbar import MBAR

        return MBAR(energies, drawn, _ITERATIONS, initial_f_k=start, solver_protocol=({"method": "hybr"}, newton))


@contextmanager
def _silent_pymbar() -> Iterator[None]:
    """pymbar's import tells every user to install JAX; where it does not converge, the overlap says which states are apart."""
    logger = logging.getLogger("pymbar")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _bootstrapped(
    statistic: Callable[[np.ndarray], float], count: int, seed: int, replicates: np.ndarray | None
) -> Estimate:
    """The statistic at equal shares, and its spread over random ones, shares [S] of mean 1, or over given ones."""
    given = _random_shares(count, seed) if replicates is None else np.asarray(replicates, np.float64).T
    with np.errstate(divide="ignore", invalid="ignore"):
        resampled = np.array([statistic(share) for share in given])
    # a replicate of few populations may be without a state
    known = resampled[np.isfinite(resampled)]
    return Estimate(statistic(np.ones(count)), float(np.std(known, ddof=1)) if len(known) > 1 else float("nan"))


def _random_shares(count: int, seed: int) -> Iterator[np.ndarray]:
    generator = np.random.default_rng(seed)
    for _ in range(RESAMPLES):
        share = generator.exponential(size=count)
        yield share / share.mean()


def _log_mean(log_weights: np.ndarray) -> Callable[[np.ndarray], float]:
    """log of the mean weight as a function of shares [S]."""
    top = log_weights.max()
    weights = np.exp(log_weights - top)
    return lambda share: float(top + np.log((share * weights).mean()))


def _weights_of(log_weights: np.ndarray | None, count: int) -> np.ndarray:
    if log_weights is None:
        return np.full(count, 1 / count)
    if len(log_weights) != count:
        raise UserError(f"{len(log_weights)} log-weights for {count} samples; expected one each")
    return normalised_weights(log_weights)


def _checked(log_weights: np.ndarray) -> np.ndarray:
    values = np.asarray(log_weights, np.float64)
    if values.ndim != 1 or not len(values):
        raise UserError(f"log-weights have the shape {values.shape}; expected [samples]")
    if np.isnan(values).any() or np.isposinf(values).any() or not np.isfinite(values).any():
        raise UserError("log-weights hold NaN or +inf, or no finite value at all; leave those samples out")
    return values
