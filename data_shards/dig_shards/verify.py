"""Read every byte of a dataset or trajectory store and tell what is wrong with it.

In: a directory. Out: a Report with one line per problem, naming the file, and the member where the damage lies in one.
Finds any changed bit, truncated, missing, altered or unlisted file. Repairs nothing.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dig_shards import chunks
from dig_shards.durable import crc32c, read_sealed, seal, sha256
from dig_shards.errors import ShardError
from dig_shards.manifest import MANIFEST, Manifest, ShardEntry, ShardIndex, load_manifest, parse_index

_PIECE = 2**24


@dataclass(frozen=True)
class Report:
    """What was read and what is wrong; a clean report has no problems."""

    directory: Path
    files: int
    bytes: int
    problems: tuple[str, ...]

    @property
    def is_clean(self) -> bool:
        """True when nothing is wrong."""
        return not self.problems

    def raise_if_damaged(self) -> None:
        """Raise ShardError holding all problems, one per line."""
        if self.problems:
            raise ShardError("\n".join(self.problems))


def verify(directory: Path | str) -> Report:
    """Check a packed dataset against its manifest, and the manifest against itself; never raises for damage."""
    directory = Path(directory)
    problems: list[str] = []
    try:
        manifest = load_manifest(directory)
    except (ShardError, KeyError, TypeError) as error:
        problems.append(f"{MANIFEST}: {error}")
    else:
        for shards in manifest.shards.values():
            for shard in shards:
                problems += _shard_problems(directory, shard)
        problems += _sidecar_problems(directory, manifest)
        problems += _unlisted(directory, _listed(manifest))
    return _report(directory, problems)


def verify_trajectory(path: Path | str) -> Report:
    """Check a trajectory store: all metadata, every committed chunk, and, if it is finished, that nothing is beside.

    In a growing store, what a killed writer left behind the last complete chunk is no problem.
    """
    path = Path(path)
    try:
        root = chunks.read_root(path)
    except ShardError as error:
        return _report(path, [str(error)])
    problems = _array_problems(path, root)
    listed = {"zarr.json", *(f"{s.name}/{name}" for s in root.fields for name in _field_files(path, root, s.name))}
    if root.n_frames is not None:
        problems += _unlisted(path, listed)
    return _report(path, problems)


def _report(directory: Path, problems: list[str]) -> Report:
    sizes = [file.stat().st_size for file in directory.rglob("*") if file.is_file()]
    return Report(directory, len(sizes), sum(sizes), tuple(problems))


def _listed(manifest: Manifest) -> set[str]:
    shards = [shard for rows in manifest.shards.values() for shard in rows]
    sidecars = {system.sidecar for system in manifest.systems if system.sidecar is not None}
    return {MANIFEST, *(shard.tar for shard in shards), *(shard.index for shard in shards), *sidecars}


def _unlisted(directory: Path, listed: set[str]) -> list[str]:
    found = {file.relative_to(directory).as_posix() for file in directory.rglob("*") if not file.is_dir()}
    return [f"{name}: is not part of this; remove it" for name in sorted(found - listed)]


def _sidecar_problems(directory: Path, manifest: Manifest) -> list[str]:
    problems = []
    for system in manifest.systems:
        if system.sidecar is None:
            continue
        file = directory / system.sidecar
        if not file.is_file():
            problems.append(f"{system.sidecar}: missing sidecar of system {system.id}")
        elif sha256(file.read_bytes()) != system.sidecar_sha256:
            problems.append(f"{system.sidecar}: altered sidecar of system {system.id}")
    return problems


def _shard_problems(directory: Path, shard: ShardEntry) -> list[str]:
    problems = []
    index = None
    try:
        data = (directory / shard.index).read_bytes()
        index = parse_index(data, shard.index)
        if sha256(data) != shard.index_sha256:
            problems.append(f"{shard.index}: is not the index the manifest lists")
    except FileNotFoundError:
        problems.append(f"{shard.index}: missing index")
    except (ShardError, KeyError, TypeError) as error:
        problems.append(str(error))
    tar = directory / shard.tar
    if not tar.is_file():
        return [*problems, f"{shard.tar}: missing shard"]
    if tar.stat().st_size != shard.tar_bytes:
        problems.append(f"{shard.tar}: {tar.stat().st_size} bytes, expected {shard.tar_bytes}: truncated or extended")
    if _file_sha256(tar) != shard.tar_sha256:
        problems += [f"{shard.tar}: altered, {place}" for place in _damaged_places(tar, index)]
    return problems


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _damaged_places(tar: Path, index: ShardIndex | None) -> list[str]:
    if index is None:
        return ["and its index is unreadable, so the member cannot be told"]
    if tar.stat().st_size == 0:
        return ["the file is empty"]
    with open(tar, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        places = [f"member {name}" for name, body, crc in _member_files(index, data) if crc32c(body) != crc]
    return places or ["in a tar header or padding; the members are whole"]


def _member_files(index: ShardIndex, data: mmap.mmap) -> Iterator[tuple[str, bytes, int]]:
    for ending, column in index.files.items():
        for key, offset, size, crc in zip(index.keys, column.offset, column.size, column.crc32c, strict=True):
            yield f"{key}.{ending}", data[offset : offset + size], crc


def _field_files(path: Path, root: chunks.Root, field: str) -> frozenset[str]:
    spec = next(spec for spec in root.fields if spec.name == field)
    return chunks.expected_files(spec, root.chunk_frames, root.n_frames or 0)


def _array_problems(path: Path, root: chunks.Root) -> list[str]:
    problems, lengths = [], {}
    for spec in root.fields:
        file = path / spec.name / "zarr.json"
        try:
            lengths[spec.name] = int(read_sealed(file)["shape"][0])
            expected = seal(chunks.array_metadata(spec, root.chunk_frames, lengths[spec.name]), indent=1)
            if file.read_bytes() != expected:
                problems.append(f"{spec.name}/zarr.json: is not the metadata of field {spec.name}")
        except ShardError as error:
            problems.append(str(error))
    if root.n_frames is not None:
        wrong = {name: length for name, length in lengths.items() if length != root.n_frames}
        problems += [f"{name}/zarr.json: {n} frames, the root says {root.n_frames}" for name, n in wrong.items()]
    elif lengths and max(lengths.values()) - min(lengths.values()) > root.chunk_frames:
        problems.append(f"{path}: fields differ by more than one chunk: {lengths}")
    committed = root.n_frames
    if committed is None:
        committed = min(lengths.values(), default=0) // root.chunk_frames * root.chunk_frames
    return problems + _chunk_problems(path, root, committed)


def _chunk_problems(path: Path, root: chunks.Root, n_frames: int) -> list[str]:
    problems = []
    for spec in root.fields:
        for index in range(-(-n_frames // root.chunk_frames)):
            try:
                chunks.read_chunk(path, spec, root.chunk_frames, index)
            except ShardError as error:
                problems.append(str(error))
    return problems
