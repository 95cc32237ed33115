"""The worker thread: the same samples as offline whatever shares the batch, and every way in which a request may end."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from dig_scale.batch import Context, Score, State
from dig_scale.serving.metrics import replica_metrics
from dig_scale.serving.scheduler import Group, Job, QueueFullError
from dig_scale.serving.served import Bench, rows_that_fit
from dig_scale.serving.worker import Broken, Event, Finished, Samples, Worker, WorkerStoppedError
from tests.dig_scale.serving.fixtures import BUTANE, ETHER, Offline

_SECONDS = 30


@dataclass
class Reader:
    """Collects the events of one request, telling the worker that it reads."""

    worker: Worker
    job: Job
    events: queue.Queue[Event] = field(default_factory=queue.Queue)
    index: list[int] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)

    def next(self) -> Event:
        event = self.events.get(timeout=_SECONDS)
        if isinstance(event, Samples):
            self.index += event.index.tolist()
            self.positions += list(event.arrays["positions"])
            self.worker.delivered(self.job.request_id, len(event.index))
        return event

    def end(self) -> Finished | Broken:
        while isinstance(event := self.next(), Samples):
            pass
        return event


@pytest.fixture
def worker() -> Iterator[Worker]:
    working = Worker(max_requests=8, metrics=replica_metrics())
    working.start()
    yield working
    working.stop()


def ask(worker: Worker, bench: Bench, name: str, **changes: object) -> Reader:
    how = {"seed": 1, "first_index": 0, "num": 5, "steps": 6, "window": 1000, "solver": "heun", "rows": 8} | changes
    group = Group(bench.system_id, how.pop("solver"), how.pop("rows"))
    reader = Reader(worker, Job(request_id=name, group=group, **how))
    worker.submit(reader.job, bench, reader.events.put)
    return reader


def with_score(bench: Bench, score: Callable[[State, Context, torch.Tensor], Score]) -> Bench:
    return replace(bench, score_fn=score)


def test_mixed_requests_give_the_samples_of_offline_runs(worker: Worker, offline: Offline) -> None:
    butane, ether = offline.bench(BUTANE), offline.bench(ETHER)
    readers = [
        ask(worker, butane, "a", seed=1, num=20, steps=6, solver="dpm-solver++2m-sde"),
        ask(worker, butane, "b", seed=9, num=7, steps=11, solver="dpm-solver++2m-sde", first_index=2**33),
        ask(worker, ether, "c", seed=1, num=9, steps=4, solver="ancestral"),
        ask(worker, butane, "d", seed=3, num=3, steps=5, solver="heun"),
    ]
    for reader, system in zip(readers, (BUTANE, BUTANE, ETHER, BUTANE), strict=True):
        assert isinstance(reader.end(), Finished)
        job = reader.job
        assert sorted(reader.index) == list(range(job.first_index, job.first_index + job.num))
        expected = offline.positions(system, np.array(reader.index), job.steps, job.seed, job.group.solver)
        np.testing.assert_allclose(np.stack(reader.positions), expected, atol=1e-3, rtol=0)


def test_a_cancelled_request_ends_and_frees_its_walkers(worker: Worker, offline: Offline) -> None:
    reader = ask(worker, offline.bench(BUTANE), "long", num=100_000, steps=50)
    assert worker.cancel("long")
    assert reader.end() == Broken("the request was cancelled", retry=False)
    assert not worker.cancel("long")
    after = ask(worker, offline.bench(BUTANE), "next", num=1)
    assert isinstance(after.end(), Finished)


def test_a_failing_step_ends_its_own_requests_only(worker: Worker, offline: Offline) -> None:
    def out_of_memory(state: State, context: Context, t: torch.Tensor) -> Score:
        raise RuntimeError("out of memory")

    bad = ask(worker, with_score(offline.bench(ETHER), out_of_memory), "bad")
    good = ask(worker, offline.bench(BUTANE), "good")
    end = bad.end()
    assert isinstance(end, Broken)
    assert "ether" in end.reason
    assert "out of memory" in end.reason
    assert not end.retry
    assert isinstance(good.end(), Finished)
    assert worker.alive


def test_samples_that_are_not_finite_are_never_delivered(worker: Worker, offline: Offline) -> None:
    def not_finite(state: State, context: Context, t: torch.Tensor) -> Score:
        assert state.positions is not None
        return Score(positions=torch.full_like(state.positions, torch.nan))

    reader = ask(worker, with_score(offline.bench(ETHER), not_finite), "nan")
    end = reader.end()
    assert isinstance(end, Broken)
    assert "not finite" in end.reason
    assert reader.index == []


def test_a_reader_that_does_not_read_pauses_its_request(worker: Worker, offline: Offline) -> None:
    group = Group(offline.bench(BUTANE).system_id, "heun", 8)
    events: queue.Queue[Event] = queue.Queue()
    worker.submit(Job("slow", group, 1, 0, num=50, steps=2, window=8), offline.bench(BUTANE), events.put)
    quick = ask(worker, offline.bench(BUTANE), "quick", num=200, steps=2)
    assert isinstance(quick.end(), Finished)
    held = list(events.queue)
    assert sum(len(event.index) for event in held if isinstance(event, Samples)) == 8
    assert not any(isinstance(event, Finished) for event in held)


def test_a_stopped_worker_tells_its_readers_to_ask_again(offline: Offline) -> None:
    working = Worker(max_requests=8, metrics=replica_metrics())
    working.start()
    reader = ask(working, offline.bench(BUTANE), "long", num=100_000)
    working.stop()
    end = reader.end()
    assert isinstance(end, Broken)
    assert end.retry
    with pytest.raises(WorkerStoppedError):
        ask(working, offline.bench(BUTANE), "late")


def test_a_full_queue_is_refused_with_a_time_to_wait(worker: Worker, offline: Offline) -> None:
    for number in range(8):
        ask(worker, offline.bench(BUTANE), f"r{number}", num=100_000)
    with pytest.raises(QueueFullError):
        ask(worker, offline.bench(BUTANE), "one too many")
    assert 1 <= worker.retry_after() <= 60


def test_larger_systems_get_fewer_rows() -> None:
    assert rows_that_fit(22, 256) == 256
    assert rows_that_fit(1000, 256) == 8
    assert rows_that_fit(100_000, 256) == 1
