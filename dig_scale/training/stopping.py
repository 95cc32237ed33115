"""A training run that is asked to stop: what it hears. It acts at its next row of metrics."""

from __future__ import annotations

import signal
from types import FrameType


class StopOnSignal:
    """Notes SIGUSR1 (a scheduler's warning before it ends the job) while the loop runs."""

    def __init__(self) -> None:
        self.seen = False

    def __enter__(self) -> StopOnSignal:
        try:
            self._previous = signal.signal(signal.SIGUSR1, self._note)
        except ValueError:  # not the main thread, as under Ray Train: its controller ends workers itself
            self._previous = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGUSR1, self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
