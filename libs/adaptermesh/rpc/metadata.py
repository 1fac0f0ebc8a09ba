"""The metadata names of the wire, one place for each (gRPC metadata and HTTP headers share them)."""

from typing import Any

AUTHORIZATION = "authorization"
"""In: `Bearer <API key>`."""

TASK = "x-model-task"
ADAPTER = "x-adapter-id"
TENANT = "x-tenant-id"
COHORT_KEY = "x-cohort-key"
REQUEST_ID = "x-request-id"
FEED_POSITION = "x-feed-position"
"""In: decide no earlier than this position of the change feed (mutations return it): read your own writes."""

ADAPTER_VERSION = "x-adapter-version"
ADAPTER_DIGEST = "x-adapter-digest"
ADAPTER_TIER = "x-adapter-tier"
COHORT = "x-cohort"
WORKER_ID = "x-worker-id"
ROUTE_GENERATION = "x-route-generation"
TRACE_ID = "x-trace-id"


def read(context: Any) -> dict[str, str]:
    """The caller's text metadata; the first value of a name wins, binary keys are left out."""
    return first_values(context.invocation_metadata())


def first_values(pairs: Any) -> dict[str, str]:
    """`(key, value)` pairs as a dict; the first value of a name wins, binary values are left out."""
    found: dict[str, str] = {}
    for key, value in pairs or ():
        if isinstance(value, str):
            found.setdefault(key, value)
    return found
