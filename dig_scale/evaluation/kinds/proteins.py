"""Proteins with residue frames against known states or MD: distances, contacts, size, soundness.

In: samples and reference with rotations of residue frames. Out: Findings. A reference of few frames is a list of states,
which samples are compared with one by one; of a longer one, distributions are compared.
"""

from __future__ import annotations

import numpy as np

from dig_scale.config import Evaluate
from dig_scale.errors import UserError
from dig_scale.evaluation import proteins
from dig_scale.evaluation.formats import percent
from dig_scale.evaluation.kind_pictures import histograms_figure, matrices_figure
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
    taken,
)
from dig_scale.system import Frames, System

VISIT = 2.0
"""Å; a sample nearer to a state than this counts as a visit."""
MAX_PAIRS = 20_000
"""Pairs of residues whose distances are compared at most; of more, a random choice."""
MAX_STATES_DRAWN = 6
_NOTES = (
    (
        "Sound",
        "No link of C-alphas beyond 4.5 Å or below 2.6 Å, no peptide bond beyond 2 Å, no clash of backbone atoms.",
    ),
    ("Neighbours 3.8 Å apart", "Share of residues joined by a peptide bond whose C-alphas are 3.8 ± 0.2 Å apart."),
    ("Clash", "Two C-alphas below 3 Å that are not joined."),
    ("Contact", "Two C-alphas below 8 Å."),
)


def compared(system: System, model: Frames, reference: Reference, settings: Evaluate) -> Findings:
    """Findings on samples of a protein."""
    reference = _of_same_residues(system, reference)
    sets = sets_of(model, reference, settings.seed)
    observables = _observables(system, model, reference)
    headline: Headline | None = None
    sections: list[Section] = []
    if reference.is_few:
        sections.append(_states(model, reference))
    else:
        headline = _divergence(system, sets, reference, settings)
        sections.append(_distances(headline, observables, sets))
    sections += [_contacts(sets), _soundness(observables, sets)]
    return Findings(tuple(_verdict(headline, sections[0], observables, reference)), headline, tuple(sections), _NOTES)


def _of_same_residues(system: System, reference: Reference) -> Reference:
    frames = reference.frames
    if frames.rotations is None:
        raise UserError(
            f"reference {reference.source!r}: frames without residue frames; import it with reader 'backbone'"
        )
    sites = match_sites(system, reference.system)
    matched = Frames(frames.positions[:, sites], frames.time_ps, frames.energy, rotations=frames.rotations[:, sites])
    return Reference(system, matched, reference.trajectory, reference.temperature, reference.source)


def _observables(system: System, model: Frames, reference: Reference) -> list[Observable]:
    pair = (model, reference.frames)
    sound = [proteins.soundness(system, one.positions, one.rotations) for one in pair if one.rotations is not None]
    size = [proteins.radius_of_gyration(one.positions) for one in pair]
    found = [
        observed("radius of gyration (Å)", size, format="length"),
        observed("neighbours 3.8 ± 0.2 Å apart", (one.ca_steps_near for one in sound), format="percent"),
        observed("longest link of C-alphas (Å)", (one.longest_ca_step for one in sound), format="length"),
        observed("clashes of C-alphas", (one.ca_clashes for one in sound)),
        observed("sound", (one.sound for one in sound), format="percent"),
    ]
    if reference.is_few:
        return found
    start = reference.frames.positions[0]
    away = [proteins.ca_rmsd(one.positions, start) for one in pair]
    return [observed("C-alpha RMSD from the first reference frame (Å)", away, format="length"), *found]


