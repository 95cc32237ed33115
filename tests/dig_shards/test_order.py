"""The global order repeats and drops nothing, and depends on neither world size nor batch size."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from dig_shards import Cursor, ShardError, batch_ids, permute, system_batch


def consume(n, batch, steps, world=1, cursor=None):
    cursor = cursor or Cursor(seed=11)
    out = []
    for _ in range(steps):
        parts = [batch_ids(cursor, n, batch, rank, world) for rank in range(world)]
        assert len({after for _, after in parts}) == 1
        out.append(np.concatenate([ids for ids, _ in parts]))
        cursor = parts[0][1]
    return np.concatenate(out), cursor


@pytest.mark.parametrize("n", [1, 2, 7, 24, 100])
def test_epochs_roll_over_repeating_and_dropping_no_record(n):
    ids, cursor = consume(n, 24, n)
    assert cursor == Cursor(11, 24, 0)
    for epoch, block in enumerate(ids.reshape(24, n)):
        np.testing.assert_array_equal(block, permute(np.arange(n), n, 11, epoch))


@pytest.mark.parametrize("world", [2, 3, 4, 8, 24])
def test_global_order_does_not_depend_on_world_size(world):
    np.testing.assert_array_equal(consume(101, 24, 20, world)[0], consume(101, 24, 20, 1)[0])


def test_resume_repeats_no_record_at_another_world_and_batch_size():
    straight, _ = consume(101, 1, 240)
    first, cursor = consume(101, 24, 4, world=8)
    second, _ = consume(101, 12, 12, world=3, cursor=Cursor(cursor.seed, cursor.epoch, cursor.consumed))
    np.testing.assert_array_equal(np.concatenate([first, second]), straight)


@pytest.mark.parametrize("arguments", [(10, 5, 0, 2), (10, 0, 0, 1), (10, 4, 4, 4), (0, 4, 0, 1), (3, 4, 0, 1)])
def test_batch_that_cannot_be_shared_or_cursor_that_does_not_fit_is_refused(arguments):
    with pytest.raises(ShardError):
        batch_ids(Cursor(0, 0, 5), *arguments)


OFFSETS = np.array([0, 50, 50, 53, 100])  # systems of 50, 0, 3 and 47 frames


def consume_by_system(batch, steps, world=1, cursor=None, offsets=OFFSETS):
    cursor = cursor or Cursor(seed=5)
    out = []
    for _ in range(steps):
        parts = [system_batch(cursor, offsets, batch, rank, world) for rank in range(world)]
        assert len({(part.system, part.next_cursor) for part in parts}) == 1
        out.append((parts[0].system, np.concatenate([part.frame_ids for part in parts])))
        cursor = parts[0].next_cursor
    return out, cursor


def test_every_batch_is_of_one_system():
    for system, ids in consume_by_system(8, 100)[0]:
        assert ((OFFSETS[system] <= ids) & (ids < OFFSETS[system + 1])).all()


def test_each_system_is_consumed_in_proportion_and_evenly():
    batches, cursor = consume_by_system(8, 3000)
    assert cursor.epoch > 200
    for system, size in [(0, 50), (2, 3), (3, 47)]:
        counts = Counter(np.concatenate([ids for s, ids in batches if s == system]).tolist())
        assert len(counts) == size
        # Within an epoch batches are reordered, so a record may be ahead of another by the passes of two epochs.
        assert max(counts.values()) - min(counts.values()) <= (2 if size >= 8 else 8)
        assert np.mean(list(counts.values())) == pytest.approx(cursor.epoch, rel=0.02)


def test_whole_epochs_by_system_repeat_and_drop_no_record():
    offsets = np.array([0, 16, 40])
    batches, cursor = consume_by_system(8, 5, offsets=offsets)
    assert cursor == Cursor(5, 1, 0)
    np.testing.assert_array_equal(np.sort(np.concatenate([ids for _, ids in batches])), np.arange(40))
    assert [system for system, _ in consume_by_system(8, 50, offsets=offsets)[0]] != [0, 0, 1, 1, 1] * 10


@pytest.mark.parametrize("world", [2, 8])
def test_order_by_system_does_not_depend_on_world_size(world):
    for (a, ids), (b, expected) in zip(consume_by_system(8, 40, world)[0], consume_by_system(8, 40)[0], strict=True):
        assert a == b
        np.testing.assert_array_equal(ids, expected)


def test_resume_by_system_repeats_no_record():
    straight, _ = consume_by_system(8, 40)
    first, cursor = consume_by_system(8, 17)
    second, _ = consume_by_system(8, 23, world=4, cursor=cursor)
    for (a, ids), (b, expected) in zip(first + second, straight, strict=True):
        assert a == b
        np.testing.assert_array_equal(ids, expected)


def test_by_system_refuses_another_batch_size_and_empty_data():
    with pytest.raises(ShardError, match="batch size"):
        system_batch(Cursor(0, 0, 8), OFFSETS, 6)
    with pytest.raises(ShardError, match="empty"):
        system_batch(Cursor(0), np.array([0, 0]), 6)
