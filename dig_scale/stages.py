"""The stages of a run, each from the files of the one before it: simulate, pack, train, sample, evaluate.

In: a Recipe and folders. Out: folders. Used by the command line, one stage at a time or all in a row; every stage is
idempotent and carries on where a killed one stopped. Heavy packages are imported by the stage that needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dig_scale.config import Evaluate, Recipe, Sample
from dig_scale.ensemble import FILE_NAME, Ensemble, read_ensemble
from dig_scale.errors import UserError
from dig_scale.progress import Reporter, duration, stage
from dig_scale.system import System

if TYPE_CHECKING:
    from dig_scale.config import CalculatorSpec, Model
    from dig_scale.evaluation.reference_files import ReferenceFile, ReferenceFrames
    from dig_scale.serving.offline import Draws


@dataclass(frozen=True)
class RunFolders:
    """Where the stages of one run keep their files."""

    root: Path

    @property
    def trajectories(self) -> Path:
        """Zarr trajectories of the simulation."""
        return self.root / "trajectories"

    @property
    def dataset(self) -> Path:
        """Packed training shards."""
        return self.root / "dataset"

    @property
    def model(self) -> Path:
        """Training run with its model.safetensors."""
        return self.root / "model"

    @property
    def ensemble(self) -> Path:
        """Samples."""
        return self.root / "ensemble"

    @property
    def report(self) -> Path:
        """report.html, report.json and summary.png."""
        return self.root / "report"


def default_folders(name: str) -> RunFolders:
    """Where a recipe's run goes when nothing else is said: runs/NAME."""
    return RunFolders(Path("runs") / name)


def simulate_stage(recipe: Recipe, out: Path) -> None:
    """Generate the trajectories of a recipe, and the crystals of its structure searches."""
    if recipe.searches:
        _search_crystals(recipe, out)
    if recipe.simulate is not None or not recipe.searches:
        _simulate_systems(recipe, out)


def _search_crystals(recipe: Recipe, out: Path) -> None:
    from dig_scale.simulation.ase_search import search_crystals

    with stage("search") as report:
        for number, spec in enumerate(recipe.searches):
            report(number, len(recipe.searches), f"{spec.composition}, {spec.candidates} random cells")
            found = search_crystals(spec, out)
            words = (
                f"{spec.composition}: {found.kept} crystals, {found.repeats} found again, {len(found.failed)} failed"
            )
            report(number + 1, len(recipe.searches), words)


def _simulate_systems(recipe: Recipe, out: Path) -> None:
    from dig_scale.simulation.campaign import Progress, simulate

    with stage("simulate") as report:

        def show(p: Progress) -> None:
            speed = f"{p.ns_per_day:.0f} ns/day" if p.ns_per_day else "starting"
            words = f"{p.done_ns:.2f} of {p.total_ns:.2f} ns, {speed}, {duration(p.eta_s)} left"
            report(p.done_ns, p.total_ns, words + (f", {p.failed} failed" if p.failed else ""))

        simulate(recipe, out, show)


def import_stage(recipe: Recipe, out: Path) -> None:
    """Read the data that a recipe imports."""
    from dig_scale.importers.readers import run_import

    with stage("import") as report:
        count = 0
        for number, entry in enumerate(recipe.imports):
            count += len(run_import(entry, out))
            report(number + 1, len(recipe.imports), f"{count} trajectories")


def evenly_spread(number: int) -> Callable[[int], Sequence[int]]:
    """Chooses `number` frames of any count, evenly spread, first and last among them; all where there are fewer."""

    def chosen(count: int) -> Sequence[int]:
        if number == 1 or count <= number:
            return range(min(count, number))
        return [round(k * (count - 1) / (number - 1)) for k in range(number)]

    return chosen


def relabel_stage(
    folders: Sequence[Path],
    choose: Callable[[int], Sequence[int]],
    spec: CalculatorSpec,
    out: Path,
    actors: int | None = None,
) -> list[Path]:
    """Compute energies and forces of frames of all trajectories again; `choose` gives indices for a number of frames."""
    from dig_shards.trajectory import TrajectoryReader

    from dig_scale.records import find_trajectories
    from dig_scale.simulation.relabel import ChosenFrames, RelabelOptions, relabel

    with stage("relabel") as report:
        paths = [path for folder in folders for path in find_trajectories(folder)]
        chosen = [ChosenFrames(path, tuple(choose(TrajectoryReader(path).n_frames))) for path in paths]
        count = sum(len(one.frames) for one in chosen)
        report(0, 1, f"{count} frames of {len(paths)} trajectories")
        stores = relabel(chosen, spec, out, RelabelOptions(actors=actors))
        report(1, 1, f"{count} frames of {len(paths)} trajectories")
    return stores


