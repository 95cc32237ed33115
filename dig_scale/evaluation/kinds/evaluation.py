"""KindEvaluation: an ensemble of proteins, poses, surfaces or crystals against its reference; and which of them it is.

In: an Ensemble and its Reference. Out: KindEvaluation, plain numbers and words but for its figures. What an ensemble is
follows from what it holds: residue frames, a cell per sample, an adsorbate on a slab, a ligand in a pocket.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dig_scale.config import Evaluate
from dig_scale.ensemble import Ensemble
from dig_scale.errors import UserError
from dig_scale.evaluation.comparison import subject_of
from dig_scale.evaluation.kinds import crystals, poses, proteins, surfaces
from dig_scale.evaluation.result import Subject
from dig_scale.evaluation.side_by_side import Findings, Reference, samples_of
from dig_scale.system import Frames, SiteRole, System

Compare = Callable[[System, Frames, Reference, Evaluate], Findings]


@dataclass(frozen=True)
class Source:
    """The reference: frames in how many trajectories, temperature in K, and where it came from."""

    frames: int
    trajectories: int
    temperature: float
    source: str


@dataclass(frozen=True)
class KindEvaluation:
    """What was evaluated, against what, and what was found."""

    subject: Subject
    reference: Source
    findings: Findings
    seed: int


def comparison_of(ensemble: Ensemble) -> Compare | None:
    """What compares an ensemble of this kind; None for molecules, which their torsions describe."""
    if ensemble.rotations is not None:
        return proteins.compared
    if ensemble.cell is not None:
        return crystals.compared
    roles = set(ensemble.system.roles.tolist())
    if ensemble.system.cell is not None and SiteRole.ADSORBATE in roles:
        return surfaces.compared
    return poses.compared if SiteRole.LIGAND in roles else None


def evaluate_kind(ensemble: Ensemble, reference: Reference, settings: Evaluate) -> KindEvaluation:
    """Compare an ensemble for which there is a comparison_of; raises UserError where the two do not match."""
    compare = comparison_of(ensemble)
    if compare is None:
        raise UserError(f"ensemble of {ensemble.system.name!r}: a molecule is compared by its torsions")
    model = samples_of(ensemble)
    source = Source(
        reference.frames.n_frames, int(reference.trajectory.max()) + 1, reference.temperature, reference.source
    )
    findings = compare(ensemble.system, model, reference, settings)
    return KindEvaluation(subject_of(ensemble, model.n_frames), source, findings, settings.seed)
