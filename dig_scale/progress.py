"""Progress of long commands: a live bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

SECONDS_BETWEEN_LINES = 10.0


class Reporter(Protocol):
    """Takes the state of one stage: done of total, and words about it."""

    def __call__(self, done: float, total: float, words: str) -> None: ...


@dataclass
class _Lines:
    """One line at the start, then at most one every SECONDS_BETWEEN_LINES, and one at the end."""

    title: str
    stream: TextIO
    last: float = field(default=-1e9)

    def __call__(self, done: float, total: float, words: str) -> None:
        now = time.monotonic()
        if done < total and now - self.last < SECONDS_BETWEEN_LINES:
            return
        self.last = now
        share = 100.0 * done / total if total else 100.0
        print(f"[{time.strftime('%H:%M:%S')}] {self.title} {share:5.1f} %  {words}", file=self.stream, flush=True)


@contextmanager
def stage(title: str) -> Iterator[Reporter]:
    """A reporter for one stage on standard error."""
    if not sys.stderr.isatty():
        yield _Lines(title, sys.stderr)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>5.1f} %  {task.fields[words]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as live:
        task = live.add_task(title, total=1.0, words="")

        def report(done: float, total: float, words: str) -> None:
            live.update(task, completed=done, total=total, words=words)

        yield report


def duration(seconds: float | None) -> str:
    """Time in words: '47 s', '3 min 20 s', '2 h 05 min'; '?' when unknown."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