def pack_stage(recipe: Recipe, folders: Sequence[Path], out: Path) -> None:
    """Pack trajectories into shards; all-atom ones become residue frames first where the recipe says so."""
    from dig_scale.records import pack_dataset

    if recipe.pack is not None and recipe.pack.atoms == "residues":
        folders = [_residue_frames(folders, out.parent / "residues")]
    with stage("pack") as report:
        manifest = pack_dataset(
            recipe, folders, out, lambda done, total: report(done, total, f"{done} of {total} frames")
        )
        report(1, 1, ", ".join(f"{split} {manifest.frames(split)} frames" for split in manifest.shards))


def _residue_frames(folders: Sequence[Path], out: Path) -> Path:
    """The folder `out` with the trajectories below `folders` as residue frames."""
    from dig_scale.importers.backbone import backbone_of
    from dig_scale.importers.stores import write_store
    from dig_scale.records import ROTATIONS, find_trajectories, read_trajectory_frames, trajectory_origin

    with stage("residues") as report:
        paths = [path for folder in folders for path in find_trajectories(folder)]
        for number, path in enumerate(paths):
            system, frames = read_trajectory_frames(path)
            if getattr(frames, ROTATIONS) is None:
                system, frames = backbone_of(system, frames)
            write_store(out / path.parent.name / path.name, system, frames, trajectory_origin(path))
            report(number + 1, len(paths), f"{number + 1} of {len(paths)} trajectories")
    return out


def train_stage(recipe: Recipe, dataset: Path, out: Path, ranks: int | None = None) -> None:
    """Train on this machine."""
    from dig_scale.training.launch import TrainingProgress, launch_ranks

    with stage("train") as report:

        def show(p: TrainingProgress) -> None:
            words = f"step {p.step} of {p.steps}, loss {p.loss:.4f}, {p.samples_per_s:.0f} frames/s"
            report(p.step, p.steps, f"{words}, {duration(p.seconds_left)} left")

        launch_ranks(recipe, dataset, out, ranks, show)


def sample_stage(wanted: Sequence[Draws]) -> list[Ensemble]:
    """Draw samples offline, of every system that is asked for."""
    from dig_scale.serving.offline import sample_ensembles

    with stage("sample") as report:
        return sample_ensembles(wanted, lambda done, total: report(done, total, f"{done} of {total} samples"))


def shared_out(
    checkpoint: Path, wanted: str | None, settings: Sample, out: Path, representation: str | None = None
) -> list[Draws]:
    """What to sample: the system that is named, or the only one, into `out`; else settings.num samples shared among the
    training systems as their training frames are, each into a folder OUT/<system>; those that get none are left out.
    `representation` (what importers.representations.represented takes) gives one system's features in the place of its own.
    """
    import torch

    from dig_scale.serving.offline import Draws
    from dig_scale.serving.served import load_served_model
    from dig_scale.serving.shares import folder_names, shares

    model = load_served_model(checkpoint, torch.device("cpu"))
    if wanted is not None or len(model.systems) == 1:
        system = trained_system(checkpoint, wanted)
        if representation is not None:
            system = _represented(system, representation, model.recipe.model)
        return [Draws(checkpoint, system, settings, out)]
    if representation is not None:
        raise UserError(f"--representation {representation} is of one system: name it with --system")
    if set(model.frames) != set(model.systems):
        raise UserError(
            f"{checkpoint} was trained on {len(model.systems)} systems ({', '.join(list(model.systems)[:4])}, ...) and does "
            "not say on how many frames of each: name one with --system"
        )
    counts = {name: count for name, count in shares(settings.num, model.frames).items() if count}
    folders = folder_names(counts)
    return [
        Draws(checkpoint, model.systems[name], settings.model_copy(update={"num": count}), out / folders[name])
        for name, count in counts.items()
    ]


def _represented(system: System, representation: str, model: Model) -> System:
    from dig_scale.importers.representations import represented

    if not model.site_features and not model.pair_features:
        raise UserError(
            f"--representation {representation}: this model reads none (its model.site_features and model.pair_features are 0)"
        )
    return represented(system, representation)


