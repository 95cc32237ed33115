"""A campaign: every (system, replica) of a recipe simulated by Ray actors, one OpenMM thread each.

In: a Recipe and a folder. Out: OUT/<system>/<replica>[-T300].zarr and OUT/campaign.json. An actor advances one chunk per
call, so a killed actor, or a killed driver started again, goes on from the last stored chunk. An actor's death is tried
again, at most three times without progress; an error of the simulation itself (coordinates that are not finite) is
recorded, the other replicas go on, and the campaign ends with that error. Knows no engine beyond its platform's name.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from dig_shards.durable import replace_durably

from dig_scale.config import Recipe, Simulate, SystemSpec
from dig_scale.errors import UserError
from dig_scale.ray_token import share_ray_token
from dig_scale.simulation.ase_start import surface_start
from dig_scale.simulation.engine import SimulationError
from dig_scale.simulation.force_field import LONGEST_STEP_FS, shortest_automatic_step_fs
from dig_scale.simulation.journal import replica_files
from dig_scale.simulation.ladder import Timetable
from dig_scale.simulation.openmm_start import start_from_spec
from dig_scale.simulation.replica import ReplicaJob, ReplicaProgress, ReplicaRun, ladder_temperatures, simulated_ns
from dig_scale.system import System
from dig_scale.units import SECONDS_PER_DAY

_DEATHS_WITHOUT_PROGRESS = 3
_HEARTBEAT_S = 5.0
_OBJECT_STORE_BYTES = 100 * 2**20
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Progress:
    """Where a campaign stands; ns_per_day and eta_s are None until this run has stored its first chunk."""

    done_ns: float
    total_ns: float
    ns_per_day: float | None
    eta_s: float | None
    finished: int
    failed: int
    jobs: int
    restarts: int


@dataclass(frozen=True)
class ReplicaReport:
    """One replica at the end: status is "finished" or "failed"; CPU seconds are those behind stored frames."""

    system: str
    replica: int
    status: str
    error: str | None = None
    simulated_ns: float = 0.0
    cpu_seconds: float = 0.0
    exchange_acceptance: tuple[float | None, ...] = ()
    platform: str | None = None
    trajectories: tuple[str, ...] = ()


@dataclass(frozen=True)
class CampaignReport:
    """What a campaign made; trajectories in `replicas` are relative to `out`; wall_seconds and restarts of the last run."""

    out: Path
    replicas: tuple[ReplicaReport, ...]
    wall_seconds: float
    restarts: int

    @property
    def simulated_ns(self) -> float:
        """All temperatures together."""
        return sum(one.simulated_ns for one in self.replicas)

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds of MD behind all stored frames."""
        return sum(one.cpu_seconds for one in self.replicas)

    @property
    def trajectories(self) -> tuple[Path, ...]:
        """All trajectory stores."""
        return tuple(self.out / name for one in self.replicas for name in one.trajectories)


ProgressCallback = Callable[[Progress], None]


def simulate(recipe: Recipe, out: Path, progress: ProgressCallback | None = None) -> CampaignReport:
    """Run the campaign of `recipe` in `out`, or carry it on; returns at once when all is there.

    Raises UserError for a recipe that cannot be run or a folder of another recipe, SimulationError after the last
    replica when any failed (see OUT/campaign.json).
    """
    settings = _checked(recipe)
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    with _only_driver(out):
        _claim(out, recipe)
        todo = [
            (spec, k)
            for spec in recipe.systems
            for k in range(settings.replicas)
            if not _is_done(out, settings, spec, k)
        ]
        failures: dict[tuple[str, int], str] = {}
        restarts = 0
        if todo:
            with cluster(settings.actors, len(todo)) as actors:
                systems = _prepared(recipe, out, {spec.name: spec for spec, _ in todo})
                jobs = [_job(recipe, out, systems[spec.name], k) for spec, k in todo]
                driver = _Driver(jobs, actors, _Meter(recipe, len(todo), progress))
                failures, restarts = driver.run()
        report = _report(recipe, out, failures, time.monotonic() - begin, restarts)
        _write_campaign(out, recipe, report)
    if failures:
        first = next(iter(failures.values()))
        raise SimulationError(
            f"{len(failures)} of {len(report.replicas)} replicas failed, the first with: {first} (all in "
            f"{out / 'campaign.json'}; run again to retry them from their last chunk)"
        )
    return report


