"""The command line: dig-scale run | simulate | import | pack | verify | train | sample | density | combine | reweight |
interpolate | serve | request | evaluate, and import-weights, relabel, recipes, describe.

Every command is a thin door to dig_scale.stages and the packages below. Bad input ends in one line with the next step.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dig_scale import cli_properties
from dig_scale.cli_data import Overrides, data, refuse
from dig_scale.cli_physics import physics
from dig_scale.config import Recipe, Sample, SolverName
from dig_scale.errors import UserError
from dig_scale.progress import stage
from dig_scale.recipe_files import bundled_recipes, load_recipe
from dig_scale.stages.folders import RunFolders, default_folders

if TYPE_CHECKING:
    from dig_scale.serving.offline import Draws

app = typer.Typer(
    help="Learn and sample the equilibrium distribution of molecular systems (Distributional Graphormer).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(data)
app.add_typer(physics)

RecipeArgument = Annotated[str, typer.Argument(help="A .toml file or the name of a bundled recipe.")]
Checkpoint = Annotated[Path, typer.Argument(help="A training folder or a model.safetensors.")]
PublishedSamplerName = Literal["released", "probability-flow", "stochastic", "dpm", "heun"]
SystemOption = Annotated[
    str | None,
    typer.Option("--system", help="Training system by name, a PDB, mmCIF, SDF or system .json file, or a sequence."),
]


@app.command()
def run(
    recipe: RecipeArgument,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the run (default: runs/RECIPE); carried on if there.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Simulate, pack, train, sample and evaluate a recipe, one stage after the other."""
    from dig_scale.stages.run import run_all

    chosen = load_recipe(recipe, overrides or [])
    folders = RunFolders(out) if out else default_folders(chosen.name)
    page = run_all(chosen, folders)
    typer.echo(f"report: {page}")
    typer.echo(f"serve the model: dig-scale serve {folders.model}")


