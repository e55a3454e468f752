"""How a sparse weight was used in a step: all that is needed for its gradient at positions it does not store.

The gradient of the loss in a weight that is *not* stored is never computed in training. At an exploration it is needed
once, to score where to grow. For that the operators that compute the gradient of stored positions tell what they
computed it from, an input and an output gradient; from the two any block of rows of the dense gradient can be computed
when it is asked for, and thrown away again.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from sparsecore import ops
from sparsecore.ops.explore import overlay_
from sparsecore.ops.in_backward import updater_of
from sparsecore.ops.recording import forget, owned, watch, within_transform
from sparsecore.topology.blocks import BLOCK

__all__ = [
    "BagUse",
    "GatherUse",
    "LinearUse",
    "PropagateUse",
    "Recorder",
    "Use",
]


def _kept(tensor: Tensor) -> Tensor:
    """A copy for scores, in single precision at least. Until the exploration the memory may change: an output's
    gradient is that of a bias, too, which is clipped or set to zero; an input a hidden state, or a buffer of
    micro-batches.
    """
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.detach().float() if half else tensor.detach().clone()


def _nonzero(grad: Tensor) -> bool:
    return bool((grad._values() if grad.is_sparse else grad).any())


class Use(Protocol):
    """One application of a sparse weight, that a backward pass has reached."""

    def rows(self, grad: Tensor) -> Tensor | None:
        """Rows whose gradient can differ from zero, int64, ascending, unique; None for all of them."""

    def block(self, grad: Tensor, rows: Tensor | slice) -> Tensor:
        """Dense gradient of these rows (a slice, or int64 ids out of ``rows()``): (len(rows), cols)."""


class LinearUse:
    """``Y = X W^T``: gradient ``dY^T X``."""

    def __init__(self, x: Tensor) -> None:
        self.x = x.detach().reshape(-1, x.shape[-1])

    def rows(self, grad: Tensor) -> Tensor | None:
        return None

    def block(self, grad: Tensor, rows: Tensor | slice) -> Tensor:
        flat = grad.reshape(-1, grad.shape[-1])
        return flat[:, rows].t() @ self.x


class BagUse:
    """``out[b] = sum of weights[e] W[ids[e]]`` over a bag's entries: gradient rows are weighted sums of dOut rows."""

    def __init__(self, ids: Tensor, bags: Tensor, weights: Tensor, padding_idx: int | None = None) -> None:
        if padding_idx is not None:
            real = ids != padding_idx
            ids, bags, weights = ids[real], bags[real], weights[real]
        self.ids, order = torch.sort(ids, stable=True)
        self.bags, self.weights = bags[order], weights.detach()[order]

    def rows(self, grad: Tensor) -> Tensor | None:
        return torch.unique_consecutive(self.ids)

    def block(self, grad: Tensor, rows: Tensor | slice) -> Tensor:
        flat = grad.reshape(-1, grad.shape[-1])
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=flat.device)
        first = torch.searchsorted(self.ids, rows[:1])
        last = torch.searchsorted(self.ids, rows[-1:], right=True)
        part = slice(int(first), int(last))
        # Ids of the range that were not asked for (another use's rows lie between) are left out.
        local = torch.searchsorted(rows, self.ids[part])
        asked = rows[local] == self.ids[part]
        # The entries are a sparse (rows x bags) matrix in CSR order; its product with dOut is the gradient.
        crow = torch.zeros(rows.numel() + 1, dtype=torch.int32, device=flat.device)
        crow[1:] = torch.bincount(local[asked], minlength=rows.numel()).cumsum(0)
        entries = (crow, self.bags[part][asked].to(torch.int32), self.weights[part][asked])
        return ops.propagate(*entries, *entries, flat)


class GatherUse(BagUse):
    """``out[e] = W[ids[e]]``: a bag of one entry each, with weight 1."""

    def __init__(self, ids: Tensor, dtype: torch.dtype, padding_idx: int | None = None) -> None:
        ids = ids.reshape(-1)
        ones = torch.ones(ids.numel(), device=ids.device, dtype=dtype)
        super().__init__(ids, torch.arange(ids.numel(), device=ids.device), ones, padding_idx)


