"""The manifest and the shard index: what a finished dataset says about itself.

In: the facts of a pack. Out: frozen dataclasses and their sealed JSON. A dataset without a manifest does not exist, and
a shard without an index does not either. Knows nothing of how shards are made or read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dig_shards.durable import UNSEALED, read_sealed, seal, unseal
from dig_shards.errors import ShardError
from dig_shards.fields import FieldSpec

FORMAT = "dig-shards"
VERSION = 1
MANIFEST = "manifest.json"
META = "meta.json"
TRAIN, VALIDATION = "train", "validation"


@dataclass(frozen=True)
class ShardEntry:
    """One tar and its index, with their SHA-256, sizes and counts."""

    tar: str
    tar_sha256: str
    tar_bytes: int
    index: str
    index_sha256: str
    members: int
    frames: int


@dataclass(frozen=True)
class SystemEntry:
    """One system: its stored fields, its sidecar file (None if none was given) and its frames per split."""

    id: str
    fields: tuple[FieldSpec, ...]
    sidecar: str | None
    sidecar_sha256: str | None
    frames: Mapping[str, int]

    def spec(self, field: str) -> FieldSpec:
        """The declaration of a field; raises ShardError listing the fields there are."""
        for spec in self.fields:
            if spec.name == field:
                return spec
        raise ShardError(f"system {self.id}: no field {field!r}; it has {', '.join(s.name for s in self.fields)}")


@dataclass(frozen=True)
class TrajectoryEntry:
    """One source: its name, system, drawn frames start:stop:stride, content fingerprint and opaque origin."""

    name: str
    system: str
    start: int
    stop: int
    stride: int
    frames: int
    fingerprint: str
    origin: Any


@dataclass(frozen=True)
class Manifest:
    """All of a dataset: shards per split in order, systems, trajectories, the plan, and what was asked (a hash)."""

    name: str
    plan: Mapping[str, Any]
    request_sha256: str
    created: str
    systems: tuple[SystemEntry, ...]
    trajectories: tuple[TrajectoryEntry, ...]
    shards: Mapping[str, tuple[ShardEntry, ...]]

    def frames(self, split: str) -> int:
        """Frames of a split."""
        return sum(shard.frames for shard in self.shards[split])

    def to_bytes(self) -> bytes:
        """The sealed manifest.json."""
        counts = {
            split: {"shards": len(rows), "members": sum(row.members for row in rows), "frames": self.frames(split)}
            for split, rows in self.shards.items()
        }
        document = {
            "format": FORMAT,
            "version": VERSION,
            "name": self.name,
            "created": self.created,
            "request_sha256": self.request_sha256,
            "plan": dict(self.plan),
            "counts": counts,
            "shards": {split: [asdict(row) for row in rows] for split, rows in self.shards.items()},
            "systems": [_system_to_json(system) for system in self.systems],
            "trajectories": [asdict(row) for row in self.trajectories],
            "dig_seal": UNSEALED,
        }
        return seal(document, indent=1)


def load_manifest(directory: Path | str) -> Manifest:
    """The manifest of a dataset; raises ShardError when it is missing, altered, or of another format or version."""
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise ShardError(f"{path}: no manifest, hence no finished dataset here; pack it (again)")
    document = read_sealed(path)
    _require_format(document, FORMAT, str(path))
    return Manifest(
        name=document["name"],
        plan=document["plan"],
        request_sha256=document["request_sha256"],
        created=document["created"],
        systems=tuple(_system_from_json(row) for row in document["systems"]),
        trajectories=tuple(TrajectoryEntry(**row) for row in document["trajectories"]),
        shards={split: tuple(ShardEntry(**row) for row in rows) for split, rows in document["shards"].items()},
    )


@dataclass(frozen=True)
class FileColumn:
    """Where one kind of member file lies in a tar, member by member: data offset, size and CRC-32C."""

    offset: tuple[int, ...]
    size: tuple[int, ...]
    crc32c: tuple[int, ...]


@dataclass(frozen=True)
class ShardIndex:
    """The members of one tar, in order; `systems` are numbers into the manifest's list; `files` by file ending."""

    tar: str
    tar_sha256: str
    tar_bytes: int
    keys: tuple[str, ...]
    systems: tuple[int, ...]
    frames: tuple[int, ...]
    files: Mapping[str, FileColumn]

    def to_bytes(self) -> bytes:
        """The sealed <shard>.index.json."""
        document = {"format": FORMAT + "-index", "version": VERSION, **asdict(self), "dig_seal": UNSEALED}
        return seal(document)


def parse_index(data: bytes, name: str) -> ShardIndex:
    """The index in a file's bytes; raises ShardError naming it when altered or of another format or version."""
    document = unseal(data, name)
    _require_format(document, FORMAT + "-index", name)
    files = {ending: FileColumn(**_tuples(column)) for ending, column in document["files"].items()}
    keys = ("tar", "tar_sha256", "tar_bytes", "keys", "systems", "frames")
    return ShardIndex(**_tuples({key: document[key] for key in keys}), files=files)


def _require_format(document: Mapping[str, Any], expected: str, name: str) -> None:
    if document.get("format") != expected or document.get("version") != VERSION:
        found = f"{document.get('format')} version {document.get('version')}"
        raise ShardError(f"{name}: is {found}; this package reads {expected} version {VERSION}")


def _tuples(document: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in document.items()}


def _system_to_json(system: SystemEntry) -> dict[str, Any]:
    return {**asdict(system), "fields": [spec.to_json() for spec in system.fields]}


def _system_from_json(row: Mapping[str, Any]) -> SystemEntry:
    return SystemEntry(**{**row, "fields": tuple(FieldSpec.from_json(field) for field in row["fields"])})
