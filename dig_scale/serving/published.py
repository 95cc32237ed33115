"""Samples of published networks: load, bind to a system, sample in batches; replay of published start states.

In: a PublishedModel (model.published.weights), AlphaFold2's representations or a slab, a number of samples and a seed. Out:
arrays as an Ensemble and its writers take them. `<name>_init_state.npz` of DiG's program (tr [N, 3] Å, rot_mat [N, 3, 3])
replays one of its samples: all that follows its start state is deterministic. Writes no structures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dig_scale.batch import ScoreFn, State
from dig_scale.errors import UserError
from dig_scale.importers.representations import Representation
from dig_scale.model.published.bioemu import BioEmu
from dig_scale.model.published.carbon import CarbonNet, carbon_rows, cell_of, completed, reference_sites
from dig_scale.model.published.catalyst import CatalystNet
from dig_scale.model.published.conditioned import FramesNetwork, carbon_network, catalyst_network, frames_network
from dig_scale.model.published.graph_rows import catalyst_rows
from dig_scale.model.published.protein import ProteinNet
from dig_scale.model.published.weights import PublishedKind, PublishedModel
from dig_scale.sampling.bioemu import AngleTable, BioEmuNoise, bioemu_prior, bioemu_score_fn, dpm_solver, heun
from dig_scale.sampling.released import ProteinSampler, Walk, protein_score_fn, released_prior, sample_protein
from dig_scale.sampling.released_atoms import AtomDiffusion, Betas, catalyst_betas, ddpm, flow, ligand_betas
from dig_scale.system import System

BATCH = 16
_COUNTS = ("num_sigma", "num_omega", "omega_exponent", "l_max")


class PublishedSampler(StrEnum):
    """The first three are of DiG's protein network, the last two of BioEmu's."""

    RELEASED = "released"
    PROBABILITY_FLOW = "probability-flow"
    STOCHASTIC = "stochastic"
    DPM = "dpm"
    HEUN = "heun"


_PROTEIN_SAMPLERS = {name: ProteinSampler(name.value) for name in list(PublishedSampler)[:3]}
_BIOEMU_SAMPLERS = {PublishedSampler.DPM: dpm_solver, PublishedSampler.HEUN: heun}


@dataclass(frozen=True)
class PublishedSamples:
    """Samples [S]: positions [S, N, 3] Å, index [S], seed; rotations [S, N, 3, 3] of proteins, cell [S, 3, 3] Å of crystals,
    and the start states they came from."""

    positions: np.ndarray
    index: np.ndarray
    seed: int
    rotations: np.ndarray | None = None
    cell: np.ndarray | None = None
    start_positions: np.ndarray | None = None
    start_rotations: np.ndarray | None = None


def read_init_state(path: Path) -> State:
    """The start state [1] in a file of DiG's program; raises UserError naming the file and what it lacks."""
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} is not a readable _init_state.npz: {error}") from None
    shapes = {name: arrays[name].shape if name in arrays else None for name in ("tr", "rot_mat")}
    count = (shapes["tr"] or (0,))[0]
    if shapes != {"tr": (count, 3), "rot_mat": (count, 3, 3)}:
        raise UserError(f"{path}: arrays {shapes}, expected tr (N, 3) in Å and rot_mat (N, 3, 3)")
    rotations = torch.from_numpy(arrays["rot_mat"]).float().transpose(-1, -2)
    return State(positions=torch.from_numpy(arrays["tr"]).float().unsqueeze(0), rotations=rotations.unsqueeze(0))


def init_state_arrays(state: State, sample: int) -> dict[str, np.ndarray]:
    """tr and rot_mat of one sample, as DiG's program names and lays them out."""
    assert state.positions is not None and state.rotations is not None
    turned = state.rotations[sample].transpose(-1, -2).contiguous()
    return {"tr": state.positions[sample].numpy(), "rot_mat": turned.numpy()}


def default_sampler(kind: PublishedKind) -> PublishedSampler:
    """The sampler that was published with a network of proteins."""
    return PublishedSampler.DPM if kind is PublishedKind.BIOEMU else PublishedSampler.RELEASED


def sample_published(
    published: PublishedModel,
    representation: Representation,
    num: int,
    seed: int,
    sampler: PublishedSampler | None = None,
    *,
    sequence: str | None = None,
    start: State | None = None,
    batch: int = BATCH,
) -> PublishedSamples:
    """Samples of a protein by DiG's or BioEmu's network, with their published sampler unless another is named.

    `start` [num] replaces the prior. Raises UserError where network, sampler and representation do not go together.
    """
    chosen = sampler or default_sampler(published.kind)
    allowed: dict[Any, Any] = {PublishedKind.DIG_PROTEIN: _PROTEIN_SAMPLERS, PublishedKind.BIOEMU: _BIOEMU_SAMPLERS}
    if chosen not in allowed.get(published.kind, {}):
        names = [name.value for name in allowed.get(published.kind, {})] or "none, it is no network of proteins"
        raise UserError(f"{published.kind.value} has no sampler {chosen.value!r}; its own are {names}")
    network = _bound(published, representation, sequence)
    states = start or _prior(published, representation.residues, num, seed)
    if states.positions is None or states.positions.shape != (num, representation.residues, 3):
        found = None if states.positions is None else tuple(states.positions.shape)
        raise UserError(f"start states {found} for {num} samples of {representation.residues} residues")
    parts = [_run(published, network, chosen, part, walk) for part, walk in _batches(states, num, seed, batch)]
    return PublishedSamples(
        np.concatenate([_numpy(part.positions) for part in parts]),
        np.arange(num),
        seed,
        np.concatenate([_numpy(part.rotations) for part in parts]),
        start_positions=_numpy(states.positions),
        start_rotations=_numpy(states.rotations),
    )


