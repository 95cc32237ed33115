"""The HTTP face of a replica: a FastAPI application over one Service. It knows neither Ray nor tensors.

POST /v1/samples streams NDJSON (see schema); DELETE /v1/samples/{id} and a closed connection free the request's walkers
at once. Errors before the stream are {"detail": [{"loc": ["body", field], "msg": ...}]} with a 4xx; after it has begun
they are its last line. Everything but GET /v1/health asks for the bearer token where one is set.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse

from dig_scale import __version__
from dig_scale.config import Serve
from dig_scale.errors import UserError
from dig_scale.sampling.solvers import SOLVERS, solver_named
from dig_scale.serving.catalogue import Catalogue, RequestError
from dig_scale.serving.gate import Gate
from dig_scale.serving.metrics import Metrics, exposition, replica_metrics
from dig_scale.serving.scheduler import Group, Job, QueueFullError
from dig_scale.serving.schema import (
    ExtraField,
    Header,
    Health,
    ModelSummary,
    SamplesRequest,
    SystemSummary,
)
from dig_scale.serving.served import (
    Bench,
    Benches,
    ServedModel,
    Wanted,
    load_served_model,
    require_wanted,
    rows_that_fit,
    wanted_by,
)
from dig_scale.serving.stream import Reading, SampleStream
from dig_scale.serving.worker import Event, Worker, WorkerStoppedError

_WINDOW_BATCHES = 4
"""Batches of samples that may wait for a slow reader before its request pauses."""


@dataclass(frozen=True)
class Service:
    """All that one replica answers from."""

    model: ServedModel
    worker: Worker
    metrics: Metrics
    catalogue: Catalogue
    benches: Benches
    limits: Serve


@dataclass(frozen=True)
class Door:
    """What stands before the service: the bearer token asked for (None: open), and how other replicas cancel."""

    token: str | None = None
    cancel_elsewhere: Callable[[str], Awaitable[bool]] | None = None


def open_service(checkpoint: Path, limits: Serve, device: torch.device) -> Service:
    """Load a checkpoint and start its worker; the caller stops `service.worker`. Raises UserError naming the file."""
    model = load_served_model(checkpoint, device)
    metrics = replica_metrics()
    worker = Worker(limits.max_queued_requests, metrics)
    worker.start()
    return Service(model, worker, metrics, Catalogue(model), Benches(model), limits)


def build_api(service: Service, door: Door) -> FastAPI:
    """The application, with its OpenAPI description at /docs and /openapi.json."""
    api = FastAPI(title="dig-scale", version=__version__, description="Equilibrium samples of molecular systems.")
    _add_sampling(api, service, door)
    _add_descriptions(api, service)
    api.add_exception_handler(RequestError, _refusal)
    api.add_exception_handler(RequestValidationError, _invalid)
    api.add_middleware(Gate, token=door.token)
    return api


def _add_sampling(api: FastAPI, service: Service, door: Door) -> None:
    @api.post(
        "/v1/samples",
        response_class=StreamingResponse,
        responses={
            200: {
                "content": {"application/x-ndjson": {}},
                "description": "Header, chunks, footer; one JSON a line",
            },
            404: {"description": "Unknown system name"},
            413: {"description": "More samples, sites or bytes than the server takes"},
            429: {"description": "The queue is full; see Retry-After"},
        },
    )
    async def draw_samples(body: SamplesRequest) -> StreamingResponse:
        """Draw samples of one system and stream them as they finish."""
        if body.num > service.limits.max_samples_per_request:
            most = service.limits.max_samples_per_request
            raise RequestError(413, "num", f"{body.num} samples; one request may ask for {most}")
        wanted = _wanted(service.model, body)
        bench = await asyncio.to_thread(_bench, service, body, wanted)
        job = _job(service, body, bench, wanted)
        inbox = _admit(service, job, bench)
        return SampleStream(Reading(_header(service, job, bench, wanted), inbox, service.worker, body.chunk))

    @api.delete("/v1/samples/{request_id}", status_code=204)
    async def cancel_samples(request_id: str) -> Response:
        """End a request and free its walkers at once."""
        found = service.worker.cancel(request_id)
        if not found and door.cancel_elsewhere is not None:
            found = await door.cancel_elsewhere(request_id)
        if not found:
            raise RequestError(404, "request_id", f"no request {request_id!r} is in work")
        return Response(status_code=204)


def _add_descriptions(api: FastAPI, service: Service) -> None:
    @api.get("/v1/health")
    async def health() -> Health:
        """Whether this replica takes requests."""
        if not service.worker.alive:
            raise HTTPException(503, "the worker of this replica is not running")
        return Health(status="ok", version=__version__, checkpoint=service.model.checkpoint_id)

    @api.get("/v1/systems")
    async def systems() -> list[SystemSummary]:
        """The checkpoint's training systems, which a request may name."""
        return [
            SystemSummary(name=s.name, kind=str(s.kind), n_sites=s.n_sites, system_id=s.system_id)
            for s in service.model.systems.values()
        ]

    @api.get("/v1/model")
    async def model() -> ModelSummary:
        """The model, its recipe, and the limits of a request."""
        return _model_summary(service)

    @api.get("/metrics")
    async def metrics() -> Response:
        """Counters of the replica that answers, as Prometheus text."""
        return Response(exposition(service.metrics), media_type="text/plain; version=0.0.4")


