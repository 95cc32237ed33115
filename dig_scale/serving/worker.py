"""The thread that owns the walkers: it takes ticks from the scheduler, advances them, and hands finished samples over.

In: jobs with their bench and a `deliver` function. Out: events, delivered from the worker's own thread (the caller
brings them to its event loop). One lock guards scheduler and orders; tensors are touched by the worker's thread alone,
so the HTTP loop never waits for a step. It knows no HTTP and no wire format.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from dig_scale.errors import UserError
from dig_scale.sampling.solvers import solver_named
from dig_scale.serving.metrics import Metrics, watch
from dig_scale.serving.pool import Advanced, Pool, advance_pool, without
from dig_scale.serving.scheduler import Group, Job, Scheduler, Tick
from dig_scale.serving.served import Bench

LOGGER = logging.getLogger(__name__)
_LONGEST_RETRY_SECONDS = 60


class WorkerStoppedError(UserError):
    """The worker takes no jobs: it has been stopped or has failed."""


@dataclass(frozen=True)
class Samples:
    """Finished samples: index [n] int64 and float32 arrays by name: positions [n, N, 3] Å, and rotations [n, N, 3, 3] or cell
    [n, 3, 3] Å where the system has them.
    """

    index: np.ndarray
    arrays: Mapping[str, np.ndarray]

    @property
    def finite(self) -> bool:
        """Whether every number of every sample is finite."""
        return all(bool(np.isfinite(values).all()) for values in self.arrays.values())


@dataclass(frozen=True)
class Finished:
    """All samples of a request have been delivered; its share of the replica's CPU seconds."""

    cpu_seconds: float


@dataclass(frozen=True)
class Broken:
    """The request ends early; `retry` says whether asking again can help."""

    reason: str
    retry: bool


Event = Samples | Finished | Broken
Deliver = Callable[[Event], None]


@dataclass
class _Order:
    job: Job
    bench: Bench
    deliver: Deliver
    admitted: float = field(default_factory=time.perf_counter)
    cpu_seconds: float = 0.0


