"""A request's answer: events of the worker -> NDJSON lines, in the event loop that serves the connection.

In: a job in work and the inbox that its events arrive in. Out: bytes, as soon as samples finish. However the stream
ends (complete, cancelled, reader gone), the request's walkers are freed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import numpy as np
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from dig_scale.serving.schema import Failure, Footer, Header, Heartbeat, encode_chunk, to_line
from dig_scale.serving.worker import Broken, Event, Finished, Samples, Worker

HEARTBEAT_SECONDS = 10.0


@dataclass(frozen=True)
class Reading:
    """One reader: the request's header, where its events arrive, who works on it, and the most samples in a line."""

    header: Header
    inbox: asyncio.Queue[Event]
    worker: Worker
    chunk: int


class SampleStream(StreamingResponse):
    """A stream of lines that frees its request's walkers however it ends."""

    def __init__(self, reading: Reading) -> None:
        headers = {"X-Request-Id": reading.header.request_id}
        super().__init__(_lines(reading), media_type="application/x-ndjson", headers=headers)
        self._reading = reading

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._reading.worker.cancel(self._reading.header.request_id)


async def _lines(reading: Reading) -> AsyncIterator[bytes]:
    yield to_line(reading.header)
    count = 0
    end = None
    while end is None:
        samples, end = await _next_events(reading.inbox)
        for start in range(0, len(samples.index), reading.chunk):
            part = slice(start, start + reading.chunk)
            arrays = {name: values[part] for name, values in samples.arrays.items()}
            yield to_line(encode_chunk(samples.index[part], arrays))
            reading.worker.delivered(reading.header.request_id, len(samples.index[part]))
        count += len(samples.index)
        if end is None and not len(samples.index):
            yield to_line(Heartbeat(finished=count))
    if isinstance(end, Finished):
        yield to_line(Footer(count=count, cpu_seconds=end.cpu_seconds))
    else:
        yield to_line(Failure(error=end.reason, retry=end.retry))


async def _next_events(inbox: asyncio.Queue[Event]) -> tuple[Samples, Finished | Broken | None]:
    """All samples that wait, and the end if it has come; no samples and no end after HEARTBEAT_SECONDS of silence."""
    waiting: list[Event] = []
    with contextlib.suppress(TimeoutError):
        waiting.append(await asyncio.wait_for(inbox.get(), HEARTBEAT_SECONDS))
    while not inbox.empty():
        waiting.append(inbox.get_nowait())
    ends = [event for event in waiting if not isinstance(event, Samples)]
    return _merged([event for event in waiting if isinstance(event, Samples)]), ends[0] if ends else None


def _merged(parts: list[Samples]) -> Samples:
    if not parts:
        return Samples(np.zeros(0, np.int64), {})
    arrays = {name: np.concatenate([part.arrays[name] for part in parts]) for name in parts[0].arrays}
    return Samples(np.concatenate([part.index for part in parts]), arrays)