def _model_summary(service: Service) -> ModelSummary:
    model = service.model
    return ModelSummary(
        checkpoint=model.checkpoint_id,
        training_step=model.training_step,
        parameters=model.parameters,
        device=str(model.device),
        default_solver=model.recipe.sample.solver,
        default_steps=model.recipe.sample.steps,
        solvers=sorted(SOLVERS),
        max_samples_per_request=service.limits.max_samples_per_request,
        recipe=model.recipe.model_dump(mode="json"),
        training_cost=dict(model.training_cost),
    )


def _wanted(model: ServedModel, body: SamplesRequest) -> Wanted:
    """The properties of a request, or the checkpoint's own; raises RequestError for those it does not know."""
    wanted = wanted_by(model.recipe.sample, body.conditions, body.guidance)
    try:
        require_wanted(model.recipe, wanted)
    except UserError as error:
        raise RequestError(422, "conditions", str(error)) from error
    return wanted


def _bench(service: Service, body: SamplesRequest, wanted: Wanted) -> Bench:
    system = service.catalogue.system(body)
    try:
        return service.benches.bench(system, wanted)
    except UserError as error:
        raise RequestError(422, "system", str(error)) from error


def _job(service: Service, body: SamplesRequest, bench: Bench, wanted: Wanted) -> Job:
    defaults = service.model.recipe.sample
    rows = rows_that_fit(bench.system.n_sites, service.limits.max_batch)
    return Job(
        request_id=uuid.uuid4().hex,
        group=Group(bench.system_id, body.solver or defaults.solver, rows, wanted.listed, wanted.guidance),
        seed=body.seed,
        first_index=body.first_index,
        num=body.num,
        steps=body.steps or defaults.steps,
        window=_WINDOW_BATCHES * rows + body.chunk,
    )


def _admit(service: Service, job: Job, bench: Bench) -> asyncio.Queue[Event]:
    """The inbox of a job that is now in work; raises HTTP 429 or 503 with Retry-After."""
    inbox: asyncio.Queue[Event] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def deliver(event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody reads any more
            loop.call_soon_threadsafe(inbox.put_nowait, event)

    try:
        service.worker.submit(job, bench, deliver)
    except QueueFullError as error:
        service.metrics.requests.labels("refused").inc()
        wait = {"Retry-After": str(service.worker.retry_after())}
        raise HTTPException(429, _detail("queue", str(error)), wait) from None
    except WorkerStoppedError as error:
        raise HTTPException(503, _detail("queue", str(error)), {"Retry-After": "1"}) from None
    return inbox


def _header(service: Service, job: Job, bench: Bench, wanted: Wanted) -> Header:
    evaluations = solver_named(job.group.solver).evaluations_per_step * wanted.evaluations
    extra = [name for name in get_args(ExtraField) if name in bench.composition.stored]
    return Header(
        request_id=job.request_id,
        system=bench.system.to_dict(),
        system_id=bench.system_id,
        seed=job.seed,
        first_index=job.first_index,
        num=job.num,
        solver=job.group.solver,
        steps=job.steps,
        network_evaluations_per_sample=job.steps * evaluations,
        checkpoint=service.model.checkpoint_id,
        recipe=service.model.recipe.model_dump(mode="json"),
        training_cost=dict(service.model.training_cost),
        fields=extra or None,
        conditions=dict(wanted.listed) or None,
        guidance=wanted.guidance if wanted.conditions else None,
    )


def _detail(field: str, problem: str) -> list[dict[str, Any]]:
    return [{"loc": ["body", field], "msg": problem}]


async def _refusal(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    return JSONResponse({"detail": _detail(error.field, str(error))}, status_code=error.status)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """Place and problem alone: what was sent may be no JSON (NaN), or large."""
    assert isinstance(error, RequestValidationError)
    detail = [{key: item[key] for key in ("loc", "msg", "type")} for item in error.errors()]
    return JSONResponse({"detail": detail}, status_code=422)
