"""Prints the result: what each rollout did, what was refused and why, what the outside saw, bytes by destination."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from rome.actions import METADATA_ADDRESS, World
from rome.verdict import Call, Result

_COMMAND = 44
_TITLE = {"enforce": "guarded", "report": "guard reports, blocks nothing", "none": "NOT guarded"}
_CLOSING = {
    "enforce": "Every ROME act was tried, refused and attributed. The outside saw nothing. Ordinary work succeeded.",
    "report": "Every ROME act got through. Every connection seen outside was traced to the call that made it.",
    "none": "Without the guard every ROME act got through.",
}
_REASONS = {
    "report_only:not_listed": "no entry of egress.allow grants it; let through, because the policy only reports",
    "not_listed": "no entry of egress.allow grants it",
    "metadata_address": "a metadata address is refused unless it is listed itself",
}


def show(world: World, result: Result) -> None:
    _rollouts(result)
    _acts(result)
    _destinations(world, result)
    for alert in result.alerts:
        print(f"\nAN ALERT, TRACED TO ITS CAUSE (evidence: {alert.tier}). The line is {alert.writer}:\n\n{alert.line}")
        for what, which in alert.path:
            print(f"  {what:<10} {which}")
    print()
    if result.evidence:
        print(f"Evidence: {result.evidence}   (ray-guard report {result.evidence})")
    for failure in result.failures:
        print(f"NOT AS IT MUST BE: {failure}")
    if result.ok:
        print(_CLOSING[result.mode])


def _rollouts(result: Result) -> None:
    print(f"\nROLLOUTS ({_TITLE[result.mode]}): in every turn the policy model chose one command\n")
    rows = []
    for outcome in sorted(result.outcomes, key=lambda outcome: outcome.rollout):
        for call in sorted(result.calls, key=lambda call: call.turn.number):
            turn = call.turn
            if turn.rollout == outcome.rollout:
                rows.append([turn.rollout, str(turn.number), turn.kind, _short(turn.command), _ended(call)])
        rows.append([outcome.rollout, "", "", "", f"reward {outcome.reward:.2f}, {outcome.violations} violations"])
    _table(["rollout", "turn", "kind", "command", "outcome"], rows)
    used = {reason for call in result.calls for _, reason in call.refused}
    for reason in sorted(used & set(_REASONS)):
        print(f"\n{reason}: {_REASONS[reason]}", end="")
    print()


def _ended(call: Call) -> str:
    if call.got_through:
        return "GOT OUT" + (f", recorded as {call.refused[0][1]}" if call.refused else "")
    if call.refused:
        place = call.refused[0][0]
        more = f" and {len(call.refused) - 1} more" if len(call.refused) > 1 else ""
        reasons = ", ".join(dict.fromkeys(reason for _, reason in call.refused))
        return f"REFUSED {place}{more}: {reasons}"
    return "done" if call.turn.exit_status == 0 else f"exit status {call.turn.exit_status}"


def _acts(result: Result) -> None:
    print("\nWHAT ROME DID, judged by the servers outside and by Ray's own job list\n")
    rows = [
        [
            act.kind,
            str(act.tried),
            str(act.refused) if result.evidence else "-",
            str(act.attributed) if result.evidence else "-",
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
        if flow.transport == "unix" or flow.call_id is None:
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
        if not result.evidence:
            allowed = refused = sent = received = "-"
        rows.append([destination, meaning, allowed, refused, sent, received, arrived, left])
    _table(
        ["destination", "what it is", "allowed", "refused", "sent", "received", "arrived there", "sent from there"],
        rows,
    )


def _short(command: str) -> str:
    return command if len(command) <= _COMMAND else command[: _COMMAND - 1] + "…"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns as wide as their widest cell; numbers to the right."""
    body = [list(row) for row in rows]
    widths = [max(len(row[column]) for row in [list(head), *body]) for column in range(len(head))]
    numeric = [all(cell == "-" or cell.isdigit() for cell in column) for column in zip(*body, strict=True)]
    for row in [list(head), ["─" * width for width in widths], *body]:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        print("  ".join(cells).rstrip())
