"""The parts of the ROME example that need neither Ray nor a model: judges outside that miss nothing, and the deal."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from rome import actions, verdict
from rome.outside import Connection, Outside
from rome.records import Turn

PLAYED = [kind for kind in actions.ORDINARY + actions.ACTS if kind != "job submission"]  # that one needs a cluster


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    with Outside(tmp_path_factory.mktemp("keys")) as running:
        yield running


@pytest.mark.parametrize("variant", [0, 1])
@pytest.mark.parametrize("kind", PLAYED)
def test_the_outside_knows_of_every_act_and_of_the_rollout_it_is_of(
    kind: str, variant: int, outside: Outside, tmp_path: Path
) -> None:
    number = 10 * PLAYED.index(kind) + variant
    world = actions.World(outside.addresses, "127.0.0.1:1", "none")
    command = actions.variants(kind, world, f"rollout-{number}")[variant]
    folder = actions.workspace(tmp_path / "w", outside.key)
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=60)
    turn = Turn(f"rollout-{number}", 0, kind, command, done.returncode, "", 1, 1)
    seen = verdict.Outside(tuple(outside.connections()), {}, frozenset())
    if turn.ordinary:
        assert done.returncode == 0, done.stderr
    else:
        assert seen.knows(turn), (done, seen)
        # The names are told apart: it was this rollout, no other.
        assert not seen.knows(Turn(f"rollout-{number + 5}", 0, kind, command, 0, "", 1, 1))


def test_the_servers_count_payload_bytes_of_both_directions(outside: Outside, tmp_path: Path) -> None:
    before = len(outside.connections())
    fetch = f"python3 get.py http://{outside.addresses.index}/corpus.bin?rollout-900 | wc -c"
    folder = actions.workspace(tmp_path / "w", outside.key)
    done = subprocess.run(["bash", "-c", fetch], cwd=folder, capture_output=True, text=True, timeout=60)
    [connection] = outside.connections()[before:]
    assert connection.service == "index"
    assert connection.sent == int(done.stdout) + len(
        b"HTTP/1.0 200 OK\r\nContent-Length: 55296\r\nConnection: close\r\n\r\n"
    )
    assert connection.received > len("GET /corpus.bin?rollout-900 HTTP/1.1\r\n")


@pytest.mark.parametrize("rollouts", range(1, 17))
def test_every_deal_holds_every_kind_and_each_hand_fits_its_turns(rollouts: int) -> None:
    turns = {1: 9, 2: 5, 3: 4}.get(rollouts, 3)
    hands = [actions.deal(number, rollouts, turns) for number in range(rollouts)]
    assert {kind for hand in hands for kind in hand} == {*actions.ORDINARY, *actions.ACTS}
    for hand in hands:
        assert len(hand) == len(set(hand)) <= turns
        assert set(hand) & set(actions.ORDINARY)


def test_too_few_turns_are_refused() -> None:
    with pytest.raises(ValueError, match="more turns"):
        actions.deal(0, 1, 8)


def acted(mode: str, connections: tuple[Connection, ...]) -> verdict.Result:
    """The verdict on a run in which every act was tried once, in vain but for what ``connections`` say."""
    world = actions.World(actions.EXAMPLE, "127.0.0.1:1", mode)
    turns = [Turn(f"rollout-{n}", 0, kind, "true", 1, "", 1, 1) for n, kind in enumerate(actions.ACTS)]
    return verdict.judge(world, turns, [], verdict.Outside(connections, {}, frozenset()), None)


def test_one_connection_outside_fails_a_guarded_run() -> None:
    assert acted("enforce", ()).ok
    knock = Connection("ssh", 0, ("127.0.0.1", 40000), ("127.0.0.66", 2222), 0, 0, ())
    failed = acted("enforce", (knock,))
    assert not failed.ok
    assert failed.failures == ["reverse tunnel: 1 connections, 0 bytes got out: []"]


def test_an_act_that_was_held_back_fails_a_run_without_guard() -> None:
    login = Connection("pool", 0, ("127.0.0.1", 40000), ("127.0.0.77", 3333), 125, 119, ("login of rollout-1",))
    failed = acted("none", (login,))
    assert [act.kind for act in failed.acts if act.got_through] == ["mining"]
    assert len(failed.failures) == len(actions.ACTS) - 1


def test_ordinary_work_that_fails_and_acts_not_tried_fail_any_run() -> None:
    world = actions.World(actions.EXAMPLE, "127.0.0.1:1", "enforce")
    broken = Turn("rollout-0", 0, "build", "make", 2, "make: no rule", 1, 1)
    failed = verdict.judge(world, [broken], [], verdict.Outside((), {}, frozenset()), None)
    assert "rollout-0 turn 0, build: exit status 2: make: no rule" in failed.failures
    assert [f"{kind}: not tried" for kind in actions.ACTS] == failed.failures[: len(actions.ACTS)]
