"""The wire: lossless positions, strict requests that name the wrong field, lines that survive the round trip."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import ValidationError

from dig_scale.serving.schema import (
    Chunk,
    Failure,
    Footer,
    Header,
    Heartbeat,
    SamplesRequest,
    WireError,
    decode_chunk,
    encode_chunk,
    parse_line,
    sample_shape,
    to_line,
)

_HEADER = Header(
    request_id="r",
    system={"name": "x"},
    system_id="s",
    seed=1,
    first_index=0,
    num=2,
    solver="heun",
    steps=4,
    network_evaluations_per_sample=8,
    checkpoint="c",
    recipe={},
    training_cost={},
)


@st.composite
def samples(draw: st.DrawFn) -> dict[str, np.ndarray]:
    count, n_sites = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    fields = ("positions", *draw(st.sets(st.sampled_from(["rotations", "cell"]))))
    shapes = {name: (count, *sample_shape(name, n_sites)) for name in fields}
    return {name: draw(arrays(np.float32, shape, elements=st.floats(width=32))) for name, shape in shapes.items()}


@given(samples())
def test_every_field_crosses_the_wire_bit_for_bit(sent: dict[str, np.ndarray]) -> None:
    positions = sent["positions"]
    index = np.arange(len(positions)) + 2**40
    message = parse_line(to_line(encode_chunk(index, sent)))
    assert isinstance(message, Chunk)
    read_index, read = decode_chunk(message, positions.shape[1], [name for name in sent if name != "positions"])
    assert {name: values.tobytes() for name, values in read.items()} == {k: v.tobytes() for k, v in sent.items()}
    assert {name: values.shape for name, values in read.items()} == {k: v.shape for k, v in sent.items()}
    assert read_index.tolist() == index.tolist()


def test_what_is_not_used_is_not_sent_so_that_older_clients_read_the_rest() -> None:
    older_header = set(Header.model_fields) - {"fields", "conditions", "guidance"}
    assert set(json.loads(to_line(_HEADER))) == older_header
    chunk = encode_chunk(np.arange(2), {"positions": np.zeros((2, 3, 3), np.float32)})
    assert set(json.loads(to_line(chunk))) == {"index", "positions"}
    crystal = _HEADER.model_copy(update={"fields": ["cell"], "conditions": {"gap": 1.0}, "guidance": 2.0})
    assert parse_line(to_line(crystal)) == crystal


def test_a_field_that_was_announced_and_does_not_come_is_named() -> None:
    chunk = encode_chunk(np.arange(2), {"positions": np.zeros((2, 3, 3), np.float32)})
    with pytest.raises(WireError, match="without the cell that the header announced"):
        decode_chunk(chunk, 3, ["cell"])
    short = encode_chunk(np.arange(1), {"positions": np.zeros((1, 3, 3)), "cell": np.zeros((1, 3, 2))})
    with pytest.raises(WireError, match="24 bytes of cell, expected 36"):
        decode_chunk(short, 3, ["cell"])


@pytest.mark.parametrize(
    "line", [_HEADER, Chunk(index=[1], positions=""), Heartbeat(finished=3), Footer(count=1, cpu_seconds=0.5)]
)
def test_every_line_is_read_as_what_it_was(line: object) -> None:
    assert parse_line(to_line(line)) == line


def test_a_failure_is_never_read_as_a_footer() -> None:
    assert parse_line(to_line(Failure(error="broken", retry=True))) == Failure(error="broken", retry=True)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num": 0}, "num"),
        ({"num": "5"}, "num"),
        ({"num": True}, "num"),
        ({"num": 2.0}, "num"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"first_index": -1}, "first_index"),
        ({"solver": "magic"}, "solver"),
        ({"steps": 0}, "steps"),
        ({"steps": 10**6}, "steps"),
        ({"chunk": 0}, "chunk"),
        ({"guidance": -0.5}, "guidance"),
        ({"guidance": float("inf")}, "guidance"),
        ({"conditions": {"gap": "1"}}, "conditions"),
        ({"conditions": {"gap": float("nan")}}, "conditions"),
        ({"conditions": {f"p{i}": 1.0 for i in range(65)}}, "conditions"),
        ({"temperature": 300}, "temperature"),
        ({"system": 5}, "system"),
    ],
)
def test_a_wrong_request_names_its_field(change: dict[str, object], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        SamplesRequest.model_validate({"system": "butane"} | change)
    assert {error["loc"][0] for error in caught.value.errors()} == {field}


@pytest.mark.parametrize("sources", [{}, {"system": "a", "smiles": "C"}, {"sequence": "ACE-ALA-NME", "smiles": "C"}])
def test_exactly_one_system_must_be_given(sources: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="exactly one of system, sequence, smiles"):
        SamplesRequest.model_validate(sources)


@pytest.mark.parametrize("text", ["not base64!", "AAAA"])
def test_a_chunk_of_the_wrong_size_is_refused(text: str) -> None:
    with pytest.raises(WireError):
        decode_chunk(Chunk(index=[0], positions=text), 2)


@pytest.mark.parametrize("line", [b"<html>", b"{}", b'{"done": false, "count": 1, "cpu_seconds": 0.0}'])
def test_a_line_of_something_else_is_refused(line: bytes) -> None:
    with pytest.raises(WireError, match="not a line of a sample stream"):
        parse_line(line)
