"""Dynamic sparse training in several processes.

    torchrun --standalone --nproc-per-node 2 examples/data_parallel.py

The ranks keep the same index sets: they decide from the gradients of all their batches.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sparsecore


def train() -> None:
    """Train a layer on each rank's own batches; print what it holds at the end."""
    rank = torch.distributed.get_rank()
    model = nn.Sequential(nn.Linear(64, 500), nn.ReLU(), nn.Linear(500, 10))
    sparsecore.sparsify(model, density=0.1, exclude="2")
    sparsecore.broadcast_topology(model)  # the index sets of rank 0, on all ranks
    parallel = DistributedDataParallel(model)  # its parameters, and the mean of all gradients
    optimizer = torch.optim.Adam(model.parameters())
    explorer = sparsecore.DynamicSparsity(model, optimizer, interval=10, total_steps=100)
    batches = torch.Generator().manual_seed(rank)
    for _ in range(100):
        x = torch.randn(32, 64, generator=batches)
        loss = nn.functional.cross_entropy(parallel(x), x[:, :10].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        explorer.step()  # a TopologyError, on all ranks, if their index sets differ
    if rank == 0:
        print(f"loss {loss.item():.2f}, {model[0].nnz} weights of {500 * 64} stored on every rank")


def main() -> None:
    """Train with a process group, which ends after everything that holds on to it."""
    torch.distributed.init_process_group("gloo")  # "nccl" on GPUs
    train()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
