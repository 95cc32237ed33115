"""One writer at a time: a lock file that names its holder and is broken when that process is dead.

In: the path of the lock file. Out: a WriterLock, or ShardError naming the live holder. A holder on another host cannot
be seen from here: its lock is honoured until `break_lock` is called by someone who knows that the host is gone. The old
holder, should it live after all, notices at its next `check` and stops. Knows nothing of what the lock protects.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from dig_shards.errors import ShardError


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock; `start_ticks` tells it from a later process with the same pid."""

    host: str
    pid: int
    start_ticks: int
    token: str


@dataclass(frozen=True)
class WriterLock:
    """A held lock; release it when done."""

    path: Path
    holder: Holder

    @classmethod
    def acquire(cls, path: Path) -> WriterLock:
        """Take the lock, breaking it if its holder is dead; raises ShardError naming a live holder."""
        mine = Holder(platform.node(), os.getpid(), _start_ticks(os.getpid()) or 0, uuid.uuid4().hex)
        with _exclusively_open(path) as descriptor:
            other = _read_holder(descriptor)
            if other is not None and not _is_dead(other):
                raise ShardError(
                    f"{path}: held by process {other.pid} on host {other.host}; wait for that writer to close, or, if "
                    f"its host is gone for good, call dig_shards.break_lock first"
                )
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(asdict(mine)).encode(), 0)
        return cls(path, mine)

    def check(self) -> None:
        """Raise ShardError if someone else took the lock over."""
        try:
            current = json.loads(self.path.read_bytes() or b"{}")
        except (FileNotFoundError, json.JSONDecodeError):
            current = {}
        if current.get("token") != self.holder.token:
            raise ShardError(f"{self.path}: this writer's lock was taken over by another; stop writing here")

    def release(self) -> None:
        """Give the lock back; does nothing if it was taken over."""
        if not self.path.exists():
            return
        with _exclusively_open(self.path) as descriptor:
            if _read_holder(descriptor) == self.holder:
                self.path.unlink()


def lock_path(target: Path) -> Path:
    """Where the lock of a store or dataset lies: beside it, so that the directory holds only the format's own files."""
    return target.with_name(target.name + ".lock")


def break_lock(target: Path) -> None:
    """Remove the lock of a store or dataset whose writer is known to be gone with its host."""
    with _exclusively_open(lock_path(target)):
        lock_path(target).unlink()


@contextmanager
def _exclusively_open(path: Path) -> Iterator[int]:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # The file may have been unlinked while we waited: then our lock is on a file nobody else will see.
        if _is_file_at(descriptor, path):
            break
        os.close(descriptor)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is_file_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _read_holder(descriptor: int) -> Holder | None:
    try:
        return Holder(**json.loads(os.pread(descriptor, 65536, 0)))
    except (json.JSONDecodeError, TypeError):
        return None  # empty or torn: its writer died inside acquire


def _is_dead(holder: Holder) -> bool:
    if holder.host != platform.node():
        return False
    ticks = _start_ticks(holder.pid)
    return ticks is None or (holder.start_ticks != 0 and ticks not in (0, holder.start_ticks))


def _start_ticks(pid: int) -> int | None:
    """Start time of a live process in clock ticks; None if dead, 0 if this platform does not tell."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0 if not Path("/proc/self/stat").exists() and _responds(pid) else None
    return None if state in "ZX" else int(rest[18])


def _responds(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