def trained_system(checkpoint: Path, wanted: str | None) -> System:
    """The system to sample: a training system by name, a file, or a sequence; the only training system when None."""
    import torch

    from dig_scale.importers.sampled import Reading, is_file_name, system_from_file
    from dig_scale.records import packed_system
    from dig_scale.serving.catalogue import Catalogue
    from dig_scale.serving.schema import SamplesRequest
    from dig_scale.serving.served import load_served_model

    model = load_served_model(checkpoint, torch.device("cpu"))
    if wanted is None:
        if len(model.systems) == 1:
            return next(iter(model.systems.values()))
        raise UserError(f"{checkpoint} was trained on {', '.join(model.systems)}: say which with --system")
    if wanted in model.systems:
        return model.systems[wanted]
    if is_file_name(wanted):
        kinds = frozenset(str(system.kind) for system in model.systems.values())
        reading = Reading(model.recipe.model.sites, kinds, model.recipe.simulate)
        system = system_from_file(Path(wanted), reading)
        return system if wanted.lower().endswith(".json") else packed_system(system, model.recipe.pack)
    if model.recipe.model.sites in ("anchored", "crystal"):
        known = ", ".join(list(model.systems)[:8])
        raise UserError(f"--system {wanted!r}: no file, and no training system of that name; {checkpoint} has {known}")
    return Catalogue(model).system(SamplesRequest(sequence=wanted, num=1))


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
        page = _evaluated(source, reference, settings, out, file)
        report(1, 1, str(page))
    return page


def _evaluated_each(folders: Sequence[Path], reference: Path, settings: Evaluate, out: Path, report: Reporter) -> Path:
    """Reports of several ensembles and their overview; one that cannot be compared is named there, if any can."""
    from dig_scale.evaluation.kind_report import write_overview

    pages: dict[str, Path] = {}
    failed: dict[str, UserError] = {}
    for number, folder in enumerate(folders):
        report(number, len(folders), f"{folder.name}, {number + 1} of {len(folders)} systems")
        try:
            pages[folder.name] = _evaluated(folder, reference, settings, out / folder.name, None)
        except UserError as error:
            failed[folder.name] = error
    if not pages:
        raise next(iter(failed.values()))
    page = write_overview(pages, {name: str(error) for name, error in failed.items()}, out)
    report(1, 1, str(page))
    return page


def _evaluated(source: Path, reference: Path, settings: Evaluate, out: Path, file: ReferenceFile | None) -> Path:
    """The report of one ensemble: of its kind, or of a molecule's torsions; with the states that it was reweighted between."""
    ensemble = read_ensemble(source)
    settings = _with_states(settings, source)

    from dig_scale.evaluation.kind_report import write_kind_report
    from dig_scale.evaluation.kinds.evaluation import comparison_of, evaluate_kind
    from dig_scale.evaluation.reference_files import reference_for
    from dig_scale.evaluation.side_by_side import reference_of

    found = reference_for(ensemble, reference, file)
    if comparison_of(ensemble) is None:
        return _evaluated_by_torsions(ensemble, found, reference.name, settings, out)
    data = reference_of(found.system, found.frames, found.temperature, reference.name)
    return write_kind_report(evaluate_kind(ensemble, data, settings), out)


def _with_states(settings: Evaluate, source: Path) -> Evaluate:
    """The settings, with the states that `dig-scale reweight` was last asked for where they have none."""
    from dig_scale.reweighted import told_states

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


def run_all(recipe: Recipe, folders: RunFolders) -> Path:
    """Every stage of a recipe in a row; the path of report.html."""
    for section in ("pack", "train"):
        if getattr(recipe, section) is None:
            raise UserError(f"recipe {recipe.name!r} has no [{section}] section; `dig-scale run` needs it")
    if recipe.simulate is None and not recipe.imports and not recipe.searches:
        raise UserError(
            f"recipe {recipe.name!r} has neither [simulate] nor [[imports]] nor [[searches]]; `dig-scale run` needs one"
        )
    if recipe.simulate is not None or recipe.searches:
        simulate_stage(recipe, folders.trajectories)
    if recipe.imports:
        import_stage(recipe, folders.trajectories)
    pack_stage(recipe, [folders.trajectories], folders.dataset)
    train_stage(recipe, folders.dataset, folders.model)
    sample_stage(shared_out(folders.model, None, recipe.sample, folders.ensemble))
    return evaluate_stage(folders.ensemble, folders.trajectories, recipe.evaluate, folders.report)
