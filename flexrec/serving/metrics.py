"""What a server says of itself to Prometheus, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable

ROUTES = ("/", "/rank", "/rerank", "/v1/rerank", "/v2/rerank", "/needs", "/users", "/items", "/health", "/metrics")
USER, OTHER = "/users/{id}", "other"  # every path that is nobody's counts as one
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


def route_of(path: str) -> str:
    """Which route a path belongs to."""
    if path in ROUTES:
        return path
    return USER if path.startswith("/users/") else OTHER


class ServerMetrics:
    """Counters of one server.

    Args:
        waiting: how many requests wait.
    """

    def __init__(self, waiting: Callable[[], int]) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._registry = CollectorRegistry()
        self._requests = Counter(
            "flexrec_requests", "HTTP requests by route and status.", ("route", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "flexrec_request_seconds",
            "Seconds from a request's head to the end of its answer.",
            ("route",),
            buckets=SECONDS,
            registry=self._registry,
        )
        self._sizes = Histogram(
            "flexrec_batch_size", "Requests that were ranked together.", buckets=SIZES, registry=self._registry
        )
        Gauge("flexrec_queue_length", "Requests that wait.", registry=self._registry).set_function(waiting)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count a request."""
        route = route_of(path)
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def ranked(self, size: int) -> None:
        """Count a batch."""
        self._sizes.observe(size)

    def text(self) -> tuple[bytes, str]:
        """What /metrics answers, and its content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST
