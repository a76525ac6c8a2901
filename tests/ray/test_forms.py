"""Every way to put something under a policy confines the worker that runs it, and changes nothing else about it."""

from __future__ import annotations

import asyncio
import inspect
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import numpy as np
import pytest
import ray
from ray.runtime_env import RuntimeEnv

from ray_guard import PolicyError, guard

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


def reach(port: int, text: str) -> str:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
            sock.sendall(text.encode())
    except OSError as error:
        return type(error).__name__
    return "sent"


def worker_class() -> type:
    class Worker:
        def reach(self, port: int, text: str) -> str:
            return reach(port, text)

    return Worker


def worker_function() -> Callable[..., str]:
    def work(port: int, text: str) -> str:
        return reach(port, text)

    return work


def above(allow: list[str]) -> Any:
    return guard(allow=allow)(ray.remote(num_cpus=0)(worker_class())).remote().reach


def below(allow: list[str]) -> Any:
    return ray.remote(num_cpus=0)(guard(allow=allow)(worker_class())).remote().reach


def with_options(allow: list[str]) -> Any:
    actor = guard(allow=allow)(ray.remote(worker_class())).options(num_cpus=0, name="with options").remote()
    return actor.reach


def as_trainers_do(allow: list[str]) -> Any:
    """ROLL's Cluster: a plain class, ray.remote around it, options with a RuntimeEnv."""
    env = RuntimeEnv(env_vars={"WORKER_NAME": "env-0"})
    return ray.remote(guard(allow=allow)(worker_class())).options(runtime_env=env, num_cpus=0.01).remote().reach


def function_above(allow: list[str]) -> Any:
    return guard(allow=allow)(ray.remote(num_cpus=0)(worker_function()))


def function_below(allow: list[str]) -> Any:
    return ray.remote(num_cpus=0)(guard(allow=allow)(worker_function())).options(name="below")


FORMS = [above, below, with_options, as_trainers_do, function_above, function_below]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_confines(form: Callable[[list[str]], Any], sink: Any) -> None:
    unguarded = ray.remote(num_cpus=0)(worker_function())
    assert ray.get(unguarded.remote(sink.port, "unguarded")) == "sent"
    assert sink.saw("unguarded")
    confined = form([f"127.0.0.1:{sink.port + 1}"])
    assert ray.get(confined.remote(sink.port, "guarded")) == "PermissionError"
    assert not sink.saw("guarded!", within=0.2)
    assert sink.accepted == 1


def test_what_is_granted_gets_through(sink: Any) -> None:
    granted = above([f"127.0.0.1:{sink.port}"])
    assert ray.get(granted.remote(sink.port, "granted")) == "sent"
    assert sink.saw("granted")


class Described:
    """A class with what frameworks look at."""

    limit = 3

    def __init__(self, name: str, *, size: int = 2) -> None:
        """Takes a name."""
        self.name = name

    def plain(self, a: int, b: str = "x") -> str:
        """Does it."""
        return b * a

    plain.dispatch_mode = "dp"  # type: ignore[attr-defined] # as ROLL marks methods

    async def later(self) -> None: ...

    def items(self) -> Iterator[int]:
        yield 1

    async def later_items(self) -> AsyncIterator[int]:
        yield 1

    @staticmethod
    def still(a: int) -> int:
        return a

    @classmethod
    def made(cls) -> str:
        return cls.__name__


def test_a_guarded_class_stays_what_it_was() -> None:
    methods = {name: vars(Described)[name] for name in ("plain", "later", "items", "later_items", "still", "made")}
    signature, init_signature = inspect.signature(Described), inspect.signature(Described.__init__)
    names = (Described.__name__, Described.__qualname__, Described.__module__, Described.__doc__)
    guarded = guard(allow=[])(Described)
    assert guarded is Described
    assert (guarded.__name__, guarded.__qualname__, guarded.__module__, guarded.__doc__) == names
    assert inspect.signature(guarded) == signature
    assert inspect.signature(guarded.__init__) == init_signature
    assert guarded.__init__.__doc__ == "Takes a name."
    assert {name: vars(guarded)[name] for name in methods} == methods
    assert vars(guarded.plain) == {"dispatch_mode": "dp"}
    actor_class = ray.remote(guarded)
    assert guard(allow=["10.0.0.1:1"])(actor_class) is actor_class


def test_a_class_without_init_gets_none_that_shows() -> None:
    class Bare:
        """Nothing."""

    before = inspect.signature(Bare)
    assert inspect.signature(guard(allow=[])(Bare)) == before

    class Base:
        def __init__(self, a: int) -> None: ...

    class Derived(Base): ...

    assert inspect.signature(guard(allow=[])(Derived)) == inspect.signature(Base)


