"""The client against a scripted server: what it retries, what it resumes, and what it refuses to believe."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from dig_scale.serving.client import Patience, ServerError, request_ensemble
from dig_scale.serving.schema import Failure, Footer, Header, SamplesRequest, WireError, encode_chunk, to_line
from tests.dig_scale.serving.fixtures import BUTANE, ETHER, unused_port

_QUICK = Patience(connect=2, line=5, silence=3, between_attempts=0.01)
_REQUEST = SamplesRequest(system="butane", num=10, seed=4, first_index=20)


@dataclass(frozen=True)
class Answer:
    """One scripted answer: status, headers, and the blocks of its body."""

    blocks: list[bytes]
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


Script = Callable[[dict[str, Any]], Answer]


@dataclass
class Scripted:
    """A server that gives the answers of a script in turn, the last one for ever, and remembers what it was asked."""

    script: list[Script]
    asked: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def serve_script() -> Iterator[Callable[..., Scripted]]:
    servers = []

    def start(*script: Script) -> Scripted:
        scripted = Scripted(list(script))

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                scripted.asked.append(asked)
                answer = scripted.script[min(len(scripted.asked), len(scripted.script)) - 1](asked)
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                for block in answer.blocks:
                    self.wfile.write(block)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        scripted.url = f"http://127.0.0.1:{server.server_address[1]}"
        return scripted

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def truth(index: np.ndarray) -> np.ndarray:
    """Positions that tell their index."""
    return np.broadcast_to(index[:, None, None], (len(index), 4, 3)).astype(np.float32)


def header(asked: dict[str, Any], **changes: Any) -> bytes:
    content = {
        "request_id": "r",
        "system": BUTANE.to_dict(),
        "system_id": BUTANE.system_id,
        "solver": "heun",
        "steps": 6,
    }
    content |= {"checkpoint": "c", "network_evaluations_per_sample": 12, "recipe": {}, "training_cost": {}}
    content |= {name: asked[name] for name in ("seed", "first_index", "num")}
    return to_line(Header(**(content | changes)))


def chunk(first: int, count: int) -> bytes:
    index = np.arange(first, first + count)
    return to_line(encode_chunk(index, {"positions": truth(index)}))


def complete(asked: dict[str, Any]) -> Answer:
    first, num = asked["first_index"], asked["num"]
    return Answer([header(asked), chunk(first, num), to_line(Footer(count=num, cpu_seconds=2.0))])


def busy(asked: dict[str, Any]) -> Answer:
    detail = {"detail": [{"loc": ["body", "queue"], "msg": "full"}]}
    return Answer([json.dumps(detail).encode()], 429, {"Retry-After": "1"})


def test_a_torn_stream_is_resumed_from_the_first_missing_index(serve_script: Callable[..., Scripted]) -> None:
    torn = lambda asked: Answer([header(asked), chunk(20, 3), chunk(24, 2), chunk(27, 3)[:-20]])  # noqa: E731
    server = serve_script(torn, complete)
    ensemble = request_ensemble(server.url, _REQUEST, patience=_QUICK)
    assert ensemble.index.tolist() == list(range(20, 30))
    assert (ensemble.positions == truth(ensemble.index)).all()
    assert [(a["first_index"], a["num"]) for a in server.asked] == [(20, 10), (23, 1), (26, 4)]
    assert all((a["solver"], a["steps"]) == ("heun", 6) for a in server.asked[1:])


@pytest.mark.parametrize("again", [Answer([], 500), Answer([], 502), Answer([b"no route"], 404), Answer([], 503)])
def test_a_server_that_restarts_is_waited_for(serve_script: Callable[..., Scripted], again: Answer) -> None:
    server = serve_script(lambda asked: Answer([header(asked), chunk(20, 4)]), lambda asked: again, complete)
    assert request_ensemble(server.url, _REQUEST, patience=_QUICK).n_samples == 10


def test_the_system_of_the_first_answer_is_kept_when_resuming(serve_script: Callable[..., Scripted]) -> None:
    server = serve_script(lambda asked: Answer([header(asked), chunk(20, 4)]), complete)
    request = SamplesRequest(smiles="CCCC", num=10, first_index=20, seed=4)
    request_ensemble(server.url, request, patience=_QUICK)
    assert "smiles" not in server.asked[1]
    assert server.asked[1]["system"]["name"] == "butane"


def test_a_full_queue_is_waited_for(serve_script: Callable[..., Scripted]) -> None:
    server = serve_script(busy, complete)
    assert request_ensemble(server.url, _REQUEST, patience=_QUICK).n_samples == 10
    assert len(server.asked) == 2


def test_patience_ends(serve_script: Callable[..., Scripted]) -> None:
    server = serve_script(busy)
    with pytest.raises(ServerError, match=r"0 samples received; last problem: queue: full"):
        request_ensemble(server.url, _REQUEST, patience=_QUICK)


def framed(first: int, count: int) -> bytes:
    index = np.arange(first, first + count)
    rotations = np.broadcast_to(index[:, None, None, None], (count, 4, 3, 3)).astype(np.float32)
    return to_line(encode_chunk(index, {"positions": truth(index), "rotations": rotations}))


def test_every_field_of_the_header_is_resumed_and_settled(serve_script: Callable[..., Scripted]) -> None:
    said = {"fields": ["rotations"], "conditions": {"gap": 1.5}, "guidance": 2.0}

    def whole(asked: dict[str, Any]) -> Answer:
        first, num = asked["first_index"], asked["num"]
        footer = to_line(Footer(count=num, cpu_seconds=1.0))
        return Answer([header(asked, **said), framed(first, num), footer])

    server = serve_script(lambda asked: Answer([header(asked, **said), framed(20, 4)]), whole)
    ensemble = request_ensemble(server.url, _REQUEST, patience=_QUICK)
    assert ensemble.rotations is not None
    assert (ensemble.rotations == ensemble.index[:, None, None, None]).all()
    assert ensemble.cell is None
    assert (ensemble.provenance["conditions"], ensemble.provenance["guidance"]) == ({"gap": 1.5}, 2.0)
    assert "conditions" not in server.asked[0]
    assert (server.asked[1]["conditions"], server.asked[1]["guidance"]) == ({"gap": 1.5}, 2.0)


def test_other_properties_are_not_mixed_in(serve_script: Callable[..., Scripted]) -> None:
    changed = lambda asked: Answer([header(asked, conditions={"gap": 2.0}, guidance=1.0)])  # noqa: E731
    server = serve_script(lambda asked: Answer([header(asked), chunk(20, 4)]), changed)
    with pytest.raises(ServerError, match="the server changed"):
        request_ensemble(server.url, _REQUEST, patience=_QUICK)


def test_another_checkpoint_is_not_mixed_in(serve_script: Callable[..., Scripted]) -> None:
    changed = lambda asked: Answer([header(asked, checkpoint="other")])  # noqa: E731
    server = serve_script(lambda asked: Answer([header(asked), chunk(20, 4)]), changed)
    with pytest.raises(ServerError, match="c before, other now"):
        request_ensemble(server.url, _REQUEST, patience=_QUICK)


def test_a_refusal_is_not_retried_and_names_the_field(serve_script: Callable[..., Scripted]) -> None:
    detail = json.dumps({"detail": [{"loc": ["body", "num"], "msg": "too many"}]}).encode()
    server = serve_script(lambda asked: Answer([detail], 413))
    with pytest.raises(ServerError, match=r"HTTP 413.*num: too many"):
        request_ensemble(server.url, _REQUEST, patience=_QUICK)
    assert len(server.asked) == 1


def test_a_final_error_line_is_not_retried(serve_script: Callable[..., Scripted]) -> None:
    server = serve_script(lambda asked: Answer([header(asked), to_line(Failure(error="not finite", retry=False))]))
    with pytest.raises(ServerError, match="not finite"):
        request_ensemble(server.url, _REQUEST, patience=_QUICK)
    assert len(server.asked) == 1


def test_a_stopping_replica_is_resumed_elsewhere(serve_script: Callable[..., Scripted]) -> None:
    stopping = to_line(Failure(error="stopping", retry=True))
    server = serve_script(lambda asked: Answer([header(asked), chunk(20, 4), stopping]), complete)
    assert request_ensemble(server.url, _REQUEST, patience=_QUICK).n_samples == 10


def test_nobody_there_is_one_clear_line() -> None:
    with pytest.raises(ServerError, match="is `dig-scale serve` running there"):
        request_ensemble(f"http://127.0.0.1:{unused_port()}", _REQUEST, patience=_QUICK)


@pytest.mark.parametrize(
    "lie",
    [
        lambda asked: Answer([b"<html>hello</html>\n"]),
        lambda asked: Answer([header(asked, seed=5)]),
        lambda asked: Answer([header(asked), chunk(19, 1)]),
        lambda asked: Answer([header(asked), chunk(29, 2)]),
        lambda asked: Answer([header(asked, system=ETHER.to_dict()), chunk(20, 1)]),
        lambda asked: Answer([header(asked), to_line(Footer(count=9, cpu_seconds=0.0))]),
        lambda asked: Answer([header(asked), header(asked)]),
        lambda asked: Answer([header(asked, fields=["rotations"]), chunk(20, 10)]),
    ],
)
def test_what_was_not_asked_for_is_refused(serve_script: Callable[..., Scripted], lie: Script) -> None:
    with pytest.raises(WireError):
        request_ensemble(serve_script(lie).url, _REQUEST, patience=_QUICK)


def test_another_kind_of_server_is_named(serve_script: Callable[..., Scripted]) -> None:
    with pytest.raises(ServerError, match="check the URL"):
        request_ensemble(serve_script(lambda asked: Answer([b"<html>"], 404)).url, _REQUEST, patience=_QUICK)
