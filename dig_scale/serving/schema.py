"""What crosses the wire: the request body, and the lines of the NDJSON answer.

In and out: JSON and numpy; it knows no tensors, no HTTP and no scheduler. A stream is one Header, any number of Chunk
and Heartbeat lines, and a Footer; a Failure ends it early. Positions travel as base64 of little-endian float32
[n, N, 3] in Å, which is lossless. Every model is strict: "5" is not 5, and an unknown field is an error.
"""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from dig_scale.config import SolverName
from dig_scale.errors import UserError

MAX_STEPS = 2_000
"""Solver steps of one sample; a request for more is refused."""
MAX_CHUNK = 4_096
"""Samples in one line of the answer."""
MAX_SITES = 4_096
"""Sites of one system; attention is quadratic in them."""
MAX_TEXT = 4_096
"""Characters of a sequence or a SMILES."""
_MAX_INTEGER = 2**62

_SOURCES = ("system", "sequence", "smiles")

Seed = Annotated[int, Field(ge=0, lt=_MAX_INTEGER)]
SampleIndex = Annotated[int, Field(ge=0, lt=_MAX_INTEGER)]
Count = Annotated[int, Field(ge=1, lt=_MAX_INTEGER)]


class WireError(UserError):
    """A line of the stream is not what this version of the protocol sends."""


class Message(BaseModel):
    """Base of all messages: strict, frozen, no unknown fields."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class SamplesRequest(Message):
    """Body of POST /v1/samples. Exactly one of `system`, `sequence`, `smiles`."""

    system: str | dict[str, Any] | None = None
    """Name of one of the checkpoint's systems, or a whole System as JSON."""
    sequence: Annotated[str, Field(max_length=MAX_TEXT)] | None = None
    """Residues, as in ACE-ALA-NME or GYDPETGTWG."""
    smiles: Annotated[str, Field(max_length=MAX_TEXT)] | None = None
    num: Count = 100
    """Samples wanted; their indices are first_index .. first_index + num - 1."""
    seed: Seed = 1
    first_index: SampleIndex = 0
    solver: SolverName | None = None
    """The checkpoint's own choice when absent."""
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    """Solver steps per sample; the checkpoint's own choice when absent."""
    chunk: Annotated[int, Field(ge=1, le=MAX_CHUNK)] = 256
    """Most samples in one line of the answer."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in _SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            found = ", ".join(given) if given else "none"
            raise ValueError(f"exactly one of {', '.join(_SOURCES)} is needed; found {found}")
        return self


class Header(Message):
    """First line: what the stream holds, and all that an Ensemble says of its origin; `checkpoint` is a hash of the file."""

    request_id: str
    system: dict[str, Any]
    system_id: str
    seed: Seed
    first_index: SampleIndex
    num: Count
    solver: SolverName
    steps: int
    network_evaluations_per_sample: int
    checkpoint: str
    recipe: dict[str, Any]
    training_cost: dict[str, Any]


class Chunk(Message):
    """Finished samples: index [n] and positions, base64 of little-endian float32 [n, N, 3] in Å."""

    index: list[int]
    positions: str


class Heartbeat(Message):
    """Nothing has finished for a while, but the request is being worked on; `finished` samples so far."""

    finished: int


class Footer(Message):
    """Last line of a complete stream; cpu_seconds is the request's share of the replica's CPU time."""

    done: Literal[True] = True
    count: int
    cpu_seconds: float


class Failure(Message):
    """Last line of a stream that went wrong; `retry` says whether asking again for the missing indices can help."""

    error: str
    retry: bool


class SystemSummary(Message):
    """One of the checkpoint's training systems."""

    name: str
    kind: str
    n_sites: int
    system_id: str


class ModelSummary(Message):
    """What the replica serves and the limits of a request."""

    checkpoint: str
    training_step: int
    parameters: int
    device: str
    default_solver: SolverName
    default_steps: int
    solvers: list[str]
    max_samples_per_request: int
    max_steps: int = MAX_STEPS
    max_sites: int = MAX_SITES
    recipe: dict[str, Any]
    training_cost: dict[str, Any]


class Health(Message):
    """Answer of GET /v1/health."""

    status: Literal["ok"]
    version: str
    checkpoint: str


Line = Header | Chunk | Heartbeat | Footer | Failure
_LINE: TypeAdapter[Line] = TypeAdapter(Line)


def to_line(message: Line) -> bytes:
    """One NDJSON line."""
    return message.model_dump_json().encode() + b"\n"


def parse_line(line: str | bytes) -> Line:
    """The message of one NDJSON line; raises WireError quoting its beginning."""
    try:
        return _LINE.validate_json(line)
    except ValidationError:
        raise WireError(
            f"not a line of a sample stream: {line[:80]!r}; is the URL that of a dig-scale server?"
        ) from None


def encode_chunk(index: np.ndarray, positions: np.ndarray) -> Chunk:
    """Chunk of samples index [n], positions [n, N, 3] Å."""
    raw = np.ascontiguousarray(positions, dtype="<f4").tobytes()
    return Chunk(index=[int(i) for i in index], positions=base64.b64encode(raw).decode("ascii"))


def decode_chunk(chunk: Chunk, n_sites: int) -> tuple[np.ndarray, np.ndarray]:
    """Index [n] int64 and positions [n, N, 3] float32 Å; raises WireError when their sizes disagree."""
    try:
        raw = base64.b64decode(chunk.positions, validate=True)
    except ValueError as error:
        raise WireError(f"positions of samples {chunk.index[:3]}... are not base64: {error}") from None
    expected = len(chunk.index) * n_sites * 3 * 4
    if len(raw) != expected:
        raise WireError(f"a chunk of {len(chunk.index)} samples has {len(raw)} bytes of positions, expected {expected}")
    positions = np.frombuffer(raw, dtype="<f4").astype(np.float32).reshape(-1, n_sites, 3)
    return np.asarray(chunk.index, dtype=np.int64), positions
