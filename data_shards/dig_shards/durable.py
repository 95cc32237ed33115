"""Durable files: atomic replacement, and JSON documents that carry their own checksum.

In: bytes and JSON-able mappings. Out: files that after a crash or power loss are either the old or the new content,
never a mixture. A sealed document holds one key `dig_seal`: the SHA-256, in hex, of the file's own bytes with those 64
digits written as zeros. So any changed byte of the file shows, whatever the layout of the JSON.
Does not know what the documents mean.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google_crc32c

from dig_shards.errors import ShardError

UNSEALED = "0" * 64
TEMPORARY_SUFFIX = ".tmp"
_SEAL = re.compile(rb'"dig_seal": ?"([0-9a-f]{64})"')


def crc32c(data: bytes | memoryview) -> int:
    """CRC-32C (Castagnoli) of a buffer, as an unsigned 32-bit integer."""
    return int(google_crc32c.value(bytes(data)))


def sha256(data: bytes) -> str:
    """SHA-256 of a buffer, as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def sync_directory(directory: Path) -> None:
    """Make creations, renames and removals inside a directory survive power loss."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and flush it to the disk; a crash half-way leaves a torn file, so commit it by another step."""
    with open(path, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def replace_durably(path: Path, data: bytes) -> None:
    """Set a file's content atomically and durably, by way of `<path>.tmp`."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    write_synced(temporary, data)
    os.replace(temporary, path)
    sync_directory(path.parent)


def seal(document: Mapping[str, Any], indent: int | None = None) -> bytes:
    """JSON bytes of a document that holds `"dig_seal": UNSEALED` at one place, with the true seal filled in.

    Raises ShardError when the document cannot be JSON (NaN, non-JSON types) or holds another `dig_seal`.
    """
    try:
        text = json.dumps(document, indent=indent, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ShardError(
            f"the document is not plain JSON ({error}); give only dict, list, str, finite numbers"
        ) from error
    body = text.encode()
    if len(_SEAL.findall(body)) != 1:
        raise ShardError("the key 'dig_seal' is reserved for the file's own checksum; rename that attribute")
    return _with_seal(body, sha256(body))


def unseal(data: bytes, name: str) -> dict[str, Any]:
    """Parse a sealed document; raises ShardError naming it when any byte differs from what was sealed."""
    found = _SEAL.findall(data)
    if len(found) != 1 or sha256(_with_seal(data, UNSEALED)) != found[0].decode():
        raise ShardError(f"{name}: its checksum 'dig_seal' does not match its content; restore it from a good copy")
    document = json.loads(data)
    if not isinstance(document, dict):
        raise ShardError(f"{name}: expected a JSON object, found {type(document).__name__}")
    return document


def read_sealed(path: Path) -> dict[str, Any]:
    """Read and check one sealed file; raises ShardError when it is missing or altered."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ShardError(f"{path}: no such file") from None
    return unseal(data, str(path))


def _with_seal(body: bytes, digits: str) -> bytes:
    match = _SEAL.search(body)
    assert match is not None
    return body[: match.start(1)] + digits.encode() + body[match.end(1) :]
