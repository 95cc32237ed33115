"""Twenty kills with SIGKILL at random moments, through the command line: simulation actors, the simulation driver,
training ranks, the server. Nothing may be lost, repeated or corrupt.

    python benchmarks/kills.py --json FILE [--seed 1]
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

from dig_shards.trajectory import TrajectoryReader
from dig_shards.verify import verify, verify_trajectory

from benchmarks.rows import Row, publish
from dig_scale.ensemble import Ensemble, read_ensemble
from dig_scale.records import find_trajectories
from dig_scale.serving.client import Patience, request_ensemble
from dig_scale.serving.schema import SamplesRequest
from dig_scale.training.metrics import read_metrics

KILLS_EACH = 5
SIMULATE = ("--set", "simulate.frames=3000", "--set", "simulate.replicas=2", "--set", "simulate.frame_spacing_ps=0.2")
TRAIN = ("--set", "train.steps=600", "--set", "train.checkpoint_every=40", "--set", "train.log_every=1")
SAMPLES = 3000


def main() -> None:
    """Run the three parts in a scratch folder and publish their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        rows = [*simulation_rows(root, chance), *training_rows(root, chance), *server_rows(root, chance)]
    publish(rows, arguments.json)


def start(*words: str | Path) -> subprocess.Popen[bytes]:
    """The command line in a process group of its own, quiet."""
    command = [sys.executable, "-m", "dig_scale.cli", *map(str, words)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)


def finish(*words: str | Path) -> None:
    """Run a command to its end; raises if it fails."""
    process = start(*words)
    if process.wait() != 0:
        raise RuntimeError(f"dig-scale {' '.join(map(str, words))} ended with {process.returncode}")


