"""The verdict and the warnings of an Evaluation, in words that follow from its numbers by fixed rules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from dig_scale.evaluation.cost import CostTable
from dig_scale.evaluation.formats import counted, percent, significant
from dig_scale.evaluation.result import Evaluation, Headline
from dig_scale.evaluation.sets import MIN_BLOCKS
from dig_scale.evaluation.torsion_tables import BasinRow, Distance, MapComparison

AT_NOISE_FLOOR = 1.5
"""A divergence up to this many noise floors is called indistinguishable from MD."""
CLEARLY_DIFFERENT = 3.0
"""Above this many times the divergence of the MD's halves, the model is said not to reproduce the MD."""
MIN_ARRIVALS = 5
MIN_BASIN_FRAMES = 20
NAMED_IN_WARNING = 6
MIN_INDEPENDENT_FRAMES = 100
MIN_EFFECTIVE_SAMPLES = 100
MIN_EFFECTIVE_FRACTION = 0.01


def with_words(evaluation: Evaluation) -> Evaluation:
    """The evaluation with its headline, verdict and warnings filled in."""
    headline = headline_of(evaluation)
    worded = replace(evaluation, headline=headline)
    return replace(worded, verdict=tuple(_verdict(worded)), warnings=tuple(_warnings(worded)))


def headline_of(evaluation: Evaluation) -> Headline | None:
    """The divergence that the verdict is about; None when the system has no torsion."""
    maps, torsions = evaluation.maps, evaluation.torsions
    if not maps and not torsions:
        return None
    if not maps:
        return Headline(f"mean over {counted(len(torsions), 'torsion')}", _mean([t.divergence for t in torsions]))
    pair = f"({_axis(maps[0].first)}, {_axis(maps[0].second)})"
    about = f"joint {pair} of {maps[0].label}" if len(maps) == 1 else f"mean over {len(maps)} torsion pairs"
    return Headline(about, _mean([m.divergence for m in maps]))


def _axis(label: str) -> str:
    """'φ' of 'φ ALA2'; a torsion without a symbol keeps its label."""
    return label.split(" ")[0]


def _mean(distances: Sequence[Distance]) -> Distance:
    """Mean of each field; the error is the mean of errors, a bound that holds however the terms are correlated."""

    def mean(name: str) -> float | None:
        values = [getattr(one, name) for one in distances]
        return None if any(value is None for value in values) else float(np.mean(values))

    model, halves, subsample = (
        float(np.mean([getattr(d, n) for d in distances])) for n in ("model", "halves", "subsample")
    )
    return Distance(model, mean("model_error"), halves, subsample, mean("reweighted"))


def _verdict(evaluation: Evaluation) -> Iterator[str]:
    if evaluation.headline is None:
        yield "The system has no torsion to compare, so there is no divergence; see geometry and clashes below."
    else:
        yield _judgement(evaluation.headline.divergence)
        yield _numbers_in_words(evaluation.headline)
    yield from _structure_in_words(evaluation)
    yield from _cost_in_words(evaluation.cost)


def _judgement(distance: Distance) -> str:
    if distance.model <= AT_NOISE_FLOOR * distance.subsample:
        return "In its torsions the model cannot be told apart from the MD at this sample size."
    if distance.model <= distance.halves:
        return "In its torsions the model agrees with the MD as well as the two halves of the MD agree with each other."
    ratio = distance.model / distance.halves if distance.halves > 0 else np.inf
    if ratio <= CLEARLY_DIFFERENT:
        return f"In its torsions the model differs from the MD {ratio:.1f} times as much as the halves of the MD do."
    return "The model does not reproduce the torsions of the MD: it differs far more than the halves of the MD do."


def _numbers_in_words(headline: Headline) -> str:
    d = headline.divergence
    error = "" if d.model_error is None else f" ± {d.model_error:.4f}"
    return (
        f"Jensen–Shannon divergence to MD {d.model:.4f}{error}; noise floor {d.subsample:.4f} (same-size subsample of the MD);"
        f" halves of the MD {d.halves:.4f} ({headline.about}; 0 is identical, ln 2 = 0.693 is disjoint)."
    )


