"""Umbrella windows become one distribution: MBAR (Shirts and Chodera 2008; pymbar) over steered and unsteered samples.

In: windows k of samples that stand for p exp(-b_k), and every bias of every sample. Out: log-weights of all samples towards p,
free energies of the windows, their overlap, errors. Knows no structures and no files; b_k = 0 is sampling as it is.

Steered samples are weighted, and MBAR is written for equal weights. Its weighted form counts sample i of window k, of
normalised weight v_i, n_k v_i times, n_k being Kish's effective sample size, so that a window of few heavy samples has as
little to say as it knows:

    exp(-f_j) = sum_i n_k(i) v_i exp(-b_j(x_i)) / sum_l n_l exp(f_l - b_l(x_i))

pymbar takes no weights, and numbers of samples that are whole. So the free energies f are solved on draws of every window by
systematic resampling at equal distances, DRAWS times n_k of them: copies of a sample are whole-number weights, what rounding
loses goes down as 1/DRAWS, and errors are scaled back to n_k samples. Draws serve f alone: the weights of the result are the
equation's right-hand side at f_j of p, for every sample that was given with the weight that it was given.

Errors. Samples of one population share ancestors and a normaliser, so they are less than independent; populations are
independent. Where every steered window has several, all of it is repeated over populations: of P, P - 1 are drawn (Rao and Wu
1988), which makes variances right however few they are; samples of windows that were not steered are drawn one by one.
Otherwise errors of f are pymbar's asymptotic ones of windows that count no more samples than distinct ancestors. Neither
knows of a gap between windows, where f is anybody's guess: there are no errors then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp

from dig_scale.errors import UserError
from dig_scale.sampling.reweighting import effective_sample_size, multistate, multistate_free_energies

DRAWS = 2
"""Draws from a window for each of its effective samples."""
REPLICATES = 50
"""Of the bootstrap; they tell an error to 10 %."""
LEAST_OVERLAP = 0.03
"""Below which free energies between two windows cannot be trusted (Klimovich, Shirts and Mobley 2015)."""


@dataclass(frozen=True)
class Window:
    """Samples [S] that stand for p exp(-b), weighed by log_weights [S] nat; all alike where it was not steered.

    population [S]: to which independent population each belongs, from 0 on; None: samples are independent. distinct: how many
    walkers of the start have descendants; None: all. stream: numbers that windows drawn from the same noise have in common.
    """

    name: str
    log_weights: np.ndarray
    population: np.ndarray | None = None
    distinct: int | None = None
    stream: tuple[int, ...] = ()

    @property
    def effective(self) -> float:
        """Kish's effective sample size."""
        return effective_sample_size(self.log_weights)

    @property
    def populations(self) -> int:
        """How many independent parts it has: populations, or samples."""
        return len(self.log_weights) if self.population is None else int(self.population.max()) + 1

    @property
    def own_free_energy(self) -> float:
        """-log of the mean weight, kT: what the window says of itself, without the others; 0 where it was not steered."""
        return float(np.log(len(self.log_weights)) - logsumexp(self.log_weights))


@dataclass(frozen=True)
class Combined:
    """All samples [S] of K windows in their order.

    log_weights [S] nat towards p, of mean weight 1; replicates [S, R]: factors on the weights over a bootstrap of populations,
    None where a steered window has only one. free_energies [K] kT, -log of the mean of exp(-b_k) over p, and their errors [K],
    NaN where windows do not hold together; overlap [K, K]: the share of the row's samples that the column might have drawn.
    """

    log_weights: np.ndarray
    replicates: np.ndarray | None
    free_energies: np.ndarray
    errors: np.ndarray
    overlap: np.ndarray


@dataclass(frozen=True)
class Link:
    """Two windows by number, and the larger of their overlaps."""

    first: int
    second: int
    overlap: float


