"""What an OTLP/HTTP endpoint answers beyond yes and no. Runs in the forwarder's process alone: imports requests.

OpenTelemetry's exporters take every status below 400 for "taken", and do not read what a collector says of the spans
it left out of a request that it took. Both would lose spans without a word.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, Final

import requests
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

_PROVIDERS: Final = (
    "OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER",
    "OTEL_PYTHON_EXPORTER_OTLP_HTTP_{}_CREDENTIAL_PROVIDER",
)


class Elsewhere(requests.RequestException):
    """The endpoint points to another address, which a POST is not sent to."""


class _Session(requests.Session):
    """Has the certificate that it was given win over REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE, which requests prefers."""

    def merge_environment_settings(self, url: Any, proxies: Any, stream: Any, verify: Any, cert: Any) -> Any:
        given = self.verify if verify is None and self.verify is not True else verify
        return super().merge_environment_settings(url, proxies, stream, given, cert)


class Answers:
    """Reads an endpoint's answers.

    ``refused``: how many of the spans of the last request it took without keeping them, and why, in its own words
    (OTLP's partial success; signals other than spans say it alike). ``pause_s``: how long it wants to be left alone,
    as ``Retry-After`` has it in seconds; 0 where it does not say.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Before a request, which may get no answer at all."""
        self.refused = (0, "")
        self.pause_s = 0.0

    def session(self, environ: Mapping[str, str], signal: str) -> requests.Session | None:
        """For an exporter of that signal. None where the environment names a provider of sessions of its own."""
        if any(environ.get(name.format(signal), "").strip() for name in _PROVIDERS):
            return None
        session = _Session()
        session.hooks["response"].append(self._read)
        return session

    def _read(self, response: requests.Response, **_: Any) -> None:
        """Raises Elsewhere."""
        self.refused = (0, "")
        after = response.headers.get("Retry-After", "").strip()
        self.pause_s = float(after) if after.isascii() and after.isdecimal() and len(after) < 9 else 0.0
        if 300 <= response.status_code < 400:
            place = response.headers.get("Location", "").partition("?")[0]
            raise Elsewhere(
                f"it answers {response.status_code} and names {place or 'no other address'}; give the address that "
                "takes spans"
            )
        if response.ok and response.headers.get("Content-Type", "").startswith("application/x-protobuf"):
            with contextlib.suppress(DecodeError):
                said = ExportTraceServiceResponse.FromString(response.content).partial_success
                self.refused = (max(0, said.rejected_spans), said.error_message)
