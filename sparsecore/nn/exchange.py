"""Rows that are split over ranks: who holds which, and the way of ids, rows and gradients between them.

The one collective is ``all_to_all_single``, which gloo and nccl have alike. Every rank must take part, also with no ids
at all, forward and backward: what a rank does not ask for itself, others ask of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Route", "request", "row_bounds", "send_back"]


def row_bounds(rows: int, ranks: int) -> list[int]:
    """Rank r holds rows ``bounds[r] .. bounds[r + 1] - 1``: blocks that differ by at most one row."""
    return [rows * rank // ranks for rank in range(ranks + 1)]


@dataclass(frozen=True)
class Route:
    """How rows travel.

    Attributes:
        give: rows that each rank has asked of this one.
        take: rows that this one has asked of each rank.
        group: the process group.
    """

    give: list[int]
    take: list[int]
    group: Any

    @property
    def back(self) -> Route:
        """The other direction."""
        return Route(self.take, self.give, self.group)

    def send(self, rows: Tensor) -> Tensor:
        """(sum(give), *) -> (sum(take), *), in the order of the ranks."""
        arrived = rows.new_empty((sum(self.take), *rows.shape[1:]))
        dist.all_to_all_single(arrived, rows.contiguous(), self.take, self.give, group=self.group)
        return arrived


def request(wanted: Tensor, bounds: list[int], group: Any) -> tuple[Tensor, Route]:
    """Ask the ranks for rows.

    Args:
        wanted: ids, int64, ascending and unique.
        bounds: as `row_bounds` makes them.
        group: the process group, of ``len(bounds) - 1`` ranks.

    Returns:
        The ids that are asked of this rank, those of the first rank first, and the way of the rows.

    Raises:
        IndexError: for an id outside the table, on every rank: how many rows a rank asks for is sent first, and one
            that cannot ask sends -1. Afterwards the ranks are in step, and can go on.
    """
    take = torch.searchsorted(wanted, torch.tensor(bounds, device=wanted.device)).diff()
    low, high = (int(wanted[0]), int(wanted[-1])) if wanted.numel() else (0, 0)
    outside = low < 0 or high >= bounds[-1]
    if outside:
        take.fill_(-1)
    give = torch.empty_like(take)
    dist.all_to_all_single(give, take, group=group)
    refused = [rank for rank, n in enumerate(give.tolist()) if n < 0]
    if outside:
        raise IndexError(f"ids must be in 0 .. {bounds[-1] - 1}, got {low if low < 0 else high}")
    if refused:
        raise IndexError(
            f"rank {refused[0]} asked for ids outside 0 .. {bounds[-1] - 1}: nothing was looked up"
        )
    route = Route(give.tolist(), take.tolist(), group)
    return route.back.send(wanted), route


def send_back(rows: Tensor, route: Route) -> Tensor:
    """Rows (sum(give), cols) to the ranks that asked for them, differentiable.

    The gradient of a row is the sum of what the ranks that asked for it have, *divided by the number of ranks*, as
    DistributedDataParallel does with every other weight: where each rank's loss is a mean over its own batch, both are
    the gradient of the mean over all batches.
    """
    return _SendBack.apply(rows, route)


class _SendBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, route: Route) -> Tensor:
        ctx.route = route
        return route.send(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        route = ctx.route
        return route.back.send(grads[0]).div_(len(route.give)), None
