"""How the GPU benchmark measures time and memory, and what it says where something cannot be measured.

Device time: CUDA events around each of `repeats` runs after a warm-up; median, 10th and 90th percentile. A spin kernel
holds the device back until the host has queued the run, so that what is timed is the device's work and not the host's
(what a CUDA graph would give); the host's time to queue it is reported beside. COLD runs find the L2 cache filled with
other, unmodified lines; WARM ones find what the last run left. A training step is timed as it is, host included.
Peak memory is the allocator's, counted from before the inputs were made. Changes no setting of the device.
"""

from __future__ import annotations

import gc
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import numpy as np
import torch
from bench.gpu_measures import Value
from torch import Tensor

Work = Callable[[], object]

COLD_CACHES = 4
"""Sizes of the L2 cache that are read before a cold run."""
LONGEST_HOLD = 0.2
"""Seconds; the most that the device is held back for the host to queue a run."""
SPINS_PER_SECOND = 2e9
"""Cycles a second of the spin kernel at the highest clock of current devices: at lower clocks it holds longer."""
_STATE = "clocks.sm,clocks.mem,power.draw,temperature.gpu,pstate"


class Cache(Enum):
    """What a run finds in the L2 cache."""

    WARM = "warm"
    COLD = "cold"


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one run: median and percentiles, and the host's time to queue it."""

    median: float
    p10: float
    p90: float
    host: float


class Clock(Protocol):
    """Measures runs."""

    def time(self, work: Work, cache: Cache) -> Timing:
        """Time of the device's work."""
        ...

    def time_with_host(self, work: Work) -> Timing:
        """Time from run to run, the host's share included."""
        ...

    def peak_gb(self, build: Callable[[], Work]) -> tuple[float, Work]:
        """Most memory in GB (1e9 bytes) that the inputs and a run of the work hold together, and the work."""
        ...


@dataclass(frozen=True)
class DeviceClock:
    """CUDA events; see the module's header."""

    device: torch.device
    repeats: int = 30
    warm_ups: int = 5

    def time(self, work: Work, cache: Cache) -> Timing:
        """See Clock."""
        host = self._warm_up(work)
        lines = self._other_lines() if cache is Cache.COLD else None
        cycles = int(min(LONGEST_HOLD, 1e-4 + 2 * host) * SPINS_PER_SECOND)

        def prepare() -> None:
            if lines is not None:
                lines.sum()
            torch.cuda._sleep(cycles)

        return self._timing(work, prepare, host)

    def time_with_host(self, work: Work) -> Timing:
        """See Clock."""
        return self._timing(work, lambda: None, self._warm_up(work))

    def peak_gb(self, build: Callable[[], Work]) -> tuple[float, Work]:
        """See Clock."""
        release_memory()
        before = torch.cuda.memory_allocated(self.device)
        work = build()
        work()  # compilation and library workspaces belong to no run
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        torch.cuda.synchronize(self.device)
        return (torch.cuda.max_memory_allocated(self.device) - before) / 1e9, work

    def _warm_up(self, work: Work) -> float:
        """Seconds the host takes to queue a run."""
        taken = []
        for _ in range(self.warm_ups):
            torch.cuda.synchronize(self.device)
            begin = time.perf_counter()
            work()
            taken.append(time.perf_counter() - begin)
        torch.cuda.synchronize(self.device)
        return statistics.median(taken[1:])

    def _other_lines(self) -> Tensor:
        size = COLD_CACHES * torch.cuda.get_device_properties(self.device).L2_cache_size
        return torch.zeros(size // 4, device=self.device)

    def _timing(self, work: Work, prepare: Work, host: float) -> Timing:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.repeats)]
        for start, stop in events:
            prepare()
            start.record()
            work()
            stop.record()
        torch.cuda.synchronize(self.device)
        p10, median, p90 = np.percentile([start.elapsed_time(stop) for start, stop in events], [10, 50, 90])
        return Timing(float(median), float(p10), float(p90), 1e3 * host)


