"""What a policy actor's next supervisor must know, in a file of memory that the zygote holds too. Runs in supervisor.

A policy actor is not ended with its supervisor (:mod:`ray_guard.supervisor.handover`). What this one knows of it beyond
the kernel's own state is said here as it changes, one JSON line each: how it said hello, what it has said since that
still counts, its open spans, and what its budgets have used. A supervisor that is killed in the middle of a line has
not said it; what its last round of the loop has used may be missing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from ray_guard.named import NamedTuple
from ray_guard.policy.budgets import Account, Amount

_PIECE: Final = 1 << 20
"""From this size on the file is written anew where most of it is over."""
_SINGLE: Final = ("identify",)
_OF_PROCESS: Final = ("engine", "engine_state")
_encode: Final = json.JSONEncoder(separators=(",", ":")).encode


class Used(NamedTuple):
    """What had been used when it was last written down.

    Attributes:
        spans: by the id of the open span whose account it is; of those with limits.
        barred: to which of the scopes nothing more is granted; empty: the actor.
    """

    actor: dict[str, Amount]
    job: dict[str, Amount]
    spans: dict[str, dict[str, Amount]]
    barred: list[str]


class Estate(NamedTuple):
    """What a book says.

    Attributes:
        hello: how the target introduced itself.
        key: names its account to other nodes.
        said: its messages since then that still count, in their order.
        opened: the beginnings of its open spans, likewise.
        notification: the last that was received, or one shortly before.
        pending: messages that were read and are still to be taken in.
    """

    hello: dict[str, Any]
    key: str
    said: list[dict[str, Any]]
    opened: list[dict[str, Any]]
    used: Used
    notification: int
    pending: list[dict[str, Any]]


class _Content:
    """What counts of all that was said."""

    def __init__(self) -> None:
        self.said: dict[str, dict[str, Any]] = {}
        self.opened: dict[str, dict[str, Any]] = {}

    def take(self, message: dict[str, Any]) -> bool:
        """Whether that changes anything."""
        operation = message["op"]
        if operation == "open":
            self.opened[str(message["span"])] = message
        elif operation == "close":
            return self.opened.pop(str(message.get("span")), None) is not None
        elif operation in _SINGLE:
            self.said[operation] = message
        elif operation in _OF_PROCESS:
            key = f"{operation}/{message.get('pid')}"
            told = {name: value for name, value in message.items() if value is not None}
            self.said[key] = {**self.said.get(key, {}), **told}
        elif operation in ("tighten", "price"):
            self.said[_encode(message)] = message
        else:
            return False
        return True


class Book:
    """That of one policy actor.

    Attributes:
        renewed: told of the file's descriptor when it was written anew.
    """

    def __init__(self, hello: Mapping[str, Any], key: str, said: Iterable[dict[str, Any]] = ()) -> None:
        self.renewed: Callable[[int], None] = lambda _descriptor: None
        self._content = _Content()
        for message in said:
            self._content.take(message)
        self._beginning = _line({"op": "hello", "hello": hello, "key": key})
        self._used: tuple[Used, int] = Used({}, {}, {}, []), 0
        self._descriptor = -1
        self._size = self._fresh = 0
        self._begin()

    def fileno(self) -> int:
        return self._descriptor

    def take(self, message: dict[str, Any]) -> None:
        """The target has said that, and it was taken. Raises OSError."""
        if self._content.take(message):
            self._write(_line(message))

    def use(self, actor: Account, spans: Mapping[str, Account], notification: int) -> None:
        """Says what has been used, where that has changed: after every round of the loop. Raises OSError.

        Args:
            spans: the accounts of open spans that have limits of their own.
            notification: the last that was received.
        """
        barred = [""] if actor.barred else [span for span, account in spans.items() if account.barred]
        used = Used(actor.spent(), actor.root.spent(), {span: each.spent() for span, each in spans.items()}, barred)
        if (used, notification) != self._used:
            self._used = used, notification
            self._write(self._usage())

    def close(self) -> None:
        os.close(self._descriptor)

    def _usage(self) -> bytes:
        used, notification = self._used
        return _line({"op": "used", "used": used, "notification": notification})

    def _write(self, line: bytes) -> None:
        self._size += os.write(self._descriptor, line)
        if self._size > max(_PIECE, 4 * self._fresh):
            self._begin()

    def _begin(self) -> None:
        """Writes it anew, and passes it on when it is whole."""
        messages = (*self._content.said.values(), *self._content.opened.values())
        content = b"".join((self._beginning, self._usage(), *map(_line, messages)))
        descriptor = os.memfd_create("ray_guard-book", os.MFD_CLOEXEC)
        with open(descriptor, "wb", closefd=False) as file:
            self._fresh = self._size = file.write(content)
        self.renewed(descriptor)
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = descriptor


def _line(message: Mapping[str, Any]) -> bytes:
    return _encode(message).encode() + b"\n"


def read(descriptor: int, last: dict[str, Any] | None = None, *, journaled: bool = False) -> Estate:
    """What a book says, as far as its last line is whole.

    Args:
        last: what the target has said that the supervisor had read, and may have taken in or not.
        journaled: it is the end of a span, and stands in the journal.

    Raises:
        ValueError: it is no book.
    """
    content = _Content()
    with open(os.dup(descriptor), "rb") as file:
        file.seek(0)
        *lines, _torn = file.read().split(b"\n")
    try:
        beginning, *messages = map(json.loads, lines)
        hello, key = dict(beginning["hello"]), str(beginning["key"])
        used, notification = Used({}, {}, {}, []), 0
        for message in messages:
            if message["op"] == "used":
                used, notification = Used(*message["used"]), int(message["notification"])
            else:
                content.take(message)
        pending = [] if last is None else _pending(content, last, journaled=journaled)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"no book: {error!r}") from error
    said, opened = list(content.said.values()), list(content.opened.values())
    return Estate(hello, key, said, opened, used, notification, pending)


def _pending(content: _Content, last: dict[str, Any], *, journaled: bool) -> list[dict[str, Any]]:
    operation, known = last.get("op"), str(last.get("span")) in content.opened
    if operation == "close" and journaled:
        content.take(last)
    elif (operation == "open" and not known) or (operation == "close" and known) or operation == "identify":
        return [last]
    return []
