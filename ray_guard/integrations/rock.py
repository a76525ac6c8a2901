"""target: ROCK's ``eagleeye-traceid``, in both directions.

ROCK writes it into each line of its logs (``[sandbox id] [trace id]``), from the admin to the rocklet in the sandbox,
and makes one up where a request brings none. So what ROCK's client sends from within a scope brings the scope's trace
id, by which the lines are found from the trace and the trace from the lines. A caller's own (``extra_headers``) is left
as it is, and noted on the span. In the servers, scopes that serve a request carry the id it came with.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, Final

from ray_guard.client import carry, foreign
from ray_guard.client.scope import Scope
from ray_guard.client.spans import say_once, warn_once
from ray_guard.integrations.imports import Watch
from ray_guard.records import EAGLEEYE_TRACE

_UTILS: Final = "rock.utils"
_CLIENT: Final = "rock.sdk.sandbox.client"
_ADDED: Final = "_ray_guard_adds_eagleeye"


def _patch(module: ModuleType) -> None:
    if module.__name__ == _UTILS:
        variable = getattr(module, "trace_id_ctx_var", None)
        if variable is not None:
            foreign.follow(variable)
        return
    sandbox = getattr(module, "Sandbox", None)
    original = getattr(sandbox, "_build_headers", None)
    if sandbox is None or original is None:
        say_once("rock", "ray_guard: ROCK's client is not as expected: its requests carry no eagleeye-traceid")
    elif not hasattr(original, _ADDED):
        sandbox._build_headers = _around_headers(original)  # noqa: SLF001 - ROCK offers no hook there


def _around_headers(original: Any) -> Any:
    @functools.wraps(original)
    def build_headers(self: Any, *args: Any, **kwargs: Any) -> Any:
        headers = original(self, *args, **kwargs)
        try:
            _add(headers)
        except Exception:  # noqa: BLE001 - the request goes on
            warn_once("rock", "ray_guard: no eagleeye-traceid could be added to a request to ROCK")
        return headers

    setattr(build_headers, _ADDED, True)
    return build_headers


def _add(headers: dict[str, str]) -> None:
    node = carry.current()
    if node is None:
        return
    own = next((value for name, value in headers.items() if name.lower() == foreign.EAGLEEYE), None)
    if own is None:
        headers[foreign.EAGLEEYE] = str(node.identity.get(EAGLEEYE_TRACE) or node.trace)
    elif isinstance(node, Scope) and (named := foreign.eagleeye_id(own)) is not None:
        node.set_attribute(EAGLEEYE_TRACE, named)


_watch = Watch((_UTILS, _CLIENT), _patch)
install = _watch.install
remove = _watch.remove
