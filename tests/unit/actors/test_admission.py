from __future__ import annotations

import pickle
import subprocess
import sys
import textwrap
from typing import Any

import pytest

from ray_guard.actors import admission, documents
from ray_guard.errors import NotEnforced
from ray_guard.policy.model import Policy

ENFORCE = documents.canonical(Policy())
REPORT = documents.canonical(Policy.from_shorthand(mode="report"))


def test_it_is_refused_before_init_runs() -> None:
    ran = []

    class Plain:
        def __init__(self) -> None:
            ran.append(1)

    admission.guard_class(Plain, ENFORCE)
    with pytest.raises(NotEnforced, match="Plain is guarded, and this process is not confined"):
        Plain()
    assert ran == []


def test_a_report_only_class_is_built_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    class Watched:
        def __init__(self, a: int) -> None:
            self.a = a

    admission.guard_class(Watched, REPORT)
    assert Watched(3).a == 3
    assert "Watched runs unguarded here" in caplog.text


def test_inits_are_called_as_before() -> None:
    calls: list[Any] = []

    class Left:
        pass

    class Right:
        def __init__(self, a: int, *, b: int = 0) -> None:
            calls.append((a, b))

    class Both(Left, Right): ...

    admission.guard_class(Left, REPORT)  # its __init__ hands on to Right's, which it does not know
    Both(1, b=2)
    assert calls == [(1, 2)]
    with pytest.raises(TypeError):
        Left(1)  # type: ignore[call-arg]
    Left()


def test_old_style_super_still_works() -> None:
    class Base:
        def __init__(self, a: int) -> None:
            self.a = a

    class Old(Base):
        def __init__(self, a: int) -> None:
            super(Old, self).__init__(a)  # noqa: UP008 - this is what would recurse if Old were replaced by a subclass

    admission.guard_class(Old, REPORT)
    assert Old(2).a == 2


def test_a_subclass_that_forgets_super_is_refused_too() -> None:
    told: list[dict[str, Any]] = []

    class Base:
        def __init_subclass__(cls, **options: Any) -> None:
            told.append(options)

    admission.guard_class(Base, ENFORCE)

    class Derived(Base, flavour="x"):
        def __init__(self) -> None: ...

    assert told == [{"flavour": "x"}]
    with pytest.raises(NotEnforced, match="Derived is guarded"):
        Derived()


def test_pickled_instances_are_not_the_guards_business() -> None:
    loaded = pickle.loads(pickle.dumps(Kept.__new__(Kept)))
    assert isinstance(loaded, Kept)


class Kept:
    def __init__(self) -> None: ...


admission.guard_class(Kept, ENFORCE)


def test_functions_are_refused_and_async_ones_are_no_tasks() -> None:
    def work() -> int:
        return 1

    with pytest.raises(NotEnforced, match="work is guarded"):
        admission.guard_function(work, ENFORCE)()
    assert admission.guard_function(work, REPORT)() == 1

    async def later() -> None: ...

    with pytest.raises(TypeError, match="no async functions"):
        admission.guard_function(later, ENFORCE)


def test_it_all_works_where_ray_is_not_installed() -> None:
    code = """
        import importlib.abc, sys

        class NoRay(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name.split(".")[0] == "ray":
                    raise ModuleNotFoundError(name)
                return None

        import importlib.util
        sys.meta_path.insert(0, NoRay())
        found = importlib.util.find_spec
        importlib.util.find_spec = lambda name, package=None: None if name == "ray" else found(name, package)
        import ray_guard

        @ray_guard.guard(allow=[])
        class Plain:
            pass

        try:
            Plain()
        except ray_guard.NotEnforced as error:
            print("refused", "ray" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.stdout.split() == ["refused", "False"], done.stderr


def test_importing_the_package_imports_no_ray() -> None:
    code = "import sys, ray_guard; from ray_guard import guard; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
