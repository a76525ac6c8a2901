"""target: how a refusal reaches whoever asked: as ray_guard's own error, and as a status of vLLM's HTTP server.

vLLM's AsyncLLM hands on the errors it knows and wraps all others; its server makes a status of the errors it knows and
an internal error of all others. So what is raised is both: the guard's class, and one that vLLM knows.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Final

from vllm.exceptions import GracefulHTTPError

from ray_guard.errors import BudgetExceeded, NotEnforced, RayGuardError, SupervisorLost

_STATUS: Final = {
    BudgetExceeded: HTTPStatus.TOO_MANY_REQUESTS,
    NotEnforced: HTTPStatus.NOT_IMPLEMENTED,  # what it would cost is not known
    SupervisorLost: HTTPStatus.SERVICE_UNAVAILABLE,
}
_OTHER: Final = HTTPStatus.FORBIDDEN  # the episode was ended for a violation


class _Status(GracefulHTTPError):  # type: ignore[misc]  # vLLM's classes are Any
    """What vLLM sees; its own constructor wants other arguments than the guard's errors."""

    http_status = _OTHER

    def __init__(self, *args: object) -> None:
        Exception.__init__(self, *args)

    @property
    def message(self) -> str:
        return str(self)


_classes: dict[type[RayGuardError], type[RayGuardError]] = {}


def _both(kind: type[RayGuardError]) -> type[RayGuardError]:
    known = _classes.get(kind)
    if known is not None:
        return known

    def as_plain(self: RayGuardError) -> tuple[Any, ...]:
        return kind, self.args  # whoever unpickles it, on the other side of an actor call, may have no vLLM

    members = {"http_status": _STATUS.get(kind, _OTHER), "__reduce__": as_plain, "__module__": kind.__module__}
    made = _classes[kind] = type(kind.__name__, (kind, _Status), members)
    return made


def of(error: RayGuardError) -> RayGuardError:
    """``error`` as vLLM hands it on."""
    return _both(type(error))(*error.args)
