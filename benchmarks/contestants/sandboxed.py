"""Runs a command in sandlock's sandbox, by its Python library as its documentation says. For the peers' interpreter.

    python sandboxed.py PORT COMMAND [ARGUMENT ...]

127.0.0.1:PORT is the only destination granted; everything can be read, as our guard leaves it too.
"""

from __future__ import annotations

import sys

from sandlock import Sandbox

port, *command = sys.argv[1:]
sys.exit(Sandbox(fs_readable=["/"], net_allow=[f"127.0.0.1:{port}"]).run_interactive(command))
