"""The service on Ray Serve: replicas, their share of the machine, start and end. The only file that imports ray.serve.

`serve` blocks until it is told to stop (SIGINT, SIGTERM); `deploy` and `shutdown` are its two halves. Without RAY_ADDRESS
a private Ray is started on this machine, with token authentication and no dashboard, and it ends with this process. The
bearer token that clients must send is read from DIG_SCALE_TOKEN; without it the port is open to whoever reaches it.
`application` builds the same from a Serve config file, for clusters that are driven by `serve deploy` or KubeRay.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
import torch
from fastapi import FastAPI
from pydantic import ValidationError
from ray import serve as ray_serve

from dig_scale.config import Serve
from dig_scale.errors import UserError
from dig_scale.model.checkpoint import load_checkpoint, require_score_model
from dig_scale.ray_token import share_ray_token
from dig_scale.serving.api import Door, build_api, open_service
from dig_scale.serving.served import best_device

APPLICATION = "dig-scale"
DEPLOYMENT = "Replica"
TOKEN_VARIABLE = "DIG_SCALE_TOKEN"
_OBJECT_STORE_BYTES = 256 * 2**20
_SPARE_CONNECTIONS = 64
"""Connections beyond the admitted requests, so that a full queue still answers health, metrics and 429."""
_PREDECESSOR_SECONDS = 30.0
"""How long a port may stay taken: the proxy of a killed server outlives it until it sees that its Ray is gone."""
_PROXY_READY_SECONDS = 60
"""How long Ray Serve lets a proxy start: its own 5 s are too few on a busy machine, and the start fails when they end."""
LOGGER = logging.getLogger(__name__)


class PortTakenError(UserError):
    """Another process listens where the service should."""


class Replica:
    """One replica: a service, its HTTP application, and the two methods that Serve calls by name."""

    def __init__(self, checkpoint: str, limits: Serve, token: str | None, threads: int) -> None:
        torch.set_num_threads(threads)
        self._service = open_service(Path(checkpoint), limits, best_device())
        self._token = token

    def __serve_build_asgi_app__(self) -> FastAPI:
        elsewhere = _cancel_elsewhere if self._service.limits.replicas > 1 else None
        return build_api(self._service, Door(self._token, elsewhere))

    def check_health(self) -> None:
        """Raises RuntimeError when the worker has ended, so that Serve replaces the replica."""
        if not self._service.worker.alive:
            raise RuntimeError("the worker of this replica has ended")

    def cancel(self, request_id: str) -> bool:
        """Whether the request was in work here; it is not any more."""
        return self._service.worker.cancel(request_id)

    def __del__(self) -> None:
        if hasattr(self, "_service"):
            self._service.worker.stop()


async def _cancel_elsewhere(request_id: str) -> bool:
    handle = ray_serve.get_deployment_handle(DEPLOYMENT, APPLICATION)
    return any(await handle.broadcast("cancel", request_id).results_async(timeout_s=10))


def serve(checkpoint: Path, config: Serve, ready: Callable[[str], None] | None = None) -> None:
    """Serve a checkpoint until SIGINT or SIGTERM; `ready(url)` is called once requests are answered. Raises UserError."""
    try:
        url = deploy(checkpoint, config)
        stop = threading.Event()
        with _stopped_by_signal(stop):
            if ready is not None:
                ready(url)
            stop.wait()
    finally:
        shutdown()


def deploy(checkpoint: Path, config: Serve, patience_s: float = _PREDECESSOR_SECONDS) -> str:
    """Start the service and return its URL once it answers; raises UserError (checkpoint, port) before anything starts.

    `patience_s` seconds are given to whoever still holds the port, such as what is left of a killed predecessor.
    """
    require_score_model(load_checkpoint(checkpoint))
    port = _awaited_port(config.host, config.port, patience_s)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    _start_ray(config)
    ray_serve.start(
        proxy_location="HeadOnly",
        http_options={"host": config.host, "port": port},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    ray_serve.run(build_application(checkpoint, config), name=APPLICATION, route_prefix="/")
    return f"http://{config.host}:{port}"


def shutdown() -> None:
    """End the service: streams in work break off (a client resumes elsewhere), then replicas, proxy and private Ray end."""
    if ray.is_initialized():
        ray_serve.delete(APPLICATION)
        ray.shutdown()


def build_application(checkpoint: Path, config: Serve) -> ray_serve.Application:
    """The Serve application of a checkpoint: `config.replicas` replicas that share the cores, a GPU each where there are."""
    threads = _threads(config.replicas)
    gpus = 1 if torch.cuda.is_available() else 0
    deployment = ray_serve.deployment(
        name=DEPLOYMENT,
        num_replicas=config.replicas,
        max_ongoing_requests=config.max_queued_requests + _SPARE_CONNECTIONS,
        ray_actor_options={"num_cpus": threads, "num_gpus": gpus},
        health_check_period_s=5,
        health_check_timeout_s=60,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=5,
    )(ray_serve.ingress()(Replica))
    token = os.environ.get(TOKEN_VARIABLE) or None
    return deployment.bind(str(checkpoint.resolve()), config, token, threads)


def application(arguments: dict[str, Any]) -> ray_serve.Application:
    """Builder for a Serve config file: `args` hold `checkpoint` and any field of the recipe's `serve` section."""
    fields = dict(arguments)
    checkpoint = fields.pop("checkpoint", None)
    if not isinstance(checkpoint, str):
        raise UserError("args.checkpoint is missing: give the path of a model.safetensors that every node can read")
    try:
        config = Serve.model_validate(fields)
    except ValidationError as error:
        raise UserError(f"args: {error}") from None
    return build_application(Path(checkpoint), config)


def _start_ray(config: Serve) -> None:
    """Join the cluster of RAY_ADDRESS, or start a private Ray with just what the replicas need."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "namespace": APPLICATION}
    if "RAY_ADDRESS" in os.environ:
        ray.init(**quiet)
        return
    # A private Ray has token authentication by default; a secret of its own keeps it from writing one into the home folder.
    share_ray_token()
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", str(_PROXY_READY_SECONDS))
    ray.init(
        address="local",
        num_cpus=max(_cores(), config.replicas),
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        **quiet,
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _threads(replicas: int) -> int:
    """Torch threads of a replica: its share of the cores, and no more than OMP_NUM_THREADS where that is set."""
    wish = os.environ.get("OMP_NUM_THREADS", "")
    share = max(1, _cores() // replicas)
    return max(1, min(share, int(wish))) if wish.isdigit() else share


def _awaited_port(host: str, port: int, patience_s: float) -> int:
    """`port`, or a free one for port 0, once nobody listens there; raises PortTakenError after `patience_s` seconds."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return _bindable_port(host, port)
        except OSError as error:
            left = deadline - time.monotonic()
            if error.errno != errno.EADDRINUSE or left <= 0:
                raise PortTakenError(
                    f"cannot listen on {host}:{port}: {error.strerror}; end the other process, or set serve.port to a free one"
                ) from None
        LOGGER.warning("%s:%d is taken; waiting for it for up to %.0f s", host, port, left)
        time.sleep(min(2.0, left))


def _bindable_port(host: str, port: int) -> int:
    """The port that a server could listen on now; raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _stopped_by_signal(stop: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set `stop` in place of Ray's handlers (in the main thread; elsewhere signals are not ours)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
