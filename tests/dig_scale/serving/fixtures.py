"""For tests of serving: a tiny checkpoint with random weights and two made-up molecules, and a server process."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
import uvicorn

from dig_scale.config import Model, Pack, Recipe, Sample
from dig_scale.ensemble import Ensemble
from dig_scale.model.checkpoint import FILE_NAME, Checkpoint, save_checkpoint
from dig_scale.model.score_model import ScoreModel
from dig_scale.sampling.integrate import sample
from dig_scale.sampling.solvers import solver_named
from dig_scale.serving.api import Door, Service, build_api
from dig_scale.serving.served import Bench, build_bench, load_served_model
from dig_scale.system import System, SystemKind

MAX_SAMPLES = 50_000
MAX_REQUESTS = 4
_START_SECONDS = 300


def chain_molecule(name: str, elements: tuple[int, ...]) -> System:
    """A zig-zag chain of single bonds."""
    n = len(elements)
    along = np.arange(n)
    bonds = np.stack([along[:-1], along[1:]], axis=1)
    return System(
        name=name,
        kind=SystemKind.MOLECULE,
        elements=np.array(elements),
        atom_names=tuple(f"A{i}" for i in range(n)),
        residue_names=("MOL",) * n,
        residue_index=np.zeros(n),
        chain_index=np.zeros(n),
        bonds=bonds,
        bond_orders=np.ones(n - 1),
        formal_charges=np.zeros(n),
        stereocentres=np.zeros((0, 4)),
        mobile=np.ones(n),
        reference_positions=np.stack([1.3 * along, 0.7 * (along % 2), 0.1 * along], axis=1),
    )


BUTANE = chain_molecule("butane", (6, 6, 6, 6))
ETHER = chain_molecule("ether", (6, 6, 8, 6, 6, 7))


def save_tiny_checkpoint(folder: Path) -> Path:
    """A checkpoint of a tiny model whose every averaged parameter is random."""
    recipe = Recipe(
        name="tiny",
        model=Model(layers=1, width=16, heads=2, feed_forward=16, radial_kernels=8, vector_channels=4, radial_knots=0),
        pack=Pack(atoms="heavy"),
        sample=Sample(steps=6),
    )
    generator = torch.Generator().manual_seed(7)
    shapes = ScoreModel(recipe.model).state_dict()
    weights = {
        name: 0.3 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in shapes.items()
    }
    return save_checkpoint(folder / FILE_NAME, Checkpoint(shapes, weights, recipe, (BUTANE, ETHER), step=3))


@dataclass(frozen=True)
class Offline:
    """What offline sampling gives for the same checkpoint."""

    checkpoint: Path
    benches: dict[str, Bench] = field(default_factory=dict)

    def bench(self, system: System) -> Bench:
        """The system's bench, on the CPU."""
        if system.name not in self.benches:
            self.benches[system.name] = build_bench(load_served_model(self.checkpoint, torch.device("cpu")), system)
        return self.benches[system.name]

    def assert_same(self, ensemble: Ensemble, system: System) -> None:
        """The ensemble holds what offline sampling gives, to 1e-3 Å."""
        how = ensemble.provenance
        expected = self.positions(system, ensemble.index, how["steps"], ensemble.seed, how["solver"])
        np.testing.assert_allclose(ensemble.positions, expected, atol=1e-3, rtol=0)

    def positions(self, system: System, index: np.ndarray, steps: int, seed: int, solver: str) -> np.ndarray:
        """Positions [S, N, 3] Å of samples `index`, one batch."""
        bench = self.bench(system)
        with torch.inference_mode():
            state = sample(
                bench.score_fn,
                bench.composition,
                bench.context,
                solver_named(solver),
                steps,
                seed,
                torch.as_tensor(index),
            )
        return bench.composition.arrays(state, bench.context)["positions"].numpy()


@dataclass
class ServerProcess:
    """`serve` in a process of its own, on a fixed port."""

    checkpoint: Path
    port: int
    log: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def launch(self) -> None:
        """Start it, without waiting."""
        with self.log.open("ab") as log:
            arguments = [sys.executable, "-c", _PROGRAM, str(self.checkpoint), str(self.port)]
            self.process = subprocess.Popen(arguments, stdout=log, stderr=log, env=_environment())

    def wait_ready(self) -> None:
        """Wait until it answers; fails with its log."""
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/v1/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        pytest.fail(f"the server did not come up:\n{self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        """SIGKILL: no goodbye."""
        self.process.kill()
        self.process.wait()

    def end(self) -> int:
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


def unused_port() -> int:
    """A port that nobody listens on, outside the range from which sockets without a wish (Ray's, clients') get theirs."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", random.randint(20_000, 32_000)))
            return probe.getsockname()[1]


@contextlib.contextmanager
def answering(service: Service, door: Door) -> Iterator[str]:
    """The URL of the service's application, in a thread."""
    port = unused_port()
    server = uvicorn.Server(uvicorn.Config(build_api(service, door), port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    eventually(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits until the condition holds; fails where it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so after {seconds} s"
        time.sleep(0.02)


def _environment() -> dict[str, str]:
    paths = [path for path in sys.path if path]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "DIG_SCALE_TOKEN": "", "OMP_NUM_THREADS": "1"}


_PROGRAM = f"""
import sys
from pathlib import Path
from dig_scale.config import Serve
from dig_scale.serving.app import serve
limits = Serve(port=int(sys.argv[2]), max_batch=8, max_samples_per_request={MAX_SAMPLES}, max_queued_requests={MAX_REQUESTS})
serve(Path(sys.argv[1]), limits, lambda url: print("ready", url, flush=True))
"""