def _structure_in_words(evaluation: Evaluation) -> Iterator[str]:
    stereo, bonds = evaluation.stereo, evaluation.bonds
    if stereo is not None:
        yield f"{percent(stereo.all_correct['model'].value)} of the samples have every stereocentre right."
    if bonds is not None:
        mean, spread = (x["model"].value for x in (bonds.largest_shift, bonds.largest_spread_change))
        off, md_off = (bonds.frames_off[name].value for name in ("model", "md"))
        yield (
            f"Bond lengths: means within {significant(mean, 2)} Å and standard deviations within {significant(spread, 2)} Å of"
            f" the MD; {percent(off)} of the samples have a bond off by more than {bonds.tolerance:g} Å (MD {percent(md_off)})."
        )
    clash, md_clash = (evaluation.clashes.frames_with_clash[name].value for name in ("model", "md"))
    yield f"{percent(clash)} of the samples have a clash (MD {percent(md_clash)})."


def _cost_in_words(cost: CostTable | None) -> Iterator[str]:
    if cost is None or cost.md_seconds_per_independent_sample is None or cost.model_seconds_per_sample is None:
        return
    md, model = cost.md_seconds_per_independent_sample, cost.model_seconds_per_sample
    yield (
        f"An independent sample costs {significant(model)} CPU seconds from the model (training left out) and"
        f" {significant(md)} from MD, {significant(md / model)} times as much."
    )


def _warnings(evaluation: Evaluation) -> Iterator[str]:
    subject, reference = evaluation.subject, evaluation.reference
    if subject.samples_left_out:
        total = subject.samples + subject.samples_left_out
        yield f"{subject.samples_left_out} of {total} samples have positions that are not finite; they were left out."
    if evaluation.bonds is None:
        yield "The system lists no bonds: torsions, bond lengths and angles could not be compared."
    if reference.independent_frames < MIN_INDEPENDENT_FRAMES:
        yield (
            f"The MD holds only about {reference.independent_frames:.0f} independent frames of {reference.frames}: its own"
            " distribution is uncertain, and its error bars are too small."
        )
    if reference.n_blocks < MIN_BLOCKS:
        yield f"The MD is cut into only {reference.n_blocks} blocks: its error bars are rough."
    yield from _basin_warnings(evaluation.maps)
    yield from _convergence_warnings(evaluation)
    yield from _weight_warnings(evaluation)


def _basin_warnings(maps: Sequence[MapComparison]) -> Iterator[str]:
    basins = [(f"{one.label} {row.name}", row, one) for one in maps for row in one.basins]
    rarely = [f"{name} ({row.md_arrivals})" for name, row, one in basins if _is_unconverged(row, one)]
    if rarely:
        yield (
            f"The MD arrived fewer than {MIN_ARRIVALS} times in {_listed(rarely)}: such a population is not converged in the"
            " MD, and no verdict on it can be trusted."
        )
    few = [
        f"{name} (MD {row.md_frames}, model {row.model_frames})"
        for name, row, _ in basins
        if min(row.md_frames, row.model_frames) < MIN_BASIN_FRAMES
    ]
    if few:
        yield f"Fewer than {MIN_BASIN_FRAMES} frames in {_listed(few)}: free energies of such basins are rough or missing."


def _is_unconverged(row: BasinRow, one: MapComparison) -> bool:
    """Whether the MD holds some frames of a basin, but not all, and seldom came there."""
    total = sum(other.md_frames for other in one.basins)
    return 0 < row.md_frames < total and row.md_arrivals < MIN_ARRIVALS


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED_IN_WARNING} other basins" if len(names) > NAMED_IN_WARNING else ""
    return ", ".join(names[:NAMED_IN_WARNING]) + more


def _convergence_warnings(evaluation: Evaluation) -> Iterator[str]:
    headline = evaluation.headline
    if headline is not None and headline.divergence.halves > 5 * headline.divergence.subsample:
        yield (
            f"The two halves of the MD differ by {headline.divergence.halves:.4f}, far above the noise floor of"
            f" {headline.divergence.subsample:.4f}: the MD is not converged, and a model cannot be judged more finely than that."
        )


def _weight_warnings(evaluation: Evaluation) -> Iterator[str]:
    weights, diagnosis = evaluation.reweighting, evaluation.physics.weights
    if weights is None:
        return
    if diagnosis is not None and diagnosis.trusted == "no":
        yield f"The weights: {diagnosis.verdict}."
    elif weights.effective_samples < MIN_EFFECTIVE_SAMPLES or weights.fraction < MIN_EFFECTIVE_FRACTION:
        yield (
            f"The reweighted numbers rest on {weights.effective_samples:.1f} effective samples"
            f" ({percent(weights.fraction)} of all): do not trust them."
        )
