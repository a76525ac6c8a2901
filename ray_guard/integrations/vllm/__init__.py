"""vLLM's hook: a ``chat`` span per request, tokens and FLOPs reserved before it runs, engine processes registered.

Nothing has to be called for it. vLLM loads it as a plugin (entry point group ``vllm.general_plugins``) in every process
it starts, and a guarded process puts it in place by itself, whatever ``VLLM_PLUGINS`` says. What is measured, and where
it cannot be: docs/vllm.md.
"""

from __future__ import annotations

from ray_guard.integrations.vllm.versions import policy_version as policy_version
from ray_guard.integrations.vllm.watch import install as install

__all__ = ["install", "policy_version"]
