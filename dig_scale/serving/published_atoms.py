"""Ensembles of slabs and carbon crystals by DiG's published networks: a folder of imported weights and a system -> a folder.

In: AtomDraws. Out: the files of an Ensemble. A slab is a file of a surface with its adsorbate (or a System as .json), from
whose structure the network diffuses; a crystal of carbon is a number of atoms, told as C8 or by any file of one. The
ligand network has a score function (model.published.conditioned.ligand_network) and no door here: it reads features of
atoms and bonds that no importer makes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dig_scale.ensemble import Ensemble
from dig_scale.errors import UserError
from dig_scale.importers.crystal import crystal_system
from dig_scale.importers.sampled import Reading, system_from_file
from dig_scale.model.published.folder import PublishedFolder, read_published
from dig_scale.model.published.weights import PublishedKind
from dig_scale.outputs.ensembles import require_own, write_ensemble_folder
from dig_scale.sampling.released_atoms import Betas
from dig_scale.serving.published import BATCH, PublishedSamples, sample_carbon, sample_slab
from dig_scale.system import System, SystemKind

DEFAULT_SAMPLES = 10
_CARBON = 6


@dataclass(frozen=True)
class AtomDraws:
    """What fixes every sample of a run, and where it goes; `system` is a file, or C8 for crystals of eight atoms of carbon.

    betas: the network's own schedule unless another is given.
    """

    folder: Path
    system: str
    out: Path
    num: int = DEFAULT_SAMPLES
    seed: int = 1
    batch: int = BATCH
    betas: Betas | None = None


def sample_published_atoms(draws: AtomDraws) -> Ensemble:
    """Draw the samples and write them into draws.out; raises UserError for a network or a system that does not fit, or where
    draws.out holds samples of another run.
    """
    begin = time.process_time()
    published = read_published(draws.folder)
    kind = published.model.kind
    system = _system(draws, kind)
    identity = {
        "checkpoint": published.sha256[:16],
        "published": kind.value,
        "source": published.source,
        "system_id": system.system_id,
        "seed": draws.seed,
        "samples": draws.num,
    }
    require_own(draws.out, identity)
    samples = _drawn(published, system, draws)
    known = identity | {"cpu_seconds": time.process_time() - begin}
    ensemble = Ensemble(system, samples.positions, samples.index, samples.seed, cell=samples.cell, provenance=known)
    write_ensemble_folder(ensemble, draws.out)
    return ensemble


def _system(draws: AtomDraws, kind: PublishedKind) -> System:
    if kind is PublishedKind.DIG_CATALYST:
        return system_from_file(Path(draws.system), Reading("anchored", (SystemKind.CATALYST,)))
    if kind is PublishedKind.DIG_CARBON:
        return _carbon(draws.system)
    what = "of ligands, which has no door for files" if kind is PublishedKind.DIG_LIGAND else "of proteins"
    more = "use its score function" if kind is PublishedKind.DIG_LIGAND else "give --representation FILE, not --system"
    raise UserError(f"{draws.folder} holds the published network {kind.value}, {what}: {more}")


def _carbon(text: str) -> System:
    if Path(text).is_file():
        system = system_from_file(Path(text), Reading("crystal", (SystemKind.CRYSTAL,)))
        if (system.elements != _CARBON).any():
            raise UserError(f"{text}: a crystal of {system.name}; the published network knows carbon alone")
        return system
    number = text[1:] or "1"
    if text[:1] != "C" or not number.isdecimal() or int(number) < 1:
        raise UserError(
            f"--system {text!r}: expected C and the number of atoms of the cell, as in C8, or a crystal's file"
        )
    return crystal_system(np.full(int(number), _CARBON))


def _drawn(published: PublishedFolder, system: System, draws: AtomDraws) -> PublishedSamples:
    if published.model.kind is PublishedKind.DIG_CARBON:
        return sample_carbon(published.model, system.n_sites, draws.num, draws.seed, draws.betas, draws.batch)
    return sample_slab(published.model, system, draws.num, draws.seed, draws.betas, draws.batch)
