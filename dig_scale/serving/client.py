"""The other end of the stream: ask a server for samples and get an Ensemble, whatever happens to the server meanwhile.

A sample depends on (checkpoint, system, solver, steps, seed, index) only, so a broken stream is resumed by asking for
the indices that are missing: nothing is lost, nothing is drawn twice. Retried: a full queue, and, once the server has
answered, every failure of connection or server. Not retried: what the server refuses, or a server never there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from dig_scale.ensemble import Ensemble
from dig_scale.errors import UserError
from dig_scale.serving.schema import (
    Chunk,
    Failure,
    Footer,
    Header,
    Heartbeat,
    Line,
    SamplesRequest,
    WireError,
    decode_chunk,
    parse_line,
    sample_shape,
)
from dig_scale.system import System

Progress = Callable[[int, int], None]
"""(samples received, samples wanted)."""

_PROVENANCE = (
    "checkpoint",
    "system_id",
    "solver",
    "steps",
    "seed",
    "network_evaluations_per_sample",
    "recipe",
    "training_cost",
)
_PROPERTIES = ("conditions", "guidance")
_BUSY = (429, 503)
_GONE = (404, 500, 502, 503, 504)


class ServerError(UserError):
    """The server refused the request, or did not come back in time; the message says which and why."""


@dataclass(frozen=True)
class Patience:
    """How long to wait, in seconds: for a connection, for the next line, and in all without any line."""

    connect: float = 10.0
    line: float = 60.0
    silence: float = 180.0
    between_attempts: float = 1.0


class _BrokenStreamError(Exception):
    """Asking again for what is missing may help; `wait` is the server's Retry-After in seconds."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass
class _Collected:
    """What has arrived so far of request.num samples."""

    request: SamplesRequest
    progress: Progress | None
    header: Header | None = None
    system: System | None = None
    have: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    """Fields of the samples by name, one row per sample wanted."""
    cpu_seconds: float = 0.0
    attempts: int = 0
    last_contact: float = field(default_factory=time.monotonic)


def request_ensemble(
    url: str,
    request: SamplesRequest,
    token: str | None = None,
    progress: Progress | None = None,
    patience: Patience | None = None,
) -> Ensemble:
    """Ensemble of request.num samples (sorted by index) from the server at `url`, as in http://127.0.0.1:8000.

    Raises ServerError when the server refuses, is not there, or stays silent for patience.silence seconds, and
    WireError when it does not speak this protocol.
    """
    waits = patience or Patience()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    timeout = httpx.Timeout(waits.line, connect=waits.connect)
    collected = _Collected(request, progress)
    with httpx.Client(base_url=url, headers=headers, timeout=timeout) as http:
        while (part := _next_part(collected)) is not None:
            try:
                _receive(http, part, collected)
            except (_BrokenStreamError, httpx.TransportError) as problem:
                _wait_or_raise(problem, collected, waits, url)
    return _ensemble(collected, url)


def _next_part(collected: _Collected) -> SamplesRequest | None:
    """The request for the first run of missing samples, pinned to what the first header settled; None when done."""
    header, request = collected.header, collected.request
    if header is None:
        return request
    missing = np.flatnonzero(~collected.have)
    if not len(missing):
        return None
    first = int(missing[0])
    run = int(np.argmin(np.append(~collected.have[first:], False)))
    settled: dict[str, Any] = {"solver": header.solver, "steps": header.steps}
    settled |= {name: value for name in _PROPERTIES if (value := getattr(header, name)) is not None}
    if request.system is None:
        settled |= {"system": header.system, "sequence": None, "smiles": None}
    return request.model_copy(update=settled | {"first_index": request.first_index + first, "num": run})


def _receive(http: httpx.Client, part: SamplesRequest, collected: _Collected) -> None:
    """One stream, from its header to its footer; raises _BrokenStreamError or httpx.TransportError when it breaks."""
    collected.attempts += 1
    body = part.model_dump(exclude_none=True)
    with http.stream("POST", "/v1/samples", json=body) as response:
        _check_status(response, collected)
        lines = _whole_lines(response)
        _open(parse_line(next(lines)), part, collected)
        for line in lines:
            message = parse_line(line)
            if isinstance(message, Chunk):
                _store(message, collected)
            elif isinstance(message, Failure):
                if not message.retry:
                    raise ServerError(f"the server gave up: {message.error}")
                raise _BrokenStreamError(message.error)
            elif isinstance(message, Footer):
                collected.cpu_seconds += message.cpu_seconds
                return _check_footer(message, part)
            elif not isinstance(message, Heartbeat):
                raise WireError("a second header in one stream")
            collected.last_contact = time.monotonic()


