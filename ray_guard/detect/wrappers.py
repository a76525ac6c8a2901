"""Programs that run another one: which, and with which arguments. Runs later, and live. Pure."""

from __future__ import annotations

import re
import shlex
from typing import Final, NamedTuple

SHELLS: Final = frozenset("sh bash dash zsh ksh ash fish rbash".split())
_MOST: Final = 8
"""Wrappers around wrappers."""

#: by name, the letters of options that take a value
_WRAPPERS: Final = {
    word.partition(":")[0]: word.partition(":")[2]
    for word in (
        "sudo:ugpCchrtTUD doas:uC env:uCS nohup setsid nice:n ionice:cnpP chrt timeout:ks stdbuf:ioe time:fo command "
        "exec:a builtin xargs:IinLlPsdEa parallel:jSNnLdI strace:eopsSuEaXO ltrace:eopsu unbuffer torsocks "
        "torify tsocks "
        "proxychains:f proxychains4:f graftcp:cf socksify "
        "chroot unshare:SG nsenter:tSG setpriv setarch linux64 linux32 faketime:f "
        "systemd-run:pMuEH systemd-inhibit daemonize:cpEeo start-stop-daemon:xanpudgc screen:SctpTXe tmux:sncxytFfSL "
        "dtach:n abduco:n watch:n script:cEIO busybox toybox taskset flock:wE catchsegv numactl:NCmiplw firejail bwrap "
        "dbus-run-session xvfb-run:efnspw valgrind perf sshpass:fpdP cgexec:g chronic "
        "nsjail:MC runcon:turlc sg eatmydata rlwrap trickle:ud cpulimit:lpe retry:td "
        "then else elif do if while until ! & { coproc RUN CMD ENTRYPOINT"
    ).split()
}
_LONG_VALUED: Final = frozenset(
    (
        "--signal --kill-after --user --group --unit --property --setenv --chdir --class --classdata "
        "--adjustment --slice "
        "--description --working-directory --max-args --max-procs --replace --delimiter --arg-file --input "
        "--output --error "
        "--jobs --unset --exec --pidfile --name --chuid --startas --interval --title --cpunodebind --membind "
        "--physcpubind "
        "--expression --target --root --wait --host --machine --on-active --on-calendar --timer-property --on-boot"
    ).split()
)
#: words that stand before the program
_BEFORE: Final = {"timeout": 1, "chroot": 1, "taskset": 1, "flock": 1, "chrt": 1, "sg": 1, "faketime": 1, "dtach": 0}
_SUBCOMMANDS: Final = {
    "tmux": frozenset("new new-session neww new-window splitw split-window respawn-pane run-shell run".split()),
    "perf": frozenset(("stat", "record", "trace")),
}
_RUNNERS: Final = {
    **dict.fromkeys("npx bunx pnpx uvx wsl".split(), ()),
    **dict.fromkeys("pipx go poetry uv conda mamba pdm hatch rye nix cargo deno".split(), ("run",)),
    "npm": ("exec", "x"),
    "pnpm": ("dlx", "exec"),
    "yarn": ("dlx", "exec"),
    "bun": ("x",),
    "bundle": ("exec",),
    "ip": ("netns",),
}
"""Programs that run another by its name, or by its package's, and the words by which they do so; none: always."""
_SERVICES: Final = frozenset("systemctl service rc-service initctl".split())
_CONTAINERS: Final = frozenset("docker podman nerdctl kubectl oc lxc docker-compose".split())
_CONTAINER_FLAGS: Final = frozenset(
    "--rm --privileged --init --detach --interactive --tty --read-only --no-healthcheck --quiet --stdin -d -i "
    "-t -it -ti -dit -itd "
    "-P -q --rm=true --attach --no-deps -T".split()
)
_ASSIGNMENT: Final = re.compile(r"[A-Za-z_]\w*\+?=")
_UNIT: Final = re.compile(r"Exec(?:Start|StartPre|StartPost|Stop)=[-@:+!]*")
_TIMES: Final = re.compile(r"[\d*/,A-Za-z-]+")
_LOADER: Final = re.compile(r"ld-(?:linux|musl)[\w.-]*\.so")
_INTERPRETERS: Final = re.compile(r"(?:python|perl|ruby|node|php|lua|deno|java|(?:ba|da|z)?sh)[\d.]*")
_SCRIPT: Final = re.compile(r"^[\w./~-]+\.(?:py|pl|rb|js|php|lua|sh)$")
_VERSION: Final = re.compile(r"(?<=.)@[\w.^~-]*$|:[\w.-]+$|==[\w.]+$")


class Unwrapped(NamedTuple):
    """The program and its arguments; and texts that are run besides."""

    words: list[str]
    texts: list[str]


