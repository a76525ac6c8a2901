"""driver, target: every name of Ray's that is not public, in one place, and what follows where one is missing.

Tried with Ray 2.48 and 2.60. What confinement stands on raises :class:`~ray_guard.errors.NotEnforced` where it is gone
(:func:`require_known`); what only carries context is left out (:meth:`Point.exists`).
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import ray
import ray.actor
import ray.remote_function
import ray.util.client
from ray._private import function_manager as _ray_function_manager
from ray._private import ray_constants as _ray_constants
from ray._private import utils as _ray_utils
from ray._private import worker as _ray_worker
from ray._private.runtime_env import setup_hook as _ray_setup_hook
from ray.experimental import internal_kv as _ray_internal_kv

from ray_guard.actors import environment
from ray_guard.errors import NotEnforced

# Ray's types are few and loose; taken as Any here, where its objects are handled, and never passed on as such.
_worker_module: Any = _ray_worker
_actor_module: Any = ray.actor
_task_module: Any = ray.remote_function
_functions: Any = _ray_function_manager
_utils: Any = _ray_utils
_constants: Any = _ray_constants
_kv: Any = _ray_internal_kv
_setup_hook: Any = _ray_setup_hook
_client: Any = ray.util.client.ray

VERSION: Final = f"ray {ray.__version__}"
ActorClass: Any = _actor_module.ActorClass
RemoteFunction: Any = _task_module.RemoteFunction


@dataclass(frozen=True)
class Point:
    """A method of Ray's that is wrapped."""

    owner: Any
    name: str

    def exists(self) -> bool:
        return hasattr(self.owner, self.name)

    def wrapped(self) -> bool:
        return bool(getattr(getattr(self.owner, self.name), "__ray_guard__", False))

    def wrap(self, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Puts `around` the function; a classmethod stays one."""
        original = inspect.getattr_static(self.owner, self.name)
        is_class_method = isinstance(original, classmethod)
        function = original.__func__ if is_class_method else original
        wrapper: Any = functools.wraps(function)(around(function))
        wrapper.__ray_guard__ = True
        setattr(self.owner, self.name, classmethod(wrapper) if is_class_method else wrapper)


CREATE_ACTOR: Final = Point(ActorClass, "_remote")
SUBMIT_TASK: Final = Point(RemoteFunction, "_remote")
LOAD_CLASS: Final = Point(_functions.FunctionActorManager, "load_actor_class")
LOAD_FUNCTION: Final = Point(_functions.FunctionActorManager, "get_execution_info")
DESCRIBE_METHODS: Final = Point(getattr(_actor_module, "_ActorClassMethodMetadata", None), "create")
CALL_METHOD: Final = Point(_actor_module.ActorHandle, "_actor_method_call")
EXECUTE_METHOD: Final = Point(_functions.FunctionActorManager, "_make_actor_method_executor")


def require_known() -> None:
    """Raises NotEnforced where this Ray lacks a name that confinement stands on."""
    points = (CREATE_ACTOR, SUBMIT_TASK, LOAD_CLASS, LOAD_FUNCTION)
    missing = [f"{point.owner.__name__}.{point.name}" for point in points if not point.exists()]
    if getattr(_constants, "WORKER_PROCESS_SETUP_HOOK_ENV_VAR", None) != environment.HOOK:
        missing.append("WORKER_PROCESS_SETUP_HOOK_ENV_VAR")
    if missing:
        raise NotEnforced((VERSION,), f"this version of Ray has no {', '.join(missing)}")


# This process ------------------------------------------------------------------------------------------------------


def worker() -> Any:
    return _worker_module.global_worker


def connected() -> bool:
    return bool(worker().connected)


def in_worker() -> bool:
    """This process is one of Ray's workers, connected."""
    return connected() and worker().mode == _worker_module.WORKER_MODE


def in_client_mode() -> bool:
    """This process speaks to its cluster through Ray Client (``ray://``)."""
    return not connected() and bool(_client.is_connected())


def ensure_connected() -> None:
    """What ``.remote()`` does by itself, earlier: the registry is written before the work is submitted."""
    if not ray.is_initialized():
        ray.init()


def job() -> str:
    """The job's id, hex."""
    return str(ray.get_runtime_context().get_job_id())


def job_and_cluster() -> object:
    """Changes whenever this process connects anew."""
    return getattr(worker(), "current_cluster_and_job", None)


def node() -> str:
    """The node's id, hex."""
    return str(worker().core_worker.get_current_node_id().hex())


def actor_id() -> str | None:
    """This process's actor id, hex; None: it is no actor, or not yet."""
    found = ray.get_runtime_context().get_actor_id() if in_worker() else None
    return None if found is None else str(found)


def actor_name() -> str:
    """The name this actor was given; empty: none, or no actor."""
    # Ray's core aborts the process when a worker that is no actor asks.
    return "" if actor_id() is None else str(worker().actor_name or "")


def current_instance() -> Any:
    """The object whose methods this actor serves; None: it is no actor."""
    return worker().actors.get(worker().core_worker.get_actor_id())


def logs_folder() -> str:
    return str(_worker_module._global_node.get_logs_dir_path())


def session_folder() -> str:
    return str(_worker_module._global_node.get_session_dir_path())


def session_name() -> str:
    return str(_worker_module._global_node.session_name)


def gcs_address() -> str:
    return str(_worker_module._global_node.gcs_address)


def session_sockets() -> tuple[str, ...]:
    """The unix sockets by which a worker speaks to its raylet and object store."""
    node = _worker_module._global_node
    return (str(node.raylet_socket_name), str(node.plasma_store_socket_name))


def node_endpoints() -> tuple[tuple[str, int], ...]:
    """What this worker was told when it was started: the GCS and this node's raylet."""
    node = _worker_module._global_node
    host, _, port = gcs_address().rpartition(":")
    found = [(host.strip("[]"), int(port))]
    if node.node_manager_port:
        found.append((str(node.node_ip_address), int(node.node_manager_port)))
    if getattr(node, "metrics_agent_port", None):
        found += [(host, int(node.metrics_agent_port)) for host in (str(node.node_ip_address), "127.0.0.1")]
    return tuple(found)


def after_init(call: Callable[[], object]) -> bool:
    """Has `call` run at the end of every ``ray.init`` of this process; False: this version of Ray tells nobody."""
    hooks = getattr(_worker_module, "_post_init_hooks", None)
    if not isinstance(hooks, list):
        return False
    if call not in hooks:
        hooks.append(call)
    return True


def run_hook(key: str) -> str | None:
    """Runs a setup hook as Ray does, by its name or its key in the GCS; what went wrong, or None."""
    failure = _setup_hook.load_and_execute_setup_hook(key)
    return None if failure is None else str(failure)


# Registry ----------------------------------------------------------------------------------------------------------

_NAMESPACE: Final = b"ray_guard"


def put(key: str, value: str) -> None:
    _kv._internal_kv_put(key.encode(), value.encode(), True, namespace=_NAMESPACE)


def get(key: str) -> str | None:
    value: bytes | None = _kv._internal_kv_get(key.encode(), namespace=_NAMESPACE)
    return None if value is None else value.decode()


# Runtime environments ----------------------------------------------------------------------------------------------


def runtime_environment() -> dict[str, Any]:
    """What Ray will put under the runtime environment of whatever this process submits."""
    return parse_environment(runtime_environment_text())


def runtime_environment_text() -> str:
    # With Ray Client the job's environment is known, and put underneath, on the cluster alone.
    return str(worker().runtime_env) if connected() else ""


@functools.lru_cache(maxsize=8)
def parse_environment(text: str) -> dict[str, Any]:
    parsed = json.loads(text or "{}")
    return parsed if isinstance(parsed, dict) else {}


def as_runtime_env(given: Mapping[str, Any]) -> Any:
    """A RuntimeEnv of `given`, checked as Ray checks it; never the user's own object."""
    return _utils.parse_runtime_env_for_task_or_actor(dict(given))


def asked_environment(serialized: str | None) -> dict[str, Any]:
    """The runtime environment in what a remote function hands to Ray's core."""
    if not serialized or serialized == "{}":
        return {}
    inner = json.loads(serialized).get("serializedRuntimeEnv")
    return dict(json.loads(inner)) if inner else {}


def with_environment(serialized: str | None, runtime_env: Mapping[str, Any]) -> str:
    """`serialized`, with another environment in it; what Ray keeps beside that (URIs, configuration) stays."""
    if not serialized or serialized == "{}":
        parsed = as_runtime_env(runtime_env)
        return str(_utils.get_runtime_env_info(parsed, is_job_runtime_env=False, serialize=True))
    outer = json.loads(serialized)
    outer["serializedRuntimeEnv"] = json.dumps(runtime_env, sort_keys=True)
    return json.dumps(outer)


# Actor classes, remote functions, and how a worker runs them -------------------------------------------------------


def metadata(actor_class: Any) -> Any:
    """What an ActorClass keeps: ``modified_class``, ``method_meta``, ``is_cross_language`` …"""
    return actor_class.__ray_metadata__


def actor_of(handle: Any) -> str:
    """The id, hex, of the actor that a handle stands for."""
    return str(handle._actor_id.hex())


def class_of(handle: Any) -> Any:
    """What tells the class behind a handle from others."""
    return handle._ray_actor_creation_function_descriptor


def function_of(remote_function: Any) -> Any:
    return remote_function._function


def is_foreign(remote_function: Any) -> bool:
    """It runs in a Java or C++ worker."""
    return bool(remote_function._is_cross_language)


def replace_function(remote_function: Any, function: Callable[..., Any]) -> None:
    """Has `remote_function` run `function`, also where it was sent to workers before."""
    remote_function._function = function
    remote_function._function_signature = None
    remote_function._last_export_cluster_and_job = None


def export_again(actor_class: Any) -> None:
    """Has a class sent to workers anew, as it is now."""
    metadata(actor_class).last_export_cluster_and_job = None


def extend_signature(
    remote_function: Any, extend: Callable[[list[inspect.Parameter]], list[inspect.Parameter]]
) -> None:
    """Changes the parameters that Ray checks a task's arguments against."""
    with remote_function._inject_lock:
        parameters = remote_function._function_signature
        if parameters is None:
            # As Ray does at the first submission, which then leaves alone what is there.
            function = _task_module._inject_tracing_into_function(remote_function._function)
            remote_function._function = function
            parameters = list(inspect.signature(function).parameters.values())
        remote_function._function_signature = extend(parameters)


def fail_all_work(refuse: Callable[..., Any], stand_in: type) -> None:
    """Makes this worker run `refuse` in place of any task, before anything is unpickled for it."""
    manager = worker().function_actor_manager

    def executor(*_args: Any, **_kwargs: Any) -> Any:
        return refuse()

    # What Ray's executor asks of a method.
    executor.name = "refused"  # type: ignore[attr-defined]
    executor.method = refuse  # type: ignore[attr-defined]
    information = _functions.FunctionExecutionInfo(function=executor, function_name="refused", max_calls=0)
    manager.load_actor_class = lambda *_args, **_kwargs: stand_in
    manager.get_execution_info = lambda *_args, **_kwargs: information
    worker().deserialize_objects = refuse