def _checked(recipe: Recipe) -> Simulate:
    if recipe.simulate is None or not recipe.systems:
        raise UserError(
            f"recipe {recipe.name!r}: needs a [simulate] section and at least one [[systems]] entry to simulate"
        )
    Timetable.of(recipe.simulate, shortest_automatic_step_fs(recipe.simulate))
    for spec in recipe.systems:
        if not _FOLDER_NAME.fullmatch(spec.name):
            raise UserError(f"system name {spec.name!r}: use letters, digits, . _ and -, for it names a folder")
    return recipe.simulate


def _is_done(out: Path, settings: Simulate, spec: SystemSpec, replica: int) -> bool:
    return replica_files(out, spec.name, replica, ladder_temperatures(settings)).summary.is_file()


# --- the folder -----------------------------------------------------------------------------------------------------


@contextmanager
def _only_driver(out: Path) -> Iterator[None]:
    descriptor = os.open(out / "campaign.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"{out}: another campaign is running here; wait for it, or choose another folder") from None
    finally:
        os.close(descriptor)


def _identity(recipe: Recipe) -> dict[str, Any]:
    """What decides the frames: all but the number of actors."""
    content = recipe.model_dump(mode="json", include={"seed", "systems", "simulate"})
    content["simulate"].pop("actors")
    return content


def _claim(out: Path, recipe: Recipe) -> None:
    file = out / "campaign.json"
    if not file.is_file():
        _write_campaign(out, recipe, None)
        return
    held = json.loads(file.read_text())["recipe"]
    wanted = _identity(recipe)
    if wanted["simulate"]["time_step_fs"] is None and held["simulate"]["time_step_fs"] == LONGEST_STEP_FS:
        held["simulate"]["time_step_fs"] = None  # written when this was the step of every system
    differing = sorted(_differences("", held, wanted))
    if differing:
        raise UserError(
            f"{out} holds the campaign of another recipe (differs in {', '.join(differing[:5])}); choose another folder"
        )


def _differences(prefix: str, one: Any, two: Any) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(two, dict):
        for key in one.keys() | two.keys():
            yield from _differences(f"{prefix}.{key}" if prefix else key, one.get(key), two.get(key))
    elif one != two:
        yield prefix


def _write_campaign(out: Path, recipe: Recipe, report: CampaignReport | None) -> None:
    content: dict[str, Any] = {"format_version": 1, "recipe": _identity(recipe), "replicas": []}
    if report is not None:
        content["replicas"] = [asdict(one) for one in report.replicas]
        content |= {"simulated_ns": report.simulated_ns, "cpu_seconds": report.cpu_seconds}
    replace_durably(out / "campaign.json", (json.dumps(content, indent=1) + "\n").encode())


def _report(
    recipe: Recipe, out: Path, failures: dict[tuple[str, int], str], wall_seconds: float, restarts: int
) -> CampaignReport:
    settings = _checked(recipe)
    rows = []
    for spec in recipe.systems:
        for replica in range(settings.replicas):
            error = failures.get((spec.name, replica))
            rows.append(_replica_report(out, settings, spec.name, replica, error))
    return CampaignReport(out, tuple(rows), wall_seconds, restarts)


def _replica_report(out: Path, settings: Simulate, system: str, replica: int, error: str | None) -> ReplicaReport:
    files = replica_files(out, system, replica, ladder_temperatures(settings))
    if error is not None:
        return ReplicaReport(system, replica, "failed", error)
    summary = json.loads(files.summary.read_text())
    return ReplicaReport(
        system=system,
        replica=replica,
        status="finished",
        simulated_ns=summary["simulated_ns"],
        cpu_seconds=summary["cpu_seconds"],
        exchange_acceptance=tuple(summary["exchange_acceptance"]),
        platform=summary["platform"],
        trajectories=tuple(f"{system}/{name}" for name in summary["trajectories"]),
    )


# --- what actors and tasks run --------------------------------------------------------------------------------------


class _Actor:
    """Runs one replica at a time in a process of its own."""

    def __init__(self) -> None:
        self._run: ReplicaRun | None = None

    def open(self, job: ReplicaJob) -> ReplicaProgress:
        self._run = ReplicaRun(job)
        return self._run.progress()

    def advance(self) -> ReplicaProgress:
        if self._run is None:
            raise SimulationError("advance was called before open")
        progress = self._run.advance()
        if progress.is_complete:
            self._run.close()
            self._run = None
        return progress


def _prepare(spec: SystemSpec, settings: Simulate, out: Path) -> None:
    """Build a system and choose its platform, once for all its replicas and for every later session."""
    folder = out / spec.name
    folder.mkdir(parents=True, exist_ok=True)
    if spec.surface is not None:
        content = surface_start(spec.name, spec.surface, settings)
    else:
        start = start_from_spec(spec, settings)
        content = {"system": start.system.to_dict(), "platform": start.platform.platform}
        content |= {"seconds_per_step": start.platform.seconds_per_step}
        start.model.save(folder)
    replace_durably(folder / "system.json", (json.dumps(content) + "\n").encode())


@dataclass(frozen=True)
class _Prepared:
    system: System
    platform: str


def _prepared(recipe: Recipe, out: Path, specs: dict[str, SystemSpec]) -> dict[str, _Prepared]:
    missing = [spec for name, spec in specs.items() if not (out / name / "system.json").is_file()]
    task = ray.remote(_prepare).options(num_cpus=1, num_gpus=_gpu_share(len(missing)))
    pending = [task.remote(spec, _checked(recipe), out) for spec in missing]
    try:
        ray.get(pending)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, UserError) else error from None
    contents = {name: json.loads((out / name / "system.json").read_text()) for name in specs}
    return {name: _Prepared(System.from_dict(one["system"]), one["platform"]) for name, one in contents.items()}