class Worker:
    """One worker thread over one Scheduler; `start` it before the first job and `stop` it at the end."""

    def __init__(self, max_requests: int, metrics: Metrics) -> None:
        self._scheduler = Scheduler(max_requests)
        self._metrics = metrics
        self._orders: dict[str, _Order] = {}
        self._gone: set[str] = set()
        self._pools: dict[Group, Pool] = {}
        self._seconds_per_row_step = 0.0
        self._open = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="dig-scale-worker", daemon=True)
        watch(metrics.walkers_in_flight, lambda: self._read(lambda s: s.walkers_in_flight))
        watch(metrics.queue_depth, lambda: self._read(lambda s: s.walkers_waiting))
        watch(metrics.requests_in_flight, lambda: self._read(lambda s: s.requests))

    @property
    def alive(self) -> bool:
        """Whether jobs are taken and worked on."""
        return self._open and self._thread.is_alive()

    def start(self) -> None:
        """Begin to work."""
        self._open = True
        self._thread.start()

    def stop(self) -> None:
        """Break off what is in work (its readers may retry elsewhere) and wait for the thread to end."""
        with self._wake:
            self._open = False
            self._wake.notify()
        self._thread.join()

    def submit(self, job: Job, bench: Bench, deliver: Deliver) -> None:
        """Take a job on; raises QueueFullError, or WorkerStoppedError."""
        with self._wake:
            if not self.alive:
                raise WorkerStoppedError("the worker of this replica is not running; try again in a moment")
            self._scheduler.submit(job)
            self._orders[job.request_id] = _Order(job, bench, deliver)
            self._wake.notify()

    def cancel(self, request_id: str) -> bool:
        """End a request and free its walkers before the next step; False where it is not in work (any more)."""
        with self._wake:
            order = self._forget(request_id)
            self._wake.notify()
        if order is not None:
            self._close(order, Broken("the request was cancelled", retry=False), "cancelled")
        return order is not None

    def delivered(self, request_id: str, count: int) -> None:
        """The reader of a request took `count` samples, so that more of its walkers may start."""
        with self._wake:
            self._scheduler.delivered(request_id, count)
            self._wake.notify()

    def retry_after(self) -> int:
        """Seconds, about, until the request nearest to its end is done."""
        with self._wake:
            row_steps = self._scheduler.least_work_left * max(1, self._scheduler.requests)
        return max(1, min(_LONGEST_RETRY_SECONDS, math.ceil(row_steps * self._seconds_per_row_step)))

    def _read(self, value: Callable[[Scheduler], float]) -> float:
        with self._wake:
            return value(self._scheduler)

    def _run(self) -> None:
        reason = "the replica is stopping"
        try:
            with torch.inference_mode():
                while (work := self._next_work()) is not None:
                    self._step(*work)
        except Exception:
            reason = "the replica's worker failed"
            LOGGER.exception("the worker ends: the replica is unhealthy from here on")
        finally:
            self._close_all(reason)

    def _next_work(self) -> tuple[Tick, Mapping[str, _Order]] | None:
        """The next tick and the orders it serves; waits for one, and returns None when the worker is to stop."""
        with self._wake:
            while self._open:
                self._drop_gone()
                tick = self._scheduler.plan()
                if tick is not None:
                    return tick, {walker.request_id: self._orders[walker.request_id] for walker in tick.walkers}
                self._wake.wait()
        return None

    def _drop_gone(self) -> None:
        """Free the rows of requests that were cancelled or have failed."""
        if not self._gone:
            return
        left = {
            group: without(pool, {label for label in pool.labels if label.request_id in self._gone})
            for group, pool in self._pools.items()
        }
        self._pools = {group: pool for group, pool in left.items() if pool is not None}
        self._gone.clear()

    def _step(self, tick: Tick, orders: Mapping[str, _Order]) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        jobs = {request_id: order.job for request_id, order in orders.items()}
        bench = next(iter(orders.values())).bench
        try:
            advanced = advance_pool(self._pools.get(tick.group), tick, jobs, bench, solver_named(tick.group.solver))
        except Exception as error:  # out of memory and the like: these requests end, the replica goes on
            LOGGER.exception("a step of %d walkers of %s failed", len(tick.walkers), bench.system.name)
            self._fail(orders, f"a step of {len(tick.walkers)} walkers of {bench.system.name} failed: {error}")
            _require_device(bench)
            return
        self._keep(tick.group, advanced.pool)
        seconds = time.perf_counter() - wall
        self._account(tick, orders, seconds, time.process_time() - cpu)
        self._hand_over(tick, orders, advanced, seconds)

    def _keep(self, group: Group, pool: Pool | None) -> None:
        if pool is None:
            self._pools.pop(group, None)
        else:
            self._pools[group] = pool

    def _account(self, tick: Tick, orders: Mapping[str, _Order], seconds: float, cpu_seconds: float) -> None:
        rows = Counter(walker.request_id for walker in tick.walkers)
        for request_id, count in rows.items():
            orders[request_id].cpu_seconds += cpu_seconds * count / len(tick.walkers)
        self._metrics.step_seconds.observe(seconds)
        self._metrics.occupancy.observe(len(tick.walkers) / tick.group.rows)
        latest = seconds / len(tick.walkers)
        self._seconds_per_row_step += 0.1 * (latest - self._seconds_per_row_step)

    def _hand_over(self, tick: Tick, orders: Mapping[str, _Order], advanced: Advanced, seconds: float) -> None:
        """Deliver what has finished: first the samples, then the end of the requests that are complete."""
        parts = _by_request(advanced)
        spoilt = [request_id for request_id, part in parts.items() if not part.finite]
        for request_id in spoilt:
            part, system = parts.pop(request_id), orders[request_id].bench.system
            self._fail([request_id], f"samples of {system.name} among {part.index[:5].tolist()} are not finite")
        with self._wake:
            complete = self._scheduler.complete(tick, advanced.finished, seconds)
            ended = [self._orders.pop(request_id) for request_id in complete]
        self._metrics.samples.inc(sum(len(part.index) for part in parts.values()))
        for request_id, part in parts.items():
            orders[request_id].deliver(part)
        for order in ended:
            self._close(order, Finished(order.cpu_seconds), "completed")

    def _fail(self, request_ids: Iterable[str], reason: str) -> None:
        with self._wake:
            orders = [self._forget(request_id) for request_id in request_ids]
        for order in orders:
            if order is not None:
                self._close(order, Broken(reason, retry=False), "failed")

    def _forget(self, request_id: str) -> _Order | None:
        """Take a request out of scheduler and orders (the lock is held); its rows go before the next tick."""
        self._scheduler.cancel(request_id)
        order = self._orders.pop(request_id, None)
        if order is not None:
            self._gone.add(request_id)
        return order

    def _close(self, order: _Order, event: Event, outcome: str) -> None:
        self._metrics.requests.labels(outcome).inc()
        self._metrics.request_seconds.observe(time.perf_counter() - order.admitted)
        order.deliver(event)

    def _close_all(self, reason: str) -> None:
        with self._wake:
            self._open = False
            orders = [self._forget(request_id) for request_id in tuple(self._orders)]
        self._pools.clear()
        for order in orders:
            if order is not None:
                self._close(order, Broken(reason, retry=True), "failed")


def _require_device(bench: Bench) -> None:
    """Raises where a failed step has left the GPU's context broken, which no later step would survive."""
    if bench.context.present.is_cuda:
        torch.cuda.synchronize(bench.context.present.device)


def _by_request(advanced: Advanced) -> dict[str, Samples]:
    rows: dict[str, list[int]] = {}
    for row, walker in enumerate(advanced.finished):
        rows.setdefault(walker.request_id, []).append(row)
    return {request_id: _samples(advanced, chosen) for request_id, chosen in rows.items()}


def _samples(advanced: Advanced, rows: list[int]) -> Samples:
    index = np.array([advanced.finished[row].sample for row in rows], dtype=np.int64)
    return Samples(index, {name: values[rows] for name, values in advanced.arrays.items()})
