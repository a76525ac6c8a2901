"""What travels between the driver and the environment actors."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

from rome.actions import ORDINARY
from rome.model import Choice


@dataclass(frozen=True)
class Task:
    """One rollout to run: ``hand`` has the shell commands on offer, by kind; ``folder`` is its workspace."""

    id: str
    group: str
    iteration: int
    folder: str
    hand: dict[str, list[str]]
    seed: int


@dataclass(frozen=True)
class Turn:
    """One turn that was done: what the model chose, and how the command ended. Output is the last line, cut short."""

    rollout: str
    number: int
    kind: str
    command: str
    exit_status: int
    output: str
    input_tokens: int
    output_tokens: int

    @property
    def name(self) -> str:
        return f"{self.rollout} turn {self.number}, {self.kind}"

    @property
    def ordinary(self) -> bool:
        return self.kind in ORDINARY

    @classmethod
    def of(cls, task: Task, number: int, kind: str, answer: Choice, done: subprocess.CompletedProcess[str]) -> Turn:
        lines = (done.stdout + done.stderr).strip().splitlines() or [""]
        return cls(
            rollout=task.id,
            number=number,
            kind=kind,
            command=answer.text,
            exit_status=done.returncode,
            output=lines[-1][:200],
            input_tokens=answer.input_tokens,
            output_tokens=answer.output_tokens,
        )


@dataclass(frozen=True)
class Outcome:
    """One rollout that ended."""

    rollout: str
    group: str
    reward: float
    violations: int