def _job(recipe: Recipe, out: Path, prepared: _Prepared, replica: int) -> ReplicaJob:
    assert recipe.simulate is not None
    return ReplicaJob(out, prepared.system, recipe.simulate, recipe.seed, replica, prepared.platform)


# --- the driver -----------------------------------------------------------------------------------------------------


@contextmanager
def cluster(actors: int | None, jobs: int) -> Iterator[int]:
    """Number of actors to run at a time, on the cluster of RAY_ADDRESS, a running one, or one started for this campaign."""
    started_here = not ray.is_initialized()
    wanted = min(jobs, actors or jobs)
    if started_here:
        _start_ray(min(wanted, actors or len(os.sched_getaffinity(0))))
    try:
        yield max(1, min(wanted, int(ray.cluster_resources().get("CPU", 1))))
    finally:
        if started_here:
            ray.shutdown()


def _start_ray(cpus: int) -> None:
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
        return
    # A private Ray has token authentication by default (RAY_AUTH_MODE set once Ray is imported would be seen by its
    # servers alone); a secret of its own keeps it from writing one into the home folder.
    share_ray_token()
    ray.init("local", num_cpus=cpus, include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, **quiet)


def _gpu_share(workers: int) -> float:
    gpus = float(ray.cluster_resources().get("GPU", 0.0))
    return min(1.0, gpus / max(workers, 1))


@dataclass
class _Slot:
    """One actor and the job it has; `deaths` without progress since the job's last chunk."""

    actor: Any
    job: ReplicaJob
    deaths: int = 0


