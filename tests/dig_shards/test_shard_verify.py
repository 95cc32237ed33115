"""Any flipped bit, truncation, missing or foreign file in a dataset or store is reported by name."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from dig_shards import ShardError, TrajectoryReader, TrajectoryWriter
from dig_shards.verify import Report, verify, verify_trajectory

FLIPS_PER_FILE = 12


def flip_a_bit_in_every_file(directory: Path, check: Callable[[Path], Report]) -> None:
    rng = random.Random(0)
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        data = file.read_bytes()
        for _ in range(FLIPS_PER_FILE):
            position, bit = rng.randrange(len(data)), rng.randrange(8)
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            file.write_bytes(changed)
            report = check(directory)
            assert not report.is_clean, f"bit {bit} of byte {position} of {file} flipped unseen"
            assert any(file.name in line for line in report.problems), f"{file}: {report.problems}"
        file.write_bytes(data)
    assert check(directory).is_clean


def test_whole_dataset_is_clean_and_counted(dataset):
    report = verify(dataset)
    assert report.problems == ()
    assert report.files == sum(1 for file in dataset.rglob("*") if file.is_file())
    report.raise_if_damaged()


def test_any_flipped_bit_of_a_dataset_is_found(dataset, tmp_path):
    flip_a_bit_in_every_file(shutil.copytree(dataset, tmp_path / "copy"), verify)


def test_every_bit_of_a_small_manifest_counts(dataset, tmp_path):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    data = (copy / "manifest.json").read_bytes()
    for position in range(0, len(data), 7):
        changed = bytearray(data)
        changed[position] ^= 1 << (position % 8)
        (copy / "manifest.json").write_bytes(changed)
        assert not verify(copy).is_clean


def test_any_flipped_bit_of_a_finished_trajectory_is_found(write_trajectory, tmp_path):
    path = write_trajectory(tmp_path / "t.zarr", 40)
    assert verify_trajectory(path).is_clean
    flip_a_bit_in_every_file(path, verify_trajectory)


def test_any_flipped_bit_of_a_growing_trajectory_is_found(fields, arrays, tmp_path):
    path = tmp_path / "t.zarr"
    with TrajectoryWriter.create(path, fields(5), {}, 8) as writer:
        for start in (0, 8):
            writer.append_chunk(arrays(5, 0, start, start + 8))
    flip_a_bit_in_every_file(path, verify_trajectory)


def test_damage_in_a_member_is_named_by_member(dataset, tmp_path):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    tar = copy / "toy-train-000001.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 1  # inside the first file of the first member of the second shard
    tar.write_bytes(data)
    assert verify(copy).problems == ("toy-train-000001.tar: altered, member toy-train-000000005.positions.bin",)
    data[600] ^= 1
    data[120] ^= 1  # inside its header
    tar.write_bytes(data)
    assert verify(copy).problems == (
        "toy-train-000001.tar: altered, in a tar header or padding; the members are whole",
    )


@pytest.mark.parametrize("name", ["toy-train-000000.tar", "toy-train-000001.index.json", "systems/benzene.json"])
def test_missing_file_is_named(dataset, tmp_path, name):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    (copy / name).unlink()
    (problem,) = verify(copy).problems
    assert problem.startswith(f"{name}: missing")


@pytest.mark.parametrize("keep", [0, 1, 511, 512, -10240, -1])
def test_truncated_tar_is_named(dataset, tmp_path, keep):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    tar = copy / "toy-validation-000000.tar"
    tar.write_bytes(tar.read_bytes()[:keep])
    assert any(line.startswith("toy-validation-000000.tar:") and "truncated" in line for line in verify(copy).problems)


def test_exchanged_and_unlisted_files_are_found(dataset, tmp_path):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    shutil.copy(copy / "toy-train-000000.tar", copy / "toy-train-000099.tar")
    assert verify(copy).problems == ("toy-train-000099.tar: is not part of this; remove it",)
    (copy / "toy-train-000099.tar").unlink()
    shutil.copy(copy / "toy-train-000000.index.json", copy / "toy-train-000001.index.json")
    assert any("is not the index the manifest lists" in line for line in verify(copy).problems)


def test_missing_manifest_is_a_problem_not_an_exception(dataset, tmp_path):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    (copy / "manifest.json").unlink()
    assert "no manifest" in verify(copy).problems[0]


def test_damage_to_a_trajectory_is_named_and_raised(write_trajectory, tmp_path):
    path = write_trajectory(tmp_path / "t.zarr", 40)
    (path / "energy" / "c.1").unlink()
    (path / "positions" / "c.9.0.0").write_bytes(b"stray")
    with pytest.raises(ShardError, match=r"energy/c\.1: chunk is missing(.|\n)*positions/c\.9\.0\.0: is not part"):
        TrajectoryReader(path).verify()
    assert "no trajectory store" in verify_trajectory(tmp_path / "none.zarr").problems[0]
