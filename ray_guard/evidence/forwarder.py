"""Whether spans or metrics are to be exported, and the command that does it. Runs in the supervisor.

Apart from :mod:`ray_guard.evidence.forward`, which the supervisor would otherwise load and never use.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from ray_guard.errors import RayGuardError


class ForwardError(RayGuardError):
    """Forwarding cannot start: the endpoint's configuration, or the folder."""


def endpoint(environ: Mapping[str, str]) -> str | None:
    """The traces endpoint that the standard variables name; None where none is wanted (as for metrics)."""
    return _endpoint(environ, "TRACES")


def metrics_endpoint(environ: Mapping[str, str]) -> str | None:
    """The metrics endpoint; None where none is wanted, as where ``OTEL_METRICS_EXPORTER`` does not name ``otlp``."""
    return _endpoint(environ, "METRICS")


def _endpoint(environ: Mapping[str, str], signal: str) -> str | None:
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    asked = environ.get(f"OTEL_{signal}_EXPORTER", "").lower().replace(" ", "")
    if "otlp" not in (asked or "otlp").split(","):
        return None
    for name in (f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"):
        if value := environ.get(name, "").strip():
            return value
    return None


def forwarder_argv(folder: str | os.PathLike[str], environ: Mapping[str, str]) -> list[str] | None:
    """How to start the forwarder of a journal; None when no OTLP endpoint is configured, for spans or metrics.

    The caller's death ends it, after a last flush. ``-P``: the working folder, which a tool may write to, is no place
    to import from.
    """
    if endpoint(environ) is None and metrics_endpoint(environ) is None:
        return None
    module = "ray_guard.evidence.forward"
    return [sys.executable, "-P", "-m", module, os.fspath(folder), "--parent", str(os.getpid())]
