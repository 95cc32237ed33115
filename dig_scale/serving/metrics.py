"""What a replica counts, and its Prometheus text. One registry per replica: of several, each answers for itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_REQUEST_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_FRACTIONS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


@dataclass(frozen=True)
class Metrics:
    """Counters of one replica; see `replica_metrics` for their meaning."""

    registry: CollectorRegistry
    walkers_in_flight: Gauge
    queue_depth: Gauge
    requests_in_flight: Gauge
    samples: Counter
    requests: Counter
    request_seconds: Histogram
    step_seconds: Histogram
    occupancy: Histogram


def replica_metrics() -> Metrics:
    """Fresh metrics on a registry of their own."""
    r = CollectorRegistry()
    return Metrics(
        registry=r,
        walkers_in_flight=Gauge("dig_scale_walkers_in_flight", "Walkers started and not finished", registry=r),
        queue_depth=Gauge("dig_scale_queue_depth", "Walkers of admitted requests not yet started", registry=r),
        requests_in_flight=Gauge("dig_scale_requests_in_flight", "Requests admitted and not finished", registry=r),
        samples=Counter("dig_scale_samples", "Samples finished", registry=r),
        requests=Counter("dig_scale_requests", "Requests by outcome", ["outcome"], registry=r),
        request_seconds=Histogram(
            "dig_scale_request_seconds", "Seconds from admission to the end", registry=r, buckets=_REQUEST_SECONDS
        ),
        step_seconds=Histogram(
            "dig_scale_step_seconds", "Seconds of one batch step", registry=r, buckets=_STEP_SECONDS
        ),
        occupancy=Histogram(
            "dig_scale_batch_occupancy", "Rows of a step over the rows that fit", registry=r, buckets=_FRACTIONS
        ),
    )


def watch(gauge: Gauge, read: Callable[[], float]) -> None:
    """Let `gauge` answer with `read()` whenever it is scraped."""
    gauge.set_function(read)


def exposition(metrics: Metrics) -> bytes:
    """The Prometheus text format."""
    return generate_latest(metrics.registry)
