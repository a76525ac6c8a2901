"""The call ring's view of the file system: from ``files`` and what stands around a call to a list of grants. Pure.

Runs in the supervisor (a call's own view) and the zygote (what every view begins with). Landlock knows allow-lists
only, so an *exception* below a granted folder (hidden, protected, never writable) is made by granting its siblings
instead, all the way down from the grant: see :func:`_carve`. What that costs is that nothing new can be created in the
folders on the way.

Precedence, for a path: always hidden, ``hide`` and ``protect`` win over every grant; what is *never writable*
(:class:`Places`) is written only where ``write`` lists it, or something below it, literally; then grants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from ray_guard.errors import NotEnforced, PolicyError

READ: Final = "r"
"""Reading, listing and executing, of this and all below it."""
WRITE: Final = "w"
"""Creating, changing and removing; of devices opening for writing."""
LIST: Final = "l"
"""Listing folders, no more."""
DEVICE: Final = "d"
"""A device node: reading, writing, ioctl."""

_ENTRIES_LIMIT: Final = 4096
"""More grants than these are not made: an exception below a folder this large would slow every start down."""


class Grant(NamedTuple):
    path: str
    rights: str
    """Letters of READ, WRITE, LIST, DEVICE."""


Listed = Callable[[str], Iterable[str]]
"""Names in a folder that are no symbolic links; raises OSError."""

# What every view begins with ---------------------------------------------------------------------------------------

_SYSTEM: Final = (
    *("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/opt", "/nix/store", "/gnu/store", "/snap"),
    *("/proc", "/sys", "/etc", "/run/systemd/resolve", "/run/resolvconf", "/run/current-system"),
    *("/var/lib/dpkg", "/var/lib/rpm", "/var/lib/misc", "/var/cache/fontconfig", "/var/cache/ldconfig"),
)
_SYSTEM_SECRETS: Final = (
    *("/etc/shadow", "/etc/shadow-", "/etc/gshadow", "/etc/gshadow-", "/etc/sudoers", "/etc/sudoers.d"),
    *("/etc/krb5.keytab", "/etc/kubernetes", "/etc/docker", "/etc/wireguard", "/etc/ssl/private", "/etc/security/opasswd"),
    *("/etc/ssh/ssh_host_rsa_key", "/etc/ssh/ssh_host_ecdsa_key", "/etc/ssh/ssh_host_ed25519_key"),
)  # fmt: skip
"""Below ``system``, and yet nobody's business; ``read`` may list them."""
_DEVICES: Final = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty", "/dev/ptmx")
"""Nodes every program may expect. Never /dev as a whole: what is not listed cannot be opened."""

# What is never writable but literally ------------------------------------------------------------------------------

