"""Others can read the shards: plain webdataset, tar, and the README's snippet run by a stranger."""

from __future__ import annotations

import json
import re
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from dig_shards import ShardReader, load_manifest

README = Path(__file__).parents[2] / "data_shards" / "README.md"


def test_webdataset_streams_the_same_members(dataset):
    reader = ShardReader(dataset, "train")
    urls = [str(dataset / shard.tar) for shard in reader.manifest.shards["train"]]
    first = 0
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        meta = json.loads(sample["meta.json"])
        spec = meta["fields"]["positions"]
        stored = np.frombuffer(sample["positions.bin"], spec["dtype"]).reshape(meta["n_frames"], *spec["shape"])
        ids = np.arange(first, first + meta["n_frames"])
        np.testing.assert_allclose(stored * spec["scale"], reader.read_batch(ids, "positions"), rtol=1e-6)
        first += meta["n_frames"]
    assert first == reader.n_frames


def test_a_stranger_decodes_a_shard_with_the_snippet_of_the_readme(dataset, monkeypatch):
    snippet = next(code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "tarfile" in code)
    assert set(re.findall(r"^import (.*)$", snippet, re.M)) == {"json, tarfile", "numpy as np"}
    decoded: dict[str, list[np.ndarray]] = {}
    collect = snippet.replace('print(meta["system"], field, values.shape, spec["unit"])', "collect(field, values)")
    assert collect != snippet
    monkeypatch.chdir(dataset)
    exec(collect, {"collect": lambda field, values: decoded.setdefault(field, []).append(values)})
    reader = ShardReader(dataset, "train")
    ids = np.arange(reader.manifest.shards["train"][0].frames)
    assert (reader.frame_system(ids) == 0).all()
    for field in ("positions", "energy"):
        np.testing.assert_allclose(np.concatenate(decoded[field]), reader.read_batch(ids, field), rtol=1e-6)


def test_the_readme_walk_from_trajectory_to_batch_runs(tmp_path, monkeypatch):
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "ShardReader" in code)
    monkeypatch.chdir(tmp_path)
    given = np.random.default_rng(0).normal(0, 3, (256, 22, 3))
    names = {"positions": given, "energy": np.arange(256.0)}
    exec(code, names)
    assert names["positions"].shape == (64, 22, 3)
    distance = np.abs(names["positions"][:, None] - given[None]).max((2, 3)).min(1)
    assert distance.max() < 6e-4


def test_index_offsets_are_where_tar_finds_the_data(dataset):
    for shards in load_manifest(dataset).shards.values():
        for shard in shards:
            index = json.loads((dataset / shard.index).read_text())
            with tarfile.open(dataset / shard.tar) as tar:
                found = {member.name: (member.offset_data, member.size) for member in tar}
            stated = {
                f"{key}.{ending}": (offset, size)
                for ending, column in index["files"].items()
                for key, offset, size in zip(index["keys"], column["offset"], column["size"], strict=True)
            }
            assert found == stated


def test_tar_program_reads_every_shard_and_keys_hold_no_dots(dataset):
    for tar in dataset.glob("*.tar"):
        listing = subprocess.run(["tar", "-tf", str(tar)], check=True, capture_output=True, text=True)
        assert listing.stderr == ""
        for name in listing.stdout.split():
            assert re.fullmatch(r"toy-(train|validation)-\d{9}\.(positions\.bin|energy\.bin|meta\.json)", name)


def test_members_of_a_key_are_adjacent_and_only_last_ones_are_short(dataset):
    lengths: dict[tuple[str, str], list[int]] = {}
    for split, shards in load_manifest(dataset).shards.items():
        for shard in shards:
            with tarfile.open(dataset / shard.tar) as tar:
                names = tar.getnames()
                keys = [name.split(".")[0] for name in names]
                assert keys == sorted(keys)
                for name in names[2::3]:
                    meta = json.loads(tar.extractfile(name).read())
                    lengths.setdefault((split, meta["system"]), []).append(meta["n_frames"])
                    assert len(meta["frame"]) == len(meta["trajectory"]) == meta["n_frames"]
    for counts in lengths.values():
        assert all(count == 8 for count in counts[:-1])
        assert 1 <= counts[-1] <= 8


@pytest.mark.parametrize("forbidden", ["pickle", "torch", "dig_scale"])
def test_source_imports_neither_pickle_nor_torch_nor_the_packages_above(forbidden):
    for file in (README.parent / "dig_shards").glob("*.py"):
        assert not re.search(rf"^\s*(import|from) {forbidden}\b", file.read_text(), re.M), file