def combined(windows: Sequence[Window], biases: np.ndarray) -> Combined:
    """The windows as one, of biases [K, S] nat, all samples' in every window; raises UserError for what does not fit."""
    samples = sum(len(window.log_weights) for window in windows)
    if biases.shape != (len(windows), samples) or not samples:
        raise UserError(f"{len(windows)} windows of {samples} samples in all: biases have the shape {biases.shape}")
    counts, own = np.array([window.effective for window in windows]), [window.log_weights for window in windows]
    start = np.array([0.0, *(window.own_free_energy for window in windows)])
    solved = multistate(*_drawn(own, biases, counts), start)
    free, overlap = solved.differences[0], solved.overlap[1:, 1:]
    whole = 1.0 if all(link.overlap >= LEAST_OVERLAP for link in neighbours(overlap)) else np.nan
    log_weights = _weighed(own, biases, counts, free)
    if all(window.populations > 1 for window in windows if window.population is not None):
        replicates, errors = _bootstrapped(windows, biases, counts, free)
        factors = np.exp(replicates - log_weights[:, None]).astype(np.float32)
        return Combined(log_weights, factors, free[1:], whole * errors, overlap)
    cautious = np.array([min(n, window.distinct or n) for n, window in zip(counts, windows, strict=True)])
    asymptotic = multistate(*_drawn(own, biases, cautious), free).errors[0, 1:] * np.sqrt(DRAWS)
    return Combined(log_weights, None, free[1:], whole * asymptotic, overlap)


def neighbours(overlap: np.ndarray) -> list[Link]:
    """The K - 1 links that hold all windows together with as much overlap as there is; the weakest are the gaps."""
    mutual = np.maximum(overlap, overlap.T)
    linked, links = [0], []
    while len(linked) < len(mutual):
        outside = [k for k in range(len(mutual)) if k not in linked]
        block = mutual[np.ix_(linked, outside)]
        i, j = np.unravel_index(int(block.argmax()), block.shape)
        links.append(Link(linked[i], outside[j], float(block[i, j])))
        linked.append(outside[j])
    return links


def _drawn(log_weights: Sequence[np.ndarray], biases: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What pymbar takes: biases [1 + K, draws] with p, which has no draws, in front; numbers of draws [1 + K]."""
    numbers = np.maximum(np.rint(DRAWS * counts).astype(np.int64), 1)
    starts = np.cumsum([0, *(len(one) for one in log_weights)])
    rows = [
        start + _resampled(one, number) for one, number, start in zip(log_weights, numbers, starts[:-1], strict=True)
    ]
    drawn = biases[:, np.concatenate(rows)]
    return np.concatenate([np.zeros((1, drawn.shape[1])), drawn]), np.array([0, *numbers])


def _resampled(log_weights: np.ndarray, number: int) -> np.ndarray:
    """Rows [number] of samples, each as often as its share, from the middles of equal parts of the cumulated weights."""
    edges = np.exp(log_weights - logsumexp(log_weights)).cumsum()
    places = (np.arange(number) + 0.5) / number
    return np.minimum(np.searchsorted(edges / edges[-1], places), len(edges) - 1)


def _weighed(log_weights: Sequence[np.ndarray], biases: np.ndarray, counts: np.ndarray, free: np.ndarray) -> np.ndarray:
    """log-weights [S] towards p of mean weight 1, free energies [1 + K] given."""
    counted = [np.log(n) + one - logsumexp(one) for n, one in zip(counts, log_weights, strict=True)]
    mixture = logsumexp(np.log(counts)[:, None] + free[1:, None] - biases, axis=0)
    found = np.concatenate(counted) - mixture
    return np.asarray(found - logsumexp(found) + np.log(len(found)))


def _bootstrapped(
    windows: Sequence[Window], biases: np.ndarray, counts: np.ndarray, free: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """log-weights [S, R] of the replicates, and the standard deviations [K] of their free energies."""
    weights, energies = [], []
    for replicate in range(REPLICATES):
        own = [window.log_weights + _log_multiplicity(window, replicate) for window in windows]
        found = multistate_free_energies(*_drawn(own, biases, counts), free)
        weights.append(_weighed(own, biases, counts, found))
        energies.append(found[1:])
    return np.stack(weights, 1), np.std(energies, axis=0, ddof=1)


def _log_multiplicity(window: Window, replicate: int) -> np.ndarray:
    """log of how often each sample [S] is in a replicate, -inf for never; the same where the noise was the same."""
    parts = window.populations
    generator = np.random.default_rng([replicate, *window.stream])
    times = np.bincount(generator.integers(parts, size=max(parts - 1, 1)), minlength=parts)
    with np.errstate(divide="ignore"):
        found = np.log(times.astype(np.float64))
    return np.asarray(found if window.population is None else found[window.population])