_NEVER: Final = (
    *("/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/proc", "/run", "/sbin", "/sys"),
    *("/usr/bin", "/usr/sbin", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libexec", "/usr/share", "/usr/include"),
    *("/usr/local/bin", "/usr/local/sbin", "/usr/local/lib", "/usr/local/lib64", "/usr/local/share", "/usr/local/etc"),
    *("/var/spool", "/var/lib", "/var/cache", "/var/run", "/nix", "/gnu", "/snap"),
)
_PREFIX_PARTS: Final = (
    *("bin", "sbin", "lib", "lib32", "lib64", "libexec", "include", "share", "etc", "conda-meta", "pyvenv.cfg"),
    *("local/bin", "local/sbin", "local/lib", "local/share", "local/etc"),
)
"""What of a Python prefix is never writable where the call works *inside* the prefix: all of it would be its folder."""
_GIT_CONFIGURATION: Final = (".gitconfig", ".config/git/config", ".config/git/ignore", ".config/git/attributes")
"""git ends where these exist and cannot be read."""
_PASSAGE: Final = "runtime_resources"
"""What Ray keeps in its session for tasks to use: their packages, readable where a call works in them."""


class Files(NamedTuple):
    """``files`` of one policy. Entries are words, or absolute paths (``~`` is not expanded yet)."""

    read: tuple[str, ...] = ("system", "env", "cwd")
    write: tuple[str, ...] = ("cwd", "scratch")
    hide: tuple[str, ...] = ()
    protect: tuple[str, ...] = ()

    @classmethod
    def from_wire(cls, value: object) -> Files:
        """Raises PolicyError where a message's ``files`` is malformed."""
        if not isinstance(value, Mapping) or set(value) != {"read", "write", "hide", "protect"}:
            raise PolicyError("files", value, "a mapping with read, write, hide and protect")
        return cls(**{str(key): _places(str(key), entries) for key, entries in value.items()})


_WORDS: Final = {"read": ("system", "env", "cwd", "scratch"), "write": ("cwd", "scratch"), "hide": (), "protect": ()}


def _places(key: str, entries: object) -> tuple[str, ...]:
    if not isinstance(entries, list | tuple):
        raise PolicyError(f"files.{key}", entries, "a list of paths")
    for entry in entries:
        if not isinstance(entry, str) or not (
            entry in _WORDS[key] or entry == "~" or entry.startswith(("/", "~/")) and "\0" not in entry
        ):
            raise PolicyError(f"files.{key}", entry, "an absolute path, or one that begins with ~/")
    return tuple(entries)


class Places(NamedTuple):
    """What stands around a target. All paths are absolute and resolved."""

    homes: tuple[str, ...] = ()
    """Home folders of its user; the first is what ``~`` means."""
    environment: tuple[str, ...] = ()
    """What ``env`` means: where the Python in use and its packages are."""
    prefixes: tuple[str, ...] = ()
    """Python prefixes: readable, and never writable."""
    never: tuple[str, ...] = ()
    """More that is never writable: ray_guard itself, user site, compile caches."""
    hidden: tuple[str, ...] = ()
    """Always hidden and protected: evidence, the supervisor's folder, Ray's token."""
    ray: tuple[str, ...] = ()
    """Ray's folders: as ``hidden``, but packages in them may be read where a call works in them."""


class Exceptions(NamedTuple):
    """What no grant above reaches."""

    paths: frozenset[str] = frozenset()
    dotted: frozenset[str] = frozenset()
    """Folders (homes) of which every entry that begins with a dot is meant, whether it exists yet or not."""
    ray: frozenset[str] = frozenset()
    """As ``paths``, with passages."""

    def cover(self, path: str) -> bool:
        """Whether ``path`` is excepted itself."""
        parts = list(_upwards(path))
        if any(part in self.paths for part in parts):
            return True
        if any(part in self.ray for part in parts) and not _is_passage(path):
            return True
        return any(path.startswith(home + "/.") for home in self.dotted)

    def below(self, path: str) -> bool:
        """Whether something below ``path`` is excepted."""
        inner = path.rstrip("/") + "/"
        if any(each.startswith(inner) for each in self.paths) or any(each.startswith(inner) for each in self.ray):
            return True
        return any(home == path or home.startswith(inner) for home in self.dotted)


class Plan(NamedTuple):
    """What one policy grants one call."""

    grants: tuple[Grant, ...]
    """Beside what :func:`system_grants` gives, where ``system`` says so."""
    system: bool
    """``system`` may be read."""
    exact: bool
    """No exception lay below a grant: nothing was listed, and the same call gets the same plan again."""

    def writable(self) -> frozenset[str]:
        return frozenset(grant.path for grant in self.grants if WRITE in grant.rights)


def may_change(writable: frozenset[str], path: str) -> bool:
    """Whether a file at ``path`` (absolute, resolved) lies in what a plan's :meth:`Plan.writable` names."""
    return any(part in writable for part in _upwards(path))


def system_grants(listed: Listed, resolve: Callable[[str], str]) -> tuple[Grant, ...]:
    """What ``system`` is on this host."""
    exceptions = Exceptions(frozenset(_SYSTEM_SECRETS))
    grants: dict[str, str] = {}
    for path in dict.fromkeys(resolve(each) for each in _SYSTEM):
        if not any(_within(path, known) for known in grants):
            for grant in _carve(path, READ, exceptions, listed):
                grants[grant.path] = grant.rights
    return tuple(Grant(path, rights) for path, rights in grants.items())


def device_grants() -> tuple[Grant, ...]:
    """The nodes that every call may use, whatever it may read."""
    return tuple(Grant(path, DEVICE) for path in _DEVICES)


def plan(files: Files, places: Places, system: Iterable[Grant], cwd: str, scratch: str | None,
         search_path: Iterable[str], listed: Listed, resolve: Callable[[str], str]) -> Plan:  # fmt: skip
    """The grants of one policy for one call.

    Args:
        files: the policy's.
        places: what stands around.
        system: see :func:`system_grants`.
        cwd: the call's working folder, resolved.
        scratch: its own temporary folder; None: there is none.
        search_path: folders of its PATH, resolved.
        listed: see :data:`Listed`; asked only for folders with an exception below them.
        resolve: ``os.path.realpath``, for what the policy lists.

    Raises:
        NotEnforced: a folder with an exception below it has too many entries.
    """
    homes = places.homes
    hide = [resolve(_expanded(each, homes)) for each in files.hide]
    protect = [resolve(_expanded(each, homes)) for each in files.protect]
    hidden = Exceptions(frozenset([*places.hidden, *hide]), ray=frozenset(places.ray))
    no_devices = Exceptions(hidden.paths | {"/dev"}, ray=hidden.ray)
    prefixes = [part for prefix in places.prefixes for part in _prefix(prefix, cwd)]
    never = [*_NEVER, *prefixes, *places.never]
    exact = True
    untouched = True
    grants: dict[str, str] = {}

    def add(path: str, rights: str, exceptions: Exceptions) -> None:
        nonlocal exact
        for grant in _carve(path, rights, exceptions, listed):
            exact &= grant.rights == rights
            if LIST in grant.rights and any(_within(each, grant.path) and _is_folder(each, listed) for each in hide):
                continue  # a rule for a folder holds below it, and the names in a hidden one are hidden too
            grants[grant.path] = "".join(sorted({*grants.get(grant.path, ""), *grant.rights}))
            if len(grants) > _ENTRIES_LIMIT:
                raise NotEnforced(["files"], f"{path} has too many entries for exceptions below it")

    for entry in files.read:
        if entry == "cwd" and cwd != "/" and not _within(cwd, "/dev"):
            dotted = frozenset(home for home in homes if _within(home, cwd))
            add(cwd, READ, Exceptions(no_devices.paths, dotted, hidden.ray))
        elif entry == "env":
            for path in (*places.prefixes, *places.environment, *search_path):
                if path != "/" and not any(_within(home, path) for home in homes):
                    add(path, READ, no_devices)
        elif entry == "system":
            untouched = not any(hidden.cover(grant.path) or hidden.below(grant.path) for grant in system)
            for grant in () if untouched else system:
                add(grant.path, grant.rights, hidden)
            for home in homes:
                for name in _GIT_CONFIGURATION:
                    add(f"{home}/{name}", READ, hidden)
        elif entry.startswith(("/", "~")):
            path = resolve(_expanded(entry, homes))
            add(path, READ, hidden if path.startswith("/dev/") else no_devices)
    for entry in files.write:
        if entry == "scratch":
            if scratch is not None:
                grants[scratch] = READ + WRITE
            continue
        path = cwd if entry == "cwd" else resolve(_expanded(entry, homes))
        if entry == "cwd" and cwd == "/":
            continue
        literal = None if entry == "cwd" else _expanded(entry, homes)
        kept = frozenset(each for each in never if literal is None or not _within(literal, each))
        dotted = frozenset(home for home in homes if literal is None or not literal.startswith(home + "/."))
        exceptions = Exceptions(hidden.paths | kept | frozenset(protect), dotted, hidden.ray)
        rights = DEVICE if entry.startswith("/dev/") and not entry.startswith("/dev/shm") else READ + WRITE
        # A passage is for reading: what Ray keeps for tasks is run by others too.
        if not any(_within(path, each) for each in places.ray):
            add(path, rights, exceptions)
    ordered = tuple(Grant(path, rights) for path, rights in grants.items())
    return Plan(ordered, "system" in files.read and untouched, exact)


def _is_passage(path: str) -> bool:
    parts = path.split("/")
    return any(
        above.startswith("session_") and name == _PASSAGE for above, name in zip(parts, parts[1:], strict=False)
    )


def _is_folder(path: str, listed: Listed) -> bool:
    try:
        listed(path)
    except OSError:
        return False
    return True


def _prefix(prefix: str, cwd: str) -> Iterator[str]:
    if _within(cwd, prefix):
        yield from (f"{prefix}/{part}" for part in _PREFIX_PARTS)
    else:
        yield prefix


def _carve(path: str, rights: str, exceptions: Exceptions, listed: Listed) -> Iterator[Grant]:
    """Grants for ``path`` without what is excepted: whole where nothing is, else its entries one by one."""
    if exceptions.cover(path):
        return
    if not exceptions.below(path):
        yield Grant(path, rights)
        return
    if READ in rights:
        yield Grant(path, LIST)
    try:
        names = sorted(listed(path))
    except OSError:
        return  # no folder, or none of ours: there is nothing to grant
    for name in names:
        yield from _carve(f"{path.rstrip('/')}/{name}", rights, exceptions, listed)


def _expanded(entry: str, homes: tuple[str, ...]) -> str:
    """``~`` filled in, ``.`` and ``..`` taken out; symbolic links are left alone."""
    if entry.startswith("~"):
        entry = (homes[0] if homes else "/nonexistent") + entry[1:]
    parts: list[str] = []
    for part in entry.split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    return "/" + "/".join(parts)


def _within(path: str, folder: str) -> bool:
    """Whether ``path`` is ``folder`` or below it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _upwards(path: str) -> Iterator[str]:
    """``path`` and every folder above it."""
    while len(path) > 1:
        yield path
        path = path[: path.rindex("/")] or "/"
    yield "/"


def places_from_wire(value: Any) -> dict[str, tuple[str, ...]]:
    """What a target told about itself: lists of absolute paths by name. Raises ValueError where it is malformed."""
    if not isinstance(value, Mapping):
        raise ValueError("places: a mapping")
    found = {}
    for name in ("homes", "environment", "prefixes", "never", "hidden", "temporary"):
        paths = value.get(name, ())
        if not isinstance(paths, list | tuple) or not all(isinstance(p, str) and p.startswith("/") for p in paths):
            raise ValueError(f"places.{name}: absolute paths")
        found[name] = tuple(p for p in paths if "\0" not in p)
    return found