def _divergence(system: System, sets: Sets, reference: Reference, settings: Evaluate) -> Headline:
    pairs = proteins.distant_pairs(system)
    if len(pairs) > MAX_PAIRS:
        pairs = pairs[np.random.default_rng(settings.seed).choice(len(pairs), MAX_PAIRS, replace=False)]
    of = (reference.frames.positions, reference.trajectory, pairs)
    found = proteins.distance_divergence(sets.model.positions, *of)
    drawn = proteins.distance_divergence(taken(sets.reference, sets.parts["subsample"]).positions, *of)
    distances = {"model": found.mean, "halves": found.mean_floor, "subsample": drawn.mean}
    about = f"Distances between {len(pairs):,} pairs of residues, mean Jensen–Shannon divergence"
    return Headline(about, distances, "divergence", "nat")


def _distances(headline: Headline, observables: list[Observable], sets: Sets) -> Section:
    divergences = Row("mean over pairs of residues", headline.format, headline.distances)
    return Section(
        "Distributions",
        (
            Table("Jensen–Shannon divergence (nat) of distances, 50 bins", DISTANCE_TITLES, (divergences,)),
            distance_table("Wasserstein-1 distances, in the unit of the number", observables, sets),
        ),
        histograms_figure([one for one in observables if one.is_drawn]),
        "Samples and reference frames, % per bin.",
    )


def _states(model: Frames, reference: Reference) -> Section:
    states = reference.frames.positions
    away = np.stack([proteins.ca_rmsd(model.positions, state) for state in states])
    between = np.stack([proteins.ca_rmsd(states, state) for state in states])
    np.fill_diagonal(between, np.inf)
    near, visits = [], []
    for number, rmsd in enumerate(away):
        other = float(between[number].min()) if len(states) > 1 else None
        values = {"model": float(rmsd.min()), "median": float(np.median(rmsd)), "others": other}
        near.append(Row(f"state {number + 1}", "length", values))
        visits.append(Row(f"state {number + 1}", "percent", {"model": float((rmsd < VISIT).mean())}))
    columns = {"model": "Closest sample", "median": "Median sample", "others": "Nearest other state"}
    tables = (
        Table("C-alpha RMSD from each state (Å)", columns, tuple(near)),
        Table("Visits", {"model": f"Samples within {VISIT:g} Å"}, tuple(visits)),
    )
    panels = [
        Observable(f"C-alpha RMSD from state {number + 1} (Å)", rmsd, between[number][np.isfinite(between[number])])
        for number, rmsd in enumerate(away[:MAX_STATES_DRAWN])
    ]
    caption = "Samples, % per bin; grey lines: the other states."
    return Section("Known states", tables, histograms_figure(panels), caption)


def _contacts(sets: Sets) -> Section:
    maps = [proteins.contact_map(one.positions) for one in (sets.reference, sets.model)]
    distances = sets.distances(
        lambda a, b: float(np.abs(proteins.contact_map(a.positions) - proteins.contact_map(b.positions)).mean())
    )
    row = Row("mean change of the probability of a contact", "divergence", distances)
    tables = () if distances["model"] is None else (Table("Contacts", DISTANCE_TITLES, (row,)),)
    figure = matrices_figure(maps[0], maps[1], "residue", "share of frames in contact")
    return Section("Contacts", tables, figure, "Share of frames in which two C-alphas are nearer than 8 Å.")


def _soundness(observables: list[Observable], sets: Sets) -> Section:
    return Section("Size and soundness", (means_table("Mean, and standard deviation σ", observables, sets),))


def _verdict(
    headline: Headline | None, first: Section, observables: list[Observable], reference: Reference
) -> list[str]:
    sound = next(one for one in observables if one.label == "sound")
    model, known = float(sound.model.mean()), float(sound.reference.mean())
    soundness = f"{percent(model)} of the samples are sound, of the reference {percent(known)}."
    if headline is not None:
        return [in_words(headline), soundness]
    near, shares = ([row.values["model"] or 0.0 for row in table.rows] for table in first.tables)
    reached = sum(share > 0 for share in shares)
    said = ", ".join(f"{value:.2f} Å" for value in near[:MAX_STATES_DRAWN])
    return [f"Samples come within {VISIT:g} Å of {reached} of {len(shares)} known states (closest: {said}).", soundness]
