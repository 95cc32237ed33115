"""Adsorbates on surfaces against MD: which sites they are on, lateral free energies, heights.

In: samples and reference of one slab with its adsorbates. Out: Findings. Sites and maps are those of the primitive cell of the
slab's top layer; a top layer that is no simple lattice has heights and displacements only.
"""

from __future__ import annotations

import numpy as np

from dig_scale.config import Evaluate
from dig_scale.errors import UserError
from dig_scale.evaluation import surface
from dig_scale.evaluation.kind_pictures import histograms_figure, lateral_figure
from dig_scale.evaluation.reference import match_sites
from dig_scale.evaluation.side_by_side import (
    DISTANCE_TITLES,
    Findings,
    Headline,
    Observable,
    Reference,
    Row,
    Section,
    Sets,
    Table,
    distance_table,
    in_words,
    means_table,
    observed,
    sets_of,
)
from dig_scale.evaluation.structure import bond_lengths
from dig_scale.evaluation.surface import SurfaceLattice, Symmetry
from dig_scale.importers.slab import surface_normal
from dig_scale.system import Frames, SiteRole, System

MAX_BINS = 24
_CELLS_SHOWN = 2
_NOTES = (
    ("Site", "The ideal site of the top layer nearest along the surface to the adsorbate's lowest atom."),
    (
        "Lateral map",
        "In the primitive cell of the top layer, averaged over the symmetry of the surface; white: never there.",
    ),
    ("Height", "Of the adsorbate's lowest atom over the mean of the top layer's atoms."),
)


def compared(system: System, model: Frames, reference: Reference, settings: Evaluate) -> Findings:
    """Findings on samples of adsorbates on a slab."""
    sites = match_sites(system, reference.system)
    known = Frames(reference.frames.positions[:, sites].astype(np.float64), reference.frames.time_ps)
    reference = Reference(system, known, reference.trajectory, reference.temperature, reference.source)
    sets = sets_of(model, reference, settings.seed)
    lattice, problem = _lattice(system)
    observables = _observables(system, lattice, sets)
    headline: Headline | None = None
    sections: list[Section] = []
    if lattice is not None:
        headline, sections = _lateral(system, lattice, sets, reference.temperature, min(settings.bins, MAX_BINS))
    drawn = [one for one in observables if one.is_drawn]
    tables = (
        means_table("Mean, and standard deviation σ", observables, sets),
        distance_table("Wasserstein-1 distances, in the unit of the number", drawn, sets),
    )
    sections.append(
        Section("Heights and displacements", tables, histograms_figure(drawn), "% of samples and frames per bin.")
    )
    verdict = (
        [f"Sites are not told apart: {problem}"] if headline is None else [in_words(headline), _fullest(sections[0])]
    )
    return Findings(tuple(verdict), headline, tuple(sections), _NOTES)


def _lattice(system: System) -> tuple[SurfaceLattice | None, str]:
    try:
        return surface.surface_lattice(system), ""
    except UserError as error:
        return None, str(error)


def _observables(system: System, lattice: SurfaceLattice | None, sets: Sets) -> list[Observable]:
    pair = [sets.model.positions, sets.reference.positions]
    height = _heights_above_surface if lattice is None else surface.adsorbate_heights
    heights = [height(system, positions) for positions in pair]
    found = [observed("height of the adsorbate (Å)", heights, format="length")]
    for role, label in ((SiteRole.SURFACE, "displacement of surface atoms"), (SiteRole.SUBSURFACE, "of atoms below")):
        atoms = np.flatnonzero((system.roles == role) & system.mobile)
        if len(atoms):
            away = [np.linalg.norm(p[:, atoms] - system.reference_positions[atoms], axis=-1) for p in pair]
            found.append(observed(f"{label} (Å)", away, format="length"))
    if len(system.bonds):
        lengths = [bond_lengths(positions, system.bonds) for positions in pair]
        found.append(observed("bonds of the adsorbate (Å)", lengths, format="length"))
    return found


def _heights_above_surface(system: System, positions: np.ndarray) -> np.ndarray:
    """Heights [F, A] Å over the mean of the surface's atoms, where the top layer has no lattice."""
    assert system.cell is not None
    along = positions @ surface_normal(system.cell)
    return np.asarray(
        along[:, surface.adsorbate_anchors(system)] - along[:, system.roles == SiteRole.SURFACE].mean(1)[:, None]
    )


def _lateral(
    system: System, lattice: SurfaceLattice, sets: Sets, temperature: float, bins: int
) -> tuple[Headline, list[Section]]:
    def histogram(frames: Frames) -> np.ndarray:
        return surface.lateral_histogram(system, frames.positions, bins, Symmetry.SURFACE)

    def divergence(first: Frames, second: Frames) -> float:
        return surface.lateral_divergence(histogram(first), histogram(second))

    distances = sets.distances(divergence)
    headline = Headline("Lateral map, Jensen–Shannon divergence", distances, "divergence", "nat")
    labels = [surface.site_labels(system, one.positions) for one in (sets.model, sets.reference)]
    names = dict.fromkeys(lattice.names)
    shares = [observed(name, (labels[0] == name, labels[1] == name), "percent") for name in names]
    maps = [surface.lateral_free_energy(histogram(one), temperature) for one in (sets.reference, sets.model)]
    tables = (
        means_table("Share of adsorbates at each kind of site", shares, sets),
        Table(
            f"Jensen–Shannon divergence (nat) of lateral maps, {bins} × {bins} bins",
            DISTANCE_TITLES,
            (Row("lateral map", "divergence", distances),),
        ),
    )
    vectors = _in_plane(lattice)
    corners = np.stack(np.meshgrid(*[np.arange(_CELLS_SHOWN + 1)] * 2, indexing="ij"), axis=-1).reshape(-1, 2)
    figure = lateral_figure(maps, vectors, ("Reference", "Model"), corners @ vectors)
    caption = (
        f"Lateral free energy at {temperature:g} K over {_CELLS_SHOWN} by {_CELLS_SHOWN} cells; circles: top atoms."
    )
    return headline, [Section("Sites and lateral free energy", tables, figure, caption)]


def _in_plane(lattice: SurfaceLattice) -> np.ndarray:
    """The primitive vectors [2, 2] Å in the plane of the surface, the first along x."""
    first = lattice.vectors[0] / np.linalg.norm(lattice.vectors[0])
    second = np.cross(lattice.normal, first)
    return np.asarray(lattice.vectors @ np.stack([first, second]).T)


def _fullest(section: Section) -> str:
    said = []
    for row in section.tables[0].rows:
        model, known = row.values["model"], row.values["md"]
        if model is not None and known is not None and max(model, known) >= 0.005:
            said.append(f"{row.label} {100 * model:.1f} % ({100 * known:.1f} %)")
    return f"Sites, model (reference): {', '.join(said)}."
