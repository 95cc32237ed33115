"""The folder of an Ensemble: ensemble.npz with everything, and beside it the files that other tools read.

In: an Ensemble and a folder. Out: files by what the Ensemble holds - residue frames: PDB and XTC of the backbone that they
imply; a cell per sample: extended XYZ and CIF; a System with a cell: extended XYZ and PDB; else PDB and XTC, and for a small
molecule or a ligand SDF. Each file is whole or absent; ensemble.npz comes first. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dig_scale import records
from dig_scale.ensemble import FILE_NAME as ENSEMBLE
from dig_scale.ensemble import Ensemble, read_ensemble, write_ensemble_file
from dig_scale.importers.backbone import full_backbone
from dig_scale.outputs.molecules import is_small_molecule, write_pdb, write_sdf
from dig_scale.outputs.structures import write_cif, write_extended_xyz
from dig_scale.run_record import require_same
from dig_scale.system import Frames

TOPOLOGY, TRAJECTORY, POSES = "topology.pdb", "samples.xtc", "samples.sdf"
EXTENDED_XYZ, CIF = "samples.extxyz", "samples.cif"

Writers = Mapping[str, Callable[[Path], Path]]
"""File name -> what writes the file at a path."""


def write_ensemble_folder(ensemble: Ensemble, out: Path) -> Path:
    """Write ensemble.npz and the files for other tools into `out` (made if absent); returns the folder.

    Raises UserError where a sample has coordinates that a format cannot hold; ensemble.npz is there then.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_ensemble_file(ensemble, out / ENSEMBLE)
    for name, write in _writers(ensemble).items():
        write(out / name)
    return out


def is_complete(ensemble: Ensemble, out: Path) -> bool:
    """Whether `out` has every file of its ensemble."""
    return all((out / name).is_file() for name in (ENSEMBLE, *_writers(ensemble)))


def require_own(out: Path, identity: Mapping[str, Any]) -> None:
    """Raises UserError where `out` has an ensemble of another origin than `identity`, a part of its provenance."""
    if (out / ENSEMBLE).is_file():
        there = read_ensemble(out).provenance
        require_same(out, {name: there.get(name) for name in identity}, identity)


def sample_properties(ensemble: Ensemble) -> dict[str, Sequence[Any]]:
    """What is known of every sample, by the names that files show, units among them."""
    known: dict[str, Sequence[Any]] = {"sample": ensemble.index.tolist(), "seed": [ensemble.seed] * ensemble.n_samples}
    optional = {
        "log_density_nat": ensemble.log_density,
        "energy_eV": ensemble.energy,
        "log_weight_nat": ensemble.log_weights,
    }
    return known | {name: [float(v) for v in values] for name, values in optional.items() if values is not None}


def _writers(ensemble: Ensemble) -> Writers:
    if ensemble.rotations is not None:
        return _of_residues(ensemble)
    if ensemble.cell is not None:
        return _of_crystals(ensemble)
    return _of_molecules(ensemble) if ensemble.system.cell is None else _of_slabs(ensemble)


def _of_residues(ensemble: Ensemble) -> Writers:
    assert ensemble.rotations is not None
    atoms, positions = full_backbone(ensemble.system, ensemble.positions, ensemble.rotations)
    return {
        TOPOLOGY: lambda path: write_pdb(path, atoms, atoms.reference_positions),
        TRAJECTORY: lambda path: records.write_xtc(atoms, positions, path),
    }


def _of_crystals(ensemble: Ensemble) -> Writers:
    frames = _frames(ensemble)
    return {
        EXTENDED_XYZ: lambda path: write_extended_xyz(ensemble.system, frames, path),
        CIF: lambda path: write_cif(ensemble.system, frames, path),
    }


def _of_slabs(ensemble: Ensemble) -> Writers:
    system, frames = ensemble.system, _frames(ensemble)
    return {
        TOPOLOGY: lambda path: write_pdb(path, system, system.reference_positions),
        EXTENDED_XYZ: lambda path: write_extended_xyz(system, frames, path),
    }


def _of_molecules(ensemble: Ensemble) -> Writers:
    system, positions = ensemble.system, ensemble.positions
    files: Writers = {
        TOPOLOGY: lambda path: write_pdb(path, system, system.reference_positions),
        TRAJECTORY: lambda path: records.write_xtc(system, positions, path),
    }
    if not is_small_molecule(system):
        return files
    return {**files, POSES: lambda path: write_sdf(path, system, positions, sample_properties(ensemble))}


def _frames(ensemble: Ensemble) -> Frames:
    properties = sample_properties(ensemble)
    properties.pop("energy_eV", None)
    labels = {name: np.asarray(values, np.float64) for name, values in properties.items()}
    return Frames(
        ensemble.positions, ensemble.index.astype(np.float64), ensemble.energy, cell=ensemble.cell, labels=labels
    )
