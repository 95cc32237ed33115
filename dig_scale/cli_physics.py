"""The commands that ask a model, or an energy, about physics: interpolate, posterior, ablate, density, combine, reweight; part of
dig_scale.cli.

In: checkpoints, structures and ensembles. Out: folders that other tools read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dig_scale.cli_data import Overrides, refuse
from dig_scale.cli_properties import States
from dig_scale.errors import UserError

if TYPE_CHECKING:
    from dig_scale.sampling.from_settings import State
    from dig_scale.sampling.likelihood import LikelihoodSettings
    from dig_scale.stages.density import Energies

physics = typer.Typer()


@physics.command()
def interpolate(
    first: Annotated[Path, typer.Argument(metavar="A.pdb", help="Structure that the path starts from.")],
    second: Annotated[Path, typer.Argument(metavar="B.pdb", help="Structure that it leads to; laid on the first.")],
    model: Annotated[Path, typer.Option("--model", help="A training folder or a model.safetensors.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the trajectory: ensemble.npz, PDB and XTC.")],
    frames: Annotated[int, typer.Option(min=2, help="Frames of the path, both ends among them.")] = 21,
    system: Annotated[
        str | None, typer.Option("--system", help="Training system by name, or a file; needed where there are several.")
    ] = None,
    way: Annotated[
        Literal["spherical", "linear"], typer.Option(help="Between latents: a great circle, or straight as published.")
    ] = "spherical",
    steps: Annotated[int | None, typer.Option(min=1, help="Equal steps of the ODE; adaptive ones when absent.")] = None,
) -> None:
    """Find a path between two structures through the latent space of a model."""
    from dig_scale.stages.interpolate import Asked, interpolate_stage

    found = interpolate_stage(Asked(first, second, model, system, frames, way, steps), out)
    errors = " and ".join(f"{error:.3f}" for error in found.end_rmsd)
    typer.echo(f"{frames} frames, ends {errors} Å from the structures given: {out}")
    typer.echo(f"frames: {found.validity.in_words()}")


@physics.command()
def posterior(
    trajectories: Annotated[
        list[Path], typer.Argument(help="Folders or .zarr trajectories of structures to begin with.")
    ],
    recipe: Annotated[str, typer.Option(help="With [simulate], whose energy it is, and [train.posterior].")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the pairs; carried on if there.")],
    overrides: Overrides = None,
) -> None:
    """Sample under an energy what noised structures were before the noise: means that [train.posterior] learns from."""
    from dig_scale.recipe_files import load_recipe
    from dig_scale.stages.posterior import posterior_stage

    found = posterior_stage(load_recipe(recipe, overrides or []), trajectories, out)
    lost = f", {found.lost} without numbers left out" if found.lost else ""
    typer.echo(
        f"{found.count} pairs in {found.seconds:.0f} s{lost}; set train.posterior.pairs = {str(found.dataset)!r}"
    )


@physics.command()
def ablate(
    recipe: Annotated[str, typer.Argument(help="A .toml file or the name of a bundled recipe, with [ablate].")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the comparison; carried on if there.")],
    overrides: Overrides = None,
) -> None:
    """Train on the energy alone, on few frames alone and on both at equal budget, and compare what they sample."""
    from dig_scale.recipe_files import load_recipe
    from dig_scale.stages.ablate import CSV_NAME, JSON_NAME, ablate_stage, lines_of

    table = ablate_stage(load_recipe(recipe, overrides or []), out)
    for line in lines_of(table):
        typer.echo(line)
    typer.echo(f"written: {out / JSON_NAME} and {out / CSV_NAME}")


@physics.command()
def density(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="STRUCTURES",
            help="An ensemble, trajectories, or a packed dataset, whose held-out frames are taken.",
        ),
    ],
    model: Annotated[Path, typer.Option("--model", help="A training folder or a model.safetensors.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the ensemble with densities; carried on if there.")],
    system: Annotated[
        str | None, typer.Option("--system", help="Of trajectories and datasets of several systems.")
    ] = None,
    num: Annotated[int | None, typer.Option(min=1, help="Structures, evenly spread; all when absent.")] = None,
    state: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:PROPERTY:LOW:HIGH", help="Take --num samples of each state, weighted accordingly."),
    ] = None,
    energy: Annotated[
        bool, typer.Option("--energy", help="Also energies by the recipe's [simulate] section, and weights of samples.")
    ] = False,
    recipe: Annotated[str | None, typer.Option(help="Whose energies, in the place of the model's own recipe.")] = None,
    prepared: Annotated[Path | None, typer.Option(help="Folder of a system that another program prepared.")] = None,
    method: Annotated[
        Literal["dopri5", "rk4", "heun"] | None, typer.Option(help="dopri5 adapts its steps, the others take --steps.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    rtol: Annotated[float | None, typer.Option(min=0)] = None,
    atol: Annotated[float | None, typer.Option(min=0, help="Å, rad.")] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0, help="Nat; nodes of dopri5's divergence are doubled until that changes its integral by less."
        ),
    ] = None,
    divergence: Annotated[Literal["exact", "hutchinson"], typer.Option()] = "exact",
    probes: Annotated[int | None, typer.Option(min=2, help="Of hutchinson; more, smaller error.")] = None,
    batch: Annotated[int, typer.Option(min=1)] = 64,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; cores or GPUs when absent.")] = None,
    overrides: Overrides = None,
) -> None:
    """Log-density of every structure by the probability-flow ODE; with energies also Boltzmann weights."""
    from dig_scale.stages.density import Asked, density_stage
    from dig_scale.stages.density_sources import Source

    ode = {"method": method, "steps": steps, "rtol": rtol, "atol": atol}
    if divergence == "exact":
        refuse({"probes": probes}, "is for --divergence hutchinson")
    settings = _likelihood({name: value for name, value in ode.items() if value is not None}, model, divergence, probes)
    if tolerance is not None:
        if settings.integration.method != "dopri5":
            refuse({"tolerance": tolerance}, "is for --method dopri5")
        settings = replace(settings, tolerance=tolerance)
    energies = _energies(recipe, prepared, overrides or []) if energy else None
    if not energy:
        refuse({"recipe": recipe, "prepared": prepared, "set": overrides}, "is for --energy")
    chosen = Source(source, system, num, _states(state or [], num))
    found = density_stage(Asked(chosen, model, settings, energies, batch, workers), out)
    for line in found.words:
        typer.echo(line)
    typer.echo(f"{found.ensemble.n_samples} structures of {found.ensemble.system.name}: {out}")


def _states(texts: list[str], num: int | None) -> tuple[State, ...]:
    from dig_scale.sampling.from_settings import states_from

    if texts and num is None:
        raise UserError("--state takes so many samples of each state: say how many with --num")
    return states_from(texts)


def _likelihood(ode: Mapping[str, Any], model: Path, divergence: str, probes: int | None) -> LikelihoodSettings:
    from dig_scale.model.checkpoint import load_checkpoint
    from dig_scale.sampling.flow import Integration
    from dig_scale.sampling.likelihood import Exact, Hutchinson, LikelihoodSettings

    diffusion = load_checkpoint(model).recipe.diffusion
    given = dict(ode)
    if not given and diffusion.schedule == "dig-sigmoid":
        given = {"method": "rk4", "steps": diffusion.steps}
    if "steps" in given and given.get("method", "dopri5") == "dopri5":
        raise UserError("--steps is for --method rk4 or heun; dopri5 chooses its own by --rtol and --atol")
    if given.get("method") in ("rk4", "heun"):
        refuse({name: given.get(name) for name in ("rtol", "atol")}, "is for --method dopri5")
    taken = Exact() if divergence == "exact" else Hutchinson() if probes is None else Hutchinson(probes)
    return LikelihoodSettings(Integration(**given), taken)


def _energies(recipe: str | None, prepared: Path | None, overrides: list[str]) -> Energies:
    from dig_scale.recipe_files import load_recipe
    from dig_scale.stages.density import Energies

    if recipe is None:
        refuse({"set": overrides or None}, "changes a recipe: give one with --recipe")
        return Energies(None, prepared)
    return Energies(load_recipe(recipe, overrides), prepared)


@physics.command()
def combine(
    windows: Annotated[
        list[Path], typer.Argument(metavar="WINDOW...", help="Ensembles of one system and model, steered or not.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the one ensemble that they become.")],
) -> None:
    """Combine umbrella windows and unsteered samples by MBAR, with weights towards the model's own distribution."""
    from dig_scale.stages.combine import combine_stage

    found = combine_stage(windows, out)
    for line in found.words:
        typer.echo(line)
    typer.echo(f"{found.ensemble.n_samples} samples of {found.ensemble.system.name}: {out}")


@physics.command()
def reweight(
    ensemble: Annotated[Path, typer.Argument(help="Folder or .npz of an ensemble with weights.")],
    state: States = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="File of the numbers (default: beside the ensemble).")
    ] = None,
) -> None:
    """Whether an ensemble's weights can be trusted, log Z, entropy, and free energies between states."""
    from dig_scale.stages.reweight import reweight_stage

    for line in reweight_stage(ensemble, state or [], out):
        typer.echo(line)
