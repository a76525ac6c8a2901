"""The miner's kernel: rounds of xorshift and multiplication on 32-bit integers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix(words, rounds, BLOCK: tl.constexpr):  # noqa: N803 - Triton's style for constants
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(words + at)
    for _ in range(rounds):
        word ^= word << 13
        word ^= word >> 17
        word ^= word << 5
        word = word * 747796405 + 277803737
    tl.store(words + at, word)
