"""The wire: lossless positions, strict requests that name the wrong field, lines that survive the round trip."""

from __future__ import annotations

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


@given(arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 5), st.just(3)), elements=st.floats(width=32)))
def test_positions_cross_the_wire_bit_for_bit(positions: np.ndarray) -> None:
    index = np.arange(len(positions)) + 2**40
    message = parse_line(to_line(encode_chunk(index, positions)))
    assert isinstance(message, Chunk)
    read_index, read = decode_chunk(message, positions.shape[1])
    assert read.tobytes() == positions.tobytes()
    assert read_index.tolist() == index.tolist()


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
