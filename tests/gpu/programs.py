"""What runs on the GPU in these tests: an engine (torch matrix products) and a miner (integer hashes in Triton).

``python programs.py engine|miner SECONDS [SHARE]`` prints a line before it opens the GPU, one when it computes, and at
its end how many seconds of kernels it ran. SHARE: of the time it computes; the rest it sleeps.
"""

from __future__ import annotations

import sys
import time

import torch


def engine() -> None:
    """Some 5 ms of bfloat16 products."""
    torch.mm(_a, _b)


def miner() -> None:
    """Integer mixing with no tensor core in it, as a proof of work has."""
    from kernels import mix  # Triton reads its kernels' source from a file

    mix[(_words.numel() // 1024,)](_words, 2000, BLOCK=1024)


print("opens", flush=True)
_a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
_b = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
_words = torch.arange(1 << 22, device="cuda", dtype=torch.int32)


def main(name: str, seconds: float, share: float) -> None:
    work = {"engine": engine, "miner": miner}[name]
    work()
    torch.cuda.synchronize()
    print("computes", flush=True)
    until, computed = time.monotonic() + seconds, 0.0
    while (now := time.monotonic()) < until:
        while time.monotonic() < now + 0.05:
            work()
            torch.cuda.synchronize()
        spent = time.monotonic() - now
        computed += spent
        time.sleep(spent * (1 - share) / share)
    print(computed, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]) if len(sys.argv) > 3 else 1.0)
