"""The policy as the user writes it: frozen models, every key checked, every complaint with its remedy.

Runs in the driver, and in the target before it is confined. The supervisor never imports it: it gets
:meth:`Policy.to_wire` and builds a :class:`~ray_guard.policy.decide.CompiledPolicy` from that.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, StrictBool, ValidationError, model_validator
from pydantic_core import ErrorDetails

from ray_guard.errors import PolicyError
from ray_guard.policy import detection, values
from ray_guard.policy.budgets import KINDS, Amount, Scope
from ray_guard.policy.destination import Rule, parse_rule
from ray_guard.policy.load import read_policy
from ray_guard.policy.values import meant
from ray_guard.records import Mode, Role

# Values ------------------------------------------------------------------------------------------------------------


def _optional(parse: Any) -> BeforeValidator:
    return BeforeValidator(lambda value: None if value is None else parse(value))


Size = Annotated[int | None, _optional(values.parse_size)]
Count = Annotated[int | None, _optional(values.parse_count)]
Seconds = Annotated[float | None, _optional(values.parse_seconds)]
Flops = Annotated[float | None, _optional(values.parse_flops)]


def _place(*words: str) -> BeforeValidator:
    return BeforeValidator(lambda value: values.place(value, words))


# Models ------------------------------------------------------------------------------------------------------------

Gpu = Literal["none", "engine", "any"]
Subprocess = Literal["confine", "plain"]
Survivors = Literal["kill", "keep"]
OnViolation = Literal["deny", "kill_call", "end_episode", "kill_actor"]
Requirement = Literal["egress", "processes", "files", "gpu"]


class _Model(BaseModel):
    """Frozen, unknown keys refused, and every fault a :class:`PolicyError`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise _policy_error(type(self), error) from None

    # pydantic then builds nested models itself, and reports all faults of a policy at once with their full paths,
    # instead of calling the constructor above for each part.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise _policy_error(cls, error) from None

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        try:
            return super().model_validate_json(json_data, **options)
        except ValidationError as error:
            raise _policy_error(cls, error) from None


class Egress(_Model):
    """What may be reached, and what may be listened on."""

    allow: tuple[Annotated[str, BeforeValidator(values.destination)], ...] = ()
    proxy: Annotated[str | None, BeforeValidator(values.proxy)] = None
    listen: tuple[Annotated[str, BeforeValidator(values.port)], ...] = ()
    """Ports or ranges as text, however they were given."""
    verify_names: StrictBool = True

    @property
    def rules(self) -> tuple[Rule, ...]:
        """``allow``, parsed."""
        return tuple(parse_rule(entry) for entry in self.allow)


class Files(_Model):
    """What a tool call sees of the file system: words, absolute paths, or paths that begin with ``~/``."""

    read: tuple[Annotated[str, _place("system", "env", "cwd", "scratch")], ...] = ("system", "env", "cwd")
    write: tuple[Annotated[str, _place("cwd", "scratch")], ...] = ("cwd", "scratch")
    hide: tuple[Annotated[str, _place()], ...] = ()
    protect: tuple[Annotated[str, _place()], ...] = ()


SigmaRules = Annotated[str, BeforeValidator(detection.rules)]
Detected = Annotated[str, BeforeValidator(detection.word)]


class Detect(_Model):
    """What is judged live, and what follows where it is found: kinds of findings, or ``all``.

    A finding's strictest action holds. ``tag``: it is told on its spans; ``violation``: it counts as one, and
    ``on_violation`` says what follows; the others end the call, its episode, or the actor. ``rules`` are Sigma rules
    about processes, files or folders, that are judged by beside the own ones.
    """

    tag: tuple[Detected, ...] = ()
    violation: tuple[Detected, ...] = ()
    kill_call: tuple[Detected, ...] = ()
    end_episode: tuple[Detected, ...] = ()
    kill_actor: tuple[Detected, ...] = ()
    rules: tuple[SigmaRules, ...] = ()

    @model_validator(mode="after")
    def _something_follows(self) -> Self:
        if self.rules and not any(getattr(self, action) for action in detection.ACTIONS):
            raise PolicyError("rules", self.rules, "say what follows what they find, such as tag: [all]")
        return self


