"""Step 12 of the walk: checkpoint -> Ray Serve -> ensemble, the same as offline, through kills and crowds.

One server process for the file; the tests leave it running, and its end on SIGTERM is checked last.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from dig_scale.config import Serve
from dig_scale.ensemble import Ensemble
from dig_scale.serving.client import Patience, request_ensemble
from dig_scale.serving.schema import SamplesRequest
from tests.dig_scale.serving.fixtures import BUTANE, ETHER, Offline, ServerProcess, save_tiny_checkpoint, unused_port

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("served")
    running = ServerProcess(save_tiny_checkpoint(folder), unused_port(), folder / "log.txt")
    running.launch()
    running.wait_ready()
    yield running
    if running.process is not None and running.process.poll() is None:
        running.kill()


@pytest.fixture(scope="module")
def offline(server: ServerProcess) -> Offline:
    return Offline(server.checkpoint)


def metric(server: ServerProcess, name: str) -> float:
    found = re.search(rf"^dig_scale_{name} (\S+)$", httpx.get(f"{server.url}/metrics", timeout=20).text, re.MULTILINE)
    assert found, name
    return float(found.group(1))


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so after {seconds} s"
        time.sleep(0.05)


def test_a_crowd_gets_what_offline_sampling_gives(server: ServerProcess, offline: Offline) -> None:
    requests = [
        SamplesRequest(system="butane", num=40, seed=1),
        SamplesRequest(system="ether", num=25, seed=2, solver="heun", steps=5),
        SamplesRequest(system="butane", num=10, seed=3, first_index=10**12, steps=9),
    ]
    with ThreadPoolExecutor() as crowd:
        ensembles = list(crowd.map(lambda request: request_ensemble(server.url, request), requests))
    for ensemble, system in zip(ensembles, (BUTANE, ETHER, BUTANE), strict=True):
        offline.assert_same(ensemble, system)


def test_a_small_request_overtakes_a_large_one(server: ServerProcess, offline: Offline) -> None:
    body = {"system": "butane", "num": 50_000, "steps": 100}
    with httpx.stream("POST", f"{server.url}/v1/samples", json=body, timeout=60) as large:
        lines = large.iter_lines()
        next(lines)
        small = request_ensemble(server.url, SamplesRequest(system="butane", num=4, seed=8))
        assert metric(server, "requests_in_flight") == 1
    offline.assert_same(small, BUTANE)
    eventually(lambda: metric(server, "walkers_in_flight") == 0)


def test_a_request_is_cancelled_by_its_id(server: ServerProcess) -> None:
    body = {"system": "butane", "num": 50_000, "steps": 100}
    with httpx.stream("POST", f"{server.url}/v1/samples", json=body, timeout=60) as response:
        lines = response.iter_lines()
        request_id = json.loads(next(lines))["request_id"]
        assert httpx.delete(f"{server.url}/v1/samples/{request_id}", timeout=20).status_code == 204
        assert json.loads(list(lines)[-1])["error"] == "the request was cancelled"
    assert metric(server, "walkers_in_flight") == 0


def _resumed(server: ServerProcess, strike: Callable[[], None]) -> Ensemble:
    """The ensemble of a client during whose stream `strike` is called once."""
    some = threading.Event()
    request = SamplesRequest(system="ether", num=400, seed=6, first_index=77, steps=20, chunk=16)
    with ThreadPoolExecutor(1) as client:
        watch = lambda have, _: some.set() if have >= 50 else None  # noqa: E731
        pending = client.submit(request_ensemble, server.url, request, None, watch, Patience(silence=390.0))
        assert some.wait(60)
        assert not pending.done()
        strike()
        return pending.result(timeout=400)


def _assert_whole(ensemble: Ensemble, offline: Offline) -> None:
    assert ensemble.provenance["attempts"] > 1
    assert ensemble.index.tolist() == list(range(77, 77 + 400))
    offline.assert_same(ensemble, ETHER)


def test_a_killed_replica_loses_nothing(server: ServerProcess, offline: Offline) -> None:
    def kill_replica() -> None:
        children = psutil.Process(server.process.pid).children(recursive=True)
        replicas = [child for child in children if "ServeReplica" in " ".join(child.cmdline())]
        assert len(replicas) == 1
        replicas[0].kill()

    _assert_whole(_resumed(server, kill_replica), offline)


def test_a_killed_server_that_comes_back_loses_nothing(server: ServerProcess, offline: Offline) -> None:
    def kill_and_restart() -> None:
        server.kill()
        server.launch()

    _assert_whole(_resumed(server, kill_and_restart), offline)


def test_a_taken_port_is_one_clear_line(tmp_path: Path) -> None:
    from dig_scale.serving.app import PortTakenError, deploy

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(PortTakenError, match=rf"127.0.0.1:{port}.*serve.port"):
            deploy(save_tiny_checkpoint(tmp_path), Serve(port=port), patience_s=0.1)


def test_a_port_that_becomes_free_is_waited_for() -> None:
    from dig_scale.serving.app import _awaited_port

    predecessor = socket.create_server(("127.0.0.1", unused_port()))
    port = predecessor.getsockname()[1]
    with ThreadPoolExecutor(1) as waiting:
        found = waiting.submit(_awaited_port, "127.0.0.1", port, 30.0)
        time.sleep(0.3)
        assert not found.done()
        predecessor.close()
        assert found.result(timeout=30) == port


def test_sigterm_ends_the_server_cleanly(server: ServerProcess) -> None:
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert server.end() == 0, server.log.read_text()[-3000:]
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