@app.command()
def simulate(
    recipe: RecipeArgument,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of trajectories (default: runs/RECIPE/trajectories); carried on if there."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Generate trajectories with molecular dynamics on Ray actors, and crystals by random structure search."""
    from dig_scale.stages.data import simulate_stage

    chosen = load_recipe(recipe, overrides or [])
    folder = out or default_folders(chosen.name).trajectories
    simulate_stage(chosen, folder)
    typer.echo(f"trajectories: {folder}")


@app.command()
def pack(
    recipe: RecipeArgument,
    trajectories: Annotated[
        list[Path] | None, typer.Argument(help="Folders or .zarr trajectories (default: runs/RECIPE/trajectories).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the dataset (default: runs/RECIPE/dataset).")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Pack trajectories into verified WebDataset shards."""
    from dig_scale.stages.data import pack_stage

    chosen = load_recipe(recipe, overrides or [])
    folders = default_folders(chosen.name)
    pack_stage(chosen, trajectories or [folders.trajectories], out or folders.dataset)
    typer.echo(f"dataset: {out or folders.dataset}")


@app.command()
def verify(directory: Annotated[Path, typer.Argument(help="A packed dataset or a .zarr trajectory.")]) -> None:
    """Read everything and report any damage; exit code 1 if there is some."""
    from dig_shards.verify import verify as verify_dataset
    from dig_shards.verify import verify_trajectory

    if not directory.is_dir():
        raise UserError(f"no folder {directory}: give a dataset or a .zarr trajectory")
    report = (verify_trajectory if directory.suffix == ".zarr" else verify_dataset)(directory)
    for problem in report.problems:
        typer.echo(problem)
    typer.echo(f"{directory}: {len(report.problems)} problems in {report.files} files, {report.bytes / 1e6:.1f} MB")
    if not report.is_clean:
        raise typer.Exit(1)


@app.command()
def train(
    recipe: RecipeArgument,
    dataset: Annotated[
        Path | None, typer.Argument(help="Folder of a packed dataset (default: runs/RECIPE/dataset).")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Training folder (default: runs/RECIPE/model, or predictor); carried on if there."),
    ] = None,
    ranks: Annotated[int | None, typer.Option(help="Processes; cores or GPUs when absent.")] = None,
    overrides: Overrides = None,
) -> None:
    """Train a score model, or with [predict] a predictor, with DeepSpeed on this machine (torchrun, Slurm, Ray: see launch/)."""
    from dig_scale.stages.train import train_stage

    chosen = load_recipe(recipe, overrides or [])
    folders = default_folders(chosen.name)
    target = out or (folders.predictor if chosen.predict else folders.model)
    train_stage(chosen, dataset or folders.dataset, target, ranks)
    typer.echo(f"model: {target}")


@app.command()
def sample(
    checkpoint: Checkpoint,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the ensemble (default: beside the model); more samples are added to it."),
    ] = None,
    system: SystemOption = None,
    num: Annotated[int | None, typer.Option(min=1, help="Samples wanted in all.")] = None,
    valid: Annotated[
        int | None,
        typer.Option(min=1, help="Physically valid samples wanted, instead of --num: draws until there are."),
    ] = None,
    attempts_cap: Annotated[
        int | None, typer.Option(min=1, help="Samples drawn at most for --valid (default: ten for each).")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    solver: Annotated[SolverName | None, typer.Option()] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Solver steps per sample.")] = None,
    batch: Annotated[int | None, typer.Option(min=1)] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; cores or GPUs when absent.")] = None,
    condition: Annotated[
        list[str] | None, typer.Option("--condition", metavar="NAME=VALUE", help="A property that samples shall have.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="1 samples p(x | condition), more sharpens it, 0 ignores it.")
    ] = None,
    guide: cli_properties.Guide = None,
    guide_target: cli_properties.GuideTarget = None,
    guide_spread: cli_properties.GuideSpread = None,
    guide_window: cli_properties.GuideWindow = None,
    guide_softness: cli_properties.GuideSoftness = None,
    guide_scale: cli_properties.GuideScale = None,
    guide_clip: cli_properties.GuideClip = None,
    guide_start: cli_properties.GuideTime = None,
    guide_end: cli_properties.GuideTime = None,
    steer: cli_properties.Steer = None,
    steer_strength: cli_properties.SteerStrength = None,
    representation: Annotated[
        str | None,
        typer.Option(
            help="AlphaFold2's single and pair, .npz, .pkl or _single.npy, for published networks and models that read them; "
            "esm2:MODEL, a name or a folder, for models that read a language model's; or template:FILE, a known structure."
        ),
    ] = None,
    sequence: Annotated[
        str | None, typer.Option(help="Of published networks: the protein, in one-letter codes.")
    ] = None,
    sampler: Annotated[
        PublishedSamplerName | None, typer.Option(help="Of published networks; their own if absent.")
    ] = None,
    init_state: Annotated[
        Path | None, typer.Option(help="Of published networks: start states to replay, .npz of theirs or ours.")
    ] = None,
) -> None:
    """Draw an equilibrium ensemble: ensemble.npz, and files for other tools.

    Without --system, samples of a model of several systems are shared among them as their training frames are, each into
    a folder of its own. Of a folder that import-weights wrote, proteins are sampled from AlphaFold2's representations, slabs and
    crystals of carbon (--system C8) from --system.
    """
    given: dict[str, object] = {"num": num, "seed": seed, "batch": batch}
    trained = {"solver": solver, "steps": steps, "workers": workers, "guidance": guidance}
    guides: dict[str, object] = {
        "property": guide,
        "target": guide_target,
        "spread": guide_spread,
        "window": guide_window,
    }
    guides |= {
        "softness": guide_softness,
        "scale": guide_scale,
        "clip": guide_clip,
        "start": guide_start,
        "end": guide_end,
    }
    steers: dict[str, object] = {"potentials": steer, "strength": steer_strength}
    published = {"sequence": sequence, "sampler": sampler, "init_state": init_state}
    if (checkpoint / "published.json").is_file():
        filtered = {"valid": valid, "attempts_cap": attempts_cap}
        refuse(trained | filtered | {"condition": condition}, "is not for published networks")
        refuse({"guide": guide, "steer": steer}, "is not for published networks")
        if system is not None:
            refuse(published | {"representation": representation}, "is of proteins, and --system of slabs and crystals")
            _sample_published_atoms(checkpoint, out, given | {"system": system})
            return
        _sample_published(checkpoint, out, given | published | {"representation": representation})
        return
    refuse(published, f"is for folders that `dig-scale import-weights` wrote, and {checkpoint} is none")
    if valid is None:
        refuse({"attempts_cap": attempts_cap}, "is for --valid N")
    else:
        refuse({"num": num}, "and --valid are two ways to say how many: give one")
        given["num"] = valid
    from dig_scale.model.checkpoint import load_checkpoint
    from dig_scale.serving.served import require_wanted, wanted_by
    from dig_scale.stages.sample import shared_out

    recipe = load_checkpoint(checkpoint).recipe
    given |= trained
    if condition:
        given["conditions"] = recipe.sample.conditions | dict(_condition(text) for text in condition)
    given |= cli_properties.with_wishes(recipe.sample, guides, steers)
    chosen = {key: value for key, value in given.items() if value is not None}
    settings = _sample_settings(recipe.sample.model_dump() | chosen)
    require_wanted(recipe, wanted_by(settings, guidance=guidance))
    if valid is not None and settings.steer is not None:
        raise UserError(
            "--valid draws until there are enough, and steered samples come in whole populations: give --num"
        )
    folder = out or (checkpoint if checkpoint.is_dir() else checkpoint.parent).parent / "ensemble"
    wanted = shared_out(checkpoint, system, settings, folder, representation)
    if valid is None:
        _draw(wanted)
    else:
        _draw_valid(wanted, attempts_cap)


def _sample_settings(content: dict[str, Any]) -> Sample:
    from pydantic import ValidationError

    try:
        return Sample.model_validate(content)
    except ValidationError as error:
        raise UserError("; ".join(item["msg"].removeprefix("Value error, ") for item in error.errors())) from None


def _draw(wanted: Sequence[Draws]) -> None:
    from dig_scale.stages.sample import sample_stage

    for draws, ensemble in zip(wanted, sample_stage(wanted), strict=True):
        typer.echo(f"{ensemble.n_samples} samples of {ensemble.system.name}: {draws.out}")


def _draw_valid(wanted: Sequence[Draws], cap: int | None) -> None:
    from dig_scale.stages.valid_samples import valid_samples

    for draws, accepted in zip(wanted, valid_samples(wanted, cap), strict=True):
        typer.echo(f"{draws.system.name}: {accepted.in_words()}: {accepted.out}")


def _sample_published(folder: Path, out: Path | None, options: dict[str, Any]) -> None:
    from dig_scale.serving.published import PublishedSampler
    from dig_scale.serving.published_run import PublishedDraws, sample_published_folder

    given = {name: value for name, value in options.items() if value is not None}
    if "representation" not in given:
        raise UserError(
            f"{folder} holds a published network: give AlphaFold2's output with --representation FILE (proteins), or --system "
            "with a slab's file (catalysts) or a number of atoms as in C8 (carbon)"
        )
    given["representation"] = Path(given["representation"])
    if "sampler" in given:
        given["sampler"] = PublishedSampler(given["sampler"])
    target = out or folder / "ensemble"
    with stage("sample") as report:
        report(0, 1, f"published network in {folder}")
        ensemble = sample_published_folder(PublishedDraws(folder, out=target, **given))
        report(1, 1, f"{ensemble.n_samples} samples")
    typer.echo(f"{ensemble.n_samples} samples of {ensemble.system.name}: {target}")


def _sample_published_atoms(folder: Path, out: Path | None, options: dict[str, Any]) -> None:
    from dig_scale.serving.published_atoms import AtomDraws, sample_published_atoms

    given = {name: value for name, value in options.items() if value is not None}
    target = out or folder / "ensemble"
    with stage("sample") as report:
        report(0, 1, f"published network in {folder}")
        ensemble = sample_published_atoms(AtomDraws(folder, out=target, **given))
        report(1, 1, f"{ensemble.n_samples} samples")
    typer.echo(f"{ensemble.n_samples} samples of {ensemble.system.name}: {target}")


def _condition(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name.strip(), float(value)
    except ValueError:
        raise UserError(f"--condition {text!r}: expected NAME=VALUE with a number, as in band_gap=1.5") from None


@app.command()
def serve(
    checkpoint: Checkpoint,
    host: Annotated[str | None, typer.Option()] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535)] = None,
    replicas: Annotated[int | None, typer.Option(min=1)] = None,
) -> None:
    """Serve samples over HTTP until Ctrl-C; API documentation at /docs."""
    from dig_scale.config import Serve
    from dig_scale.model.checkpoint import load_checkpoint
    from dig_scale.serving.app import serve as serve_forever

    defaults = load_checkpoint(checkpoint).recipe.serve
    given = {"host": host, "port": port, "replicas": replicas}
    chosen = {key: value for key, value in given.items() if value is not None}
    settings = Serve.model_validate(defaults.model_dump() | chosen)
    serve_forever(
        checkpoint.resolve(), settings, lambda url: typer.echo(f"serving at {url} (documentation: {url}/docs)")
    )


@app.command()
def request(
    url: Annotated[str, typer.Argument(help="Where the server is, as in http://127.0.0.1:8000.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the ensemble.")],
    system: Annotated[str | None, typer.Option(help="Training system by name.")] = None,
    sequence: Annotated[str | None, typer.Option()] = None,
    smiles: Annotated[str | None, typer.Option()] = None,
    num: Annotated[int, typer.Option(min=1)] = 100,
    seed: Annotated[int, typer.Option(min=0)] = 1,
    solver: Annotated[SolverName | None, typer.Option()] = None,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    condition: Annotated[list[str] | None, typer.Option("--condition", metavar="NAME=VALUE")] = None,
    guidance: Annotated[float | None, typer.Option(min=0)] = None,
    token: Annotated[str | None, typer.Option(envvar="DIG_SCALE_TOKEN")] = None,
) -> None:
    """Ask a server for samples and write them as `sample` does."""
    from pydantic import ValidationError

    from dig_scale.outputs.ensembles import write_ensemble_folder
    from dig_scale.serving.client import request_ensemble
    from dig_scale.serving.schema import SamplesRequest

    wanted = dict(_condition(text) for text in condition) if condition else None
    try:
        body = SamplesRequest(
            system=system,
            sequence=sequence,
            smiles=smiles,
            num=num,
            seed=seed,
            solver=solver,
            steps=steps,
            conditions=wanted,
            guidance=guidance,
        )
    except ValidationError as error:
        raise UserError("; ".join(item["msg"] for item in error.errors())) from None
    with stage("request") as report:
        ensemble = request_ensemble(
            url, body, token, lambda done, total: report(done, total, f"{done} of {total} samples")
        )
    write_ensemble_folder(ensemble, out)
    typer.echo(f"{ensemble.n_samples} samples of {ensemble.system.name}: {out}")


@app.command()
def evaluate(
    ensemble: Annotated[Path, typer.Argument(help="Folder or .npz of an ensemble, or a folder of such folders.")],
    reference: Annotated[
        Path, typer.Option("--reference", help="Trajectories: a folder, a .zarr, or any file with --topology.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of report.html and report.json (default: beside the ensemble).")
    ] = None,
    topology: Annotated[Path | None, typer.Option(help="Topology of a trajectory file.")] = None,
    frame_spacing_ps: Annotated[float | None, typer.Option(min=0, help="Of a trajectory file without times.")] = None,
    bins: Annotated[int, typer.Option(min=2)] = 36,
    bootstrap: Annotated[int, typer.Option(min=2)] = 200,
    state: cli_properties.States = None,
) -> None:
    """Compare an ensemble with reference trajectories in one HTML report."""
    from dig_scale.config import Evaluate
    from dig_scale.evaluation.reference_files import ReferenceFile
    from dig_scale.stages.evaluate import evaluate_stage

    file = ReferenceFile(topology, frame_spacing_ps) if topology is not None else None
    folder = out or (ensemble if ensemble.is_dir() else ensemble.parent).parent / "report"
    settings = Evaluate(bins=bins, bootstrap=bootstrap, states=tuple(state or ()))
    page = evaluate_stage(ensemble, reference, settings, folder, file)
    typer.echo(f"report: {page}")


@app.command()
def recipes() -> None:
    """List the bundled recipes."""
    for name, path in bundled_recipes().items():
        typer.echo(f"{name:12s} {path.read_text().splitlines()[0].removeprefix('# ')}")


@app.command()
def describe(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Print a recipe in full and the parameters of its model, counted without using memory."""
    from dig_scale.model.score_model import count_parameters

    content: Recipe = load_recipe(recipe, overrides or [])
    typer.echo(content.model_dump_json(indent=2, exclude_none=True))
    typer.echo(f"parameters: {count_parameters(content.model):,}")


def main() -> None:
    """Entry point: user errors are one line on standard error and exit code 2."""
    from dig_shards.errors import ShardError

    try:
        app()
    except (UserError, ShardError) as error:
        words = " ".join(line.strip() for line in str(error).splitlines())
        typer.echo(f"error: {words}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("stopped; run the same command again to carry on", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
