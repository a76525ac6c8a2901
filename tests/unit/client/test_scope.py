from __future__ import annotations

import re

import ray_guard.client.scope as s
from ray_guard.testing import RecordingChannel


def test_tool_call_is_one_open_and_one_close(wire: RecordingChannel) -> None:
    with s.tool_call("bash", {"command": "ls"}):
        assert len(wire.sent("open")) == 1, "the call is known before it does anything"
        assert not wire.sent("close")
    (opened,) = wire.sent("open")
    (closed,) = wire.sent("close")
    assert opened["name"] == "execute_tool bash"
    assert closed["span"] == opened["span"]
    assert re.fullmatch(r"[0-9a-f]{16}", opened["span"])
    print(opened, closed)
