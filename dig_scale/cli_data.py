"""The commands that bring data and weights in: import, import-weights, relabel; part of dig_scale.cli.

In: files of the user. Out: trajectory stores and folders that the other commands take, whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from dig_scale.config import CalculatorName, CalculatorSpec
from dig_scale.errors import UserError
from dig_scale.recipe_files import apply_override, load_recipe
from dig_scale.stages.folders import default_folders

data = typer.Typer()

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a value of the recipe.")
]


@data.command("import")
def import_(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="A recipe with imports; or a topology (PDB, mmCIF, what MDTraj reads) and its trajectories, or .npy "
            "arrays [F, N, 3] with --unit.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of trajectories (default: runs/NAME/trajectories).")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the system; the topology file's when absent.")] = None,
    sites: Annotated[
        Literal["atoms", "beads"], typer.Option(help="Atoms, or coarse-grained beads bonded in a chain.")
    ] = "atoms",
    unit: Annotated[Literal["angstrom", "nanometre"] | None, typer.Option(help="Unit of .npy positions.")] = None,
    forces: Annotated[list[Path] | None, typer.Option(help="Forces .npy, one per trajectory.")] = None,
    force_unit: Annotated[
        Literal["eV/angstrom", "kcal/mol/angstrom", "kJ/mol/nanometre"] | None, typer.Option()
    ] = None,
    frame_spacing_ps: Annotated[float | None, typer.Option(min=0, help="Where the format has no times.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="K, if known.")] = None,
    select: Annotated[str | None, typer.Option(help='MDTraj atom selection, as in "protein".')] = None,
    overrides: Overrides = None,
) -> None:
    """Import your own trajectories, or what a recipe imports, into the store that `simulate` writes."""
    if len(files) == 1:
        given = {"name": name, "unit": unit, "forces": forces, "force_unit": force_unit, "temperature": temperature}
        given |= {"frame_spacing_ps": frame_spacing_ps, "select": select}
        refuse(given, "is an option of TOPOLOGY TRAJECTORY...; a recipe says it in its [[imports]]")
        _import_recipe(files[0], out, overrides or [])
        return
    refuse({"set": overrides}, "changes a recipe, and none is given")
    from dig_scale.importers.readers import all_or_nothing
    from dig_scale.importers.trajectory import ForceUnit, ImportOptions, LengthUnit, Sites, import_trajectory

    topology, *trajectories = files
    options = ImportOptions(
        temperature=temperature,
        name=name,
        sites=Sites(sites),
        length_unit=LengthUnit(unit) if unit else None,
        forces=tuple(forces or ()),
        force_unit=ForceUnit(force_unit) if force_unit else None,
        frame_spacing_ps=frame_spacing_ps,
        selection=select,
    )
    folder = out or default_folders(name or topology.stem).trajectories
    with all_or_nothing(folder):
        stores = import_trajectory(topology, trajectories, folder, options)
    for store in stores:
        typer.echo(f"trajectory: {store}")


def refuse(options: Mapping[str, object], problem: str) -> None:
    """Raises UserError for the first option that was given."""
    for name, value in options.items():
        if value is not None:
            raise UserError(f"--{name.replace('_', '-')} {problem}")


def _import_recipe(source: Path, out: Path | None, overrides: list[str]) -> None:
    from dig_scale.stages.data import import_stage

    if source.is_file() and source.suffix != ".toml":
        raise UserError(
            f"{source} is no recipe (.toml): give a topology with at least one trajectory, or a recipe whose [[imports]] name it"
        )
    chosen = load_recipe(str(source), overrides)
    if not chosen.imports:
        raise UserError(f"recipe {chosen.name!r} has no [[imports]]; give it some, or run `dig-scale simulate`")
    folder = out or default_folders(chosen.name).trajectories
    import_stage(chosen, folder)
    typer.echo(f"trajectories: {folder}")


@data.command("import-weights")
def import_weights(
    file: Annotated[Path, typer.Argument(help="A published checkpoint of DiG or BioEmu.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for `dig-scale sample`.")],
    config: Annotated[
        Path | None, typer.Option(help="BioEmu's config.yaml (default: the one beside the file).")
    ] = None,
) -> None:
    """Load published weights, every tensor in its place, and keep them as a folder that `sample` takes."""
    from dig_scale.model.published.folder import import_published

    written = import_published(file, config, out)
    typer.echo(f"{written.model.kind.value}: {written.tensors} tensors, {written.parameters:,} parameters: {out}")


@data.command()
def relabel(
    trajectories: Annotated[list[Path], typer.Argument(help="Folders or .zarr trajectories.")],
    calculator: Annotated[CalculatorName, typer.Option(help="EMT, GFN-xTB (tblite), or DFT (pyscf).")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the new trajectories; carried on if there.")],
    method: Annotated[str | None, typer.Option(help="GFN1-xTB or GFN2-xTB of tblite, the functional of pyscf.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of each trajectory, evenly spread.")] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="Every so many-th frame instead.")] = None,
    actors: Annotated[int | None, typer.Option(min=1, help="Trajectories at a time; one per core when absent.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other setting, as in basis=gth-dzvp.")
    ] = None,
) -> None:
    """Compute energies and forces of stored frames again with a better method."""
    from dig_scale.records import evenly_spread
    from dig_scale.stages.data import relabel_stage

    if (frames is None) == (stride is None):
        raise UserError("give --frames N or --stride K: which frames of each trajectory to compute")

    def chosen(count: int) -> Sequence[int]:
        return range(0, count, stride) if stride else evenly_spread(count, frames or count).tolist()

    for store in relabel_stage(trajectories, chosen, _calculator(calculator, method, settings or []), out, actors):
        typer.echo(f"trajectory: {store}")


def _calculator(name: CalculatorName, method: str | None, settings: list[str]) -> CalculatorSpec:
    from pydantic import ValidationError

    content: dict[str, object] = {"name": name}
    if method is not None and name == "emt":
        raise UserError(f"--method {method!r}: emt has one method; --method is for tblite and pyscf")
    if method is not None:
        content["method" if name == "tblite" else "functional"] = method
    for text in settings:
        content = apply_override(content, text)
    try:
        return CalculatorSpec.model_validate(content)
    except ValidationError as error:
        lines = [f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()]
        raise UserError(f"calculator {name}: {'; '.join(lines)}") from None
