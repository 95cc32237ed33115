"""The pictures of a report that need weights, densities or costs, as matplotlib figures in the style of pictures.py."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dig_scale.evaluation.cost_curve import CostCurve, CostPoint
from dig_scale.evaluation.pictures import INK, MD_COLOUR, MODEL_COLOUR, tidy
from dig_scale.evaluation.weights import Agreement, Weights

REWEIGHTED_COLOUR = "#c2570c"
_LOWEST_WEIGHT = -12.0
"""log10 of the smallest weight over the mean that is drawn; smaller ones stand there."""
_CENTRAL = (1.0, 99.0)
"""Percentiles that set the frame of the scatter plot."""


def weights_figure(weights: Weights) -> Figure:
    """Histogram of log10(weight / mean weight), with the mean marked."""
    figure, ax = _one_panel(6.2, 2.5)
    drawn = np.clip(weights.log_relative, _LOWEST_WEIGHT, None)
    ax.hist(drawn, bins=min(60, max(10, len(drawn) // 20)), color=REWEIGHTED_COLOUR, alpha=0.7)
    ax.axvline(0, color=INK, lw=0.8, ls=(0, (4, 3)))
    ax.set_yscale("log")
    ax.set_title(f"ESS {100 * weights.fraction:.3g} %", fontsize=9, color=INK)
    _labelled(ax, "log₁₀ of weight over mean weight", "samples")
    return figure


def agreement_figure(found: Agreement) -> Figure:
    """log p against -u of every sample, with the line of slope 1 through their means."""
    figure, ax = _one_panel(4.6, 3.9)
    ax.plot(found.minus_reduced_energy, found.log_density, ".", color=MODEL_COLOUR, ms=2.5, alpha=0.5, rasterized=True)
    low, high = _frame(found.minus_reduced_energy)
    line = np.array([low, high])
    centre = np.median(found.minus_reduced_energy - found.log_density)
    ax.plot(line, line - centre, color=INK, lw=0.8, ls=(0, (4, 3)))
    ax.set_xlim(low, high)
    ax.set_ylim(*_frame(found.log_density))
    ax.set_title(f"Pearson r {found.pearson:.3f}", fontsize=9, color=INK)
    _labelled(ax, "−u (kT)", "log p (nat)")
    return figure


def cost_figure(curve: CostCurve) -> Figure:
    """Divergence against CPU seconds, both logarithmic; dashed with training."""
    figure, ax = _one_panel(6.2, 3.3)
    _draw_points(ax, curve.model, MODEL_COLOUR, "model")
    _draw_points(ax, curve.reweighted, REWEIGHTED_COLOUR, _reweighted_label(curve.reweighted))
    _draw_points(ax, curve.md, MD_COLOUR, "MD")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.legend(fontsize=7.5, frameon=False, handlelength=1.6)
    _labelled(ax, "CPU seconds", "Jensen–Shannon divergence (nat)")
    return figure


def _draw_points(ax: Axes, points: Sequence[CostPoint], colour: str, name: str) -> None:
    for key, style, label in (("cpu_seconds", "o-", name), ("with_training", "o--", f"{name}, with training")):
        drawn = [(getattr(one, key), one.divergence) for one in points if getattr(one, key)]
        if drawn:
            ax.plot(*zip(*drawn, strict=True), style, color=colour, ms=3.5, lw=1.1, label=label)


def _reweighted_label(points: Sequence[CostPoint]) -> str:
    if not points or not points[-1].effective_samples:
        return "model, reweighted"
    return f"model, reweighted (ESS {100 * points[-1].effective_samples / points[-1].samples:.3g} %)"


def _frame(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, _CENTRAL)
    margin = 0.15 * (high - low) or 1.0
    return float(low - margin), float(high + margin)


def _one_panel(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    ax = figure.subplots()
    tidy(ax)
    return figure, ax


def _labelled(ax: Axes, across: str, up: str) -> None:
    ax.set_xlabel(across, fontsize=9, color=INK)
    ax.set_ylabel(up, fontsize=9, color=INK)