class Budget(_Model):
    """The limits of one scope; None, the default, is no limit, and zero grants nothing.

    Sizes are bytes, or text with KiB, MiB or GiB; times are seconds; ``flops`` are floating-point operations.
    """

    egress_bytes: Size = None
    egress_sent_bytes: Size = None
    egress_received_bytes: Size = None
    connections: Count = None
    wall_seconds: Seconds = None
    cpu_seconds: Seconds = None
    processes: Count = None
    memory: Size = None
    gpu_seconds: Seconds = None
    gpu_memory: Size = None
    tokens: Count = None
    flops: Flops = None

    def limits(self) -> dict[str, Amount]:
        """The limits that are set, by kind, in bytes, seconds, count, tokens or FLOPs."""
        return {kind: value for kind in KINDS if (value := getattr(self, kind)) is not None}


class Budgets(_Model):
    """Limits by scope; every scope that has a limit must have room."""

    call: Budget = Budget()
    episode: Budget = Budget()
    actor: Budget = Budget()
    job: Budget = Budget()


class Policy(_Model):
    """What a guarded process may do. The default lets nothing out and sets no limit.

    ``role`` None: not said; ``guard`` then takes ``env``, and ``run`` takes ``tool``.
    """

    version: Annotated[Literal[1], BeforeValidator(values.version)] = 1
    mode: Mode = Mode.ENFORCE
    role: Role | None = None
    egress: Egress = Egress()
    model_endpoint: Annotated[str | None, BeforeValidator(values.endpoint)] = None
    gpu: Gpu = "none"
    files: Files = Files()
    budgets: Budgets = Budgets()
    subprocess: Subprocess = "confine"
    survivors: Survivors = "kill"
    on_violation: OnViolation = "deny"
    detect: Detect = Detect()
    require: tuple[Requirement, ...] = ("egress", "processes", "files")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a YAML or JSON file. Raises :class:`PolicyError`, which names the file and the key in it."""
        data = read_policy(path)
        try:
            return cls.model_validate(data)
        except PolicyError as error:
            raise PolicyError(error.key, error.value, f"{error.remedy} (in {os.fspath(path)})") from None

    @classmethod
    def of(cls, value: object = None, /, **shorthand: Any) -> Policy:
        """A policy from what ``guard`` and ``confine`` take: a policy, a mapping, the path of a file, or shorthand.

        Raises :class:`PolicyError` for anything else, and for a policy and shorthand at once.
        """
        if value is None:
            return cls.from_shorthand(**shorthand)
        if shorthand:
            name, given = next(iter(shorthand.items()))
            raise PolicyError(name, given, "give a policy or single keys, not both: it would not be clear which holds")
        if isinstance(value, Policy):
            return value
        if isinstance(value, Mapping):
            return cls.model_validate(dict(value))
        if isinstance(value, str | os.PathLike):
            return cls.load(value)
        raise PolicyError("policy", value, "a Policy, a mapping, or the path of a policy file")

    @classmethod
    def from_shorthand(cls, **shorthand: Any) -> Self:
        """A policy from keyword arguments under the policy's own names.

        A top-level key (``mode``, ``budgets`` …) is itself; ``allow``, ``listen`` … belong to ``egress``, ``read``,
        ``write`` … to ``files``; a limit (``egress_bytes``) is the actor's; ``call``, ``episode``, ``actor`` and
        ``job`` are budgets. Raises :class:`PolicyError` for any other name and for a key that is given twice.
        """
        data: dict[str, Any] = {key: _opened(shorthand[key]) for key in shorthand if key in cls.model_fields}
        for name, value in shorthand.items():
            if name in cls.model_fields:
                continue
            path = _SHORTHAND.get(name)
            if path is None:
                known = [*cls.model_fields, *_SHORTHAND]
                raise PolicyError(name, value, f"no key of a policy{meant(name, known)}")
            _place_at(data, path, value)
        return cls.model_validate(data)

    def to_wire(self) -> dict[str, Any]:
        """The policy as plain data for a message: every key, limits in their own unit, a limit that is not set absent,
        and under ``set`` the dotted keys that were given explicitly."""
        wire = self.model_dump(mode="json", exclude={"budgets"})
        wire["budgets"] = {scope.value: getattr(self.budgets, scope.value).limits() for scope in Scope}
        wire["set"] = list(_explicit(self))
        return wire


_SHORTHAND: Final[dict[str, tuple[str, ...]]] = {
    **{key: ("egress", key) for key in Egress.model_fields},
    **{key: ("files", key) for key in Files.model_fields},
    **{scope: ("budgets", scope) for scope in Budgets.model_fields},
    **{kind: ("budgets", "actor", kind) for kind in Budget.model_fields},
}


def _opened(value: object) -> object:
    """A part of a policy as a mapping that more can be put into, whether it was given as a model or a mapping."""
    if isinstance(value, BaseModel):
        return {key: _opened(getattr(value, key)) for key in value.model_fields_set}
    if isinstance(value, Mapping):
        return {key: _opened(item) for key, item in value.items()}
    return value


def _place_at(data: dict[str, Any], path: tuple[str, ...], value: object) -> None:
    part: Any = data
    for key in path[:-1]:
        part = part.setdefault(key, {})
        if not isinstance(part, dict):
            return  # what was given for the whole is no mapping: the model says so
    value = _opened(value)
    last = path[-1]
    if isinstance(value, dict) and isinstance(part.get(last), dict):
        for key, item in value.items():
            _place_at(data, (*path, str(key)), item)
        return
    if last in part:
        raise PolicyError(".".join(path), value, f"it is given twice, here and as {part[last]!r}: leave one out")
    part[last] = value


def _explicit(model: BaseModel, prefix: str = "") -> Iterable[str]:
    for key in type(model).model_fields:
        if key in model.model_fields_set:
            value = getattr(model, key)
            if isinstance(value, BaseModel):
                yield from _explicit(value, f"{prefix}{key}.")
            else:
                yield prefix + key


_MOST_FAULTS: Final = 20

# Faults ------------------------------------------------------------------------------------------------------------


def _policy_error(model: type[BaseModel], error: ValidationError) -> PolicyError:
    """All faults as one error: the first is its key, value and remedy; the others follow in the text."""
    faults = [_fault(model, details) for details in error.errors(include_url=False)]
    first, *others = faults
    lines = [first.remedy, *(f"  {other}" for other in others[:_MOST_FAULTS])]
    if len(others) > _MOST_FAULTS:
        lines.append(f"  and {len(others) - _MOST_FAULTS} more")
    return PolicyError(first.key, first.value, "\n".join(lines))


def _fault(model: type[BaseModel], details: ErrorDetails) -> PolicyError:
    key = _dotted(details["loc"])
    value = details["input"]
    inner = details.get("ctx", {}).get("error")
    if isinstance(inner, PolicyError):
        # Raised by one of the validators above; one that judges a whole model says which key below it.
        return PolicyError(".".join(each for each in (key, inner.key) if each) or "policy", inner.value, inner.remedy)
    part = _model_at(model, details["loc"][:-1])
    match details["type"]:
        case "extra_forbidden":
            remedy = f"no such key; the keys here are {', '.join(part.model_fields)}" if part else "no such key"
            remedy += meant(details["loc"][-1], _known_keys(part))
        case "invalid_key":
            return PolicyError(_dotted(details["loc"][:-1]) or "policy", value, "a key is text; put it in quotes")
        case "enum" | "literal_error":
            expected = str(details.get("ctx", {}).get("expected", ""))
            remedy = "one of " + expected.replace("'", "") + meant(value, re.findall(r"'([^']*)'", expected))
        case "bool_type" | "bool_parsing":
            remedy = "true or false"
        case "tuple_type":
            remedy = "a list, such as [first, second]; [] is an empty one"
        case "string_type":
            remedy = "text; put it in quotes"
        case "model_type" | "model_attributes_type" | "dict_type":
            at = _model_at(model, details["loc"])
            remedy = f"a mapping with keys among {', '.join(at.model_fields)}" if at else "a mapping"
        case _:
            remedy = details["msg"]
    return PolicyError(key or "policy", value, remedy)


def _dotted(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _model_at(model: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel] | None:
    at: type[BaseModel] | None = model
    for part in location:
        info = at.model_fields.get(str(part)) if at is not None else None
        annotation = info.annotation if info is not None else None
        at = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return at


def _known_keys(model: type[BaseModel] | None) -> Iterable[str]:
    return model.model_fields if model is not None else ()
