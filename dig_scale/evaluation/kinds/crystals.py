"""Crystals of one composition against known structures: density, distances, neighbours, validity, what was found or is new.

In: samples and reference with a cell per frame. Out: Findings. Known structures are independent of each other, so the halves of
the reference are every other one. Samples that are not plausible count in their share and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from dig_scale.config import Evaluate
from dig_scale.errors import UserError
from dig_scale.evaluation import crystals
from dig_scale.evaluation.formats import percent
from dig_scale.evaluation.kind_pictures import histograms_figure
from dig_scale.evaluation.side_by_side import (
    Findings,
    Headline,
    Observable,
    Reference,
    Row,
    Section,
    Sets,
    Table,
    alternating_sets,
    distance_table,
    in_words,
    means_table,
    observed,
    observed_distances,
    taken,
)
from dig_scale.importers.crystal_duplicates import Similarity
from dig_scale.records import evenly_spread
from dig_scale.system import Frames, System

MATCHED = 12
"""Samples that are matched with known structures; of more, evenly chosen ones."""
KNOWN = 200
"""Known structures that are matched with, at most."""
SIMILAR = Similarity(volume_tolerance=0.1, energy_tolerance=math.inf)
LOOSELY = crystals.PUBLISHED_SIMILARITY
_MOST_NEIGHBOURS = 12
_MATCH_TITLES = {"model": "Model, in the reference", "halves": "Reference, first half in its second half"}
_NOTES = (
    ("Plausible", "Finite, no two sites within 0.5 Å, 1 to 1000 Å³ per site."),
    ("Neighbours", "Sites closer than 1.22 times the sum of covalent radii, images included."),
    ("Known", "The same as a structure of the reference, by pymatgen's StructureMatcher, and of a volume within 10 %."),
    ("Known, loosely", "By the tolerances of Zheng et al. 2023: ltol 0.3, stol 0.5, 10 degrees, whatever the volume."),
    ("Coverage", "Share of the known structures that some sample is; it grows with the number of samples."),
    ("Unique", "Share of structures that are left when repeats are removed."),
)


def compared(system: System, model: Frames, reference: Reference, settings: Evaluate) -> Findings:
    """Findings on samples of crystals."""
    _require_composition(system, reference)
    plausible = [crystals.are_plausible(system, frames) for frames in (model, reference.frames)]
    if not plausible[0].any():
        raise UserError(
            f"ensemble of {system.name!r}: none of {model.n_frames} structures is plausible; train for longer"
        )
    sets = alternating_sets(taken(model, plausible[0]), reference, settings.seed)
    observables = _observables(system, sets)
    about = "Density, Wasserstein-1"
    headline = (
        None if reference.is_few else Headline(about, observed_distances(observables[0], sets), "length", "g/cm³")
    )
    valid = observed("plausible", plausible, format="percent")
    tables = [means_table("Mean, and standard deviation σ", [*observables, valid], sets), _neighbours(system, sets)]
    if not reference.is_few:
        tables.insert(1, distance_table("Wasserstein-1 distances, in the unit of the number", observables, sets))
    matches = _matches(system, sets)
    sections = (
        Section(
            "Structures", tuple(tables), histograms_figure(observables), "Samples and known structures, % per bin."
        ),
        Section("Known and new structures", (matches,)),
    )
    verdict = [] if headline is None else [in_words(headline)]
    said = f"{percent(float(plausible[0].mean()))} of the samples are plausible. {_known_in_words(matches)}"
    return Findings((*verdict, said), headline, sections, _NOTES)


def _require_composition(system: System, reference: Reference) -> None:
    if reference.frames.cell is None:
        raise UserError(f"reference {reference.source!r}: structures without a cell; import it with reader 'crystals'")
    if sorted(system.elements) != sorted(reference.system.elements):
        raise UserError(
            f"ensemble of {system.name!r} and reference of {reference.system.name!r} are not of one composition: give "
            "the reference's trajectories of the ensemble's composition"
        )


def _observables(system: System, sets: Sets) -> list[Observable]:
    pair = (sets.model, sets.reference)
    measured = {
        "density (g/cm³)": [crystals.densities(system, one) for one in pair],
        "shortest distance (Å)": [crystals.shortest_distances(system, one) for one in pair],
        "neighbours of a site": [crystals.coordination(system, one) for one in pair],
        "mean neighbours of a structure": [crystals.coordination(system, one).mean(axis=1) for one in pair],
    }
    return [
        observed(label, values, format="number" if "neighbours" in label else "length")
        for label, values in measured.items()
    ]


def _neighbours(system: System, sets: Sets) -> Table:
    pair = [np.minimum(crystals.coordination(system, one), _MOST_NEIGHBOURS) for one in (sets.model, sets.reference)]
    low, high = min(int(one.min()) for one in pair), max(int(one.max()) for one in pair)
    shares = [
        observed(f"{n} or more" if n == _MOST_NEIGHBOURS else f"{n}", (pair[0] == n, pair[1] == n), "percent")
        for n in range(low, high + 1)
    ]
    return means_table("Share of sites with so many neighbours", shares, sets)


def _matches(system: System, sets: Sets) -> Table:
    """Match rates of the model in the reference, and as a yardstick of the reference's halves in each other."""
    model, known = _some(sets.model, MATCHED), _some(sets.reference, KNOWN)
    pairs = {"model": (model, known)}
    if sets.parts:
        halves = [taken(sets.reference, sets.parts[name]) for name in ("first_half", "second_half")]
        pairs["halves"] = (_some(halves[0], MATCHED), _some(halves[1], KNOWN))
    strict, loose = (
        {key: crystals.match_structures(system, *pair, similarity) for key, pair in pairs.items()}
        for similarity in (SIMILAR, LOOSELY)
    )
    unique = {key: crystals.uniqueness(system, pair[0], SIMILAR) for key, pair in pairs.items()}
    coverage = {key: one.coverage(pairs[key][1].n_frames) for key, one in strict.items()}
    rows = (
        Row("known", "percent", {key: one.rate for key, one in strict.items()}),
        Row("new", "percent", {key: one.novelty for key, one in strict.items()}),
        Row("coverage of the known", "percent", coverage),
        Row("unique", "percent", unique),
        Row("mean displacement from the known", "length", _displacements(strict)),
        Row("known, loosely", "percent", {key: one.rate for key, one in loose.items()}),
        Row("mean displacement from the loosely known", "length", _displacements(loose)),
    )
    counted = f"{model.n_frames} samples against {known.n_frames} known structures"
    note = f"{counted}; displacements in cube roots of the volume per site."
    return Table("Samples among known structures", _MATCH_TITLES, rows, note)


def _some(frames: Frames, at_most: int) -> Frames:
    return taken(frames, evenly_spread(frames.n_frames, at_most))


def _displacements(found: Mapping[str, crystals.Matches]) -> dict[str, float | None]:
    return {key: float(one.rms[one.known >= 0].mean()) if one.rate else None for key, one in found.items()}


def _known_in_words(matches: Table) -> str:
    model, halves = (matches.rows[0].values.get(key) for key in ("model", "halves"))
    yardstick = "" if halves is None else f"; of one half of the reference, {percent(halves)} are in the other"
    return f"{percent(model)} of them are a structure of the reference{yardstick}."
