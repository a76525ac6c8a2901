"""Whether spans are to be exported, and the command that does it. Runs in the supervisor.

Apart from :mod:`ray_guard.evidence.forward`, which the supervisor would otherwise load and never use.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping


def endpoint(environ: Mapping[str, str]) -> str | None:
    """The traces endpoint that the standard variables name; None where none is wanted."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    if environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() == "none":
        return None
    for name in ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"):
        if value := environ.get(name, "").strip():
            return value
    return None


def forwarder_argv(folder: str | os.PathLike[str], environ: Mapping[str, str]) -> list[str] | None:
    """How to start the forwarder of a journal; None when no OTLP endpoint is configured.

    The caller's death ends it, after a last flush. ``-P``: the working folder, which a tool may write to, is no place
    to import from.
    """
    if endpoint(environ) is None:
        return None
    module = "ray_guard.evidence.forward"
    return [sys.executable, "-P", "-m", module, os.fspath(folder), "--parent", str(os.getpid())]
