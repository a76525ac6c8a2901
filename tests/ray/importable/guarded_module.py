"""A module as users write them: workers import it, so its classes travel by name and are guarded on arrival."""

from __future__ import annotations

import socket

import ray

from ray_guard import context, guard, tool


def reach(port: int, text: str) -> str:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
            sock.sendall(text.encode())
    except OSError as error:
        return type(error).__name__
    return "sent"


@guard(allow=[])
@ray.remote(num_cpus=0)
class Above:
    def __init__(self, text: str) -> None:
        self.text = text

    @tool
    def reach(self, port: int) -> str:
        return reach(port, self.text)

    def place(self) -> str | None:
        return context()["span"]


@ray.remote(num_cpus=0)
@guard(allow=[])
class Below:
    def reach(self, port: int) -> str:
        return reach(port, "below")

    def child(self, port: int) -> str:
        return ray.get(Above.remote("child").reach.remote(port))


@guard(allow=[])
class Plain:
    def reach(self, port: int) -> str:
        return reach(port, "plain")


@ray.remote(num_cpus=0)
@guard(allow=[])
def task(port: int) -> str:
    return reach(port, "task")
