"""What of this process's environment a tool gets. Runs in the target, and in ``ray-guard run``. Pure."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import AnyStr

#: what leads a tool to a control plane, a cloud account or a daemon outside its call
_PREFIXES = tuple(
    "RAY_ AWS_ AZURE_ ARM_ GOOGLE_ GCP_ GCLOUD_ CLOUDSDK_ ALIBABA_CLOUD_ ALIYUN_ OSS_ TENCENTCLOUD_ VOLC_ VOLCENGINE_ "
    "HUAWEICLOUD_ OPENAI_ ANTHROPIC_ KUBERNETES_ OTEL_ PGPASS".split()
)
_NAMES = frozenset(
    "SSH_AUTH_SOCK SSH_AGENT_PID GPG_AGENT_INFO DBUS_SESSION_BUS_ADDRESS DBUS_SYSTEM_BUS_ADDRESS KUBECONFIG "
    "DOCKER_HOST DOCKER_CONFIG CONTAINER_HOST LD_PRELOAD LD_AUDIT MYSQL_PWD NETRC".split()
)
#: how the name of a credential ends, before one of the words that say in which form it is
_ENDINGS = tuple(
    "TOKEN SECRET PASSWORD PASSWD PASSPHRASE _PASS _AUTH CREDENTIAL CREDENTIALS API_KEY APIKEY ACCESS_KEY ACCESSKEY "
    "SECRET_KEY SECRETKEY PRIVATE_KEY SIGNING_KEY ENCRYPTION_KEY".split()
)
_FORMS = tuple("_ID _FILE _PATH _SECRET _VALUE _JSON _BASE64".split())
_OUR_OWN = "RAY_GUARD_CALL"


def inherited(own: Mapping[str, str]) -> dict[str, str]:
    """``own``, the environment of this process, without what is secret in it."""
    return {name: value for name, value in own.items() if not _is_secret(name, value)}


def given(environment: Mapping[AnyStr, AnyStr], own: Mapping[AnyStr, AnyStr]) -> dict[AnyStr, AnyStr]:
    """The environment a caller puts together is what a tool gets: naming a secret in it grants it.

    But ``{**os.environ, "X": "1"}`` is no grant. Where more than half of this process's own variables are repeated
    unchanged, a secret that is repeated unchanged is left out too.
    """
    repeated = {name for name, value in environment.items() if own.get(name) == value}
    if 2 * len(repeated) <= len(own):
        return dict(environment)
    return {
        name: value
        for name, value in environment.items()
        if name not in repeated or not _is_secret(_text(name), _text(value))
    }


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode(errors="surrogateescape")


def _is_secret(name: str, value: str) -> bool:
    return _is_secret_name(name) or ("@" in value and _holds_password(value))


@functools.lru_cache(maxsize=4096)
def _is_secret_name(name: str) -> bool:
    name = name.upper()
    if name == _OUR_OWN:
        return False
    if name in _NAMES or name.startswith(_PREFIXES):
        return True
    for form in _FORMS:
        name = name.removesuffix(form)
    return name.endswith(_ENDINGS)


def _holds_password(value: str) -> bool:
    """Whether there is a URL in it with a user's password: ``https://user:password@host``."""
    _, *places = value.split("://")
    return any(_user(place).partition(":")[2] for place in places)


def _user(place: str) -> str:
    authority = place.partition("/")[0]
    return authority.rpartition("@")[0]
