"""Ensemble: samples of one system with what is known of each. The product's file.

Written as a folder: `topology.pdb` and `samples.xtc` (the layout that trajectory tools and bioemu-benchmarks read, nm
inside) and `ensemble.npz` (everything, lossless, Å; no pickle) with the system and the recipe as JSON inside.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from dig_shards.durable import replace_durably

from dig_scale.errors import UserError
from dig_scale.system import System
from dig_scale.units import thermal_energy

FORMAT_VERSION = 1
FILE_NAME = "ensemble.npz"
BOLTZMANN, STEERED, MODEL = "boltzmann", "steered", "model"
WINDOWS = "windows"
"""In the provenance: the ensembles that this one was combined of."""
STRATA = "strata"
"""In the provenance: how many samples of each state were drawn, and how many chosen."""
_OPTIONAL = ("log_density", "log_density_error", "energy", "log_weights", "bias", "rotations", "cell", "replicates")


@dataclass(frozen=True)
class Ensemble:
    """Samples [S] of `system`.

    positions [S, N, 3] Å float32, index [S] sample number (with `seed` it identifies a sample for ever), log_density [S] nat
    with its standard error log_density_error [S] (NaN where there is none), energy [S] eV, log_weights [S] nat, rotations
    [S, N, 3, 3] of residue frames, cell [S, 3, 3] Å; provenance: solver, steps, seed, recipe, checkpoint hash, costs in CPU
    seconds.

    log_weights are towards what provenance["log_weights"] says: BOLTZMANN, exp(-u), or STEERED, what was sampled without
    steering tilted by exp(-bias), with bias [S] nat of every sample, or MODEL, what is sampled without steering, from combined
    windows or from some samples of each state. replicates [S, R] are factors on the weights in each replicate of a bootstrap
    over independent populations; where they are there, errors of reweighted numbers come from them.
    """

    system: System
    positions: np.ndarray
    index: np.ndarray
    seed: int
    log_density: np.ndarray | None = None
    log_density_error: np.ndarray | None = None
    energy: np.ndarray | None = None
    log_weights: np.ndarray | None = None
    bias: np.ndarray | None = None
    rotations: np.ndarray | None = None
    cell: np.ndarray | None = None
    replicates: np.ndarray | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        expected = (len(self.index), self.system.n_sites, 3)
        if self.positions.shape != expected:
            raise UserError(f"ensemble of {self.system.name!r}: positions {self.positions.shape}, expected {expected}")
        for name in _OPTIONAL:
            values = getattr(self, name)
            if values is not None and len(values) != len(self.index):
                raise UserError(
                    f"ensemble of {self.system.name!r}: {name} has {len(values)} of {len(self.index)} entries"
                )

    @property
    def n_samples(self) -> int:
        """Number of samples S."""
        return len(self.index)

    @property
    def log_weights_towards(self) -> str | None:
        """BOLTZMANN, STEERED or MODEL; None where there are no log_weights."""
        return None if self.log_weights is None else str(self.provenance.get("log_weights", BOLTZMANN))

    @property
    def is_tilted(self) -> bool:
        """Whether the samples lie elsewhere than those of the model as it is: steered, combined windows, chosen by state."""
        return self.bias is not None or WINDOWS in self.provenance or STRATA in self.provenance

    @property
    def correcting_log_weights(self) -> np.ndarray | None:
        """log-weights [S] that correct averages: towards exp(-u), or back to what is sampled without steering."""
        if self.log_weights is None or self.bias is None or self.log_weights_towards != STEERED:
            return self.log_weights
        return np.asarray(self.log_weights + self.bias)

    @property
    def model_log_weights(self) -> np.ndarray | None:
        """log-weights [S] from samples that lie elsewhere back to what the model samples by itself; None where nothing is known
        of them, or nothing needed."""
        if not self.is_tilted or self.log_weights_towards != BOLTZMANN:
            return self.correcting_log_weights if self.is_tilted else None
        kelvin = self.provenance.get("temperature_K")
        if self.log_density is None or self.energy is None or self.log_weights is None or kelvin is None:
            return None
        return np.asarray(self.log_weights + self.energy / thermal_energy(kelvin) + self.log_density)

    def take(self, rows: np.ndarray) -> Ensemble:
        """Some samples (indices or mask), with what is known of each."""
        per_sample = ("positions", "index", *_OPTIONAL)
        known = {name: getattr(self, name) for name in per_sample if getattr(self, name) is not None}
        return replace(self, **{name: values[rows] for name, values in known.items()})


def ensemble_bytes(ensemble: Ensemble) -> bytes:
    """The ensemble as the bytes of its .npz file."""
    arrays = {name: getattr(ensemble, name) for name in _OPTIONAL if getattr(ensemble, name) is not None}
    header = {"format_version": FORMAT_VERSION, "seed": ensemble.seed, "provenance": ensemble.provenance}
    buffer = io.BytesIO()
    np.savez(
        buffer,
        positions=ensemble.positions.astype(np.float32),
        index=ensemble.index.astype(np.int64),
        system=np.frombuffer(ensemble.system.to_json().encode(), np.uint8),
        header=np.frombuffer(json.dumps(header).encode(), np.uint8),
        **arrays,
    )
    return buffer.getvalue()


def write_ensemble_file(ensemble: Ensemble, path: Path) -> Path:
    """Write the .npz atomically (temporary file, fsync, rename) and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_durably(path, ensemble_bytes(ensemble))
    return path


def read_ensemble(source: Path) -> Ensemble:
    """Ensemble from its .npz or from the folder that holds it; raises UserError naming the file."""
    path = source / FILE_NAME if source.is_dir() else source
    if not path.is_file():
        raise UserError(f"no ensemble at {path}: run `dig-scale sample` first or give the folder it wrote")
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} is not an ensemble file: {error}") from error
    header = json.loads(arrays["header"].tobytes())
    if header.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: ensemble format {header.get('format_version')!r}, this version reads {FORMAT_VERSION}"
        )
    return Ensemble(
        system=System.from_json(arrays["system"].tobytes().decode()),
        positions=arrays["positions"],
        index=arrays["index"],
        seed=header["seed"],
        provenance=header["provenance"],
        **{name: arrays[name] for name in _OPTIONAL if name in arrays},
    )
