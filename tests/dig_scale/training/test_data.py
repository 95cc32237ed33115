"""What a step is given depends on seed, step and cursor alone, not on the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dig_shards import Cursor
from dig_shards.manifest import TRAIN, VALIDATION

from dig_scale.config import Train
from dig_scale.training.data import (
    MicroBatch,
    Prefetcher,
    StepInput,
    TrainingData,
    counter_generator,
    open_split,
    step_input,
    validation_batches,
)
from dig_scale.training.zero import Ranks
from tests.dig_scale.training.small_runs import make_dataset, small_recipe
from tests.molecules import alanine_dipeptide_heavy, five_beads

CPU = torch.device("cpu")
SETTINGS = Train(steps=6, global_batch=160, seed=3)
"""The batch is no multiple of the noise block, and a rank's share of it neither."""


def ranks_of(world_size: int) -> Iterator[Ranks]:
    return (Ranks(rank, world_size, CPU) for rank in range(world_size))


def opened(dataset: Path, split: str = TRAIN) -> TrainingData:
    data = open_split(dataset, split, small_recipe(), CPU)
    assert data is not None
    return data


def joined(inputs: list[StepInput]) -> list[torch.Tensor]:
    micro = [m for item in inputs for m in item.micro_batches]
    return [
        torch.cat([m.batch.state.positions for m in micro]),
        torch.cat([m.t for m in micro]),
        torch.cat([m.noise.positions for m in micro]),
    ]


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 20), (2, None), (5, 8), (160, 1)])
def test_all_ranks_together_see_the_same_rows_and_noise(
    dataset: Path, world_size: int, micro_batch: int | None
) -> None:
    data, cursor = opened(dataset), Cursor(3, 0, 80)
    (alone,) = (step_input(data, SETTINGS, ranks, 4, cursor) for ranks in ranks_of(1))
    split = SETTINGS.model_copy(update={"micro_batch": micro_batch})
    parts = [step_input(data, split, ranks, 4, cursor) for ranks in ranks_of(world_size)]
    assert all(torch.equal(a, b) for a, b in zip(joined([alone]), joined(parts), strict=True))
    assert {part.next_cursor for part in parts} == {alone.next_cursor}


def test_noise_and_times_change_with_step_and_seed(dataset: Path) -> None:
    data, (ranks,) = opened(dataset), ranks_of(1)
    draw = lambda settings, step: joined([step_input(data, settings, ranks, step, Cursor(3))])[1:]  # noqa: E731
    first = draw(SETTINGS, 0)
    for other in (draw(SETTINGS, 1), draw(SETTINGS.model_copy(update={"seed": 4}), 0)):
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert torch.equal(first[0], draw(SETTINGS, 0)[0])


def test_noise_is_standard_normal_without_centre_of_mass(dataset: Path) -> None:
    data, (ranks,) = opened(dataset), ranks_of(1)
    noise = joined([step_input(data, SETTINGS, ranks, 0, Cursor(3))])[2]
    assert noise.mean(dim=1).abs().max() < 1e-6
    # 10 sites lose one of ten degrees of freedom; 4800 numbers give the variance to 2 %, three times that is allowed.
    assert float(noise.var()) == pytest.approx(0.9, rel=0.06)


def test_prefetcher_gives_the_steps_in_order_and_hands_over_errors(dataset: Path) -> None:
    data, (ranks,) = opened(dataset), ranks_of(1)
    reader = Prefetcher(data, SETTINGS, ranks, 2, Cursor(3))
    expected = step_input(data, SETTINGS, ranks, 2, Cursor(3))
    assert np.array_equal(reader.next().frame_ids, expected.frame_ids)
    second = step_input(data, SETTINGS, ranks, 3, expected.next_cursor)
    assert np.array_equal(reader.next().frame_ids, second.frame_ids)
    reader.close()
    broken = Prefetcher(data, SETTINGS, ranks, 0, Cursor(3, 0, 10**9))
    with pytest.raises(ValueError, match="does not fit a data set"):
        broken.next()
    broken.close()


def test_validation_rows_are_shared_out_once_and_are_the_same_every_time(dataset: Path) -> None:
    data = opened(dataset, VALIDATION)
    settings = Train(global_batch=48)

    def rows(world_size: int) -> list[MicroBatch]:
        parts = [list(validation_batches(data, settings, ranks, 70)) for ranks in ranks_of(world_size)]
        assert len({len(part) for part in parts}) == 1
        return [one.micro for part in parts for one in part if one.weight]

    alone, shared, again = rows(1), rows(3), rows(1)
    sums = [sorted(float(t) for micro in found for t in micro.t) for found in (alone, shared)]
    assert sums[0] == sums[1]
    assert len(sums[0]) == 70
    assert all(torch.equal(a.noise.positions, b.noise.positions) for a, b in zip(alone, again, strict=True))


def test_batches_of_several_systems_hold_one_each_and_all_frames_come_once(tmp_path: Path) -> None:
    data = opened(make_dataset(tmp_path, [alanine_dipeptide_heavy(), five_beads()], 50))
    settings, cursor, seen = Train(global_batch=8), Cursor(1), []
    (ranks,) = ranks_of(1)
    while cursor.epoch == 0:
        item = step_input(data, settings, ranks, 0, cursor)
        assert len({data.reader.frame_system(item.frame_ids)[k] for k in range(8)}) == 1
        seen += item.frame_ids.tolist()
        cursor = item.next_cursor
    assert len(seen) == len(set(seen))


def test_generators_of_different_purposes_differ() -> None:
    keys = [(1, "a", 0), (1, "b", 0), (1, "a", 1), (2, "a", 0)]
    draws = {float(torch.rand(1, generator=counter_generator(*key))) for key in keys}
    assert len(draws) == 4


def test_micro_batch_moves_without_its_context(dataset: Path) -> None:
    data, (ranks,) = opened(dataset), ranks_of(1)
    micro = step_input(data, SETTINGS, ranks, 0, Cursor(3)).micro_batches[0]
    moved = micro.to(CPU)
    assert moved.batch.context is data.contexts[0]
    assert replace(moved).batch.systems == ("ala2-heavy",)
