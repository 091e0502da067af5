"""Counts for Prometheus, out of what the engines count anyway."""

import time
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ggufkit.serve.engine import Metrics
from ggufkit.serve.hosting import Hosted

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_GAUGES = {
    "running": "Answers that are being written",
    "waiting": "Requests that wait for a sequence",
    "remembered": "Sequences kept for later requests",
    "cells": "Tokens that there is room for",
    "cells_used": "Tokens that are held",
}
_COUNTERS = {
    "refused": "Requests refused because too many waited",
    "preempted": "Answers set back because there was no room",
    "prompt_tokens": "Tokens of prompts that were computed",
    "cached_tokens": "Tokens of prompts that were known already",
    "generated_tokens": "Tokens written",
    "guessed_tokens": "Tokens that a draft model guessed",
    "right_tokens": "Guesses that were right",
    "embedded_tokens": "Tokens of texts embedded",
    "steps": "Batches computed",
    "decode_seconds": "Time in batches",
    "step_seconds": "Time in steps altogether",
    "queue_seconds": "Time that requests waited for a sequence",
    "first_token_seconds": "Time to first tokens",
    "first_tokens": "Answers that have had their first token",
}


class _Engines(Collector):
    """What the engines of all loaded models count."""

    def __init__(self, loaded: Callable[[], Iterable[Hosted]]) -> None:
        self._loaded = loaded

    def collect(self) -> Iterable[Metric]:
        """The counts now."""
        snapshots = [(hosted.name, hosted.engine.metrics()) for hosted in self._loaded()]
        for name, told in _GAUGES.items():
            gauge = GaugeMetricFamily(f"ggufkit_{name}", told, labels=["model"])
            for model, counts in snapshots:
                gauge.add_metric([model], getattr(counts, name))
            yield gauge
        for name, told in _COUNTERS.items():
            counter = CounterMetricFamily(f"ggufkit_{name}", told, labels=["model"])
            for model, counts in snapshots:
                counter.add_metric([model], getattr(counts, name))
            yield counter
        yield _finished(snapshots)


def _finished(snapshots: list[tuple[str, Metrics]]) -> Metric:
    told = "Answers by the reason of their end"
    counter = CounterMetricFamily("ggufkit_finished", told, labels=["model", "reason"])
    for model, counts in snapshots:
        for reason, count in counts.finished.items():
            counter.add_metric([model, reason], count)
    return counter


def registry_of(loaded: Callable[[], Iterable[Hosted]]) -> CollectorRegistry:
    """A registry with the counts of all loaded models."""
    registry = CollectorRegistry()
    registry.register(_Engines(loaded))
    return registry


def written(registry: CollectorRegistry) -> bytes:
    """All counts, in the text format of Prometheus."""
    return generate_latest(registry)


class Counting:
    """Counts requests by path and status.

    Args:
        app: the application behind it.
        registry: where the counts are kept.
        paths: those that are counted by name; all others are one.
    """

    def __init__(
        self, app: ASGIApp, registry: CollectorRegistry, paths: Callable[[], frozenset[str]]
    ) -> None:
        self._app = app
        self._paths = paths
        labels = ["path", "status"]
        self._requests = Counter("ggufkit_requests", "Requests answered", labels, registry=registry)
        self._seconds = Histogram(
            *("ggufkit_request_seconds", "Time from a request to the end of its answer", ["path"]),
            registry=registry,
            buckets=_SECONDS,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, and count it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, started = "499", time.monotonic()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception:
            status = "500"  # told from further out
            raise
        finally:
            path = scope["path"] if scope["path"] in self._paths() else "other"
            self._requests.labels(path, status).inc()
            self._seconds.labels(path).observe(time.monotonic() - started)
