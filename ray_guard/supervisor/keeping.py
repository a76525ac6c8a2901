"""What is kept of a supervisor's targets by others, should it die. Runs in zygote and witness."""

from __future__ import annotations

from typing import Any

from ray_guard.supervisor.unread import About, Unread
from ray_guard.supervisor.wards import Ward, Wards


class Keeping:
    """Their lines, whose unread messages count, and their trees, which are ended: :mod:`ray_guard.supervisor.care`."""

    def __init__(self) -> None:
        self.unread = Unread()
        self.wards = Wards()

    def obey(self, message: dict[str, Any], descriptors: list[int]) -> bool:
        """The supervisor's word. The descriptors are ours from here on. False: it is not about any of this."""
        operation = message.get("op")
        if operation in ("line", "ward"):
            if "about" in message:
                self.unread.hold(int(message["line"]), descriptors.pop(), About(*message["about"]))
            if "pid" in message:
                pid, lifeline = int(message["pid"]), descriptors[0] if descriptors else None
                self.wards.add(Ward(pid, int(message["start_time"]), lifeline, int(message.get("root", pid))))
        elif operation == "inbox":
            (self.unread.inbox,) = descriptors
        elif operation == "rename":
            self.unread.rename(int(message["line"]), message["resource"])
        elif operation == "release":
            self.unread.release(int(message["line"]))
            self.wards.release(int(message["pid"]))
        else:
            return False
        return True
