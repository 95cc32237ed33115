"""From ensembles and reference trajectories to reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dig_scale.config import Evaluate
from dig_scale.ensemble import FILE_NAME, Ensemble, read_ensemble
from dig_scale.errors import UserError
from dig_scale.progress import Reporter, stage
from dig_scale.stages.reweight import told_states

if TYPE_CHECKING:
    from dig_scale.evaluation.reference_files import ReferenceFile, ReferenceFrames
    from dig_scale.system import System


def evaluate_stage(
    source: Path, reference: Path, settings: Evaluate, out: Path, file: ReferenceFile | None = None
) -> Path:
    """Compare an ensemble, or those in the folders of a folder, with reference trajectories; the path of report.html.

    report.json and summary.png are written beside it; of several ensembles each has its report in OUT/<system>.
    """
    alone = source.is_file() or (source / FILE_NAME).is_file()
    folders = [] if alone else sorted(path.parent for path in source.glob(f"*/{FILE_NAME}"))
    with stage("evaluate") as report:
        if folders:
            return _evaluated_each(folders, reference, settings, out, report)
        page = _evaluated(source, _Given(reference, file), settings, out)
        report(1, 1, str(page))
    return page


def _evaluated_each(folders: Sequence[Path], reference: Path, settings: Evaluate, out: Path, report: Reporter) -> Path:
    """Reports of several ensembles and their overview; one that cannot be compared is named there, if any can."""
    from dig_scale.evaluation.kind_report import write_overview
    from dig_scale.evaluation.reference_files import stored_systems

    given = _Given(reference, stores=stored_systems(reference) if reference.is_dir() else None)
    pages: dict[str, Path] = {}
    failed: dict[str, UserError] = {}
    for number, folder in enumerate(folders):
        report(number, len(folders), f"{folder.name}, {number + 1} of {len(folders)} systems")
        try:
            pages[folder.name] = _evaluated(folder, given, settings, out / folder.name)
        except UserError as error:
            failed[folder.name] = error
    if not pages:
        raise next(iter(failed.values()))
    page = write_overview(pages, {name: str(error) for name, error in failed.items()}, out)
    report(1, 1, str(page))
    return page


@dataclass(frozen=True)
class _Given:
    """Where reference trajectories are: a folder or file, what a file does not say, the systems of a folder where known."""

    source: Path
    file: ReferenceFile | None = None
    stores: Mapping[Path, System] | None = None


def _evaluated(source: Path, reference: _Given, settings: Evaluate, out: Path) -> Path:
    """The report of one ensemble: of its kind, or of a molecule's torsions; with the states that it was reweighted between."""
    ensemble = read_ensemble(source)
    settings = _with_states(settings, source)

    from dig_scale.evaluation.kind_report import write_kind_report
    from dig_scale.evaluation.kinds.evaluation import comparison_of, evaluate_kind
    from dig_scale.evaluation.reference_files import reference_for
    from dig_scale.evaluation.side_by_side import reference_of

    found = reference_for(ensemble, reference.source, reference.file, reference.stores)
    if comparison_of(ensemble) is None:
        return _evaluated_by_torsions(ensemble, found, reference.source.name, settings, out)
    data = reference_of(found.system, found.frames, found.temperature, reference.source.name)
    return write_kind_report(evaluate_kind(ensemble, data, settings), out)


def _with_states(settings: Evaluate, source: Path) -> Evaluate:
    """The settings, with the states that `dig-scale reweight` was last asked for where they have none."""
    return settings if settings.states else settings.model_copy(update={"states": told_states(source)})


def _evaluated_by_torsions(
    ensemble: Ensemble, found: ReferenceFrames, source: str, settings: Evaluate, out: Path
) -> Path:
    from dig_scale.evaluation.comparison import evaluate
    from dig_scale.evaluation.cost import Costs
    from dig_scale.evaluation.pictures import summary_picture
    from dig_scale.evaluation.reference import reference_from_frames
    from dig_scale.evaluation.report import write_report

    provenance = ensemble.provenance
    costs = Costs(
        md_cpu_seconds=found.cpu_seconds,
        training_cpu_seconds=provenance.get("training_cost", {}).get("cpu_seconds"),
        sampling_cpu_seconds=provenance.get("cpu_seconds"),
        network_evaluations_per_sample=provenance.get("network_evaluations_per_sample"),
        weighting_cpu_seconds=_weighting_seconds(ensemble),
    )
    data = reference_from_frames(found.system, found.frames, found.temperature, source)
    result = evaluate(ensemble, data, settings, costs)
    page = write_report(result, out)
    summary_picture(result, out / "summary.png")
    return page


def _weighting_seconds(ensemble: Ensemble) -> float | None:
    """CPU seconds of log-densities and energies, where both were computed."""
    told = ensemble.provenance
    if "density" not in told or "energy_cpu_seconds" not in told:
        return None
    return float(told["density"]["cpu_seconds"]) + float(told["energy_cpu_seconds"])
