"""Step-level continuous batching, without tensors: safety on random histories, and fairness."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dig_scale.serving.scheduler import Group, Job, QueueFullError, Scheduler, Tick, Walker, max_min_shares

_ROWS = 4


def job(name: str, num: int, steps: int = 3, group: str = "a", rows: int = _ROWS, window: int = 10**6) -> Job:
    return Job(name, Group(group, "heun", rows), seed=1, first_index=100, num=num, steps=steps, window=window)


@dataclass
class Run:
    """Drives a scheduler as the worker does, counting the steps of every walker and checking each tick."""

    scheduler: Scheduler
    jobs: dict[str, Job] = field(default_factory=dict)
    steps: Counter[Walker] = field(default_factory=Counter)
    ended: dict[str, int] = field(default_factory=dict)
    ticks: list[Tick] = field(default_factory=list)

    def submit(self, new: Job) -> None:
        self.scheduler.submit(new)
        self.jobs[new.request_id] = new

    def tick(self, seconds: float = 1.0) -> Tick | None:
        tick = self.scheduler.plan()
        if tick is None:
            return None
        self._check(tick)
        self.steps.update(tick.walkers)
        over = [w for w in tick.walkers if self.steps[w] == self.jobs[w.request_id].steps]
        self.ticks.append(tick)
        for request_id in self.scheduler.complete(tick, over, seconds):
            self.ended[request_id] = len(self.ticks)
        for walker in over:
            self.scheduler.delivered(walker.request_id, 1)
        return tick

    def _check(self, tick: Tick) -> None:
        assert 0 < len(tick.walkers) <= tick.group.rows
        assert len(set(tick.walkers)) == len(tick.walkers)
        assert all(self.jobs[walker.request_id].group == tick.group for walker in tick.walkers)
        assert all(self.steps[walker] > 0 for walker in tick.resumed)
        assert all(self.steps[walker] == 0 for walker in tick.started)

    def finish(self, most: int = 10_000) -> None:
        for _ in range(most):
            if self.tick() is None:
                return
        pytest.fail(f"not idle after {most} ticks")


jobs_strategy = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 4), st.sampled_from("ab"), st.integers(0, 6), st.integers(1, 20)),
    min_size=1,
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(jobs_strategy, st.sets(st.integers(0, 7)), st.integers(1, 5))
def test_every_sample_gets_exactly_its_steps(
    arrivals: list[tuple[int, int, str, int, int]], cancelled: set[int], rows: int
) -> None:
    run = Run(Scheduler(max_requests=100))
    for number, (num, steps, group, pause, window) in enumerate(arrivals):
        run.submit(job(f"r{number}", num, steps, group, rows, window))
        for _ in range(pause):
            run.tick()
        if number in cancelled:
            run.scheduler.cancel(f"r{number}")
    run.finish()
    assert run.scheduler.requests == run.scheduler.walkers_in_flight == run.scheduler.walkers_waiting == 0
    for request_id in run.ended:
        wanted = run.jobs[request_id]
        expected = {Walker(request_id, 100 + k): wanted.steps for k in range(wanted.num)}
        assert {w: n for w, n in run.steps.items() if w.request_id == request_id} == expected
    left = set(run.jobs) - set(run.ended)
    assert left <= {f"r{number}" for number in cancelled}
    assert all(count <= run.jobs[walker.request_id].steps for walker, count in run.steps.items())


@given(st.lists(st.integers(0, 20), max_size=8), st.integers(1, 30))
def test_shares_are_max_min_fair(demands: list[int], rows: int) -> None:
    shares = max_min_shares(demands, rows)
    assert sum(shares) == min(rows, sum(demands))
    assert all(share <= demand for share, demand in zip(shares, demands, strict=True))
    unsatisfied = [s for s, d in zip(shares, demands, strict=True) if s < d]
    if unsatisfied:
        assert max(shares) <= min(unsatisfied) + 1


def test_a_small_request_is_not_stuck_behind_a_large_one() -> None:
    run = Run(Scheduler(max_requests=9))
    run.submit(job("large", 100_000, steps=50))
    for _ in range(7):
        run.tick()
    run.submit(job("small", 2, steps=5))
    for _ in range(5):
        run.tick()
    assert run.ended["small"] == 7 + 5
    assert all(len(tick.walkers) == _ROWS for tick in run.ticks)


def test_new_walkers_join_at_every_step() -> None:
    run = Run(Scheduler(max_requests=9))
    run.submit(job("one", 1, steps=8))
    run.tick()
    run.submit(job("two", 1, steps=8))
    tick = run.tick()
    assert tick is not None
    assert (tick.resumed, tick.started) == ((Walker("one", 100),), (Walker("two", 100),))


def test_a_finished_row_is_filled_at_once() -> None:
    run = Run(Scheduler(max_requests=9))
    run.submit(job("short", 1, steps=1))
    run.submit(job("long", 10, steps=5))
    first, second = run.tick(), run.tick()
    assert first is not None
    assert second is not None
    assert len(first.walkers) == len(second.walkers) == _ROWS
    assert len(second.started) == 1


@given(st.integers(1, 12), st.integers(1, 5))
def test_no_request_waits_longer_than_requests_over_rows(requests: int, rows: int) -> None:
    run = Run(Scheduler(max_requests=100))
    for number in range(requests):
        run.submit(job(f"r{number}", 1000, rows=rows))
    last = dict.fromkeys(run.jobs, 0)
    for now in range(1, 60):
        tick = run.tick()
        assert tick is not None
        for walker in tick.walkers:
            last[walker.request_id] = now
        assert all(now - seen <= ceil(requests / rows) for seen in last.values())


def test_groups_share_seconds_not_ticks() -> None:
    run = Run(Scheduler(max_requests=9))
    run.submit(job("cheap", 10_000, group="a"))
    run.submit(job("dear", 10_000, group="b"))
    spent = {"a": 0.0, "b": 0.0}
    cost = {"a": 1.0, "b": 10.0}
    for _ in range(400):
        tick = run.scheduler.plan()
        assert tick is not None
        run.scheduler.complete(tick, (), cost[tick.group.system_id])
        spent[tick.group.system_id] += cost[tick.group.system_id]
        assert abs(spent["a"] - spent["b"]) <= 10.0


def test_an_idle_group_saves_up_no_credit() -> None:
    run = Run(Scheduler(max_requests=9))
    run.submit(job("busy", 100_000, group="a"))
    for _ in range(1000):
        run.tick()
    run.submit(job("late", 100_000, group="b"))
    served = Counter(tick.group.system_id for tick in (run.tick() for _ in range(20)) if tick)
    assert abs(served["a"] - served["b"]) <= 1


def test_cancel_frees_the_walkers_at_once() -> None:
    run = Run(Scheduler(max_requests=9))
    run.submit(job("gone", 100))
    run.submit(job("stays", 1))
    run.tick()
    assert run.scheduler.cancel("gone")
    assert not run.scheduler.cancel("gone")
    assert run.scheduler.walkers_in_flight == 1
    tick = run.tick()
    assert tick is not None
    assert {walker.request_id for walker in tick.walkers} == {"stays"}


def test_a_cancel_during_a_tick_is_survived() -> None:
    scheduler = Scheduler(max_requests=9)
    scheduler.submit(job("gone", 2))
    tick = scheduler.plan()
    assert tick is not None
    scheduler.cancel("gone")
    assert scheduler.complete(tick, tick.walkers, 1.0) == ()
    assert scheduler.plan() is None


def test_a_full_queue_refuses_and_recovers() -> None:
    scheduler = Scheduler(max_requests=1)
    scheduler.submit(job("one", 1))
    with pytest.raises(QueueFullError, match="max_queued_requests"):
        scheduler.submit(job("two", 1))
    scheduler.cancel("one")
    scheduler.submit(job("two", 1))


def test_a_slow_reader_pauses_its_own_request_only() -> None:
    scheduler = Scheduler(max_requests=9)
    scheduler.submit(job("slow", 100, steps=1, window=2))
    tick = scheduler.plan()
    assert tick is not None
    assert len(tick.walkers) == 2
    scheduler.complete(tick, tick.walkers, 1.0)
    assert scheduler.plan() is None
    scheduler.submit(job("quick", 1, steps=1))
    other = scheduler.plan()
    assert other is not None
    assert {walker.request_id for walker in other.walkers} == {"quick"}
    scheduler.complete(other, other.walkers, 1.0)
    scheduler.delivered("slow", 2)
    again = scheduler.plan()
    assert again is not None
    assert [walker.sample for walker in again.started] == [102, 103]
