"""A tensor of one process changed by another: what both see is printed."""

from __future__ import annotations

import torch
import torch.multiprocessing as processes


def change(tensors, done) -> None:
    tensor = tensors.get()
    print(tensor.sum().item(), flush=True)
    tensor += 1
    torch.cuda.synchronize()
    done.set()


def main() -> None:
    context = processes.get_context("spawn")
    tensors, done = context.Queue(), context.Event()
    child = context.Process(target=change, args=(tensors, done))
    child.start()
    tensor = torch.ones(1000, device="cuda")
    tensors.put(tensor)
    assert done.wait(50)
    print(tensor[0].item(), flush=True)
    child.join()


if __name__ == "__main__":
    main()
