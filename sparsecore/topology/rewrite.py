"""Exchange some of a weight's positions in place: indices, values, gradient, optimizer state, by one permutation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparsecore.nn.base import SparseModule
from sparsecore.pattern import Pattern
from sparsecore.topology.blocks import row_blocks

__all__ = ["Exchange", "fresh_state", "reconcile", "rewrite"]


@dataclass(frozen=True)
class Exchange:
    """What one exploration does to one weight.

    Attributes:
        survivors: bool, (nnz,): stored weights that stay, with value and optimizer state (also those that were pruned
            and grown again at once).
        new_positions: linear positions that were not stored before, ascending; as many as weights leave.
        pruned: number of weights of smallest magnitude that were taken out.
    """

    survivors: Tensor
    new_positions: Tensor
    pruned: int


def reconcile(pattern: Pattern, survivors: Tensor, grown: Tensor) -> Tensor:
    """Give back what was pruned and grown at once: marks it in ``survivors``; returns the really new positions."""
    is_new = torch.ones(grown.numel(), dtype=torch.bool, device=grown.device)
    for block in row_blocks(pattern):
        low, high = block.within(grown)
        if high > low:
            pruned = torch.nonzero(~survivors[block.start : block.stop]).view(-1)
            wanted = grown[low:high] - block.base
            again = block.mark(wanted)[block.positions[pruned]]
            survivors[block.start + pruned[again]] = True
            is_new[low:high] = ~block.mark(block.positions[pruned])[wanted]
    return grown[is_new]


@torch.no_grad()
def rewrite(module: SparseModule, exchange: Exchange, optimizers: Sequence[Optimizer]) -> None:
    """Apply an exchange. The Parameter and every state tensor keep their identity; nnz does not change.

    New weights start at 0 with fresh optimizer state. Every state tensor of the shape of the values is realigned, which
    serves all torch optimizers that keep their state element by element (LBFGS does not).
    """
    new = exchange.new_positions
    if new.numel() == 0:
        return
    source, is_new = _new_order(module, exchange)
    _move(module.values.data, source, is_new, 0.0)
    if module.values.grad is not None:
        _move(module.values.grad, source, is_new, 0.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if any(parameter is module.values for parameter in group["params"]):
                for key, state in optimizer.state.get(module.values, {}).items():
                    if isinstance(state, Tensor) and state.dim() and state.shape == module.values.shape:
                        _move(state, source, is_new, fresh_state(group, key))


def fresh_state(group: dict, key: str) -> float:
    """What a torch optimizer's state holds for a weight that has just begun: 0, but for Adagrad and Rprop."""
    if key == "sum":
        return float(group.get("initial_accumulator_value", 0.0))
    return float(group["lr"]) if key == "step_size" else 0.0


def _new_order(module: SparseModule, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """Rewrite the index set; returns, for every new place, where its weight was, and whether it is new."""
    pattern, new, cols = module.pattern, exchange.new_positions, module.shape[1]
    index = torch.int32 if module.nnz < 2**31 else torch.int64
    source = torch.zeros(module.nnz, dtype=index, device=new.device)
    is_new = torch.zeros(module.nnz, dtype=torch.bool, device=new.device)
    col = torch.empty_like(pattern.col)
    counts = torch.zeros_like(pattern.crow)
    begin = 0
    for block in row_blocks(pattern):
        low, high = block.within(new)
        stays = torch.nonzero(exchange.survivors[block.start : block.stop]).view(-1)
        fresh = block.mark(new[low:high] - block.base)
        merged = torch.nonzero(fresh | block.mark(block.positions[stays])).view(-1)
        part = slice(begin, begin + merged.numel())
        is_new[part] = fresh[merged]
        source[part][~is_new[part]] = (block.start + stays).to(index)
        row = merged.div(cols, rounding_mode="floor")
        col[part] = (merged - row * cols).to(col.dtype)
        counts[block.first + 1 : block.last + 1] = torch.bincount(row, minlength=block.last - block.first)
        begin += merged.numel()
    if begin != module.nnz:
        raise AssertionError(f"an exchange must keep nnz = {module.nnz}, but this one leads to {begin}")
    module.write_index(counts.cumsum(0), col)
    return source, is_new


def _move(tensor: Tensor, source: Tensor, is_new: Tensor, fresh: float) -> None:
    moved = tensor.index_select(0, source)
    tensor.copy_(moved.masked_fill_(is_new, fresh))