class PropagateUse:
    """Mean of the hops 0..h of a graph over W: gradient ``1/(h+1) sum of (A^T)^i dOut``, an (N, d) activation."""

    def __init__(self, graph: tuple[Tensor, ...], hops: int) -> None:
        self.graph, self.hops = graph, hops
        self._dense: tuple[Tensor, Tensor] | None = None  # (of which output gradient, the gradient)

    def rows(self, grad: Tensor) -> Tensor | None:
        return None

    def block(self, grad: Tensor, rows: Tensor | slice) -> Tensor:
        if self._dense is None or self._dense[0] is not grad:
            a = self.graph
            out = grad
            for _ in range(self.hops):
                out = ops.propagate(*a[3:], *a[:3], out).add_(grad)
            self._dense = (grad, out)
        return self._dense[1][rows] / (self.hops + 1)


class Recorder:
    """Collects a weight's uses, each with its output gradient, in the order in which backward passes reach them.

    Only those count whose gradient is added to that of the weight. A backward pass to something else (to the input, as
    for adversarial examples), or one that only returns the gradient (``torch.autograd.grad``, to log its norm), runs
    the same operators: what they tell is kept apart until the pass has added to ``values.grad``, and dropped at its
    end. (Where nothing has been added at all, and yet there is a gradient, somebody has put there what was returned:
    then that counts.) So is a gradient that was thrown away: where ``values.grad`` is gone or zero when the next one
    arrives, the uses before that are forgotten.

    A loss may also hold terms of the stored values themselves, such as a penalty on their squares, which are no use of
    the weight. At stored positions (a weight that is pruned may be grown at once) the gradient is therefore that of
    ``values``, which holds everything.

    Args:
        values: the weight's parameter, (nnz,).
        index: its index set, as operators take it.
        shape: of the weight.
        skip_row: a row that gets no gradient (an embedding's padding row).
    """

    def __init__(
        self,
        values: Tensor,
        index: tuple[Tensor, Tensor | None],
        shape: tuple[int, int],
        skip_row: int | None = None,
    ) -> None:
        self._uses: list[tuple[Use, Tensor]] = []
        self._returned: list[tuple[Use, Tensor]] = []
        self.index, self.shape, self.skip_row = index, shape, skip_row
        watch(index[0], self)
        self.stored: Tensor | None = None
        self._moved = False  # whether the gradient of what was recorded is not zero at all stored positions
        # By backward pass: what operators told; what is to be kept if the gradient is added.
        self._pending: dict[int, list[tuple[Use, Tensor]]] = {}
        self._staged: dict[int, tuple[bool, list[tuple[Use, Tensor]], bool, Tensor | None]] = {}
        self._values = weakref.ref(values)
        self._hooks: list[RemovableHandle] = []
        if values.requires_grad and values.is_leaf:  # computed ones (pruned) are refused by explorations
            self._hooks = [
                values.register_hook(self._reached),
                values.register_post_accumulate_grad_hook(self._was_reached),
            ]

    # What autograd calls stays as it is where a compiled function calls backward().
    @torch._disable_dynamo
    def _reached(self, grad: Tensor | None) -> None:
        """A backward pass has the whole gradient of the values, and is about to add it to ``values.grad``, or to return
        it. None is what an optimizer has left that updates in the backward pass: nothing will be added.
        """
        task = torch._C._current_graph_task_id()
        discarded, uses = self._discarded(), self._pending.pop(task, [])
        if grad is None:
            self._keep(discarded, uses, False, None)
            return
        # A sparse gradient comes from lookups alone: torch cannot add a penalty's dense one to it.
        stored = _kept(grad) if grad.layout == torch.strided else None
        self._staged[task] = discarded, uses, _nonzero(grad), stored
        if task >= 0:
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._drop, task))

    def _keep(
        self, discarded: bool, uses: list[tuple[Use, Tensor]], moved: bool, stored: Tensor | None
    ) -> None:
        if discarded:
            self.discard()
        self._uses += uses
        self._moved = self._moved or moved
        if stored is not None:
            self.stored = stored if self.stored is None else self.stored.add_(stored)

    @torch._disable_dynamo
    def _was_reached(self, values: Tensor) -> None:
        """The gradient has been added. torch 2.6 forgets the other hook where saved tensors are packed."""
        task = torch._C._current_graph_task_id()
        staged, pending = self._staged.pop(task, None), self._pending.pop(task, None)
        if staged is not None:
            self._keep(*staged)
        elif pending is not None:
            self._uses += pending
            self._moved = self._moved or (values.grad is not None and _nonzero(values.grad))
            if values.grad is not None and values.grad.layout == torch.strided:
                self.stored = _kept(values.grad)  # of all passes since it was zero

    def _discarded(self) -> bool:
        """Whether what was recorded before is in no gradient any more."""
        if not self._uses and self.stored is None:
            return False
        values = self._values()
        grad = None if values is None else values.grad
        if grad is None:  # or an optimizer has used it already
            return values is None or updater_of(values) is None
        return self._moved and not _nonzero(grad)

    def discard(self) -> None:
        """Forget what has been recorded."""
        self._uses, self._returned, self.stored, self._moved = [], [], None, False

    @property
    def uses(self) -> list[tuple[Use, Tensor]]:
        """What the gradient in ``values.grad`` is of."""
        values = self._values()
        by_hand = not self._uses and values is not None and values.grad is not None
        return self._returned if by_hand else self._uses

    def close(self) -> None:
        """Stop watching; what has been recorded stays."""
        forget(self.index[0], self)
        for hook in self._hooks:
            hook.remove()

    # ---- what operators tell: see `sparsecore.ops.recording.Watcher`

    def saw_product(self, dy: Tensor, x: Tensor) -> None:
        self._add(LinearUse(_kept(x)), _kept(dy))

    def saw_rows(self, grad: Tensor, ids: Tensor) -> None:
        grad = _kept(grad)
        self._add(GatherUse(owned(ids), grad.dtype, self.skip_row), grad)

    def saw_bags(self, grad: Tensor, ids: Tensor, sources: Tensor, weights: Tensor) -> None:
        self._add(BagUse(owned(ids), sources, _kept(weights), self.skip_row), _kept(grad))

    def saw_propagation(self, grad: Tensor, graph: tuple[Tensor, ...], hops: int) -> None:
        self._add(PropagateUse(graph, hops), _kept(grad))

    def _add(self, use: Use, grad: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        # Outside a backward pass, and in one that a functional transform takes through values of its own, no hook
        # will say that they were reached.
        if not self._hooks or task < 0 or within_transform():
            self._uses.append((use, grad))
            return
        if task not in self._pending:
            if self._discarded():
                self.discard()
            self._pending[task] = []
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._drop, task))
        self._pending[task].append((use, grad))

    def _drop(self, task: int) -> None:
        """A backward pass is over; what it has not brought to the values is nothing of theirs."""
        self._pending.pop(task, None)
        staged = self._staged.pop(task, None)
        if staged is not None:
            self._returned += staged[1]

    # ---- what an exploration asks: see `sparsecore.ops.explore.GradientSource`

    def rows(self) -> Tensor | None:
        """Union of the rows of the uses, and of those with a gradient at a stored position; None for all rows."""
        per_use = [use.rows(grad) for use, grad in self.uses]
        listed = [rows for rows in per_use if rows is not None]
        if len(listed) < len(per_use):
            return None
        if self.stored is not None:
            listed.append(self._rows_of_stored())
        return torch.unique(torch.cat(listed))

    def block(self, rows: Tensor | slice) -> Tensor:
        """Sum of the uses' dense gradients of these rows."""
        total: Tensor | None = None
        for use, grad in self.uses:
            part = use.block(grad, rows)
            total = part if total is None else total.add_(part)
        assert total is not None, "a block was asked of a weight that no backward pass has reached"
        if self.stored is None:
            return total
        return overlay_(total, self.stored, self.index, rows)

    def _rows_of_stored(self) -> Tensor:
        """Rows with a gradient at a stored position; a part of the rows at a time, to stay small in memory."""
        assert self.stored is not None
        crow, col = self.index
        pointers = (crow[:, 0] if col is None else crow).to(torch.int64)
        height = max(1, BLOCK // self.shape[1])
        found = []
        for first in range(0, self.shape[0], height):
            part = pointers[first : first + height + 1]
            nonzero = self.stored[int(part[0]) : int(part[-1])] != 0
            before = F.pad(nonzero.cumsum(0, dtype=torch.int32), (1, 0))
            found.append(first + before[part - part[0]].diff().nonzero().view(-1))
        return torch.cat(found)
