"""Exchange some of a weight's positions in place: index, values, gradient, optimizer state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparsecore.encoding import stored
from sparsecore.nn.base import SparseModule
from sparsecore.ops import explore

__all__ = ["Exchange", "fresh_state", "rewrite"]


@dataclass(frozen=True)
class Exchange:
    """What one exploration does to one weight.

    Attributes:
        index: the new index, in the module's encoding, with as many nonzeros. Weights that the old one has too stay,
            with value and optimizer state (also those that were pruned and grown again at once).
        pruned: number of weights of smallest magnitude that were taken out.
    """

    index: explore.Index
    pruned: int


@torch.no_grad()
def rewrite(module: SparseModule, exchange: Exchange, optimizers: Sequence[Optimizer]) -> int:
    """Apply an exchange. The Parameter, every state tensor and every index buffer keep their identity.

    New weights start at 0 with fresh optimizer state. Every state tensor of the shape of the values is realigned, which
    serves all torch optimizers that keep their state element by element (LBFGS does not). A sparse one, as torch's SGD
    makes its momentum of sparse gradients, is replaced.

    Returns:
        Number of positions that were not stored before.
    """
    if stored(exchange.index) != module.nnz:
        raise AssertionError(
            f"an exchange must keep nnz = {module.nnz}, but this one leads to {stored(exchange.index)}"
        )
    moving = [(module.values.data, 0.0)]
    grad = module.values.grad
    if grad is not None and grad.is_sparse:
        # It names places of the old index set; the step that it was made for is over.
        module.values.grad = None
    elif grad is not None:
        moving.append((grad, 0.0))
    replaced: list[tuple[dict, str, Tensor]] = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if any(parameter is module.values for parameter in group["params"]):
                states = optimizer.state.get(module.values, {})
                for key, state in states.items():
                    if not isinstance(state, Tensor) or not state.dim() or state.shape != module.values.shape:
                        continue
                    if state.is_sparse:
                        state = state.to_dense()
                        replaced.append((states, key, state))
                    moving.append((state, fresh_state(group, key)))
    kept = explore.realign_(moving, module.index, exchange.index, module.shape)
    for states, key, state in replaced:
        states[key] = state.to_sparse()
    for mine, new in zip(module.index, exchange.index, strict=True):
        if mine is not None and new is not None:
            mine.copy_(new)
    return module.nnz - kept


def fresh_state(group: dict, key: str) -> float:
    """What a torch optimizer's state holds for a weight that has just begun: 0, but for Adagrad and Rprop."""
    if key == "sum":
        return float(group.get("initial_accumulator_value", 0.0))
    return float(group["lr"]) if key == "step_size" else 0.0
