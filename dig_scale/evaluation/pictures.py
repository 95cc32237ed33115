"""The pictures of a report, as matplotlib figures (Agg, object interface, no pyplot) and as embeddable data URIs.

In: an Evaluation. Out: figures; maps as PNG, curves as SVG. Grey is MD, blue is the model, everywhere.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from dig_scale.evaluation.distribution import free_energy
from dig_scale.evaluation.geometry_tables import EnergyTable, GeometryTable, Term
from dig_scale.evaluation.result import Evaluation
from dig_scale.evaluation.torsion_tables import Curve, MapComparison, TorsionComparison

MODEL_COLOUR, MD_COLOUR, INK = "#1f6fb4", "#6b7280", "#1f2933"
MAX_FREE_ENERGY, MAX_DIFFERENCE = 8.0, 2.0
"""Ends of the colour scales in kT."""
MAX_MAPS, MAX_PANELS = 6, 24
"""Pictures drawn of each kind; of more, the worst are drawn."""
_COLUMNS = 6
_TICKS = (-180, -90, 0, 90, 180)


def map_figure(one: MapComparison) -> Figure:
    """Free-energy maps of MD and model side by side, and model minus MD; kT."""
    figure = Figure(figsize=(10.2, 2.95), layout="constrained")
    axes = figure.subplots(1, 3)
    md, model = map_energies(one)
    top = _top_of_scale((md, model))
    energy = [_draw_map(ax, values, one, top) for ax, values in zip(axes[:2], (md, model), strict=True)]
    difference = _draw_difference(axes[2], model - md, one)
    for ax, title in zip(axes, ("MD", "Model", "Model − MD"), strict=True):
        ax.set_title(title, fontsize=10, color=INK, fontweight="bold")
    colour_bar(figure, energy[1], axes[1:2], "−ln p (kT)")
    colour_bar(figure, difference, axes[2:], "ΔF (kT), blue: model more often")
    return figure


def map_energies(one: MapComparison) -> tuple[np.ndarray, np.ndarray]:
    """Free energies [bins, bins] in kT of MD and model above the minimum of the MD, first torsion along axis 0."""
    bins = round(len(one.md_histogram) ** 0.5)
    md, model = (free_energy(h).reshape(bins, bins) for h in (one.md_histogram, one.model_histogram))
    zero = np.nanmin(md)
    return md - zero, model - zero


def torsion_figure(torsions: Sequence[TorsionComparison]) -> Figure:
    """Histogram of each torsion, MD and model, with 95 % bootstrap bands."""
    figure, axes = panels(len(torsions), columns=min(4, max(2, len(torsions))))
    for ax, torsion in zip(axes, torsions, strict=True):
        draw_torsion(ax, torsion)
        ax.set_title(torsion.label, fontsize=8.5, color=INK)
    _legend(axes[0])
    return figure


def draw_torsion(ax: Axes, torsion: TorsionComparison) -> None:
    """One torsion's histogram in per cent per bin on `ax`."""
    edges = np.linspace(-180, 180, len(torsion.md.histogram) + 1)
    for curve, colour, name in ((torsion.md, MD_COLOUR, "MD"), (torsion.model, MODEL_COLOUR, "model")):
        _draw_curve(ax, edges, curve, colour, name)
    ax.set_xlim(-180, 180)
    ax.set_xticks(_TICKS)
    ax.set_ylim(bottom=0)
    tidy(ax)


def geometry_figure(table: GeometryTable) -> Figure:
    """Histograms of bonds or angles, MD and model; of many, those whose means differ most."""
    terms = worst_terms(table)
    figure, axes = panels(len(terms), columns=min(_COLUMNS, max(2, len(terms))))
    for ax, term in zip(axes, terms, strict=True):
        _draw_term(ax, term)
    _legend(axes[0])
    return figure


def worst_terms(table: GeometryTable) -> list[Term]:
    """The terms that are drawn, in the order of the system."""
    shift = [abs(term.mean["model"] - term.mean["md"]) for term in table.terms]
    drawn = sorted(np.argsort(shift)[::-1][:MAX_PANELS].tolist())
    return [table.terms[index] for index in drawn]