def unwrapped(words: list[str]) -> Unwrapped:
    """What is run in the end by a simple command's words."""
    left, texts = list(words), []
    for _ in range(_MOST):
        while left and _ASSIGNMENT.match(left[0]) and not _UNIT.match(left[0]):
            value = left.pop(0).partition("=")[2]
            if " " in value or value.startswith(("$(", "`")):
                texts.append(value)  # GIT_SSH_COMMAND='ssh …' git fetch; found=$(…)
        left = _timed(left)
        if len(left) < 2:
            break
        name = left[0].rpartition("/")[2]
        if name in _WRAPPERS or _LOADER.match(name):
            inner = _behind_options(name, left[1:], texts)
        elif name in _SERVICES:
            return Unwrapped(left, texts + _served(left[1:]))
        elif name in _CONTAINERS:
            texts += _contained(left)
            return Unwrapped(left, texts)
        else:
            inner = _run_by_name(name, left)
        if not inner:
            break
        left = inner
    if len(left) == 1 and " " in left[0]:  # tmux new-session -d 'ssh …'
        return Unwrapped([], [*texts, left[0]])
    script = next((at for at, word in enumerate(left) if at and not word.startswith("-")), 0)
    if left and _INTERPRETERS.fullmatch(left[0].rpartition("/")[2]) and script and _SCRIPT.search(left[script]):
        texts.append(shlex.join(left[script:]))
    return Unwrapped(left, texts)


def _timed(words: list[str]) -> list[str]:
    """Without what a timetable or a unit writes in front of a command."""
    if not words:
        return words
    unit = _UNIT.match(words[0])
    if unit:
        return [words[0][unit.end() :], *words[1:]] if unit.end() < len(words[0]) else words[1:]
    if words[0] in ("@reboot", "@hourly", "@daily", "@weekly"):
        return words[1:]
    if (
        len(words) > 5
        and words[0][:1] in "*0123456789"
        and all(map(_TIMES.fullmatch, words[:5]))
        and "*" in "".join(words[:5])
    ):
        return words[6:] if words[5] in ("root", "nobody", "www-data", "ubuntu") and len(words) > 6 else words[5:]
    return words


def _behind_options(name: str, rest: list[str], texts: list[str]) -> list[str]:
    valued = _WRAPPERS.get(name, "")
    if name in _SUBCOMMANDS and rest and rest[0] in _SUBCOMMANDS[name]:
        rest = rest[1:]
    while rest and rest[0].startswith("-") and rest[0] != "-":
        option = rest.pop(0)
        if option == "--":
            break
        if name == "env" and option.startswith(("-S", "--split-string")):
            texts.append(option[2:] if option[2:3] not in ("", "-") else option.partition("=")[2] or " ".join(rest[:1]))
        takes = option in _LONG_VALUED or (re.fullmatch(r"-[A-Za-z]+", option) and option[-1] in valued)
        if takes and rest:
            value = rest.pop(0)
            if " " in value:
                texts.append(value)
    return rest[_BEFORE.get(name, 0) :]


def _served(words: list[str]) -> list[str]:
    """The programs, by their units' names, that a manager of services is told to start."""
    told = [word for word in words if not word.startswith("-")]
    if not {"start", "restart", "enable", "reenable"} & set(told):
        return []
    return [shlex.quote(word.removesuffix(".service").partition("@")[0]) for word in told]


def _run_by_name(name: str, left: list[str]) -> list[str]:
    if name.startswith("python") and "-m" in left[1:3]:
        at = left.index("-m")
        return (
            [left[at + 1].rpartition(".")[2] if ".__main__" in left[at + 1] else left[at + 1], *left[at + 2 :]]
            if at + 1 < len(left)
            else []
        )
    if name not in _RUNNERS:
        return []
    words = [each for each in left[1:] if each != "--"]
    if _RUNNERS[name]:
        if not words or words[0] not in _RUNNERS[name]:
            return []
        words.pop(0)
    if name == "ip":
        return words[2:] if words[:1] == ["exec"] else []
    while words and words[0].startswith("-"):
        option = words.pop(0)
        if option in ("-p", "--package", "-n", "--name", "--with", "--from", "--python") and words:
            words.pop(0)
    return [_VERSION.sub("", words[0]).rpartition("/")[2], *words[1:]] if words else []


def _contained(left: list[str]) -> list[str]:
    """The command lines that are run in a container; an image that is named after its program is one."""
    name, words = left[0].rpartition("/")[2], left[1:]
    if "--" in words:
        return [shlex.join(words[words.index("--") + 1 :])]
    try:
        begin = next(at for at, word in enumerate(words) if word in ("run", "exec", "create"))
    except StopIteration:
        return []
    rest, entry = words[begin + 1 :], ""
    while rest and rest[0].startswith("-"):
        option = rest.pop(0)
        if option.startswith("--entrypoint"):
            entry = option.partition("=")[2] or (rest[0] if rest else "")
        if option not in _CONTAINER_FLAGS and "=" not in option and rest and not re.fullmatch(r"-[a-z]\S+", option):
            rest.pop(0)
    if not rest or name in ("kubectl", "oc"):
        return []
    image, *inner = rest
    program = entry or _VERSION.sub("", image).rpartition("/")[2]
    return [shlex.join([program, *inner]), shlex.join(inner)]
