"""Run append or pack in children that die by SIGKILL, then let one finish; prints JSON {kills, outcomes}.

A child dies either just before its n-th file operation, for every n, optionally with the file it wrote last torn in
half (what a power loss leaves of a file that nothing has committed yet), or at a random moment chosen by the parent.
Run as a program, so that it forks from a process without threads.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from dig_shards import FieldSpec, PackPlan, TrajectoryReader, TrajectorySource, TrajectoryWriter
from dig_shards.pack import pack
from dig_shards.verify import verify, verify_trajectory

CHUNK, FRAMES = 4, 14
FIELDS = (FieldSpec("positions", (6, 3), "int32", 1e-3, "Å"), FieldSpec("energy", (), "float64", None, "eV"))
OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


def frames(start: int, stop: int) -> dict[str, np.ndarray]:
    number = np.arange(start, stop)
    return {"positions": np.sin(number[:, None, None] + np.arange(18).reshape(6, 3)), "energy": number * 1.5}


def append(path: Path) -> None:
    """Create or resume the trajectory and bring it to its end."""
    attributes = {"system_id": "x"}
    opened = (
        TrajectoryWriter.resume(path) if path.exists() else TrajectoryWriter.create(path, FIELDS, attributes, CHUNK)
    )
    with opened as writer:
        while writer.n_frames + CHUNK <= FRAMES:
            writer.append_chunk(frames(writer.n_frames, writer.n_frames + CHUNK))
        if not writer.is_finished:
            writer.finish(frames(writer.n_frames, FRAMES))


def pack_two(out: Path) -> None:
    """Pack the two trajectories beside `out`."""
    sources = [TrajectorySource(out.parent.parent / f"{name}.zarr") for name in "ab"]
    plan = PackPlan("toy", ("positions", "energy"), 3, 4, 0.3, block_frames=2)
    pack(sources, out, plan, {"x": "{}"}, memory_bytes=4000)


def check_trajectory(path: Path) -> None:
    """After a kill: a prefix of whole chunks (or all), each frame once."""
    if not path.exists():
        return
    reader = TrajectoryReader(path)
    assert reader.n_frames % CHUNK == 0 or (reader.is_finished and reader.n_frames == FRAMES)
    expected = frames(0, reader.n_frames)
    assert (reader.read("energy", 0, reader.n_frames) == expected["energy"]).all()
    assert np.allclose(reader.read("positions", 0, reader.n_frames), expected["positions"], atol=6e-4)
    assert verify_trajectory(path).is_clean


def check_dataset(out: Path) -> None:
    """After a kill: either no dataset, or a whole one."""
    if not (out / "manifest.json").exists():
        return
    assert verify(out).is_clean


def die_before(number: int, folder: Path, tear: str) -> None:
    """From now on die before the number-th file operation inside `folder`."""
    count = itertools.count(1)
    written: list[str] = []

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event not in OPERATIONS or (event != "os.truncate" and str(folder) not in str(arguments[0])):
            return
        if next(count) == number:
            if tear == "torn" and written and os.path.isfile(written[-1]):
                os.truncate(written[-1], os.path.getsize(written[-1]) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        if event == "open" and arguments[1] in ("wb", "ab"):
            written.append(str(arguments[0]))

    sys.addaudithook(hook)


def child(task: Callable[[Path], None], target: Path, before: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        before()
        task(target)
        os._exit(0)
    return pid


def every_operation(task: Callable[[Path], None], check: Callable[[Path], None], root: Path, tear: str) -> int:
    """Kill at each operation in turn, in a fresh folder each; returns how many there were."""
    for number in itertools.count(1):
        folder = root / f"{tear}-{number}"
        folder.mkdir()
        target = folder / "target.zarr"
        pid = child(task, target, lambda number=number, folder=folder: die_before(number, folder, tear))
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            shutil.rmtree(folder)
            return number - 1
        assert os.WTERMSIG(status) == signal.SIGKILL
        check(target)
        finish(task, target)
        check(target)
    raise AssertionError


def random_moments(task: Callable[[Path], None], check: Callable[[Path], None], root: Path, rounds: int) -> int:
    """Kill the work at random moments, again and again, on one target after another; returns the kills."""
    rng, kills = random.Random(1), 0
    folders = (root / f"random-{number}" for number in itertools.count())
    target, longest = next_target(folders), 0.01
    for _ in range(rounds):
        began = time.perf_counter()
        pid = child(task, target, lambda: None)
        time.sleep(rng.uniform(0, longest))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        check(target)
        if os.WIFEXITED(status):
            longest, target = 0.7 * (time.perf_counter() - began), next_target(folders)
        else:
            kills, longest = kills + 1, 1.1 * longest
    finish(task, target)
    return kills


def next_target(folders: Iterator[Path]) -> Path:
    """Where the next run works: an empty folder of its own."""
    folder = next(folders)
    folder.mkdir()
    return folder / "target.zarr"


def finish(task: Callable[[Path], None], target: Path) -> None:
    _, status = os.waitpid(child(task, target, lambda: None), 0)
    assert status == 0, f"{target}: could not be finished after a kill"


def main(mode: str, root: Path) -> None:
    task, check = {"append": (append, check_trajectory), "pack": (pack_two, check_dataset)}[mode]
    # Torn files are the harder case; the append runs are cheap enough to try whole ones as well.
    tears = {"append": ("whole", "torn"), "pack": ("torn",)}[mode]
    kills = {tear: every_operation(task, check, root, tear) for tear in tears}
    kills["random"] = random_moments(task, check, root, rounds=60)
    print(json.dumps(kills))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
