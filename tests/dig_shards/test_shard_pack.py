"""Packing puts every drawn frame in exactly one place, the same way each time."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from dig_shards import (
    PackPlan,
    ShardError,
    ShardReader,
    SplitBy,
    TrajectoryReader,
    TrajectorySource,
    TrajectoryWriter,
    load_manifest,
)
from dig_shards.lock import WriterLock, lock_path
from dig_shards.pack import pack
from dig_shards.verify import verify


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def tars_of(directory: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(directory).items() if name != "manifest.json"}


def sources_in(directory: Path, split: str) -> list[tuple[str, int]]:
    reader = ShardReader(directory, split)
    return [(record.source.trajectory, record.source.frame) for record in map(reader.record, range(reader.n_frames))]


DRAWN = {
    *(("a", frame) for frame in range(100)),
    *(("b", frame) for frame in range(5, 80, 3)),
    *(("c", frame) for frame in range(70)),
}


@pytest.mark.parametrize("split_by", list(SplitBy))
def test_every_drawn_frame_is_in_exactly_one_split_once(tmp_path, sources, plan, split_by):
    pack(sources, tmp_path / "d", dataclasses.replace(plan, split_by=split_by, validation_fraction=0.34))
    found = sources_in(tmp_path / "d", "train") + sources_in(tmp_path / "d", "validation")
    assert len(found) == len(set(found))
    assert set(found) == DRAWN


def test_block_split_keeps_blocks_whole_and_trajectory_split_trajectories(tmp_path, sources, plan):
    pack(sources, tmp_path / "block", plan)
    sides = [
        {(name, (frame - 5) // 3 // 10 if name == "b" else frame // 10) for name, frame in sources_in(folder, split)}
        for folder in [tmp_path / "block"]
        for split in ("train", "validation")
    ]
    assert not sides[0] & sides[1]
    assert len(sides[1]) == round(0.2 * len(sides[0] | sides[1]))
    by_trajectory = dataclasses.replace(plan, split_by=SplitBy.TRAJECTORY, validation_fraction=0.4)
    pack(sources, tmp_path / "trajectory", by_trajectory)
    names = [{name for name, _ in sources_in(tmp_path / "trajectory", split)} for split in ("train", "validation")]
    assert (len(names[0]), len(names[1]), names[0] & names[1]) == (2, 1, set())


def test_every_frame_holds_the_values_of_its_source(dataset, sources):
    readers = {reader.name: reader for reader in (TrajectoryReader(source.path) for source in sources)}
    for split in ("train", "validation"):
        reader = ShardReader(dataset, split)
        for frame_id in range(reader.n_frames):
            record = reader.record(frame_id)
            origin, frame = readers[record.source.trajectory], record.source.frame
            assert record.system_id == origin.attributes["system_id"]
            for name in ("positions", "energy"):
                np.testing.assert_array_equal(record.arrays[name], origin.read(name, frame, frame + 1)[0])


def test_frames_are_shuffled_over_all_trajectories_of_a_system(tmp_path, sources):
    pack(sources, tmp_path / "d", PackPlan("toy", ("energy",), seed=1))
    order = [pair for pair in sources_in(tmp_path / "d", "train") if pair[0] != "c"]
    in_order = sorted(order)
    moves = np.abs(np.array([in_order.index(pair) for pair in order]) - np.arange(len(order)))
    # A random permutation moves an item by a third of the length on average (here 42, standard error about 3).
    assert 30 < moves.mean() < 54


def test_packing_again_gives_identical_bytes_whatever_the_memory(tmp_path, sources, plan, sidecars, dataset):
    for memory in (1, 4000, 2**30):
        out = tmp_path / str(memory)
        pack(sources, out, plan, sidecars, memory_bytes=memory)
        assert tars_of(out) == tars_of(dataset)
        assert verify(out).is_clean


def test_memory_of_packing_is_bounded_by_what_was_asked(tmp_path, write_trajectory):
    path = write_trajectory(tmp_path / "t.zarr", 16384, n_atoms=40, chunk=512)  # 8 MB of positions
    memory = 2**20
    tracemalloc.start()
    pack([TrajectorySource(path)], tmp_path / "d", PackPlan("toy", ("positions",)), memory_bytes=memory)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # A bucket with its copies is within the target; a chunk, JSON and zstd work come on top.
    assert peak < 2 * memory


def test_another_seed_gives_another_order(tmp_path, sources, plan, sidecars, dataset):
    pack(sources, tmp_path / "d", dataclasses.replace(plan, seed=4), sidecars)
    assert tars_of(tmp_path / "d") != tars_of(dataset)


def test_packing_into_a_finished_dataset_returns_it_untouched(sources, plan, sidecars, dataset):
    before = contents(dataset)
    assert pack(sources, dataset, plan, sidecars) == load_manifest(dataset)
    assert contents(dataset) == before


@pytest.mark.parametrize("change", ["plan", "sources", "sidecars", "content"])
def test_finished_dataset_of_another_request_is_not_overwritten(
    tmp_path, sources, plan, sidecars, dataset, change, write_trajectory
):
    before = contents(dataset)
    if change == "plan":
        plan = dataclasses.replace(plan, seed=99)
    elif change == "sources":
        sources = (*sources[:2], dataclasses.replace(sources[2], stop=50))
    elif change == "sidecars":
        sidecars = {**sidecars, "alanine": "{}"}
    else:
        other = write_trajectory(tmp_path / "a.zarr", 100, seed=77)
        sources = (dataclasses.replace(sources[0], path=other), *sources[1:])
    with pytest.raises(ShardError, match="another plan or other trajectories"):
        pack(sources, dataset, plan, sidecars)
    assert contents(dataset) == before


def test_manifest_tells_counts_origin_and_plan(dataset, plan):
    document = json.loads((dataset / "manifest.json").read_text())
    assert document["version"] == 1
    assert sum(split["frames"] for split in document["counts"].values()) == len(DRAWN)
    assert [row["origin"] for row in document["trajectories"]] == [{"engine": "test", "seed": s} for s in (0, 1, 2)]
    assert document["plan"] == plan.to_json()
    assert [system["id"] for system in document["systems"]] == ["alanine", "benzene"]
    assert document["systems"][1]["fields"][0]["shape"] == [7, 3]


def test_progress_counts_to_its_total(tmp_path, sources, plan):
    seen: list[tuple[int, int]] = []
    pack(sources, tmp_path / "d", plan, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (2 * len(DRAWN), 2 * len(DRAWN))


def test_growing_trajectory_is_packed_as_far_as_it_is_committed(tmp_path, fields, arrays):
    with TrajectoryWriter.create(tmp_path / "t.zarr", fields(5), {"system_id": "x"}, 8) as writer:
        writer.append_chunk(arrays(5, 0, 0, 8))
        manifest = pack([TrajectorySource(tmp_path / "t.zarr")], tmp_path / "d", PackPlan("toy", ("positions",)))
    assert manifest.frames("train") == 8
    assert verify(tmp_path / "d").is_clean


def test_damaged_trajectory_stops_the_pack_without_a_manifest(tmp_path, write_trajectory):
    path = write_trajectory(tmp_path / "t.zarr", 64)
    chunk = path / "positions" / "c.2.0.0"
    data = bytearray(chunk.read_bytes())
    data[20] ^= 4
    chunk.write_bytes(data)
    with pytest.raises(ShardError, match=r"c\.2\.0\.0: checksum mismatch"):
        pack([TrajectorySource(path)], tmp_path / "d", PackPlan("toy", ("positions",)))
    assert not (tmp_path / "d" / "manifest.json").exists()
    assert not lock_path(tmp_path / "d").exists()


def test_foreign_files_and_a_second_packer_are_refused(tmp_path, sources, plan):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "thesis.txt").write_text("precious")
    with pytest.raises(ShardError, match=r"thesis\.txt"):
        pack(sources, tmp_path / "d", plan)
    assert (tmp_path / "d" / "thesis.txt").read_text() == "precious"
    lock = WriterLock.acquire(lock_path(tmp_path / "e"))
    with pytest.raises(ShardError, match="held by process"):
        pack(sources, tmp_path / "e", plan)
    lock.release()


def test_sources_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, sources, plan, write_trajectory):
    bigger = write_trajectory(tmp_path / "bigger.zarr", 20, n_atoms=9)
    nameless = write_trajectory(tmp_path / "nameless.zarr", 20, system="../x")
    cases = [
        ([], plan, "at least one trajectory"),
        ([sources[0], sources[0]], plan, "two sources are named 'a'"),
        ([sources[0], TrajectorySource(bigger)], plan, "declare different fields"),
        ([TrajectorySource(nameless)], plan, "system_id is '../x'"),
        ([dataclasses.replace(sources[0], stop=101)], plan, "the store holds 100"),
        (sources, dataclasses.replace(plan, fields=("forces",)), "no field 'forces'"),
        (sources, dataclasses.replace(plan, split_by=SplitBy.TRAJECTORY, validation_fraction=0.1), "puts 0 in"),
    ]
    for given, asked, message in cases:
        with pytest.raises(ShardError, match=message):
            pack(given, tmp_path / "d", asked)
    with pytest.raises(ShardError, match="no trajectory is of"):
        pack(sources, tmp_path / "d", plan, {"water": "{}"})
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"name": "a.b"},
        {"fields": ()},
        {"fields": ("x", "x")},
        {"frames_per_member": 0},
        {"members_per_shard": 0},
        {"block_frames": 0},
        {"validation_fraction": 1.0},
        {"validation_fraction": -0.1},
    ],
)
def test_impossible_plan_is_refused(plan, change):
    with pytest.raises(ShardError):
        dataclasses.replace(plan, **change)
