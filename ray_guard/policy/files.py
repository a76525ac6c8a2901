"""The call ring's view of the file system: from ``files`` and what stands around a call to a list of grants. Pure.

Runs in the supervisor (a call's own view) and the zygote (what every view begins with). Landlock knows allow-lists
only, and an *exception* below a granted folder (hidden, protected, never writable) needs more:

- where the call can have a mount namespace of its own, what exists is *covered*: bound read-only, or by emptiness;
- elsewhere its siblings are granted instead, all the way down from the grant (:func:`_carve`). What that costs is that
  nothing new can be created in the folders on the way. So it is, too, for what does not exist yet and must not.

Precedence, for a path: always hidden, ``hide`` and ``protect`` win over every grant; what is *never writable*
(:class:`Places`) is written only where ``write`` lists it, or something below it, literally; then grants.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from ray_guard.errors import NotEnforced, PolicyError
from ray_guard.named import NamedTuple

READ: Final = "r"
"""Reading, listing and executing, of this and all below it."""
WRITE: Final = "w"
"""Creating, changing and removing; of devices opening for writing."""
LIST: Final = "l"
"""Listing folders, no more."""
DEVICE: Final = "d"
"""A device node: reading, writing, ioctl."""

HIDE: Final = "hide"
PROTECT: Final = "protect"
PIN: Final = "pin"
_SHARED_MEMORY: Final = "/dev/shm"  # noqa: S108 - a path like any other

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
    *("/etc/krb5.keytab", "/etc/kubernetes", "/etc/docker", "/etc/wireguard", "/etc/ssl/private"),
    *("/etc/security/opasswd", "/etc/ssh/ssh_host_rsa_key", "/etc/ssh/ssh_host_ecdsa_key"),
    *("/etc/ssh/ssh_host_ed25519_key", "/etc/ssh/ssh_host_dsa_key", "/etc/pki/tls/private", "/etc/letsencrypt"),
    *("/etc/ipsec.secrets", "/etc/openvpn", "/etc/ppp", "/etc/NetworkManager/system-connections"),
    *("/etc/rancher", "/etc/munge", "/etc/mysql/debian.cnf"),
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
_GROUPS: Final = "/sys/fs/cgroup"
"""Never writable at all: a tool could leave its call's control group."""
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
            entry in _WORDS[key] or entry == "~" or (entry.startswith(("/", "~/")) and "\0" not in entry)
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


class Cover(NamedTuple):
    """A mount in the call's own namespace."""

    path: str
    how: str
    """HIDE, PROTECT, or PIN: what is above a covered place must keep its position too."""


class Plan(NamedTuple):
    """What one policy grants one call."""

    grants: tuple[Grant, ...]
    """Beside what :func:`system_grants` gives, where ``system`` says so."""
    covers: tuple[Cover, ...]
    """What is above before what is below it."""
    system: bool
    """``system`` may be read."""
    exact: bool
    """No folder was listed: the same call gets the same plan again."""

    def writable(self) -> frozenset[str]:
        return frozenset(grant.path for grant in self.grants if WRITE in grant.rights)


def may_change(writable: frozenset[str], path: str) -> bool:
    """Whether a file at ``path`` (absolute, resolved) lies in what a plan's :meth:`Plan.writable` names."""
    return any(part in writable for part in _upwards(path))


def system_grants(listed: Listed, resolve: Callable[[str], str], *, mounts: bool) -> tuple[Grant, ...]:
    """What ``system`` is on this host. ``mounts``: secrets in it will be covered, so need no going around."""
    exceptions = Exceptions() if mounts else Exceptions(frozenset(_SYSTEM_SECRETS))
    grants: dict[str, str] = {}
    for path in dict.fromkeys(resolve(each) for each in _SYSTEM):
        if not any(_within(path, known) for known in grants):
            for grant in _carve(path, READ, exceptions, listed):
                grants[grant.path] = grant.rights
    return tuple(Grant(path, rights) for path, rights in grants.items())


