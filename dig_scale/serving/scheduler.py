"""Which walkers take their next step together: step-level continuous batching.

In: jobs (so many samples of one group) and reports of finished walkers. Out: ticks, each a set of walkers of ONE group
that advance by one step. It holds no tensors and knows no model, clock or thread; a walker is (request, sample index).

A job's walkers are started lazily, in index order; one that has started keeps its place and may be paused between any
two steps, so a newcomer joins at the next tick instead of waiting for a whole trajectory. Fairness has two levels.
Groups share seconds by start-time fair queueing (Goyal, Vin, Cheng 1996): the group that has had least goes next, and a
newcomer or a returner starts at the clock, so that nobody saves up credit. Inside a tick, rows are dealt to requests
max-min fairly, so that a small request gets all it can use whatever stands beside it; when there are more requests than
rows, age decides: the one passed over longest comes first, and none waits more than requests / rows ticks of its group.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from dig_scale.config import SolverName
from dig_scale.errors import UserError


class QueueFullError(UserError):
    """No more requests are admitted now."""


class Walker(NamedTuple):
    """One sample on its way: its request and its sample index."""

    request_id: str
    sample: int


@dataclass(frozen=True)
class Group:
    """What the rows of one batch have in common, and how many of them (`rows`) fit one batch.

    conditions: wanted properties (name, value), sorted, and the guidance towards them.
    """

    system_id: str
    solver: SolverName
    rows: int
    conditions: tuple[tuple[str, float], ...] = ()
    guidance: float = 1.0


@dataclass(frozen=True)
class Job:
    """Samples first_index .. first_index + num - 1 of a group. At most `window` are started and not yet delivered."""

    request_id: str
    group: Group
    seed: int
    first_index: int
    num: int
    steps: int
    window: int


@dataclass(frozen=True)
class Tick:
    """One step of some walkers of `group`: `resumed` have run before, `started` have not."""

    group: Group
    resumed: tuple[Walker, ...]
    started: tuple[Walker, ...]

    @property
    def walkers(self) -> tuple[Walker, ...]:
        """All rows of the tick."""
        return self.resumed + self.started


@dataclass
class _Request:
    job: Job
    last_served: int
    """Tick of its group at which it last got a row (or was admitted)."""
    started: int = 0
    finished: int = 0
    delivered: int = 0
    live: dict[int, None] = field(default_factory=dict)
    """Indices started and not finished, oldest first."""

    @property
    def startable(self) -> int:
        """Walkers that may start now: some are left and the reader keeps up."""
        return max(0, min(self.job.num - self.started, self.job.window - (self.started - self.delivered)))

    @property
    def demand(self) -> int:
        """Rows that the request can use in one tick."""
        return len(self.live) + self.startable


@dataclass
class _Lane:
    """The requests of one group, in order of admission, with the seconds and ticks spent on it."""

    seconds: float
    ticks: int = 0
    requests: dict[str, _Request] = field(default_factory=dict)

    def runnable(self) -> list[_Request]:
        return [request for request in self.requests.values() if request.demand]


class Scheduler:
    """Jobs in, ticks out. Not thread-safe: its owner holds a lock. Admits at most `max_requests` at a time."""

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._lanes: dict[Group, _Lane] = {}
        self._group_of: dict[str, Group] = {}
        self._clock = 0.0

    @property
    def requests(self) -> int:
        """Requests admitted and not finished."""
        return len(self._group_of)

    @property
    def walkers_in_flight(self) -> int:
        """Walkers started and not finished."""
        return sum(len(request.live) for request in self._all())

    @property
    def walkers_waiting(self) -> int:
        """Walkers not yet started."""
        return sum(request.job.num - request.started for request in self._all())

    @property
    def least_work_left(self) -> int:
        """Row-steps, at most, until the request nearest to its end is done; 0 when idle."""
        return min(((r.job.num - r.finished) * r.job.steps for r in self._all()), default=0)

    def submit(self, job: Job) -> None:
        """Admit a job; raises QueueFullError, or ValueError when its request is already there."""
        if job.request_id in self._group_of:
            raise ValueError(f"request {job.request_id} is already scheduled")
        if self.requests >= self._max_requests:
            raise QueueFullError(f"{self.requests} requests are in work; serve.max_queued_requests allows no more")
        lane = self._lanes.setdefault(job.group, _Lane(seconds=self._clock))
        lane.requests[job.request_id] = _Request(job, last_served=lane.ticks)
        self._group_of[job.request_id] = job.group

    def cancel(self, request_id: str) -> bool:
        """Forget a request and its walkers at once; False where it is not there (any more)."""
        group = self._group_of.pop(request_id, None)
        if group is None:
            return False
        lane = self._lanes[group]
        del lane.requests[request_id]
        if not lane.requests:
            del self._lanes[group]
        return True

    def plan(self) -> Tick | None:
        """The next tick, or None when nothing can run. Walkers it starts count as started from here on."""
        runnable = {group: lane for group, lane in self._lanes.items() if lane.runnable()}
        if not runnable:
            return None
        for lane in runnable.values():
            lane.seconds = max(lane.seconds, self._clock)
        group, lane = min(runnable.items(), key=lambda item: item[1].seconds)
        self._clock = lane.seconds
        return _deal(group, lane)

    def complete(self, tick: Tick, finished: Collection[Walker], seconds: float) -> tuple[str, ...]:
        """Account for a tick that took `seconds`; returns the requests that are now complete (and forgotten)."""
        lane = self._lanes.get(tick.group)
        if lane is None:
            return ()
        lane.seconds += seconds
        for walker in finished:
            request = lane.requests.get(walker.request_id)
            if request is not None:
                del request.live[walker.sample]
                request.finished += 1
        touched = dict.fromkeys(walker.request_id for walker in finished if walker.request_id in lane.requests)
        done = tuple(key for key in touched if lane.requests[key].finished == lane.requests[key].job.num)
        for request_id in done:
            self.cancel(request_id)
        return done

    def delivered(self, request_id: str, count: int) -> None:
        """The reader took `count` more samples of a request; unknown requests are ignored (they have finished)."""
        group = self._group_of.get(request_id)
        if group is not None:
            self._lanes[group].requests[request_id].delivered += count

    def _all(self) -> Iterable[_Request]:
        return (request for lane in self._lanes.values() for request in lane.requests.values())


def max_min_shares(demands: list[int], rows: int) -> list[int]:
    """Rows for each demand: as even as possible, none above its demand, earlier entries first for what is left over."""
    shares = [0] * len(demands)
    hungry = [i for i, demand in enumerate(demands) if demand > 0]
    while rows > 0 and hungry:
        each = max(1, rows // len(hungry))
        for i in hungry:
            given = min(each, demands[i] - shares[i], rows)
            shares[i] += given
            rows -= given
        hungry = [i for i in hungry if shares[i] < demands[i]]
    return shares


def _deal(group: Group, lane: _Lane) -> Tick:
    requests = sorted(lane.runnable(), key=lambda request: request.last_served)
    lane.ticks += 1
    resumed: list[Walker] = []
    started: list[Walker] = []
    for request, share in zip(requests, max_min_shares([r.demand for r in requests], group.rows), strict=True):
        old, new = _take(request, share)
        resumed += old
        started += new
        if share:
            request.last_served = lane.ticks
    return Tick(group, tuple(resumed), tuple(started))


def _take(request: _Request, rows: int) -> tuple[list[Walker], list[Walker]]:
    """The request's oldest live walkers, then new ones, `rows` in all."""
    request_id = request.job.request_id
    old = [Walker(request_id, index) for index in islice(request.live, rows)]
    first = request.job.first_index + request.started
    new = [Walker(request_id, index) for index in range(first, first + rows - len(old))]
    request.started += len(new)
    request.live.update(dict.fromkeys(walker.sample for walker in new))
    return old, new
