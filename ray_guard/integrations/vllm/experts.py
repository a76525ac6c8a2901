"""target: where a sequence's tokens were routed, where vLLM returns it (``enable_return_routed_experts``). Pure.

vLLM's arrays are ``[tokens, layers, top-k]`` of expert numbers. A balanced policy uses its experts about alike; one
whose router has collapsed does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

_LISTED: Final = 128
"""As many values as a span's attribute holds."""
_MOST: Final = 1 << 16
MISSING: Final = "ray_guard.moe.missing"
"""The attribute that says why there is nothing to be said."""


def load(chunks: Sequence[Any], experts: int) -> dict[str, object]:
    """Attributes for a ``chat`` span; none where the arrays are empty.

    ``ray_guard.moe.load_max_over_mean``: of the layer where it is worst, how much more its busiest expert took than the
    mean of all. ``ray_guard.moe.expert_load``: how often each was chosen, over all layers; left out above 128 experts.

    Args:
        chunks: vLLM's arrays, in the order of the tokens.
        experts: routed experts of a layer; 0: not known, as many as the highest number says.
    """
    import numpy as np  # vLLM's, loaded by now

    try:
        routed = np.concatenate(chunks, axis=0)
    except ValueError as error:
        return {MISSING: f"the engine's arrays do not go together: {error}"}
    if routed.size == 0:
        return {}
    if routed.ndim != 3 or routed.dtype.kind not in "iu" or not 0 <= int(routed.min()) <= int(routed.max()) < _MOST:
        return {MISSING: f"the engine's array is no numbers of experts: {routed.dtype} {routed.shape}"}
    width = max(experts, int(routed.max()) + 1)
    counts = np.stack([np.bincount(routed[:, layer].ravel(), minlength=width) for layer in range(routed.shape[1])])
    found: dict[str, object] = {
        "ray_guard.moe.experts_used": int((counts.sum(axis=0) > 0).sum()),
        "ray_guard.moe.load_max_over_mean": float((counts.max(axis=1) / counts.mean(axis=1)).max()),
    }
    if width <= _LISTED:
        found["ray_guard.moe.expert_load"] = [int(count) for count in counts.sum(axis=0)]
    return found
