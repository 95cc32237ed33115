"""Batches of several systems and of conditioned frames: a row is what it is, whoever shares its batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dig_shards import Cursor, TrajectoryWriter
from dig_shards.manifest import TRAIN
from torch import Tensor

from dig_scale.config import Recipe
from dig_scale.errors import TrainingError
from dig_scale.objectives.denoising import denoising_loss
from dig_scale.records import field_names, field_specs, frame_arrays, pack_dataset, trajectory_attributes
from dig_scale.sampling.solvers import fields_of
from dig_scale.system import Frames, System
from dig_scale.training.data import MicroBatch, StepInput, TrainingData, open_split, step_input, validation_batches
from dig_scale.training.objective import Objective
from dig_scale.training.zero import Ranks
from dig_scale.tree import tree_select
from tests.dig_scale.training.small_runs import small_recipe
from tests.kinds import KINDS, case, lively_model, protein, system_of
from tests.molecules import alanine_dipeptide_heavy, five_beads

CPU = torch.device("cpu")
GAP = [{"name": "gap", "centre": 1.0, "spread": 2.0}]
ORIGIN = {"temperature_K": 300.0, "first_frame_ps": 0.0, "frame_spacing_ps": 1.0, "engine": "test"}


def write_dataset(folder: Path, content: Sequence[tuple[System, Frames]]) -> Path:
    for system, frames in content:
        names = field_names(frames)
        attributes = trajectory_attributes(system, ORIGIN)
        path = folder / "trajectories" / f"{system.name}.zarr"
        specs = field_specs(system.n_sites, names)
        with TrajectoryWriter.create(path, specs, attributes, chunk_frames=frames.n_frames) as writer:
            arrays = frame_arrays(frames)
            writer.finish(
                {name: arrays[name].astype(np.float32) if name == "positions" else arrays[name] for name in names}
            )
    pack_dataset(small_recipe(), [folder / "trajectories"], folder / "dataset")
    return folder / "dataset"


def frames_of(positions: np.ndarray, **others: Any) -> Frames:
    return Frames(positions, np.arange(len(positions), dtype=float), **others)


def copies(kind: str, system: System | None = None, count: int = 12) -> tuple[System, Frames]:
    """Frames of a case of tests.kinds, four times over with noise."""
    found, generator = case(kind), np.random.default_rng(3)
    repeat = {
        name: np.tile(value.numpy(), (count // 3, *[1] * (value.dim() - 1))) for name, value in found.frames.items()
    }
    mobile = found.system.mobile[:, None]
    repeat["positions"] = repeat["positions"] + generator.normal(0, 0.05, repeat["positions"].shape) * mobile
    positions = repeat.pop("positions")
    if "rotations" in repeat:
        repeat["rotations"] = repeat["rotations"].astype(np.float32)
    return system or found.system, frames_of(positions, **repeat)


def shaken_frames(system: System, count: int, seed: int, **labels: np.ndarray) -> Frames:
    noise = np.random.default_rng(seed).normal(0, 0.1, (count, system.n_sites, 3))
    return frames_of(system.reference_positions + noise, labels=labels)


def short_protein() -> tuple[System, Frames]:
    """Another protein, of four residues."""
    found = protein()
    system = replace(found.system.select([0, 1, 2, 3]), name="short")
    frames = {name: value[:, :4] for name, value in found.frames.items()}
    positions, rotations = (
        np.tile(frames[k].numpy(), (4, *[1] * (frames[k].dim() - 1))) for k in ("positions", "rotations")
    )
    return system, frames_of(positions, rotations=rotations.astype(np.float32))


def mixed(**changes: Any) -> Recipe:
    return small_recipe(**{"batches": "mixed", "global_batch": 8, **changes})


def opened(dataset: Path, recipe: Recipe) -> TrainingData:
    data = open_split(dataset, TRAIN, recipe, CPU)
    assert data is not None
    return data


def steps(data: TrainingData, recipe: Recipe, world_size: int, micro_batch: int | None = None) -> list[StepInput]:
    settings = recipe.train.model_copy(update={"micro_batch": micro_batch})
    ranks = [Ranks(rank, world_size, CPU) for rank in range(world_size)]
    return [step_input(data, settings, one, 5, Cursor(3, 0, 4)) for one in ranks]


def losses(parts: Sequence[StepInput], network: torch.nn.Module) -> Tensor:
    micro = [m for part in parts for m in part.micro_batches]
    with torch.no_grad():
        return torch.cat([denoising_loss(network, m.composition, m.batch, m.t, m.noise) for m in micro])


MIXTURES = {
    "molecules": ("atoms", lambda: [(s, shaken_frames(s, 20, 1)) for s in (alanine_dipeptide_heavy(), five_beads())]),
    "proteins": ("residues", lambda: [copies("protein"), short_protein()]),
    "crystals": (
        "crystal",
        lambda: [
            copies("crystal"),
            (
                system_of("diamond", "crystal", [6, 6], np.zeros((2, 3)), periodic=(True, True, True)),
                frames_of(np.random.default_rng(0).normal(0, 1, (9, 2, 3)), cell=np.tile(3.0 * np.eye(3), (9, 1, 1))),
            ),
        ],
    ),
}


@pytest.fixture(scope="module", params=list(MIXTURES))
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingData, Recipe]:
    sites, content = MIXTURES[request.param]
    recipe = mixed(model={"sites": sites})
    return opened(write_dataset(tmp_path_factory.mktemp(request.param), content()), recipe), recipe


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 1), (2, None), (4, 2)])
def test_a_row_of_a_mixed_batch_has_its_loss_and_noise_in_any_company(
    mixture: tuple[TrainingData, Recipe], world_size: int, micro_batch: int | None
) -> None:
    data, recipe = mixture
    network = lively_model(recipe.model.sites).float()
    whole, parts = steps(data, recipe, 1), steps(data, recipe, world_size, micro_batch)
    assert len(np.unique(data.system_of(whole[0].frame_ids))) == 2
    shared = [m for part in parts for m in part.micro_batches]
    for name, noise in fields_of(whole[0].micro_batches[0].noise).items():
        assert torch.equal(torch.cat([fields_of(m.noise)[name] for m in shared]), noise)
        clean = fields_of(whole[0].micro_batches[0].batch.state)[name]
        assert torch.allclose(torch.cat([fields_of(m.batch.state)[name] for m in shared]), clean, atol=1e-6)
    wanted = losses(whole, network)
    assert torch.allclose(losses(parts, network), wanted, rtol=1e-3, atol=1e-5)
    assert {part.next_cursor for part in parts} == {whole[0].next_cursor}


def test_the_order_of_a_mixed_batch_does_not_matter(mixture: tuple[TrainingData, Recipe]) -> None:
    data, recipe = mixture
    network = lively_model(recipe.model.sites).float()
    (whole,) = steps(data, recipe, 1)
    micro, order = whole.micro_batches[0], torch.tensor([3, 0, 7, 1, 2, 6, 5, 4])
    again = data.micro_batch(whole.frame_ids[order.numpy()], micro.t[order], tree_select(micro.noise, order))
    turned = replace(whole, micro_batches=(again,))
    assert torch.allclose(losses([turned], network), losses([whole], network)[order], rtol=1e-3, atol=1e-5)


def test_padding_does_not_change_a_loss(mixture: tuple[TrainingData, Recipe]) -> None:
    """A frame of the smaller system, padded in a mixed batch, against the same frame by itself."""
    data, recipe = mixture
    network = lively_model(recipe.model.sites).float()
    alone = opened(data.reader.directory, recipe.model_copy(update={"train": small_recipe().train}))
    small = int(np.argmin([system.n_sites for system in data.systems]))
    n, ids = data.systems[small].n_sites, np.flatnonzero(data.system_of(np.arange(data.reader.n_frames)) == small)[:3]
    context, composition = alone.contexts[small], alone.compositions[small]
    assert data.contexts[small].n_sites > n
    normals = torch.randn(3, composition.normals(context), generator=torch.Generator().manual_seed(0))
    noise, t = composition.noise(normals, context), torch.tensor([0.1, 0.5, 0.9])
    missing = data.contexts[small].n_sites - n
    longer = {
        name: value if name == "lattice" else torch.nn.functional.pad(value, (0, 0, 0, missing))
        for name, value in fields_of(noise).items()
    }
    wanted = losses([StepInput(ids, (alone.micro_batch(ids, t, noise),), Cursor(0))], network)
    padded = data.micro_batch(ids, t, type(noise)(**longer))
    found = losses([StepInput(ids, (padded,), Cursor(0))], network)
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-5)
    trimmed = padded.trimmed()
    assert trimmed.batch.context.n_sites == n
    assert torch.allclose(losses([StepInput(ids, (trimmed,), Cursor(0))], network), wanted, rtol=1e-3, atol=1e-5)


def test_trimming_keeps_every_site_of_the_largest_row(mixture: tuple[TrainingData, Recipe]) -> None:
    data, recipe = mixture
    micro = steps(data, recipe, 1)[0].micro_batches[0]
    rows = [int(count) for count in micro.batch.context.present.sum(1)]
    kept = micro.trimmed()
    assert kept.batch.context.n_sites == max(rows)
    assert [int(count) for count in kept.batch.context.present.sum(1)] == rows


def test_systems_with_other_periodic_directions_share_no_batch(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, [copies("pocket"), copies("catalyst")])
    with pytest.raises(TrainingError, match=r"cannot share a batch.*train.batches = 'one-system'"):
        open_split(dataset, TRAIN, mixed(model={"sites": "anchored"}), CPU)
    opened(dataset, mixed(model={"sites": "anchored"}, batches="one-system"))


def test_a_model_of_other_sites_is_refused_with_the_systems_name(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, [copies("crystal")])
    with pytest.raises(ValueError, match=r"'crystal' needs a model with model.sites = 'crystal', this one has 'atoms'"):
        open_split(dataset, TRAIN, small_recipe(), CPU)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_loss_with_gradients_for_all_it_reads(kind: str, precision: str, tmp_path: Path) -> None:
    recipe = small_recipe(model={"sites": case(kind).sites}, global_batch=4)
    data = opened(write_dataset(tmp_path, [copies(kind)]), recipe)
    (item,) = steps(data, recipe, 1)
    network = lively_model(case(kind).sites).float().train()
    loss = Objective(network, precision)(item.micro_batches[0])
    assert loss.shape == (4,)
    assert loss.isfinite().all()
    loss.mean().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    silent += [name for name, p in network.named_parameters() if name.endswith("head.out.weight") and not p.grad.any()]
    assert not silent
    with torch.no_grad():
        exact = Objective(network, "fp32")(item.micro_batches[0])
    assert float(loss.detach().mean()) == pytest.approx(float(exact.mean()), rel=0.05)  # bf16 keeps 8 bits


def labelled(folder: Path, gaps: np.ndarray, **others: np.ndarray) -> Path:
    system = alanine_dipeptide_heavy()
    return write_dataset(folder, [(system, shaken_frames(system, len(gaps), 1, gap=gaps, **others))])


def test_frames_bring_their_properties_in_units_of_the_spread(tmp_path: Path) -> None:
    gaps = np.where(np.arange(40) % 4 == 0, 5.0, 1.0)
    recipe = mixed(model={"conditions": GAP}, condition_dropout=0.0, global_batch=16)
    data = opened(labelled(tmp_path, gaps), recipe)
    (item,) = steps(data, recipe, 1)
    context = item.micro_batches[0].batch.context
    assert context.known.shape == (16, 1)
    assert context.known.all()
    stored = torch.from_numpy(data.reader.read_batch(item.frame_ids, "label_gap"))
    assert set(stored.tolist()) == {1.0, 5.0}
    assert torch.allclose(context.condition[:, 0].double(), (stored - 1) / 2)


def test_hidden_properties_are_unknown_and_the_same_rows_on_any_number_of_ranks(tmp_path: Path) -> None:
    recipe = mixed(model={"conditions": GAP}, condition_dropout=0.3, global_batch=32)
    data = opened(labelled(tmp_path, np.linspace(0, 4, 50)), recipe)

    def known(parts: list[StepInput]) -> Tensor:
        return torch.cat([m.batch.context.known for part in parts for m in part.micro_batches])

    whole = known(steps(data, recipe, 1))
    assert 2 <= int((~whole).sum()) <= 20  # 9.6 of 32 are expected, with a standard deviation of 2.6
    assert torch.equal(known(steps(data, recipe, 4, 2)), whole)
    seen = list(validation_batches(data, recipe.train, Ranks(0, 1, CPU), 20))
    assert all(one.micro.batch.context.known.all() for one in seen)


def test_a_conditioned_model_listens_to_what_is_known_alone(tmp_path: Path) -> None:
    recipe = mixed(model={"conditions": GAP}, condition_dropout=0.0)
    data = opened(labelled(tmp_path, np.linspace(0, 4, 50)), recipe)
    network = lively_model("atoms", conditions=GAP).float()
    micro = steps(data, recipe, 1)[0].micro_batches[0]

    def loss(known: bool, shift: float) -> Tensor:
        context = micro.batch.context
        told = replace(context, condition=context.condition + shift, known=torch.full_like(context.known, known))
        return losses([StepInput(np.arange(0), (with_context(micro, told),), Cursor(0))], network)

    assert torch.equal(loss(False, 0.0), loss(False, 1.0))
    assert (loss(True, 0.0) - loss(True, 1.0)).abs().max() > 1e-5
    bare = replace(micro.batch.context, condition=torch.zeros(1, 0), known=torch.zeros(1, 0, dtype=torch.bool))
    unasked = losses([StepInput(np.arange(0), (with_context(micro, bare),), Cursor(0))], network)
    assert torch.allclose(unasked, loss(False, 0.0), atol=1e-6)


def with_context(micro: MicroBatch, context: Any) -> MicroBatch:
    return replace(micro, batch=replace(micro.batch, context=context))


def test_a_missing_label_is_named_with_those_there(tmp_path: Path) -> None:
    dataset = labelled(tmp_path, np.ones(20), bulk=np.ones(20))
    wanted = mixed(model={"conditions": [{"name": "shear", "centre": 0.0, "spread": 1.0}]})
    with pytest.raises(TrainingError, match=r"ala2-heavy' have no label 'shear'.*labels there: bulk, gap"):
        open_split(dataset, TRAIN, wanted, CPU)