def worst_torsions(evaluation: Evaluation) -> list[TorsionComparison]:
    """The torsions that are drawn, in the order of the system."""
    order = np.argsort([torsion.divergence.model for torsion in evaluation.torsions])[::-1][:MAX_PANELS]
    return [evaluation.torsions[index] for index in sorted(order.tolist())]


def worst_maps(evaluation: Evaluation) -> list[MapComparison]:
    """The maps that are drawn, in the order of the system."""
    order = np.argsort([one.divergence.model for one in evaluation.maps])[::-1][:MAX_MAPS]
    return [evaluation.maps[index] for index in sorted(order.tolist())]


def energy_figure(table: EnergyTable) -> Figure:
    """Histograms of potential energy, MD and model, in kJ/mol."""
    figure = Figure(figsize=(6.2, 2.5), layout="constrained")
    ax = figure.subplots()
    _draw_pair(ax, table.edges, table.md_histogram, table.model_histogram)
    ax.set_xlabel("potential energy (kJ/mol)", fontsize=9, color=INK)
    ax.set_ylabel("% per bin", fontsize=9, color=INK)
    _legend(ax)
    return figure


def summary_picture(evaluation: Evaluation, path: Path) -> Path:
    """Write one PNG: free-energy maps of MD and model and the histograms of their two torsions; returns its path.

    Of several maps the one that differs most is drawn; a system without pairs of torsions shows what it has.
    """
    figure = _summary_figure(evaluation)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150, facecolor="white")
    return path


