"""Training on one machine: start the ranks, watch them, show their progress, and leave none behind.

In: a recipe, a packed dataset, a folder. Out: a trained model in the folder, or one TrainingError with the failing rank's
own words and its log. Each rank is a process of its own (`python -m dig_scale.training.trainer`) with the rank environment
of torchrun; the ranks end when this process does, however it ends. Imports neither torch nor DeepSpeed.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dig_scale.config import Recipe, Train
from dig_scale.errors import RecipeError, TrainingError
from dig_scale.recipe_files import load_recipe, parse_recipe
from dig_scale.training.run_folder import claim_folder

WATCHED = "DIG_SCALE_ENDS_WITH_LAUNCHER"
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 5.0
_METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class TrainingProgress:
    """The newest row of metrics, for a person who waits."""

    step: int
    steps: int
    loss: float
    samples_per_s: float
    seconds_left: float


OnProgress = Callable[[TrainingProgress], None]


def launch_ranks(
    recipe: Recipe | Path, dataset: Path, out: Path, ranks: int | None = None, progress: OnProgress | None = None
) -> None:
    """Train on this machine with `ranks` processes (recipe.train.ranks, GPUs or cores when absent) and wait for the end.

    `recipe` is a Recipe, or a file with one (TOML, or its JSON). Raises TrainingError with one line when a rank fails;
    a KeyboardInterrupt stops all ranks and goes on to the caller.
    """
    resolved = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    if resolved.train is None:
        raise TrainingError(f"recipe {resolved.name!r} has no [train] section; add one to train")
    if claim_folder(out, resolved, dataset) == "complete":
        print(f"already complete: {out}", file=sys.stderr)
        return
    number = ranks or rank_count(resolved.train)
    (out / "logs").mkdir(parents=True, exist_ok=True)
    recipe_file = out / "logs" / "recipe.json"
    recipe_file.write_text(resolved.model_dump_json())
    follower = _Follower(out, progress)
    with ExitStack() as stack:
        processes = [
            _start_rank(r, environment, (recipe_file, dataset, out), stack) for r, environment in _ranks(number)
        ]
        stack.callback(_stop, processes)
        while not all(process.poll() == 0 for process in processes):
            failed = [rank for rank, process in enumerate(processes) if process.poll() not in (None, 0)]
            if failed:
                raise TrainingError(_failure(_first_to_fail(failed, processes, out), processes, out))
            follower.advance()
            time.sleep(_POLL_SECONDS)
        follower.advance()


def rank_count(train: Train) -> int:
    """Ranks for this machine: as the recipe says, else the most GPUs or cores that divide the global batch."""
    if train.ranks is not None:
        return train.ranks
    most = _gpu_count() or _core_count()
    return max(n for n in range(1, most + 1) if train.global_batch % n == 0)


def read_recipe(path: Path) -> Recipe:
    """A recipe from TOML, or from the JSON that a Recipe dumps."""
    if path.suffix != ".json":
        return load_recipe(path)
    try:
        return parse_recipe(json.loads(path.read_text()), str(path))
    except (OSError, json.JSONDecodeError) as error:
        raise RecipeError(f"{path}: not a recipe in JSON: {error}") from error


def end_with_launcher() -> None:
    """In a rank started here: leave at once when the launcher is gone, even by SIGKILL (its end of stdin closes)."""
    if os.environ.get(WATCHED):
        threading.Thread(target=_exit_at_end_of_stdin, daemon=True, name="launcher-watch").start()


def _exit_at_end_of_stdin() -> None:
    while os.read(0, 1024):
        pass
    os._exit(3)


def _ranks(number: int) -> list[tuple[int, dict[str, str]]]:
    """Environment of every rank. Threads share the cores; gloo stays on the loopback device."""
    port = str(_free_port())
    common = {
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    common |= {"OMP_NUM_THREADS": str(max(1, _core_count() // number)), WATCHED: "1", "PYTHONUNBUFFERED": "1"}
    # The ranks import what this process imports, also where that was put on the path by a test runner.
    common["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    if sys.platform == "linux":
        common["GLOO_SOCKET_IFNAME"] = "lo"
    return [(rank, {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(number)]


def _start_rank(
    rank: int, environment: dict[str, str], arguments: Sequence[Path], stack: ExitStack
) -> subprocess.Popen[bytes]:
    log = stack.enter_context(_log_file(arguments[-1], rank).open("wb"))
    command = [sys.executable, "-m", "dig_scale.training.trainer", *map(str, arguments)]
    # A session of its own: Ctrl-C reaches this process alone, which then stops the ranks in order.
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdin is not None:
            process.stdin.close()


def _first_to_fail(failed: Sequence[int], processes: Sequence[subprocess.Popen[bytes]], out: Path) -> int:
    """The rank to blame: one with a message of its own before one that lost its peers."""
    time.sleep(_POLL_SECONDS)
    now_failed = [rank for rank, process in enumerate(processes) if process.poll() not in (None, 0)]
    speaking = [rank for rank in now_failed if _own_words(_log_file(out, rank)) is not None]
    return (speaking or list(failed))[0]


def _failure(rank: int, processes: Sequence[subprocess.Popen[bytes]], out: Path) -> str:
    log = _log_file(out, rank)
    words = _own_words(log) or _last_line(log)
    return f"rank {rank} of {len(processes)} failed (exit {processes[rank].poll()}): {words}; log: {log}"


def _own_words(log: Path) -> str | None:
    """The line a rank printed for the user."""
    said = _lines_after("error: ", log)
    return said[-1] if said else None


def _lines_after(prefix: str, log: Path) -> list[str]:
    lines = log.read_text(errors="replace").splitlines()
    return [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def _log_file(out: Path, rank: int) -> Path:
    return out / "logs" / f"rank-{rank}.log"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _core_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count()


class _Follower:
    """Reads new train rows of a growing metrics.jsonl and tells `progress` the newest; says what rank 0 warned of before."""

    def __init__(self, out: Path, progress: OnProgress | None) -> None:
        self._path, self._progress = out / _METRICS_FILE, progress
        self._seen: float = time.time()
        self._log: Path | None = _log_file(out, 0)

    def advance(self) -> None:
        """Report the newest row, if there is a new one, and before the first of all, warnings."""
        if self._log is not None and (warnings := _lines_after("warning: ", self._log)):
            self._log = None
            print("\n".join(f"warning: {words}" for words in warnings), file=sys.stderr)
        if self._progress is None or not self._path.is_file():
            return
        row = _newest_train_row(self._path)
        if row is not None and row["time"] > self._seen:
            self._seen = row["time"]
            self._progress(TrainingProgress(*(row[key] for key in TrainingProgress.__dataclass_fields__)))


def _newest_train_row(path: Path) -> dict[str, Any] | None:
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 16384))
        lines = stream.read().decode(errors="replace").splitlines(keepends=True)
    for line in reversed(lines):
        if line.startswith('{"kind": "train"') and line.endswith("\n"):
            row: dict[str, Any] = json.loads(line)
            return row
    return None
