"""Prints the result: what each rollout did, what was refused and why, what the outside saw, bytes by destination."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from rome.actions import METADATA_ADDRESS, World
from rome.verdict import Result

_COMMAND = 58


def show(world: World, result: Result) -> None:
    _rollouts(result)
    _acts(result)
    _destinations(world, result)
    for alert in result.alerts:
        print(f"\n{alert}")
    print()
    if result.evidence:
        print(f"Evidence: {result.evidence}   (ray-guard report {result.evidence})")
    for failure in result.failures:
        print(f"NOT AS IT MUST BE: {failure}")
    if result.ok and result.guarded:
        print("Every ROME act was tried, refused and attributed. The outside saw nothing. Ordinary work succeeded.")
    elif result.ok:
        print("Without the guard every ROME act got through.")


def _rollouts(result: Result) -> None:
    title = "guarded" if result.guarded else "NOT guarded"
    print(f"\nROLLOUTS ({title}): in every turn the policy model chose one command\n")
    rows = []
    for outcome in sorted(result.outcomes, key=lambda outcome: outcome.rollout):
        for turn in sorted((t for t in result.turns if t.rollout == outcome.rollout), key=lambda turn: turn.number):
            refused = sorted(
                {
                    (flow.reason, flow.destination)
                    for flow in result.flows
                    if (flow.rollout, flow.turn, flow.decision) == (turn.rollout, turn.number, "deny")
                    and flow.transport != "unix"
                }
            )
            if refused:
                reasons = ", ".join(sorted({reason for reason, _ in refused}))
                more = f" and {len(refused) - 1} more" if len(refused) > 1 else ""
                ended = f"REFUSED {refused[0][1]}{more}: {reasons}"
            elif not turn.ordinary:
                ended = "got out" if not result.guarded else "?"
            else:
                ended = "done" if turn.exit_status == 0 else f"exit status {turn.exit_status}"
            rows.append([turn.rollout, str(turn.number), turn.kind, _short(turn.command), ended])
        rows.append([outcome.rollout, "", f"reward {outcome.reward:.2f}", f"{outcome.violations} violations", ""])
    _table(["rollout", "turn", "kind", "command", "outcome"], rows)


def _acts(result: Result) -> None:
    print("\nWHAT ROME DID, judged by the servers outside and by Ray's own job list\n")
    rows = [
        [
            act.kind,
            str(act.tried),
            str(act.refused) if result.guarded else "-",
            str(act.attributed) if result.guarded else "-",
            str(act.got_through),
            f"{act.outside_connections} connections, {act.outside_bytes} bytes",
            "; ".join(act.outside_saw[:1]) + (f" (+{len(act.outside_saw) - 1})" if len(act.outside_saw) > 1 else ""),
        ]
        for act in result.acts
    ]
    _table(["act", "tried", "refused", "attributed", "got through", "outside saw", "such as"], rows)


def _destinations(world: World, result: Result) -> None:
    at = world.addresses
    network = at.range.rsplit(".", 1)[0] + "."
    known = {
        at.index: "package index, allowed",
        at.ssh: "SSH server outside",
        at.pool: "mining pool outside",
        at.metadata: f"stands for {METADATA_ADDRESS}",
        METADATA_ADDRESS: "metadata service",
        world.dashboard: "Ray's dashboard",
    }
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0, 0, 0])

    def place(destination: str) -> str:
        return f"{network}x:{at.range_port}" if destination.startswith(network) else destination

    for flow in result.flows:
        if flow.transport == "unix" or flow.rollout is None:
            continue
        row = totals[place(flow.destination)]
        row[0 if flow.decision == "allow" else 1] += 1
        row[2] += flow.sent or 0
        row[3] += flow.received or 0
    for connection in result.outside:
        row = totals[place(f"{connection.local[0]}:{connection.local[1]}")]
        row[4] += connection.received
        row[5] += connection.sent
    print("\nBYTES BY DESTINATION of all tool calls: on record, and as counted at the other end\n")
    rows = []
    for destination, numbers in sorted(totals.items()):
        allowed, refused, sent, received, arrived, left = map(str, numbers)
        meaning = "internal network" if destination.startswith(network) else known.get(destination, "")
        if not result.guarded:
            allowed = refused = sent = received = "-"
        rows.append([destination, meaning, allowed, refused, sent, received, arrived, left])
    _table(
        ["destination", "what it is", "allowed", "refused", "sent", "received", "arrived there", "sent from there"], rows
    )


def _short(command: str) -> str:
    return command if len(command) <= _COMMAND else command[: _COMMAND - 1] + "…"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns as wide as their widest cell; numbers to the right."""
    body = [list(row) for row in rows]
    widths = [max(len(row[column]) for row in [list(head), *body]) for column in range(len(head))]
    numeric = [all(row[column].lstrip("-").isdigit() or row[column] in "-" for row in body) for column in range(len(head))]
    for row in [list(head), ["─" * width for width in widths], *body]:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        print("  ".join(cells).rstrip())
