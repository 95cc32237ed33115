"""The HTTP face of one replica, over a real socket: streams, refusals that name the field, cancelling, the token."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
import torch

from dig_scale.config import Serve
from dig_scale.serving import stream
from dig_scale.serving.api import Door, Service, open_service
from dig_scale.serving.client import request_ensemble
from dig_scale.serving.schema import SamplesRequest
from tests.dig_scale.serving.fixtures import BUTANE, ETHER, Offline, answering, eventually

_LIMITS = Serve(max_batch=8, max_samples_per_request=50_000, max_queued_requests=3)
_LONG = {"system": "butane", "num": 50_000, "steps": 200}


@pytest.fixture(scope="module")
def service(checkpoint_file: Path) -> Iterator[Service]:
    opened = open_service(checkpoint_file, _LIMITS, torch.device("cpu"))
    yield opened
    opened.worker.stop()


@pytest.fixture(scope="module")
def http(service: Service) -> Iterator[httpx.Client]:
    with answering(service, Door()) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


def metric(http: httpx.Client, name: str) -> float:
    found = re.search(rf"^dig_scale_{re.escape(name)} (\S+)$", http.get("/metrics").text, re.MULTILINE)
    assert found, name
    return float(found.group(1))


def test_a_request_gives_the_ensemble_of_offline_sampling(http: httpx.Client, offline: Offline) -> None:
    seen = []
    request = SamplesRequest(system="ether", num=30, seed=5, first_index=12, chunk=4)
    ensemble = request_ensemble(str(http.base_url), request, progress=lambda have, of: seen.append((have, of)))
    offline.assert_same(ensemble, ETHER)
    assert ensemble.index.tolist() == list(range(12, 42))
    assert ensemble.system.system_id == ETHER.system_id
    assert ensemble.provenance["cpu_seconds"] > 0
    assert ensemble.provenance["recipe"]["name"] == "tiny"
    assert ensemble.provenance["system_id"] == ETHER.system_id
    assert seen[-1] == (30, 30)
    assert all(later[0] - earlier[0] <= 4 for earlier, later in pairwise(seen))


def test_an_inline_system_is_sampled(http: httpx.Client, offline: Offline) -> None:
    request = SamplesRequest(system=BUTANE.to_dict(), num=3, solver="ancestral", steps=4)
    offline.assert_same(request_ensemble(str(http.base_url), request), BUTANE)


def test_smiles_become_heavy_atoms_where_the_recipe_packs_them(http: httpx.Client) -> None:
    ensemble = request_ensemble(str(http.base_url), SamplesRequest(smiles="CCO", num=2))
    assert ensemble.system.elements.tolist() == [6, 6, 8]


def test_samples_arrive_before_the_request_is_complete(http: httpx.Client) -> None:
    with http.stream("POST", "/v1/samples", json={"system": "butane", "num": 5_000, "steps": 20}) as response:
        lines = response.iter_lines()
        header, first = json.loads(next(lines)), json.loads(next(lines))
        assert response.headers["X-Request-Id"] == header["request_id"]
        assert len(first["index"]) < 5_000
        assert metric(http, "requests_in_flight") == 1
    eventually(lambda: metric(http, "requests_in_flight") == 0)


def test_a_closed_connection_frees_its_walkers(http: httpx.Client) -> None:
    with http.stream("POST", "/v1/samples", json=_LONG) as response:
        lines = response.iter_lines()
        next(lines)
        eventually(lambda: metric(http, "walkers_in_flight") == 8)
        assert metric(http, "queue_depth") > 0
    eventually(lambda: metric(http, "walkers_in_flight") == 0)
    assert metric(http, "queue_depth") == 0


def test_delete_ends_the_stream_with_an_error_line(http: httpx.Client) -> None:
    with http.stream("POST", "/v1/samples", json=_LONG) as response:
        lines = response.iter_lines()
        path = f"/v1/samples/{json.loads(next(lines))['request_id']}"
        assert http.delete(path).status_code == 204
        assert json.loads(list(lines)[-1]) == {"error": "the request was cancelled", "retry": False}
    assert http.delete(path).status_code == 404


def test_silence_is_filled_with_heartbeats(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "HEARTBEAT_SECONDS", 0.02)
    body = {"system": "ether", "num": 1, "steps": 200}
    lines = [json.loads(line) for line in http.post("/v1/samples", json=body).text.splitlines()]
    assert {"finished": 0} in lines
    assert lines[-1]["done"]


def test_a_full_queue_answers_429_with_retry_after(http: httpx.Client) -> None:
    with (
        http.stream("POST", "/v1/samples", json=_LONG),
        http.stream("POST", "/v1/samples", json=_LONG),
        http.stream("POST", "/v1/samples", json=_LONG),
    ):
        refused = http.post("/v1/samples", json=_LONG)
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["Retry-After"]) <= 60
        assert http.get("/v1/health").status_code == 200
    eventually(lambda: metric(http, "requests_in_flight") == 0)
    assert http.post("/v1/samples", json={"system": "butane", "num": 1}).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({"system": "nobody"}, 404, "system"),
        ({"system": "butane", "num": 50_001}, 413, "num"),
        ({"system": "butane", "num": "7"}, 422, "num"),
        ({"system": "butane", "tempo": 7}, 422, "tempo"),
        ({"system": {"format_version": 9}}, 422, "system"),
        ({"system": BUTANE.to_dict() | {"elements": [6]}}, 422, "system"),
        ({"system": BUTANE.to_dict() | {"bonds": "none"}}, 422, "system"),
        ({"system": BUTANE.to_dict() | {"kind": "crystal"}}, 422, "system"),
        ({"system": BUTANE.to_dict() | {"bond_orders": [1, 9, 1]}}, 422, "system"),
        ({"system": BUTANE.to_dict() | {"cell": [[9, 0, 0], [9, 0.1, 0], [0, 0, 9]]}}, 422, "system"),
        ({"system": "butane", "conditions": {"gap": 1.0}}, 422, "conditions"),
        ({"smiles": "not a molecule"}, 422, "smiles"),
        ({"sequence": "ACE-XXX-NME"}, 422, "sequence"),
    ],
)
def test_a_wrong_request_names_its_field(http: httpx.Client, body: dict[str, object], status: int, field: str) -> None:
    answer = http.post("/v1/samples", json=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["detail"][0]["loc"][:2] == ["body", field]
    assert answer.json()["detail"][0]["msg"]


@pytest.mark.parametrize("text", [b'{"system": "butane", "guidance": NaN}', b'{"system": "butane", "guidance": -1}'])
def test_what_is_no_number_is_refused_like_any_other_wrong_field(http: httpx.Client, text: bytes) -> None:
    answer = http.post("/v1/samples", content=text, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert [set(item) for item in answer.json()["detail"]] == [{"loc", "msg", "type"}]
    assert answer.json()["detail"][0]["loc"][:2] == ["body", "guidance"]


def test_a_body_without_end_is_refused(http: httpx.Client) -> None:
    blocks = (b"x" * 2**20 for _ in range(20))
    assert http.post("/v1/samples", content=blocks, headers={"Content-Type": "application/json"}).status_code == 413


def test_the_replica_describes_itself(http: httpx.Client) -> None:
    assert [(s["name"], s["n_sites"]) for s in http.get("/v1/systems").json()] == [("butane", 4), ("ether", 6)]
    model = http.get("/v1/model").json()
    assert model["default_steps"] == 6
    assert model["max_samples_per_request"] == 50_000
    assert model["checkpoint"] == http.get("/v1/health").json()["checkpoint"]
    assert "/v1/samples" in http.get("/openapi.json").json()["paths"]
    assert metric(http, 'requests_total{outcome="completed"}') >= 0
    assert metric(http, "batch_occupancy_count") == metric(http, "step_seconds_count")


def test_only_health_answers_without_the_token(service: Service) -> None:
    with answering(service, Door(token="secret")) as url:
        for path in ("/v1/systems", "/v1/model", "/metrics", "/docs", "/openapi.json"):
            assert httpx.get(url + path).status_code == 401
            assert httpx.get(url + path, headers={"Authorization": "Bearer wrong"}).status_code == 401
            assert httpx.get(url + path, headers={"Authorization": "Bearer secret"}).status_code == 200
        assert httpx.get(url + "/v1/health").status_code == 200
        assert request_ensemble(url, SamplesRequest(system="butane", num=1), token="secret").n_samples == 1