def test_a_guarded_function_stays_what_it_was() -> None:
    def work(a: int, *, b: str = "x") -> str:
        """Works."""
        return b * a

    work.flag = 1  # type: ignore[attr-defined]
    guarded = guard(allow=[])(work)
    assert inspect.signature(guarded) == inspect.signature(work)
    assert (guarded.__name__, guarded.__doc__, guarded.flag) == ("work", "Works.", 1)  # type: ignore[attr-defined]

    def stream(n: int) -> Iterator[int]:
        yield n

    assert inspect.isgeneratorfunction(guard(allow=[])(stream))


@guard(allow=[])
@ray.remote(num_cpus=0, concurrency_groups={"io": 2})
class Threaded:
    def __init__(self, start: int = 1) -> None:
        self.start = start
        self.gate = threading.Event()

    def add(self, n: int, *rest: int, **named: int) -> int:
        return self.start + n + sum(rest) + sum(named.values())

    def count(self, n: int) -> Iterator[int]:
        # Not `yield from`: Ray 2.60 calls send() with a value, guard or no guard, which range lacks.
        for each in range(n):  # noqa: UP028
            yield each

    @ray.method(num_returns=2)
    def two(self) -> tuple[int, int]:
        return 1, 2

    @ray.method(concurrency_group="io")
    def wait(self) -> bool:
        return self.gate.wait(20)

    @ray.method(concurrency_group="io")
    def open(self) -> str:
        self.gate.set()
        return threading.current_thread().name

    def total(self, array: Any) -> int:
        return int(array.sum())

    def make(self, size: int) -> Any:
        return ray.put(np.ones(size, dtype=np.uint8))

    def child(self) -> int:
        return int(ray.get(ray.remote(num_cpus=0)(Child).remote().pid.remote()))

    def pid(self) -> int:
        return os.getpid()

    @staticmethod
    def still(a: int) -> int:
        return a


class Child:
    def pid(self) -> int:
        return os.getpid()


def test_a_threaded_actor_works_as_without() -> None:
    actor = Threaded.remote(start=2)
    assert ray.get(actor.add.remote(1, 2, k=3)) == 8
    assert [ray.get(ref) for ref in actor.count.remote(3)] == [0, 1, 2]
    assert ray.get(list(actor.two.remote())) == [1, 2]
    waiting = actor.wait.remote()
    ray.get(actor.open.remote())
    assert ray.get(waiting) is True
    size = 4 << 20
    assert ray.get(actor.total.remote(ray.put(np.ones(size, dtype=np.uint8)))) == size
    assert int(ray.get(ray.get(actor.make.remote(size))).sum()) == size
    assert ray.get(actor.child.remote()) != ray.get(actor.pid.remote())
    assert ray.get(actor.still.remote(7)) == 7
    with pytest.raises(TypeError, match="missing a required argument"):
        actor.add.remote()


@ray.remote(num_cpus=0)
@guard(allow=[])
class Asynchronous:
    async def __init__(self, start: int) -> None:  # type: ignore[misc] # Ray awaits it
        await asyncio.sleep(0)
        self.start = start

    async def add(self, n: int) -> int:
        await asyncio.sleep(0)
        return self.start + n

    async def count(self, n: int) -> AsyncIterator[int]:
        for each in range(n):
            await asyncio.sleep(0)
            yield each

    def plain(self) -> int:
        return self.start


def test_an_async_actor_works_as_without() -> None:
    actor = Asynchronous.remote(5)
    assert ray.get(actor.add.remote(1)) == 6
    assert [ray.get(ref) for ref in actor.count.remote(3)] == [0, 1, 2]
    assert ray.get(actor.plain.remote()) == 5


def test_what_a_runtime_environment_asks_for_is_kept() -> None:
    actor_class = guard(allow=[])(ray.remote(num_cpus=0, runtime_env={"env_vars": {"A": "1", "B": "1"}})(Variables))
    assert ray.get(actor_class.remote().of.remote("A", "B")) == ["1", "1"]
    # As without a guard, .options(runtime_env=…) replaces the decorator's.
    replaced = actor_class.options(runtime_env=RuntimeEnv(env_vars={"B": "2", "C": "2"})).remote()
    assert ray.get(replaced.of.remote("A", "B", "C")) == [None, "2", "2"]


class Variables:
    def of(self, *names: str) -> list[str | None]:
        return [os.environ.get(name) for name in names]


def test_mistakes_are_told_where_they_are_made() -> None:
    with pytest.raises(TypeError, match=r"write @guard\(policy\)"):
        guard(Child)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="then call"):
        guard(allow=[])(ray.remote(Child).options(num_cpus=0))
    with pytest.raises(TypeError, match="not int"):
        guard(allow=[])(3)
    with pytest.raises(PolicyError, match="alow"):
        guard(alow=[])
