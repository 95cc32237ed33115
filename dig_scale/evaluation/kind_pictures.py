"""Pictures of kinds: histograms of observables, matrices and lateral maps of reference and model side by side.

In: observables and arrays. Out: matplotlib figures (Agg, object interface). Grey is the reference, blue the model, as elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dig_scale.evaluation.pictures import INK, MD_COLOUR, MODEL_COLOUR, colour_bar, panels, tidy
from dig_scale.evaluation.side_by_side import FEW_FRAMES, Observable

BINS = 40
_MOST_INTEGERS = 40
_TAIL = 0.5


def histograms_figure(observables: Sequence[Observable]) -> Figure | None:
    """One panel per observable that varies: the reference filled, or as lines where its values are few, the model outlined."""
    observables = [
        one for one in observables if np.ptp(np.concatenate([np.ravel(one.model), np.ravel(one.reference)])) > 0
    ]
    if not observables:
        return None
    figure, axes = panels(len(observables), columns=min(3, max(2, len(observables))), height=2.1)
    for ax, one in zip(axes, observables, strict=True):
        _draw(ax, one)
    handles, labels = axes[0].get_legend_handles_labels()
    axes[0].legend(handles, labels, fontsize=7.5, frameon=False, loc="best", handlelength=1.2)
    return figure


def matrices_figure(reference: np.ndarray, model: np.ndarray, axis: str, meaning: str) -> Figure:
    """Two matrices [N, N] on one scale from 0 to 1, and model minus reference."""
    figure = Figure(figsize=(10.2, 3.2), layout="constrained")
    axes = figure.subplots(1, 3)
    size = len(reference) + 0.5
    extent = (0.5, size, size, 0.5)
    for ax, values in zip(axes[:2], (reference, model), strict=True):
        image = ax.imshow(values, cmap="Greys", vmin=0, vmax=1, extent=extent, interpolation="nearest")
    change = model - reference
    top = max(0.1, float(np.abs(change).max()))
    difference = axes[2].imshow(change, cmap="RdBu_r", vmin=-top, vmax=top, extent=extent, interpolation="nearest")
    for ax, title in zip(axes, ("Reference", "Model", "Model − reference"), strict=True):
        ax.set_title(title, fontsize=10, color=INK, fontweight="bold")
        ax.set_xlabel(axis, fontsize=9, color=INK)
        tidy(ax)
    axes[0].set_ylabel(axis, fontsize=9, color=INK)
    colour_bar(figure, image, axes[1:2], meaning)
    colour_bar(figure, difference, axes[2:], "change")
    return figure


def lateral_figure(maps: Sequence[np.ndarray], vectors: np.ndarray, titles: Sequence[str], sites: np.ndarray) -> Figure:
    """Free-energy maps [n, n] eV over 2 x 2 primitive cells of a surface, vectors [2, 2] Å; sites [K, 2] Å of top atoms."""
    figure = Figure(figsize=(4.6 * len(maps) + 1.0, 3.1), layout="constrained")
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    top = max(0.02, max(float(np.nanmax(values)) for values in maps))
    for ax, values, title in zip(axes, maps, titles, strict=True):
        steps = np.arange(2 * len(values) + 1) / len(values)
        corners = steps[:, None, None] * vectors[0] + steps[None, :, None] * vectors[1]
        tiled = np.tile(values, (2, 2))
        image = ax.pcolormesh(
            corners[..., 0], corners[..., 1], tiled, cmap="viridis", vmin=0, vmax=top, rasterized=True
        )
        outline = 2 * np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]]) @ vectors
        ax.plot(*outline.T, color="#9aa5b1", lw=0.8)
        ax.plot(sites[:, 0], sites[:, 1], "o", mec=INK, mfc="white", ms=6, mew=1, clip_on=False, zorder=3)
        ax.set(aspect="equal", facecolor="white")
        ax.set_title(title, fontsize=10, color=INK, fontweight="bold")
        ax.set_xlabel("Å", fontsize=9, color=INK)
        ax.set_ylabel("Å", fontsize=9, color=INK)
        tidy(ax)
    colour_bar(figure, image, axes, "−kT ln p (eV)")
    return figure


def _draw(ax: Axes, one: Observable) -> None:
    model, reference = (np.ravel(np.asarray(values, np.float64)) for values in (one.model, one.reference))
    model, reference = model[np.isfinite(model)], reference[np.isfinite(reference)]
    edges = _edges(model, reference)
    if len(reference) >= FEW_FRAMES:
        heights = 100 * np.histogram(np.clip(reference, edges[0], edges[-1]), edges)[0] / len(reference)
        ax.stairs(heights, edges, fill=True, color=MD_COLOUR, alpha=0.35, lw=0, label="reference")
    else:
        for number, value in enumerate(reference):
            ax.axvline(value, color=MD_COLOUR, lw=1.2, label="reference" if not number else None)
    if len(model):
        heights = 100 * np.histogram(np.clip(model, edges[0], edges[-1]), edges)[0] / len(model)
        ax.stairs(heights, edges, color=MODEL_COLOUR, lw=1.3, label="model")
    ax.set_ylim(bottom=0)
    ax.set_xlabel(one.label, fontsize=8.5, color=INK)
    ax.set_ylabel("% per bin", fontsize=8, color=INK)
    tidy(ax)


def _edges(model: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Bins over the range of both without far outliers, which count in the end bins; a bin per integer where there are few."""
    both = np.concatenate([model, reference])
    if not len(both):
        return np.array([0.0, 1.0])
    low, high = (float(value) for value in np.percentile(both, [_TAIL, 100 - _TAIL]))
    if len(reference):
        low, high = min(low, float(reference.min())), max(high, float(reference.max()))
    if (both == np.round(both)).all() and high - low <= _MOST_INTEGERS:
        return np.arange(np.floor(low) - 0.5, np.ceil(high) + 1.5)
    return np.linspace(low, high if high > low else low + 1.0, BINS + 1)
