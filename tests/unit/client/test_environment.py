"""What of an environment a tool gets."""

from __future__ import annotations

import pytest

from ray_guard.client.environment import given, inherited


@pytest.mark.parametrize(
    "name",
    "RAY_ADDRESS RAY_AUTH_TOKEN ray_job_config RAY_GUARD_EVIDENCE AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY HF_TOKEN "
    "HUGGING_FACE_HUB_TOKEN WANDB_API_KEY GH_TOKEN GITHUB_TOKEN MODAL_TOKEN_ID MODAL_TOKEN_SECRET MY_API_KEY "
    "AZURE_CLIENT_SECRET GOOGLE_APPLICATION_CREDENTIALS SSH_AUTH_SOCK DB_PASSWORD SERVICE_PRIVATE_KEY PGPASSWORD "
    "ALIYUN_ACCESSKEY KUBERNETES_SERVICE_HOST DOCKER_HOST LD_PRELOAD OTEL_EXPORTER_OTLP_HEADERS "
    "MLFLOW_TRACKING_PASSWORD NPM_CONFIG__AUTH PASSWORD TOKEN SECRET_KEY_BASE64".split(),
)
def test_secret_names(name: str) -> None:
    assert inherited({name: "x"}) == {}


@pytest.mark.parametrize(
    "name",
    "PATH HOME PWD OLDPWD LANG TERM TMPDIR PYTHONPATH TOKENIZERS_PARALLELISM MAX_TOKENS KEYBOARD SECRETARY_NAME "
    "CUDA_VISIBLE_DEVICES LD_LIBRARY_PATH RAY_GUARD_CALL TRACEPARENT OMP_NUM_THREADS XAUTHORITY AUTHOR".split(),
)
def test_ordinary_names(name: str) -> None:
    assert inherited({name: "x"}) == {name: "x"}


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("http://proxy:3128", True),
        ("http://user:password@proxy:3128", False),
        ("postgresql://app:s3cret@db.example.org/app", False),
        ("a=1 https://u:p@h/x", False),
        ("https://user@host/path", True),
        ("https://host/a:b@c", True),
        ("https://user:@host", True),
        ("somebody@example.org: hello", True),
    ],
)
def test_a_password_in_a_url_is_a_secret_whatever_it_is_called(value: str, kept: bool) -> None:
    assert inherited({"INDEX": value}) == ({"INDEX": value} if kept else {})


OWN = {"PATH": "/bin", "HOME": "/root", "LANG": "C", "HF_TOKEN": "s1", "RAY_ADDRESS": "s2"}


def test_naming_a_secret_grants_it() -> None:
    assert given({"HF_TOKEN": "s1"}, OWN) == {"HF_TOKEN": "s1"}
    assert given({"PATH": "/bin", "HF_TOKEN": "s1"}, OWN) == {"PATH": "/bin", "HF_TOKEN": "s1"}
    assert given({}, OWN) == {}


def test_a_copy_of_the_environment_grants_nothing() -> None:
    assert given({**OWN, "X": "1"}, OWN) == {"PATH": "/bin", "HOME": "/root", "LANG": "C", "X": "1"}
    most = {key: value for key, value in OWN.items() if key != "LANG"}
    assert given(most, OWN) == {"PATH": "/bin", "HOME": "/root"}


def test_what_a_copy_sets_anew_is_granted() -> None:
    assert given({**OWN, "HF_TOKEN": "for the tool"}, OWN)["HF_TOKEN"] == "for the tool"