def _whole_lines(response: httpx.Response) -> Iterator[bytes]:
    """Lines that end in a newline, and _BrokenStreamError at the end: a complete stream is left at its footer."""
    pending: list[bytes] = []
    for block in response.iter_bytes():
        *complete, rest = block.split(b"\n")
        if complete:
            yield b"".join([*pending, complete[0]])
            yield from complete[1:]
            pending = []
        pending.append(rest)
    raise _BrokenStreamError("the stream ended without its footer")


def _check_status(response: httpx.Response, collected: _Collected) -> None:
    status = response.status_code
    if status == 200:
        return
    response.read()
    detail = _detail(response)
    again = status in _BUSY or (collected.header is not None and status in _GONE)
    if again and not (status == 404 and detail is not None):
        raise _BrokenStreamError(detail or f"HTTP {status}", _retry_after(response))
    if detail is None:
        raise ServerError(f"{response.url} answered HTTP {status}, not as a dig-scale server would: check the URL")
    raise ServerError(f"the server refused the request (HTTP {status}): {detail}")


def _retry_after(response: httpx.Response) -> float | None:
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None


def _detail(response: httpx.Response) -> str | None:
    """The server's own words as one line, or None where the body is not an error of ours."""
    try:
        detail = response.json()["detail"]
        return "; ".join(f"{'.'.join(str(part) for part in item['loc'][1:])}: {item['msg']}" for item in detail)
    except (ValueError, KeyError, TypeError):
        return None


def _open(header: Line, part: SamplesRequest, collected: _Collected) -> None:
    """Check the header against what was asked and, on a later attempt, against the first header."""
    if not isinstance(header, Header):
        raise WireError(f"a stream began with {type(header).__name__}, expected a header")
    asked = (part.seed, part.first_index, part.num)
    if (header.seed, header.first_index, header.num) != asked:
        raise WireError(f"asked for (seed, first index, samples) {asked}, the header disagrees: {header}")
    if collected.header is None:
        _begin(header, collected)
    elif _identity(header) != _identity(collected.header):
        raise ServerError(
            f"the server changed while it was away (checkpoint {collected.header.checkpoint} before, "
            f"{header.checkpoint} now): the rest would belong to another ensemble; ask again from the start"
        )


def _begin(header: Header, collected: _Collected) -> None:
    collected.header = header
    collected.system = System.from_dict(header.system)
    if collected.system.system_id != header.system_id:
        raise WireError(
            f"the system {collected.system.name!r} of the header is not the {header.system_id} it says it is"
        )
    collected.have = np.zeros(header.num, bool)
    n_sites = collected.system.n_sites
    collected.arrays = {
        name: np.zeros((header.num, *sample_shape(name, n_sites)), np.float32)
        for name in ("positions", *(header.fields or ()))
    }


def _identity(header: Header) -> tuple[Any, ...]:
    return header.checkpoint, header.system_id, header.solver, header.steps, header.conditions, header.guidance


def _store(chunk: Chunk, collected: _Collected) -> None:
    assert collected.system is not None and collected.header is not None
    index, arrays = decode_chunk(chunk, collected.system.n_sites, collected.header.fields or ())
    place = index - collected.request.first_index
    if len(place) and (place.min() < 0 or place.max() >= len(collected.have) or len(np.unique(place)) != len(place)):
        raise WireError(f"samples {index[:3].tolist()}... were not asked for, or came twice")
    for name, values in arrays.items():
        collected.arrays[name][place] = values
    collected.have[place] = True
    if collected.progress is not None:
        collected.progress(int(collected.have.sum()), len(collected.have))


def _check_footer(footer: Footer, part: SamplesRequest) -> None:
    if footer.count != part.num:
        raise WireError(f"the server says that it sent {footer.count} of {part.num} samples")


def _wait_or_raise(problem: Exception, collected: _Collected, waits: Patience, url: str) -> None:
    """Sleep before the next attempt, or raise ServerError when there is no hope or patience left."""
    reason = str(problem) or type(problem).__name__
    if collected.header is None and isinstance(problem, httpx.TransportError):
        raise ServerError(f"no answer from {url}: {reason}; is `dig-scale serve` running there?") from None
    pause = getattr(problem, "wait", None) or waits.between_attempts
    silent = time.monotonic() - collected.last_contact
    if silent + pause > waits.silence:
        count = int(collected.have.sum())
        raise ServerError(
            f"{url}: silent for {silent:.0f} s, {count} samples received; last problem: {reason}"
        ) from None
    time.sleep(pause)


def _ensemble(collected: _Collected, url: str) -> Ensemble:
    header = collected.header
    assert header is not None
    assert collected.system is not None
    first = collected.request.first_index
    wanted = {name: value for name in _PROPERTIES if (value := getattr(header, name)) is not None}
    return Ensemble(
        system=collected.system,
        **collected.arrays,
        index=np.arange(first, first + header.num, dtype=np.int64),
        seed=header.seed,
        provenance=header.model_dump(include=set(_PROVENANCE))
        | wanted
        | {"source": url, "cpu_seconds": collected.cpu_seconds, "attempts": collected.attempts},
    )