def until(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 180) -> bool:
    """Wait for a condition while a process lives; False when it ended first."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.05)
    raise RuntimeError("waited too long")


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a process, then to what it leaves behind."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children, timeout=10)


def simulation_rows(root: Path, chance: random.Random) -> list[Row]:
    """Actors and drivers killed in one campaign, against an undisturbed one."""
    calm, out = root / "calm", root / "killed"
    finish("simulate", "tiny", "--out", calm, *SIMULATE)
    (out / "ala2").mkdir(parents=True)
    shutil.copy(calm / "ala2" / "system.json", out / "ala2" / "system.json")
    drivers = actors = 0
    while drivers < KILLS_EACH or actors < KILLS_EACH:
        before = stored_frames(out)
        process = start("simulate", "tiny", "--out", out, *SIMULATE)
        if not until(lambda seen=before: stored_frames(out) > seen, process):  # type: ignore[misc]
            break
        for _ in range(2):
            time.sleep(chance.uniform(0.1, 1.0))
            victims = [p for p in psutil.Process(process.pid).children(recursive=True) if is_actor(p)]
            if actors < KILLS_EACH and victims:
                chance.choice(victims).kill()
                actors += 1
                here = stored_frames(out)
                until(lambda seen=here: stored_frames(out) > seen, process)  # type: ignore[misc]
        if drivers < KILLS_EACH and process.poll() is None:
            kill_group(process)
            drivers += 1
        process.wait()
    finish("simulate", "tiny", "--out", out, *SIMULATE)
    same = contents(out) == contents(calm)
    clean = all(verify_trajectory(store).is_clean for store in find_trajectories(out))
    return [
        Row("kills: simulation actors killed", actors, "", f">= {KILLS_EACH}", actors >= KILLS_EACH),
        Row("kills: simulation drivers killed", drivers, "", f">= {KILLS_EACH}", drivers >= KILLS_EACH),
        Row("kills: trajectories equal an undisturbed campaign's", str(same), "", "True", same),
        Row("kills: trajectory stores verify", str(clean), "", "True", clean),
    ]


def is_actor(process: psutil.Process) -> bool:
    """Whether a process is a Ray actor at work."""
    with suppress(psutil.Error):
        return process.cmdline()[:1] != [] and "Actor" in process.cmdline()[0] and "ray::" in process.cmdline()[0]
    return False


def stored_frames(out: Path) -> int:
    """Committed frames of all stores below a folder."""
    total = 0
    for store in out.rglob("*.zarr"):
        with suppress(Exception):
            total += TrajectoryReader(store).n_frames
    return total


def contents(out: Path) -> dict[str, str]:
    """Fingerprint of every store by its place."""
    return {str(path.relative_to(out)): TrajectoryReader(path).fingerprint() for path in find_trajectories(out)}


def training_rows(root: Path, chance: random.Random) -> list[Row]:
    """One rank killed at random in each of several launches, against an undisturbed training."""
    dataset, calm, out = root / "dataset", root / "calm-model", root / "killed-model"
    finish("pack", "tiny", root / "calm", "--out", dataset)
    clean = verify(dataset).is_clean
    finish("train", "tiny", dataset, "--out", calm, *TRAIN, "--ranks", "2")
    kills = 0
    while kills < KILLS_EACH:
        process = start("train", "tiny", dataset, "--out", out, *TRAIN, "--ranks", "2")
        last = newest_step(out)
        if not until(lambda seen=last: newest_step(out) > seen, process):  # type: ignore[misc]
            break
        time.sleep(chance.uniform(0.0, 1.5))
        ranks = [p for p in psutil.Process(process.pid).children() if p.is_running()]
        if ranks:
            chance.choice(ranks).kill()
            kills += 1
        process.wait()
    finish("train", "tiny", dataset, "--out", out, *TRAIN, "--ranks", "2")
    same = training_record(out) == training_record(calm)
    return [
        Row("kills: dataset verifies", str(clean), "", "True", clean),
        Row("kills: training ranks killed", kills, "", f">= {KILLS_EACH}", kills >= KILLS_EACH),
        Row(
            "kills: losses and frames of every step equal an undisturbed run's, bit for bit",
            str(same),
            "",
            "True",
            same,
        ),
    ]


def newest_step(out: Path) -> int:
    """Last step in the metrics."""
    if not (out / "metrics.jsonl").is_file():
        return -1
    return max((row["step"] for row in read_metrics(out)), default=-1)


def training_record(out: Path) -> list[tuple[int, float, int]]:
    """Step, loss and checksum of the frames of every step."""
    return [(row["step"], row["loss"], row["frames_crc32"]) for row in read_metrics(out) if row["kind"] == "train"]


def server_rows(root: Path, chance: random.Random) -> list[Row]:
    """The server killed in the middle of streams; the client carries on with the next one."""
    model, offline = root / "calm-model", root / "offline"
    finish("sample", model, "--num", str(SAMPLES), "--out", offline)
    port = free_port()
    kills, received = 0, [0]
    result: list[Ensemble] = []
    with server(model, port) as first:
        process = first
        client = threading.Thread(target=lambda: result.append(ask(port, received)))
        client.start()
        while kills < KILLS_EACH and client.is_alive():
            seen = received[0]
            until(lambda before=seen: received[0] > before or not client.is_alive(), process)  # type: ignore[misc]
            time.sleep(chance.uniform(0.0, 0.5))
            if not client.is_alive():
                break
            kill_group(process)
            kills += 1
            process = launch(model, port)
        client.join(300)
        kill_group(process)
    expected = read_ensemble(offline)
    whole = bool(result) and result[0].index.tolist() == list(range(SAMPLES))
    difference = float(np.abs(result[0].positions - expected.positions).max()) if whole else float("inf")
    return [
        Row("kills: servers killed", kills, "", f">= {KILLS_EACH}", kills >= KILLS_EACH),
        Row("kills: every sample of the stream there once", str(whole), "", "True", whole),
        Row("kills: largest difference from offline samples", difference, "Å", "<= 0.001", difference <= 1e-3),
    ]


def ask(port: int, received: list[int]) -> Ensemble:
    """All samples in small chunks, whatever happens to the server."""

    def count(done: int, total: int) -> None:
        received[0] = done

    request = SamplesRequest(system="ala2", num=SAMPLES, chunk=16)
    return request_ensemble(f"http://127.0.0.1:{port}", request, None, count, Patience(silence=240))


@contextmanager
def server(model: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A server that answers; killed at the end whatever happens."""
    process = launch(model, port)
    try:
        yield process
    finally:
        if process.poll() is None:
            kill_group(process)


def launch(model: Path, port: int) -> subprocess.Popen[bytes]:
    """Start a server and wait until it is healthy."""
    process = start("serve", model, "--port", str(port))
    if not until(lambda: healthy(port), process):
        raise RuntimeError("the server ended while starting")
    return process


def healthy(port: int) -> bool:
    """Whether the server answers."""
    with suppress(httpx.HTTPError):
        return httpx.get(f"http://127.0.0.1:{port}/v1/health", timeout=2).status_code == 200
    return False


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
