"""Ensembles of proteins by published networks: a folder of imported weights and AlphaFold2's representations -> a folder.

In: PublishedDraws. Out: the files of an Ensemble (outputs.ensembles says which), and init_states.npz with the start states of
all samples, `tr` [S, N, 3] Å and `rot_mat` [S, N, 3, 3], laid out as DiG's program does for one: sampling from it again gives
the same arrays. Residues are named by the sequence, UNK without one. Knows no HTTP and no training.
"""

from __future__ import annotations

import hashlib
import io
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dig_shards.durable import replace_durably

from dig_scale.batch import State
from dig_scale.ensemble import Ensemble
from dig_scale.errors import UserError
from dig_scale.importers.backbone import residue_chain
from dig_scale.importers.representations import Representation, read_representation
from dig_scale.importers.residues import THREE_LETTER
from dig_scale.model.published.folder import PublishedFolder, read_published
from dig_scale.outputs.ensembles import require_own, write_ensemble_folder
from dig_scale.serving.published import (
    BATCH,
    PublishedSampler,
    PublishedSamples,
    default_sampler,
    read_init_state,
    sample_published,
)
from dig_scale.serving.served import best_device
from dig_scale.system import System

INIT_STATES = "init_states.npz"
UNKNOWN_RESIDUE = "UNK"
DEFAULT_SAMPLES = 10


@dataclass(frozen=True)
class PublishedDraws:
    """What fixes every sample of a run, and where it goes.

    num is that of the states in `init_state` where these are given, else DEFAULT_SAMPLES; sampler: the network's own.
    """

    folder: Path
    representation: Path
    out: Path
    num: int | None = None
    seed: int = 1
    sampler: PublishedSampler | None = None
    sequence: str | None = None
    init_state: Path | None = None
    batch: int = BATCH


def sample_published_folder(draws: PublishedDraws) -> Ensemble:
    """Draw the samples and write them into draws.out; raises UserError naming the file that does not fit, or where draws.out
    holds samples of another run.
    """
    begin = time.process_time()
    published, representation = read_published(draws.folder), read_representation(draws.representation)
    start = None if draws.init_state is None else read_init_states(draws.init_state)
    num = draws.num or (DEFAULT_SAMPLES if start is None or start.positions is None else len(start.positions))
    identity = _identity(draws, published, representation, start) | {"samples": num}
    require_own(draws.out, identity)
    system = protein_system(representation, draws.sequence)
    samples = sample_published(
        published.model.to(best_device()),
        representation,
        num,
        draws.seed,
        PublishedSampler(identity["solver"]),
        sequence=draws.sequence,
        start=start,
        batch=draws.batch,
    )
    known = identity | {"cpu_seconds": time.process_time() - begin}
    ensemble = Ensemble(
        system, samples.positions, samples.index, samples.seed, rotations=samples.rotations, provenance=known
    )
    draws.out.mkdir(parents=True, exist_ok=True)
    replace_durably(draws.out / INIT_STATES, _start_bytes(samples))
    write_ensemble_folder(ensemble, draws.out)
    return ensemble


def protein_system(representation: Representation, sequence: str | None) -> System:
    """One chain with the representation's number of residues, named by the one-letter sequence, else UNK."""
    count, name = representation.residues, representation.name
    if sequence is None:
        return residue_chain(name, (UNKNOWN_RESIDUE,) * count, {"source": "representations"})
    if len(sequence) != count:
        raise UserError(f"--sequence has {len(sequence)} letters, the representations of {name!r} {count} residues")
    named = [THREE_LETTER.get(letter, UNKNOWN_RESIDUE) for letter in sequence]
    return residue_chain(name, named, {"source": "sequence", "sequence": sequence})


def read_init_states(path: Path) -> State:
    """Start states [S] of an init_states.npz, or the one of a file of DiG's program; raises UserError naming the file."""
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a readable file of start states: {error}") from None
    places, turned = arrays.get("tr"), arrays.get("rot_mat")
    if places is None or turned is None or places.ndim != 3:
        return read_init_state(path)
    if turned.shape != (*places.shape, 3) or places.shape[-1] != 3 or not places.size:
        raise UserError(f"{path}: tr {places.shape} and rot_mat {turned.shape}, expected (S, N, 3) and (S, N, 3, 3)")
    rotations = torch.from_numpy(turned).float().transpose(-1, -2).contiguous()
    return State(positions=torch.from_numpy(places).float(), rotations=rotations)


def _start_bytes(samples: PublishedSamples) -> bytes:
    assert samples.start_positions is not None and samples.start_rotations is not None
    buffer = io.BytesIO()
    np.savez(buffer, tr=samples.start_positions, rot_mat=samples.start_rotations.swapaxes(-1, -2))
    return buffer.getvalue()


def _identity(
    draws: PublishedDraws, published: PublishedFolder, representation: Representation, start: State | None
) -> dict[str, Any]:
    """What an ensemble says of its origin, but for its cost."""
    sampler = draws.sampler or default_sampler(published.model.kind)
    given = None if start is None else _digest(start.positions, start.rotations)
    known = {"checkpoint": published.sha256[:16], "published": published.model.kind.value, "source": published.source}
    return known | {
        "representation": f"{representation.name} {_digest(representation.single, representation.pair)}",
        "sequence": draws.sequence,
        "solver": sampler.value,
        "seed": draws.seed,
        "init_state": given,
    }


def _digest(*arrays: Any) -> str:
    content = hashlib.sha256()
    for array in arrays:
        content.update(np.ascontiguousarray(array).tobytes())
    return content.hexdigest()[:16]
