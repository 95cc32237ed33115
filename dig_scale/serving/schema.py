"""What crosses the wire: the request body, and the lines of the NDJSON answer.

In and out: JSON and numpy; it knows no tensors, no HTTP and no scheduler. A stream is one Header, any number of Chunk
and Heartbeat lines, and a Footer; a Failure ends it early. Positions travel as base64 of little-endian float32
[n, N, 3] in Å, which is lossless; the Header names what else comes with them: `rotations` [n, N, 3, 3] of residue frames,
`cell` [n, 3, 3] Å of crystals. What a request does not use is not in its answer, so that clients older than it read the
rest. Every model is strict: "5" is not 5, and an unknown field is an error.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
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
MAX_CONDITIONS = 64
"""Properties that one request may ask for."""
_MAX_INTEGER = 2**62

_SOURCES = ("system", "sequence", "smiles")

Seed = Annotated[int, Field(ge=0, lt=_MAX_INTEGER)]
SampleIndex = Annotated[int, Field(ge=0, lt=_MAX_INTEGER)]
Count = Annotated[int, Field(ge=1, lt=_MAX_INTEGER)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Conditions = Annotated[dict[str, Finite], Field(max_length=MAX_CONDITIONS)]
ExtraField = Literal["rotations", "cell"]
"""What samples may have beside positions."""


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
    conditions: Conditions | None = None
    """Wanted values of properties that the model is conditioned on, by name; the checkpoint's own choice when absent."""
    guidance: Annotated[Finite, Field(ge=0)] | None = None
    """Classifier-free guidance towards them: 1 samples p(x | conditions), more sharpens; the checkpoint's own when absent."""
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
    """First line: what the stream holds, and all that an Ensemble says of its origin; `checkpoint` is a hash of the file.

    `fields` are those that chunks have beside positions; conditions and guidance stand where properties were asked for.
    """

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
    fields: list[ExtraField] | None = None
    conditions: dict[str, float] | None = None
    guidance: float | None = None


class Chunk(Message):
    """Finished samples: index [n] and, each as base64 of little-endian float32, positions [n, N, 3] in Å, and the fields of
    the Header: rotations [n, N, 3, 3], cell [n, 3, 3] in Å.
    """

    index: list[int]
    positions: str
    rotations: str | None = None
    cell: str | None = None


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
_LEFT_OUT_WHEN_NONE = ("fields", "conditions", "guidance", "rotations", "cell")


def to_line(message: Line) -> bytes:
    """One NDJSON line; optional fields that are not used are left out."""
    unused = {name for name in _LEFT_OUT_WHEN_NONE if getattr(message, name, None) is None}
    return message.model_dump_json(exclude=unused).encode() + b"\n"


def parse_line(line: str | bytes) -> Line:
    """The message of one NDJSON line; raises WireError quoting its beginning."""
    try:
        return _LINE.validate_json(line)
    except ValidationError:
        raise WireError(
            f"not a line of a sample stream: {line[:80]!r}; is the URL that of a dig-scale server?"
        ) from None


def sample_shape(field: str, n_sites: int) -> tuple[int, ...]:
    """Shape of one sample's field."""
    shapes: dict[str, tuple[int, ...]] = {"positions": (n_sites, 3), "rotations": (n_sites, 3, 3), "cell": (3, 3)}
    return shapes[field]


def encode_chunk(index: np.ndarray, arrays: Mapping[str, np.ndarray]) -> Chunk:
    """Chunk of samples index [n] with their fields by name: positions [n, N, 3] Å, and what else there is."""
    encoded = {name: base64.b64encode(_little_endian(values)).decode("ascii") for name, values in arrays.items()}
    return Chunk(index=[int(i) for i in index], **encoded)


def decode_chunk(chunk: Chunk, n_sites: int, fields: Sequence[str] = ()) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Index [n] int64 and float32 arrays by name, positions [n, N, 3] Å and `fields`; raises WireError where one is missing
    or of the wrong size.
    """
    index = np.asarray(chunk.index, dtype=np.int64)
    return index, {name: _decoded(chunk, name, n_sites) for name in ("positions", *fields)}


def _little_endian(values: np.ndarray) -> bytes:
    return np.ascontiguousarray(values, dtype="<f4").tobytes()


def _decoded(chunk: Chunk, name: str, n_sites: int) -> np.ndarray:
    text: str | None = getattr(chunk, name)
    if text is None:
        raise WireError(f"samples {chunk.index[:3]}... come without the {name} that the header announced")
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise WireError(f"{name} of samples {chunk.index[:3]}... are not base64: {error}") from None
    shape = (len(chunk.index), *sample_shape(name, n_sites))
    expected = 4 * int(np.prod(shape))
    if len(raw) != expected:
        raise WireError(f"a chunk of {len(chunk.index)} samples has {len(raw)} bytes of {name}, expected {expected}")
    return np.frombuffer(raw, dtype="<f4").astype(np.float32).reshape(shape)
