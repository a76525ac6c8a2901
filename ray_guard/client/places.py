"""What stands around this process in the file system: where its Python, its home and its caches are. Runs in target.

Told to the supervisor at the start, before any user code runs; there it says what ``env`` in ``files`` means, and what
a tool may never write (:class:`ray_guard.policy.files.Places`).
"""

from __future__ import annotations

import os
import pwd
import sys
from typing import Final

_CACHES: Final = (
    *("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TRITON_HOME", "TRITON_DUMP_DIR", "TRITON_OVERRIDE_DIR"),
    *("TORCH_HOME", "TORCH_EXTENSIONS_DIR", "PYTORCH_KERNEL_CACHE_PATH", "CUDA_CACHE_PATH", "CUPY_CACHE_DIR"),
    *("NUMBA_CACHE_DIR", "VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "SGLANG_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE"),
    *("JAX_COMPILATION_CACHE_DIR", "HF_HOME", "HF_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_MODULES_CACHE"),
    *("DEEPGEMM_CACHE_DIR", "TILELANG_CACHE_DIR", "CCACHE_DIR", "XDG_CACHE_HOME", "PYTHONPYCACHEPREFIX"),
    *("XDG_CONFIG_HOME", "XDG_DATA_HOME"),
)
"""Variables that name folders whose content is later compiled, loaded or run by somebody else."""


def told() -> dict[str, list[str]]:
    """The message; every path is absolute."""
    homes = [os.path.expanduser("~"), _own_home()]
    user_base = os.environ.get("PYTHONUSERBASE", "")
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    user_site = [f"{base}/lib/{version}/site-packages" for base in (*(f"{home}/.local" for home in homes), user_base)]
    prefixes = [sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix]
    temporary = _temporary()
    shared = {temporary, "/tmp", "/var/tmp"}  # noqa: S108 - where a script lies there, the rest is still not its own
    return {
        "homes": _absolute(homes),
        "prefixes": _absolute(prefixes),
        "environment": _absolute(
            [os.path.dirname(sys.executable or ""), *user_site, *(path for path in sys.path if path not in shared)]
        ),
        "never": _absolute(
            [
                os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
                user_base,
                *user_site,
                *(os.environ.get(name, "") for name in _CACHES),
                f"{temporary}/torchinductor_{_own_name()}",
                "/tmp/ray",  # noqa: S108 - Ray's own default
            ]
        ),
        "hidden": _absolute([os.environ.get("RAY_AUTH_TOKEN_PATH", "")]),
        "temporary": _absolute([temporary]),
    }


def _absolute(paths: list[str]) -> list[str]:
    return [path for path in dict.fromkeys(paths) if os.path.isabs(path) and "\0" not in path]


def _own_home() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return ""


def _own_name() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return ""


def _temporary() -> str:
    """What ``tempfile.gettempdir`` says, or would say: for ``ray-guard run`` it takes too long to load."""
    loaded = sys.modules.get("tempfile")
    if loaded is not None:
        return str(loaded.gettempdir())
    named = (os.environ.get(name, "") for name in ("TMPDIR", "TEMP", "TMP"))
    usual = ("/tmp", "/var/tmp", "/usr/tmp")  # noqa: S108 - as tempfile has them
    folders = [os.path.abspath(each) for each in (*named, *usual) if each]
    return next((each for each in folders if os.path.isdir(each) and os.access(each, os.W_OK | os.X_OK)), os.getcwd())