def device_grants() -> tuple[Grant, ...]:
    """The nodes that every call may use, whatever it may read."""
    return tuple(Grant(path, DEVICE) for path in _DEVICES)


class Surroundings(NamedTuple):
    """What a view depends on beside the policy."""

    places: Places
    system: tuple[Grant, ...]
    """See :func:`system_grants`."""
    cwd: str
    """The call's working folder, resolved."""
    search_path: tuple[str, ...]
    """Folders of its PATH, resolved."""
    mounts: bool
    """The call can have a mount namespace of its own, and so exceptions can be covered."""


class Looking(NamedTuple):
    """The little that has to be asked of the file system itself."""

    listed: Listed
    resolve: Callable[[str], str]
    """``os.path.realpath``."""
    exists: Callable[[str], bool]


def plan(files: Files, around: Surroundings, look: Looking) -> Plan:
    """The grants of one policy for one call, but for its scratch folder.

    Raises:
        NotEnforced: a folder with an exception below it has too many entries.
    """
    return _Planner(files, around, look).plan()


class _Planner:
    def __init__(self, files: Files, around: Surroundings, look: Looking) -> None:
        self._files = files
        self._around = around
        self._look = look
        places = around.places
        self._homes = places.homes
        self._hide = [look.resolve(_expanded(each, self._homes)) for each in files.hide]
        self._protect = [look.resolve(_expanded(each, self._homes)) for each in files.protect]
        self._hidden = Exceptions(frozenset([*places.hidden, *self._hide]), ray=frozenset(places.ray))
        prefixes = [part for prefix in places.prefixes for part in _prefix(prefix, around.cwd)]
        self._never = (*_NEVER, *prefixes, *places.never)
        self._grants: dict[str, str] = {}
        self._covers: dict[str, str] = {}
        self._exact = True
        self._untouched = True

    def plan(self) -> Plan:
        for entry in self._files.read:
            self._read(entry)
        for entry in self._files.write:
            self._write(entry)
        covers = sorted(self._covers.items(), key=lambda item: (item[0].count("/"), item[0]))
        return Plan(
            self._needed(),
            tuple(Cover(path, how) for path, how in covers if not self._is_under_a_hide(path)),
            "system" in self._files.read and self._untouched,
            self._exact,
        )

    def _needed(self) -> tuple[Grant, ...]:
        """Without those that a grant above includes: each costs every start a few microseconds."""
        all_of = dict(self._grants)
        if "system" in self._files.read and self._untouched:
            all_of |= {grant.path: grant.rights + all_of.get(grant.path, "") for grant in self._around.system}
        return tuple(
            Grant(path, rights)
            for path, rights in self._grants.items()
            if not any(set(rights) <= set(all_of.get(above, "")) for above in _upwards(path) if above != path)
        )

    def _is_under_a_hide(self, path: str) -> bool:
        return any(self._covers.get(above) == HIDE for above in _upwards(path) if above != path)

    def _read(self, entry: str) -> None:
        devices = frozenset({"/dev"})
        if entry == "system":
            self._read_system()
        elif entry == "env":
            programs = (each for path in self._around.search_path for each in _installed(path, self._homes))
            for path in (*self._around.places.prefixes, *self._around.places.environment, *programs):
                shared = path == "/" or any(_within(home, path) for home in self._homes)
                if not shared and self._look.exists(path):
                    self._add(path, READ, devices)
        elif entry == "cwd":
            if self._around.cwd != "/":
                dotted = frozenset(home for home in self._homes if _within(home, self._around.cwd))
                self._add(self._around.cwd, READ, devices, dotted)
        elif entry != "scratch":
            path = self._resolved(entry)
            self._add(path, READ, frozenset() if path.startswith("/dev/") else devices)

    def _read_system(self) -> None:
        system = self._around.system
        touched = [g for g in system if self._hidden.cover(g.path) or self._hidden.below(g.path)]
        self._untouched = not touched
        for grant in system if touched else ():
            self._add(grant.path, grant.rights, frozenset())
        for secret in _SYSTEM_SECRETS if self._around.mounts else ():
            if secret not in self._files.read and self._look.exists(secret):
                self._covers[secret] = HIDE
        for home in self._homes:
            for name in _GIT_CONFIGURATION:
                self._add(f"{home}/{name}", READ, frozenset())

    def _write(self, entry: str) -> None:
        if entry == "scratch" or (entry == "cwd" and self._around.cwd == "/"):
            return
        path = self._around.cwd if entry == "cwd" else self._resolved(entry)
        if any(_within(path, each) for each in self._around.places.ray):
            return  # a passage is for reading: what Ray keeps for tasks is run by others too
        literal = None if entry == "cwd" else _expanded(entry, self._homes)
        if _within(path, _GROUPS):
            raise PolicyError("files.write", entry, "no control groups: a tool could leave its call's")
        never = frozenset(each for each in self._never if literal is None or not _within(literal, each)) | {_GROUPS}
        dotted = frozenset(home for home in self._homes if literal is None or not literal.startswith(home + "/."))
        device = path.startswith("/dev/") and not _within(path, _SHARED_MEMORY)
        self._add(path, DEVICE if device else READ + WRITE, never | frozenset(self._protect), dotted)

    def _resolved(self, entry: str) -> str:
        return self._look.resolve(_expanded(entry, self._homes))

    def _add(self, path: str, rights: str, more: frozenset[str], dotted: frozenset[str] = frozenset()) -> None:
        """Grants ``path`` but for what is hidden, and ``more``."""
        exceptions = Exceptions(self._hidden.paths | more, dotted, self._hidden.ray)
        if exceptions.cover(path):
            return
        below = [each for each in (*exceptions.paths, *exceptions.ray) if each != path and _within(each, path)]
        if self._around.mounts and below:
            covered = frozenset(each for each in below if each != "/dev" and self._look.exists(each))
            for each in covered:
                self._cover(each, path)
            exceptions = Exceptions(exceptions.paths - covered, dotted, exceptions.ray - covered)
        for grant in _carve(path, rights, exceptions, self._look.listed):
            if grant.rights != rights:
                self._exact = False
                if self._hides_names_below(grant.path):
                    continue
            self._grants[grant.path] = "".join(sorted({*self._grants.get(grant.path, ""), *grant.rights}))
            if len(self._grants) > _ENTRIES_LIMIT:
                raise NotEnforced(["files"], f"{path} has too many entries for exceptions below it")

    def _cover(self, path: str, grant: str) -> None:
        hidden = path in self._hidden.paths or path in self._hidden.ray
        if hidden or self._covers.get(path) != HIDE:
            self._covers[path] = HIDE if hidden else PROTECT
        for above in _upwards(path):
            if above == grant:
                break
            self._covers.setdefault(above, PIN)

    def _hides_names_below(self, folder: str) -> bool:
        """Whether ``folder`` must not be listed: the rule would hold below it, where names are hidden too."""
        return any(_within(each, folder) and _is_folder(each, self._look.listed) for each in self._hide)


def _installed(folder: str, homes: tuple[str, ...]) -> Iterator[str]:
    """A folder of PATH, and where it belongs to an installation (``…/bin``, pyenv's ``shims``) all of that.

    Folders such as ~/.local and ~/.cargo, which hold more than programs, are not taken for one.
    """
    yield folder
    above, _, name = folder.rpartition("/")
    home = above.rpartition("/")[0]
    if above and (name == "shims" or (name == "bin" and not (home in homes and above.startswith(home + "/.")))):
        yield above


def _is_passage(path: str) -> bool:
    parts = path.split("/")
    return any(above.startswith("session_") and name == _PASSAGE for above, name in itertools.pairwise(parts))


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
