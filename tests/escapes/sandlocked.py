"""Runs a command in sandlock's sandbox, by its Python library. For the peers' interpreter, which has no ray_guard.

    python sandlocked.py '{"readable": […], "writable": […], "denied": […], "net_allow": […]}' COMMAND [ARGUMENT …]

The folders to read are those of its documentation's first example, and what is told; everything else is its default.
"""

from __future__ import annotations

import json
import sys

from sandlock import Sandbox

told = json.loads(sys.argv[1])
documented = ["/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc", "/proc", "/dev"]
sandbox = Sandbox(
    fs_readable=[*documented, *told["readable"]],
    fs_writable=[*told["writable"], "/dev/null"],
    fs_denied=told["denied"],
    net_allow=told["net_allow"],
    cwd=told["writable"][0],
)
status = sandbox.run_interactive(sys.argv[2:])
if status < 0:  # it does not say by which signal
    print('{"killed": true}')
sys.exit(status & 0xFF)