@dataclass
class _Meter:
    """Adds up what replicas report and tells the caller."""

    recipe: Recipe
    todo: int
    callback: ProgressCallback | None
    frames: dict[str, int] = field(default_factory=dict)
    at_start: dict[str, int] = field(default_factory=dict)
    begin: float | None = None
    restarts: int = 0

    def saw(self, job: ReplicaJob, progress: ReplicaProgress) -> None:
        self.begin = self.begin or time.monotonic()
        self.at_start.setdefault(job.label, progress.frames)
        self.frames[job.label] = progress.frames

    def report(self, failed: int) -> None:
        if self.callback is None:
            return
        settings = _checked(self.recipe)
        jobs = len(self.recipe.systems) * settings.replicas
        per_job = simulated_ns(settings, settings.frames)
        done = simulated_ns(settings, sum(self.frames.values())) + (jobs - self.todo) * per_job
        fresh = simulated_ns(settings, sum(self.frames.values()) - sum(self.at_start.values()))
        rate = fresh / (time.monotonic() - self.begin) if fresh and self.begin else None
        total = jobs * per_job
        finished = jobs - self.todo + sum(count == settings.frames for count in self.frames.values())
        eta = (total - done - failed * per_job) / rate if rate else None
        self.callback(
            Progress(done, total, rate * SECONDS_PER_DAY if rate else None, eta, finished, failed, jobs, self.restarts)
        )


class _Driver:
    """Keeps every actor busy with one call in flight."""

    def __init__(self, jobs: list[ReplicaJob], actors: int, meter: _Meter) -> None:
        self._waiting = deque(jobs)
        self._actors = actors
        self._meter = meter
        self._slots: dict[Any, _Slot] = {}
        self._failures: dict[tuple[str, int], str] = {}
        self._actor_class = ray.remote(_Actor).options(num_cpus=1, num_gpus=_gpu_share(actors))

    def run(self) -> tuple[dict[tuple[str, int], str], int]:
        """Run all jobs; returns the failures and the number of restarts."""
        while self._waiting and len(self._slots) < self._actors:
            self._begin(_Slot(self._actor_class.remote(), self._waiting.popleft()))
        try:
            while self._slots:
                ready, _ = ray.wait(list(self._slots), num_returns=1, timeout=_HEARTBEAT_S)
                for call in ready:
                    self._handle(call, self._slots.pop(call))
                self._meter.report(len(self._failures))
        finally:
            for slot in self._slots.values():
                ray.kill(slot.actor)
        return self._failures, self._meter.restarts

    def _begin(self, slot: _Slot) -> None:
        self._slots[slot.actor.open.remote(slot.job)] = slot

    def _handle(self, call: Any, slot: _Slot) -> None:
        try:
            progress: ReplicaProgress = ray.get(call)
        except ray.exceptions.RayTaskError as error:
            self._failed(slot, f"{type(error.cause).__name__}: {error.cause}")
            return
        except (
            ray.exceptions.RayActorError,
            ray.exceptions.WorkerCrashedError,
            ray.exceptions.OutOfMemoryError,
        ) as error:
            self._died(slot, str(error).splitlines()[0])
            return
        before = self._meter.frames.get(slot.job.label)
        self._meter.saw(slot.job, progress)
        deaths = slot.deaths if before == progress.frames else 0
        if progress.is_complete:
            self._next_job(slot.actor)
        else:
            self._slots[slot.actor.advance.remote()] = replace(slot, deaths=deaths)

    def _died(self, slot: _Slot, reason: str) -> None:
        deaths = slot.deaths + 1
        ray.kill(slot.actor)
        if deaths >= _DEATHS_WITHOUT_PROGRESS:
            self._give_up(slot, f"its process died {deaths} times without storing a chunk; the last time: {reason}")
            return
        self._meter.restarts += 1
        self._begin(_Slot(self._actor_class.remote(), slot.job, deaths))

    def _failed(self, slot: _Slot, reason: str) -> None:
        # The process goes with its job: its locks and engines are in no known state.
        ray.kill(slot.actor)
        self._give_up(slot, reason)

    def _give_up(self, slot: _Slot, reason: str) -> None:
        self._failures[slot.job.system.name, slot.job.replica] = f"{slot.job.label}: {reason}"
        self._next_job(None)

    def _next_job(self, actor: Any) -> None:
        if self._waiting:
            self._begin(_Slot(actor or self._actor_class.remote(), self._waiting.popleft()))
        elif actor is not None:
            ray.kill(actor)
