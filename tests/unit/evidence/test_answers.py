"""What an OTLP/HTTP exporter's session does where requests' own would not."""

from __future__ import annotations

import pytest

from ray_guard.evidence.answers import Answers


def test_a_given_certificate_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/etc/others.pem")
    session = Answers().session({}, "TRACES")
    assert session is not None

    def verified_with() -> object:
        return session.merge_environment_settings("https://collector", {}, None, None, None)["verify"]

    assert verified_with() == "/etc/others.pem"
    session.verify = "/etc/own.pem"  # as the exporters set it from OTEL_EXPORTER_OTLP_CERTIFICATE
    assert verified_with() == "/etc/own.pem"


def test_who_brings_sessions_of_their_own_keeps_them() -> None:
    named = {"OTEL_PYTHON_EXPORTER_OTLP_HTTP_TRACES_CREDENTIAL_PROVIDER": "gcp"}
    assert Answers().session(named, "TRACES") is None
    assert Answers().session(named, "METRICS") is not None
