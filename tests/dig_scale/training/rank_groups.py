"""Groups of ranks that live as long as the tests: importing torch and DeepSpeed once costs more than all jobs together."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.dig_scale.training.rank_server import ANSWER
from tests.dig_scale.training.small_runs import make_dataset
from tests.molecules import alanine_dipeptide_heavy


class RankGroup:
    """Processes that joined one process group and run jobs of rank_jobs."""

    def __init__(self, size: int, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._folder = folder
        self.extensions = folder / "extensions"
        common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        common |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TORCH_EXTENSIONS_DIR": str(self.extensions)}
        self._logs = [folder / f"rank-{rank}.log" for rank in range(size)]
        self._processes = []
        for rank in range(size):
            environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with self._logs[rank].open("w") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "tests.dig_scale.training.rank_server"],
                    env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                )  # fmt: skip
            self._processes.append(process)

    def run(self, job: str, **arguments: Any) -> list[Any]:
        """Results of all ranks; raises RuntimeError with the first rank's error."""
        request = json.dumps({"job": job, "arguments": arguments}) + "\n"
        for process in self._processes:
            process.stdin.write(request)
            process.stdin.flush()
        watch = threading.Timer(90, self._kill)
        watch.start()
        answers = [self._answer(rank) for rank in range(len(self._processes))]
        watch.cancel()
        errors = [answer["error"] for answer in answers if "error" in answer]
        if errors:
            raise RuntimeError(errors[0])
        return [answer["result"] for answer in answers]

    def close(self) -> None:
        """End the processes; a job that is done leaves nothing to wait for."""
        self._kill()
        for process in self._processes:
            process.wait()
            process.stdin.close()
            process.stdout.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()

    def _answer(self, rank: int) -> dict[str, Any]:
        for line in self._processes[rank].stdout:
            if line.startswith(ANSWER):
                answer: dict[str, Any] = json.loads(line.removeprefix(ANSWER))
                return answer
        raise RuntimeError(f"rank {rank} ended: {self._logs[rank].read_text()[-2000:]}")


@cache
def group_of(size: int) -> RankGroup:
    """The one group of this size in a test session."""
    return RankGroup(size, Path(tempfile.mkdtemp(prefix=f"ranks-{size}-")))


@pytest.fixture(scope="session")
def pair() -> Iterator[RankGroup]:
    """Two gloo ranks."""
    group = group_of(2)
    yield group
    group.close()


@pytest.fixture(scope="session")
def single() -> Iterator[RankGroup]:
    """One rank."""
    group = group_of(1)
    yield group
    group.close()


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed alanine dipeptide, 320 frames for training and 80 for validation."""
    return make_dataset(tmp_path_factory.mktemp("data"), [alanine_dipeptide_heavy()], 400)