def png_of(figure: Figure) -> bytes:
    """The figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=170, facecolor="white")
    return buffer.getvalue()


def as_png(figure: Figure) -> str:
    """The figure as a PNG data URI."""
    return png_uri(png_of(figure))


def png_uri(png: bytes) -> str:
    """A PNG as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def as_svg(figure: Figure) -> str:
    """The figure as an SVG data URI."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _summary_figure(evaluation: Evaluation) -> Figure:
    if evaluation.maps:
        return _map_and_histograms(evaluation)
    if evaluation.torsions:
        return torsion_figure(worst_torsions(evaluation))
    if evaluation.bonds:
        return geometry_figure(evaluation.bonds)
    figure = Figure(figsize=(6, 1.2))
    figure.text(
        0.5, 0.5, f"{evaluation.subject.system}: no torsions and no bonds to draw", ha="center", va="center", color=INK
    )
    return figure


def _map_and_histograms(evaluation: Evaluation) -> Figure:
    worst = max(evaluation.maps, key=lambda one: one.divergence.model)
    figure = Figure(figsize=(10.2, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(1.75, 1))
    _summary_maps(figure, [figure.add_subplot(grid[0, column]) for column in range(2)], worst, evaluation)
    by_label = {torsion.label: torsion for torsion in evaluation.torsions}
    for column, label in enumerate((worst.first, worst.second)):
        ax = figure.add_subplot(grid[1, column])
        draw_torsion(ax, by_label[label])
        ax.set_xlabel(f"{label} (°)", fontsize=9, color=INK)
        ax.set_ylabel("% per bin", fontsize=9, color=INK)
        _legend(ax)
    return figure


def _summary_maps(figure: Figure, axes: Sequence[Axes], one: MapComparison, evaluation: Evaluation) -> None:
    subject, divergence = evaluation.subject, one.divergence
    titles = (
        f"MD, {evaluation.reference.frames:,} frames\nits two halves: JS {divergence.halves:.4f}",
        f"Model, {subject.samples:,} samples\nto MD: JS {divergence.model:.4f}, noise floor {divergence.subsample:.4f}",
    )
    energies = map_energies(one)
    top = _top_of_scale(energies)
    for ax, values, title in zip(axes, energies, titles, strict=True):
        image = _draw_map(ax, values, one, top)
        ax.set_title(title, fontsize=10, color=INK)
    colour_bar(figure, image, axes, "−ln p (kT)")


def _draw_map(ax: Axes, values: np.ndarray, one: MapComparison, top: float) -> QuadMesh:
    edges = np.linspace(-180, 180, len(values) + 1)
    image = ax.pcolormesh(edges, edges, values.T, cmap="viridis", vmin=0, vmax=top, rasterized=True)
    _finish_map(ax, one)
    return image


def _draw_difference(ax: Axes, values: np.ndarray, one: MapComparison) -> QuadMesh:
    edges = np.linspace(-180, 180, len(values) + 1)
    ax.set_facecolor("#f3f4f6")
    image = ax.pcolormesh(
        edges, edges, values.T, cmap="RdBu_r", vmin=-MAX_DIFFERENCE, vmax=MAX_DIFFERENCE, rasterized=True
    )
    _finish_map(ax, one)
    return image


def _finish_map(ax: Axes, one: MapComparison) -> None:
    if one.basins:
        ax.axvline(0, color=INK, lw=0.7, ls=(0, (4, 3)))
        for psi in (-120, 50):
            ax.plot([-180, 0], [psi, psi], color=INK, lw=0.7, ls=(0, (4, 3)))
    ax.set(xlim=(-180, 180), ylim=(-180, 180), xticks=_TICKS, yticks=_TICKS, aspect="equal")
    ax.set_xlabel(f"{one.first} (°)", fontsize=9, color=INK)
    ax.set_ylabel(f"{one.second} (°)", fontsize=9, color=INK)
    tidy(ax)
    ax.spines[["top", "right"]].set(visible=True, color="#9aa5b1")


def _top_of_scale(energies: Sequence[np.ndarray]) -> float:
    return min(MAX_FREE_ENERGY, float(np.ceil(max(np.nanmax(values) for values in energies))))


def colour_bar(figure: Figure, image: ScalarMappable, axes: Sequence[Axes], label: str) -> None:
    """A labelled colour bar beside `axes`."""
    bar = figure.colorbar(image, ax=list(axes), shrink=0.85)
    bar.set_label(label, fontsize=8.5, color=INK)
    bar.ax.tick_params(labelsize=7.5, color="#9aa5b1", labelcolor=INK)
    bar.outline.set_edgecolor("#9aa5b1")


def _draw_curve(ax: Axes, edges: np.ndarray, curve: Curve, colour: str, name: str) -> None:
    ax.stairs(100 * curve.upper, edges, baseline=100 * curve.lower, fill=True, color=colour, alpha=0.25, lw=0)
    ax.stairs(100 * curve.histogram, edges, color=colour, lw=1.2, label=name)


def _draw_term(ax: Axes, term: Term) -> None:
    _draw_pair(ax, term.edges, term.md_histogram, term.model_histogram)
    ax.set_title(term.label, fontsize=7.5, color=INK)
    ax.set_yticks([])
    ax.locator_params(axis="x", nbins=4)


def _draw_pair(ax: Axes, edges: np.ndarray, md: np.ndarray, model: np.ndarray) -> None:
    ax.stairs(100 * md, edges, fill=True, color=MD_COLOUR, alpha=0.35, lw=0, label="MD")
    ax.stairs(100 * model, edges, color=MODEL_COLOUR, lw=1.2, label="model")
    ax.set_xlim(edges[0], edges[-1])
    ax.set_ylim(bottom=0)
    tidy(ax)


def panels(count: int, columns: int, height: float | None = None) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels in rows of `columns`, each `height` inches high."""
    rows = -(-count // columns)
    figure = Figure(figsize=(10.2, rows * (height or (1.75 if columns > 4 else 2.01))))
    # Without a margin of its own, a printed page clips the titles of the upper row.
    figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.05)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[count:]:
        ax.set_visible(False)
    return figure, axes[:count]


def _legend(ax: Axes) -> None:
    ax.legend(fontsize=7.5, frameon=False, loc="best", handlelength=1.2)


def tidy(ax: Axes) -> None:
    """Light axes without a frame."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#9aa5b1")
    ax.tick_params(labelsize=7.5, color="#9aa5b1", labelcolor=INK)