@dataclass(frozen=True)
class RehearsalClock:
    """Runs everything once on a processor; its numbers are there to be thrown away."""

    def time(self, work: Work, cache: Cache) -> Timing:
        """See Clock."""
        return self.time_with_host(work)

    def time_with_host(self, work: Work) -> Timing:
        """See Clock."""
        begin = time.perf_counter()
        work()
        taken = 1e3 * (time.perf_counter() - begin)
        return Timing(taken, taken, taken, taken)

    def peak_gb(self, build: Callable[[], Work]) -> tuple[float, Work]:
        """See Clock."""
        work = build()
        work()
        return 1.0, work


@dataclass(frozen=True)
class Sizes:
    """Shape of the problem: N sites in all, H heads of `width`, K Gaussians, table knots, and layers that share a bias."""

    sites: int = 16_384
    heads: int = 32
    width: int = 24
    kernels: int = 128
    knots: int = 1024
    layers: int = 12
    types: int = 16
    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    shrunk_to: int | None = None
    """Sites a sample really has in a rehearsal, whatever its case is called."""

    def samples_of(self, length: int) -> list[int]:
        """Lengths of the samples of the case called L=`length`."""
        actual = self.shrunk_to or length
        return [actual] * max(1, self.sites // actual)


REHEARSAL = Sizes(sites=16, heads=2, kernels=4, knots=16, layers=2, types=2, lengths=(512,), shrunk_to=16)


@dataclass(frozen=True)
class Bench:
    """Where and how to measure: device, element type, sizes, clock, and the compiler of the competitors."""

    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    clock: Clock
    compiler: str

    def compiled(self, function: Any) -> Any:
        """torch.compile for one shape, with no compiled code left from earlier ones."""
        torch.compiler.reset()
        return torch.compile(function, backend=self.compiler, dynamic=False)

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"


def measuring_bench(sizes: Sizes) -> Bench:
    """On the current GPU, in bf16."""
    device = torch.device("cuda", torch.cuda.current_device())
    return Bench(device, torch.bfloat16, sizes, DeviceClock(device), "inductor")


def rehearsal_bench(sizes: Sizes) -> Bench:
    """On the processor, in fp32, the kernels in Triton's interpreter (TRITON_INTERPRET=1 must be set)."""
    return Bench(torch.device("cpu"), torch.float32, sizes, RehearsalClock(), "eager")


@dataclass(frozen=True)
class Computation:
    """Outputs made from leaves, and the seeds of their gradients."""

    outputs: Callable[[], Sequence[Tensor]]
    leaves: Sequence[Tensor]
    seeds: Sequence[Tensor]

    def forward(self) -> Sequence[Tensor]:
        """The outputs, without a graph."""
        with torch.no_grad():
            return self.outputs()

    def both(self) -> tuple[Tensor, ...]:
        """Forward and backward: the gradients of all leaves."""
        return torch.autograd.grad(list(self.outputs()), list(self.leaves), list(self.seeds))


def attempt(columns: Sequence[str], measure: Callable[[], Sequence[Value]]) -> dict[str, Value]:
    """What was measured, by column, or the reason of failure in every column."""
    try:
        return dict(zip(columns, measure(), strict=True))
    except Exception as error:  # competitors fail in ways of their own; each is published
        return dict.fromkeys(columns, failure_text(error))
    finally:
        release_memory()


def failure_text(error: Exception) -> str:
    """One line for a table."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:160]


def release_memory() -> None:
    """Gives back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def device_state() -> str:
    """Clocks in MHz, power, temperature and performance state as nvidia-smi reports them, or why it does not."""
    if shutil.which("nvidia-smi") is None:
        return "nvidia-smi is not installed"
    command = ["nvidia-smi", f"--query-gpu={_STATE}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{_STATE}: {done.stdout.strip()}" if done.returncode == 0 else f"nvidia-smi: {done.stderr.strip()[:120]}"
