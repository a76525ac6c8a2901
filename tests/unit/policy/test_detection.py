"""What follows a finding, as policies say it."""

from __future__ import annotations

import pytest

from ray_guard.detect import Kind
from ray_guard.errors import PolicyError
from ray_guard.policy import plain
from ray_guard.policy.decide import CompiledPolicy, intersect
from ray_guard.policy.model import Policy


def _actions(**detect: list[str]) -> dict[str, str]:
    return dict(CompiledPolicy.from_wire(Policy(detect=detect).to_wire()).detect)


def test_the_strictest_action_of_a_kind_holds() -> None:
    assert _actions() == {}
    assert _actions(tag=["mining"]) == {"mining": "tag"}
    everything = _actions(tag=["all"], kill_call=["mining"], violation=["mining", "probing"])
    assert everything == {**dict.fromkeys((*Kind, "other"), "tag"), "mining": "kill_call", "probing": "violation"}


def test_of_several_policies_the_strictest() -> None:
    wires = [Policy(detect=each).to_wire() for each in ({"kill_call": ["mining"]}, {"tag": ["all"]})]
    both = CompiledPolicy.from_wire(intersect(*wires)).detect
    assert both == {**dict.fromkeys((*Kind, "other"), "tag"), "mining": "kill_call"}


def test_a_policy_that_reports_ends_nobody() -> None:
    wire = Policy(mode="report", detect={"kill_actor": ["mining"]}).to_wire()
    assert CompiledPolicy.from_wire(wire).detect == {"mining": "tag"}
    enforced = Policy(detect={"violation": ["probing"]}).to_wire()
    assert CompiledPolicy.from_wire(intersect(wire, enforced)).detect == {"mining": "tag", "probing": "violation"}


def test_both_readers_read_it() -> None:
    given = {"detect": {"tag": ["all"], "kill_call": ["mining", "dns_tunnel"], "rules": ["/a/", "/b"]}}
    assert plain.read(given) == Policy.of(given).to_wire()


@pytest.mark.parametrize(
    ("detect", "key", "remedy"),
    [
        ({"tag": ["minning"]}, "detect.tag[0]", "did you mean mining?"),
        ({"kill": ["mining"]}, "detect.kill", "kill_call"),
        ({"tag": "all"}, "detect.tag", "a list"),
        ({"tag": [7]}, "detect.tag[0]", "one of all"),
        ({"rules": ["rules.yml"]}, "detect.rules[0]", "absolute path"),
        ({"rules": ["/rules.yml"]}, "detect.rules", "what follows"),
    ],
)
def test_what_is_wrong_is_named(detect: object, key: str, remedy: str) -> None:
    with pytest.raises(PolicyError, match=remedy.replace("?", r"\?")) as raised:
        Policy.of({"detect": detect})
    assert raised.value.key == key
    assert plain.read({"detect": detect}) is None


def test_a_message_states_it() -> None:
    wire = Policy().to_wire()
    for wrong in ({**wire, "detect": {}}, {**wire, "detect": {**wire["detect"], "tag": ["no"]}}):
        with pytest.raises(PolicyError):
            CompiledPolicy.from_wire(wrong)
    del wire["detect"]
    with pytest.raises(PolicyError):
        CompiledPolicy.from_wire(wire)
