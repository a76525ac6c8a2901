"""docs/traces.md names every attribute that is written. Told by the source: whatever looks like one and is a value."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import ray_guard

_PACKAGE = Path(ray_guard.__file__).parent
_DOCS = _PACKAGE.parent / "docs" / "traces.md"
_ATTRIBUTE = re.compile(
    r"(?:ray_guard|rl|gen_ai|process|network|server|url|http|exception|host|service|error|ray)\.[a-z0-9_.]+"
)
_WRITERS = ("actors", "client", "egress", "integrations", "supervisor", "records.py", "evidence/recovery.py")
_ELSEWHERE = {
    "client/mirror_sdk.py": "attributes of others, which it leaves out",
    "actors/environment.py": "the name of a function",
    "integrations/vllm/watch.py": "the name of a module",
}
_JOURNAL = "ray_guard.journal."
"""What a journal says of itself is in docs/evidence.md, and on no span."""


def _written(tree: ast.Module) -> Iterator[str]:
    """Keys of dicts, first arguments of calls that set one, constants, and keys within lines that are put together."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            yield from (key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str))
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                yield node.value.value
            for target in targets:
                if isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
                    yield str(target.slice.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "set_attribute":
            yield from (each.value for each in node.args[:1] if isinstance(each, ast.Constant))
        elif isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) for part in node.values if isinstance(part, ast.Constant))
            yield from re.findall(r'"key":"([^"]+)"', text)


def _named(text: str) -> Iterator[str]:
    """What stands in backquotes: ``.limit`` behind ``a.kind`` is ``a.limit``."""
    before = ""
    for said in re.findall(r"`([^`\n]+)`", text):
        if said.startswith("."):
            yield before.rpartition(".")[0] + said
        else:
            yield (before := said)


def test_the_documentation_names_every_attribute() -> None:
    named = set(_named(_DOCS.read_text(encoding="utf-8")))
    lacking: dict[str, str] = {}
    found = set()
    for writer in _WRITERS:
        path = _PACKAGE / writer
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            where = str(file.relative_to(_PACKAGE))
            if where in _ELSEWHERE:
                continue
            for name in _written(ast.parse(file.read_text(encoding="utf-8"))):
                if _ATTRIBUTE.fullmatch(name) and not name.startswith(_JOURNAL):
                    found.add(name)
                    if name not in named:
                        lacking[name] = where
    assert not lacking, f"docs/traces.md, Attributes, lacks {lacking}"
    assert len(found) > 80, "the source is looked through"
