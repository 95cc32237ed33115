"""Ligands in pockets against known poses or MD of the complex: RMSD in place, best of n, clashes, the checks of PoseBusters.

In: samples and reference of ligand and pocket. Out: Findings. A reference of few frames holds the known poses, and a sample is
compared with the nearest; of a longer one the first frame is the pose that samples and reference frames are measured from.
"""

from __future__ import annotations

from dataclasses import fields
from importlib.util import find_spec

import numpy as np

from dig_scale.config import Evaluate
from dig_scale.evaluation import poses
from dig_scale.evaluation.formats import counted, percent
from dig_scale.evaluation.kind_pictures import histograms_figure
from dig_scale.evaluation.reference import match_sites
from dig_scale.evaluation.side_by_side import (
    Findings,
    Headline,
    Observable,
    Reference,
    Row,
    Section,
    Table,
    distance_table,
    in_words,
    means_table,
    observed_distances,
    sets_of,
)
from dig_scale.records import evenly_spread
from dig_scale.system import Frames, System

POSES_CHECKED = 30
"""Samples, and reference frames, that PoseBusters looks at."""
BEST_OF = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_FIXED = 1e-3
"""Å; a pocket that moves less is held fixed."""
_LABELS = {
    "rmsd": "RMSD of the ligand in place (Å)",
    "conformer_rmsd": "RMSD of the conformer (Å)",
    "centroid_distance": "distance of its centre (Å)",
    "pocket_rmsd": "RMSD of the pocket (Å)",
    "clashes": "clashes with the pocket",
}
_NOTES = (
    (
        "RMSD in place",
        "Of the ligand's atoms where they stand; atoms that its bonds cannot tell apart may be swapped.",
    ),
    ("RMSD of the conformer", "After superposition: the shape of the ligand alone."),
    ("Best of n", "Expected smallest RMSD among n of the samples, drawn without replacement."),
    ("Clash", "A heavy atom of the ligand within 2 Å of one of the pocket."),
)


def compared(system: System, model: Frames, reference: Reference, settings: Evaluate) -> Findings:
    """Findings on samples of a ligand in its pocket."""
    sites = match_sites(system, reference.system)
    known = Frames(reference.frames.positions[:, sites], reference.frames.time_ps)
    reference = Reference(system, known, reference.trajectory, reference.temperature, reference.source)
    sets = sets_of(model, reference, settings.seed)
    accuracy = _nearest(system, model.positions, known.positions if reference.is_few else known.positions[:1])
    observables = _observables(system, accuracy, reference)
    place = observables[0]
    headline = None
    if not reference.is_few:
        about = "RMSD of the ligand from the first reference frame, Wasserstein-1"
        headline = Headline(about, observed_distances(place, sets), "length", "Å")
    drawn = [one for one in observables if one.is_drawn]
    tables = [means_table("Mean, and standard deviation σ", observables, sets)]
    tables += (
        [] if reference.is_few else [distance_table("Wasserstein-1 distances, in the unit of the number", drawn, sets)]
    )
    caption = "Samples and reference, % per bin; from the nearest known pose, or from the first frame of the MD."
    sections = [Section("Poses", tuple(tables), histograms_figure(drawn), caption), _best_of(accuracy)]
    sections += _checked(system, model.positions, known.positions)
    return Findings(tuple(_verdict(headline, accuracy, reference)), headline, tuple(sections), _NOTES)


def _nearest(system: System, positions: np.ndarray, known: np.ndarray) -> poses.PoseAccuracy:
    """Accuracy of every sample against the known pose that it is nearest to in place."""
    each = [poses.pose_accuracy(system, positions, pose) for pose in known]
    chosen = np.stack([one.rmsd for one in each]).argmin(axis=0)
    rows = np.arange(len(positions))
    stacked = {field.name: np.stack([getattr(one, field.name) for one in each]) for field in fields(each[0])}
    return poses.PoseAccuracy(**{name: values[chosen, rows] for name, values in stacked.items()})


def _observables(system: System, accuracy: poses.PoseAccuracy, reference: Reference) -> list[Observable]:
    known = reference.frames.positions
    if reference.is_few:
        # a known pose is no distance from itself: only its clashes say something
        none = np.zeros(0)
        measured = {**dict.fromkeys(_LABELS, none), "clashes": poses.pocket_clashes(system, known)}
    else:
        found = poses.pose_accuracy(system, known, known[0])
        measured = {name: getattr(found, name) for name in _LABELS}
    observables = [
        Observable(label, getattr(accuracy, name), measured[name], "number" if name == "clashes" else "length")
        for name, label in _LABELS.items()
        if name != "pocket_rmsd" or (accuracy.pocket_rmsd > _FIXED).any()
    ]
    near = accuracy.rmsd < poses.GOOD_POSE
    known_near = measured["rmsd"] < poses.GOOD_POSE if len(measured["rmsd"]) else measured["rmsd"]
    return [*observables, Observable(f"within {poses.GOOD_POSE:g} Å", near, known_near, "percent")]


def _best_of(accuracy: poses.PoseAccuracy) -> Section:
    counts = [n for n in BEST_OF if n <= len(accuracy.rmsd)]
    columns = {str(n): f"of {n:,}" for n in counts}
    rows = [
        Row(label, "length", {str(n): poses.expected_best(getattr(accuracy, name), n) for n in counts})
        for name, label in (("rmsd", _LABELS["rmsd"]), ("conformer_rmsd", _LABELS["conformer_rmsd"]))
    ]
    return Section("Best of n samples", (Table("Expected smallest RMSD", columns, tuple(rows)),))


def _checked(system: System, samples: np.ndarray, known: np.ndarray) -> list[Section]:
    if find_spec("posebusters") is None:
        return []
    chosen = [values[evenly_spread(len(values), POSES_CHECKED)] for values in (samples, known)]
    model, reference = (poses.posebusters_checks(system, values, depth=poses.CheckDepth.FAST) for values in chosen)
    shares = {
        name.replace("_", " "): {"model": share, "md": reference.fractions().get(name)}
        for name, share in model.fractions().items()
    }
    failed = [Row(name, "percent", values) for name, values in shares.items() if set(values.values()) != {1.0}]
    every = {"model": float(model.valid.mean()), "md": float(reference.valid.mean())}
    rows = (Row(f"all {len(shares)} checks", "percent", every), *failed)
    looked = f"{len(chosen[0])} samples and {counted(len(chosen[1]), 'reference frame')}, evenly chosen"
    note = f"{looked}; without the conformer's energy. Checks that all of them pass are not listed."
    columns = {"model": "Model", "md": "Reference"}
    return [Section("PoseBusters", (Table("Share of poses that pass", columns, rows, note),))]


def _verdict(headline: Headline | None, accuracy: poses.PoseAccuracy, reference: Reference) -> list[str]:
    n = min(10, len(accuracy.rmsd))
    best = f"The best of {n} samples is {accuracy.best_of(n):.2f} Å"
    what = "the nearest known pose" if reference.is_few else "the first frame of the reference"
    said = f"{best} from {what}; {percent(accuracy.found())} of the samples are within {poses.GOOD_POSE:g} Å."
    clashes = f"{percent(float((accuracy.clashes > 0).mean()))} of the samples clash with the pocket."
    return [*([] if headline is None else [in_words(headline)]), said, clashes]
