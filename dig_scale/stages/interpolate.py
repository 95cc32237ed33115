"""Paths between two structures of one system by a trained model: `dig-scale interpolate`.

In: two structure files (or one system's files as its importer takes them) and a checkpoint. Out: the folder of an Ensemble
whose samples are the frames of the path in order, the second structure laid on the first. A stage of the command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dig_scale.errors import UserError
from dig_scale.progress import stage
from dig_scale.stages.sample import trained_system
from dig_scale.system import Frames, System

if TYPE_CHECKING:
    from dig_scale.ensemble import Ensemble
    from dig_scale.evaluation.validity import Validity
    from dig_scale.sampling.flow import Integration
    from dig_scale.sampling.interpolation import PathSettings
    from dig_scale.serving.served import Bench, ServedModel


@dataclass(frozen=True)
class Asked:
    """The two structures, the model, the system where the model has several, frames and way, ODE steps (None: adaptive)."""

    first: Path
    second: Path
    checkpoint: Path
    system: str | None
    frames: int
    way: str
    steps: int | None


@dataclass(frozen=True)
class Found:
    """The path, how far its ends are from the structures given (RMSD in Å), and which frames are physically sound."""

    path: Ensemble
    end_rmsd: tuple[float, float]
    validity: Validity


def interpolate_stage(asked: Asked, out: Path) -> Found:
    """Write the path into `out`; raises UserError naming the file that does not fit the system."""
    from dig_scale.evaluation.validity import validity
    from dig_scale.outputs.ensembles import write_ensemble_folder
    from dig_scale.sampling.interpolation import PathSettings, Way
    from dig_scale.serving.served import best_device, build_bench, load_served_model

    with stage("interpolate") as report:
        model = load_served_model(asked.checkpoint, best_device())
        system = trained_system(asked.checkpoint, asked.system)
        bench = build_bench(model, system)
        ends = [structure_of(path, system, model.recipe.model.sites) for path in (asked.first, asked.second)]
        settings = PathSettings(asked.frames, Way(asked.way), _integration(model, asked.steps))
        report(0, 1, f"{asked.frames} frames between {asked.first.name} and {asked.second.name}")
        path, errors = _path(bench, ends, settings)
        ensemble = _ensemble(model, asked, system, path, errors)
        write_ensemble_folder(ensemble, out)
        report(1, 1, f"{asked.frames} frames")
    return Found(ensemble, errors, validity(ensemble))


def structure_of(path: Path, system: System, sites: str) -> Frames:
    """The first structure of a file as one frame of a system, its sites found by name; raises UserError naming the file.

    `sites` is what the model reads (config.Model.sites): residue frames come from the backbone, cells from crystal files.
    """
    if not path.is_file():
        raise UserError(f"no file at {path}")
    found, frames = _read(path, sites)
    try:
        rows = _sites_of(system, found, sites)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return Frames(
        frames.positions[:1, rows],
        frames.time_ps[:1],
        rotations=None if frames.rotations is None else frames.rotations[:1, rows],
        cell=None if frames.cell is None or sites != "crystal" else frames.cell[:1],
    )


def _read(path: Path, sites: str) -> tuple[System, Frames]:
    if sites == "residues":
        from dig_scale.importers.backbone import read_backbone

        return read_backbone(path.stem, [path])
    if sites == "crystal":
        from dig_scale.importers.crystal import CrystalOptions, load_crystals

        return load_crystals([path], CrystalOptions(labels=(), similarity=None))[0][0]
    from dig_scale.evaluation.reference_files import ReferenceFile, reference_frames

    read = reference_frames(path, ReferenceFile(path, frame_spacing_ps=1.0), None)
    return read.system, read.frames[0]


def _sites_of(system: System, found: System, sites: str) -> np.ndarray:
    """Site of a file for every site of the system: by name, or as they stand where the elements do and names are others."""
    from dig_scale.evaluation.reference import match_sites

    if sites == "crystal":
        return _by_element(system, found)
    try:
        return match_sites(system, found)
    except UserError:
        if sites != "residues" and np.array_equal(system.elements, found.elements):
            return np.arange(system.n_sites)
        raise


def _by_element(system: System, found: System) -> np.ndarray:
    """Sites of a crystal, which have no names; the importer's are sorted by atomic number."""
    if sorted(system.elements.tolist()) != found.elements.tolist():
        raise UserError(f"holds {found.name}, and the path is asked of {system.name!r}")
    return np.argsort(np.argsort(system.elements, kind="stable"), kind="stable")


def _integration(model: ServedModel, steps: int | None) -> Integration:
    from dig_scale.sampling.flow import Integration

    diffusion = model.recipe.diffusion
    if steps is None and diffusion.schedule == "dig-sigmoid":
        steps = diffusion.steps
    return Integration() if steps is None else Integration("rk4", steps=steps)


def _path(
    bench: Bench, ends: list[Frames], settings: PathSettings
) -> tuple[dict[str, np.ndarray], tuple[float, float]]:
    """Stored frames [K, ...] by field, and the RMSD in Å of the ends from what they should be."""
    import torch

    from dig_scale.sampling.interpolation import pathway, superposed

    context, composition = bench.context, bench.composition
    given = {
        name: torch.as_tensor(np.concatenate([getattr(one, name) for one in ends])).to(context.anchor)
        for name in composition.stored
    }
    state = composition.state(superposed(given, context), context)
    path = composition.arrays(pathway(bench.score_fn, composition, state, context, settings), context)
    wanted = composition.arrays(state, context)
    apart = path["positions"][[0, -1]] - wanted["positions"]
    if "cell" in wanted:
        inside = apart @ torch.linalg.inv(wanted["cell"])
        apart = (inside - torch.round(inside)) @ wanted["cell"]
    errors = ((apart**2).sum(-1).mean(-1).sqrt()).tolist()
    return {name: value.float().cpu().numpy() for name, value in path.items()}, (errors[0], errors[1])


def _ensemble(
    model: ServedModel, asked: Asked, system: System, path: dict[str, np.ndarray], errors: tuple[float, float]
) -> Ensemble:
    from dig_scale.ensemble import Ensemble

    told = {
        "from": asked.first.name,
        "to": asked.second.name,
        "way": asked.way,
        "steps": asked.steps,
        "end_rmsd": list(errors),
    }
    provenance = {"checkpoint": model.checkpoint_id, "system_id": system.system_id, "pathway": told}
    index = np.arange(asked.frames)
    return Ensemble(system, index=index, seed=0, provenance=provenance, **path)