def published_score_fn(
    published: PublishedModel, representation: Representation, sequence: str | None = None
) -> ScoreFn:
    """A published protein network as a score function of State(positions Å, rotations) and t in [0, 1]."""
    network = _bound(published, representation, sequence)
    if published.kind is PublishedKind.BIOEMU:
        return bioemu_score_fn(network, bioemu_noise(published))
    return protein_score_fn(network)


def bioemu_noise(published: PublishedModel) -> BioEmuNoise:
    """BioEmu's processes as its configuration gives them."""
    assert published.config is not None
    given = {key: int(v) if key in _COUNTS else v for key, v in published.config.rotations.items()}
    return BioEmuNoise(angles=AngleTable(**given), **published.config.positions)  # type: ignore[arg-type]


def sample_slab(
    published: PublishedModel, system: System, num: int, seed: int, betas: Betas | None = None, batch: int = BATCH
) -> PublishedSamples:
    """Structures of a slab with its adsorbate by DiG's catalyst network, DDPM from the reference structure."""
    net = published.net
    if not isinstance(net, CatalystNet) or system.cell is None:
        raise UserError(
            f"{published.source} and system {system.name!r}: expected DiG's catalyst network and a slab's cell"
        )
    initial, moving = torch.from_numpy(system.reference_positions).float(), torch.from_numpy(system.mobile)
    centre = initial[moving].mean(0) if bool(moving.any()) else torch.zeros(3)
    initial = initial - centre
    network = catalyst_network(net, initial, torch.from_numpy(system.cell).float(), catalyst_rows(system))
    of = AtomDiffusion(betas or catalyst_betas(), initial, moving)
    drawn = _sampled(lambda walk: ddpm(network, of.prior(initial, walk), of, walk), num, seed, batch)
    return PublishedSamples(_numpy(drawn + centre), np.arange(num), seed)


def sample_carbon(
    published: PublishedModel, atoms: int, num: int, seed: int, betas: Betas | None = None, batch: int = BATCH
) -> PublishedSamples:
    """Carbon crystals of `atoms` atoms a cell by DiG's network and probability flow; the cell's origin at 0."""
    net = published.net
    if not isinstance(net, CarbonNet):
        raise UserError(f"{published.source} is {published.kind.value}, expected DiG's carbon network")
    reference = reference_sites(atoms)
    network = carbon_network(net, carbon_rows(atoms))
    of = AtomDiffusion(betas or ligand_betas(), reference, torch.ones(len(reference), dtype=torch.bool), completed)
    drawn = _sampled(lambda walk: flow(network, of.prior(reference, walk), of), num, seed, batch)
    origin = drawn[:, atoms : atoms + 1]
    return PublishedSamples(_numpy(drawn[:, :atoms] - origin), np.arange(num), seed, cell=_numpy(cell_of(drawn)))


def _bound(published: PublishedModel, representation: Representation, sequence: str | None) -> FramesNetwork:
    net = published.net
    if not isinstance(net, ProteinNet | BioEmu):
        raise UserError(f"{published.source} is {published.kind.value}, which is no network of proteins")
    single, pair = (torch.from_numpy(x).to(_device(net)) for x in (representation.single, representation.pair))
    return frames_network(net, single, pair, sequence)


def _device(net: nn.Module) -> torch.device:
    return next(net.parameters()).device


def _prior(published: PublishedModel, residues: int, num: int, seed: int) -> State:
    if published.kind is PublishedKind.BIOEMU:
        return bioemu_prior(residues, _walk(0, num, seed))
    return released_prior(num, residues, seed)


def _run(
    published: PublishedModel, network: FramesNetwork, sampler: PublishedSampler, start: State, walk: Walk
) -> State:
    assert start.positions is not None and start.rotations is not None
    device = _device(published.net)
    start = State(positions=start.positions.to(device), rotations=start.rotations.to(device))
    walk = Walk(walk.seed.to(device), walk.index.to(device))
    with torch.no_grad():
        if sampler in _BIOEMU_SAMPLERS:
            return _BIOEMU_SAMPLERS[sampler](network, start, walk, bioemu_noise(published))
        return sample_protein(network, start, _PROTEIN_SAMPLERS[sampler], walk)


def _batches(states: State, num: int, seed: int, batch: int) -> list[tuple[State, Walk]]:
    assert states.positions is not None and states.rotations is not None
    spans = [slice(first, min(first + batch, num)) for first in range(0, num, batch)]
    return [
        (State(positions=states.positions[s], rotations=states.rotations[s]), _walk(s.start, s.stop, seed))
        for s in spans
    ]


def _walk(first: int, last: int, seed: int) -> Walk:
    index = torch.arange(first, last)
    return Walk(torch.full_like(index, seed), index)


def _sampled(run: Callable[[Walk], Tensor], num: int, seed: int, batch: int) -> Tensor:
    with torch.no_grad():
        return torch.cat([run(_walk(i, min(i + batch, num), seed)) for i in range(0, num, batch)])


def _numpy(values: Tensor | None) -> np.ndarray:
    assert values is not None
    return values.cpu().numpy()
