"""Who watches the gradient of a weight being computed.

The operators that compute a weight's gradient at its nonzeros are given everything that its gradient elsewhere would
take. An exploration asks for that once in a while: it registers a watcher for an index set, and the operators tell it
what they were given. Because they tell it when they run, and not when they are called, this works in compiled code too,
and costs other steps nothing.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Protocol

from torch import Tensor

__all__ = [
    "Watcher",
    "forget",
    "in_transform",
    "owned",
    "through_dispatcher",
    "unwatch",
    "watch",
    "watcher_of",
    "within_transform",
]


class Watcher(Protocol):
    """Is told what the gradient of a weight was computed from. Tensors must not be changed."""

    def saw_product(self, dy: Tensor, x: Tensor) -> None:
        """``dY^T X``: dy (B, rows), x (B, cols)."""

    def saw_rows(self, grad: Tensor, ids: Tensor) -> None:
        """Row ids[e] gets row e of grad."""

    def saw_bags(self, grad: Tensor, ids: Tensor, sources: Tensor, weights: Tensor) -> None:
        """Row ids[e] gets weights[e] times row sources[e] of grad."""

    def saw_propagation(self, grad: Tensor, graph: tuple[Tensor, ...], hops: int) -> None:
        """The mean of the hops 0..h of a graph got this gradient."""


_watchers: weakref.WeakValueDictionary[int, Watcher] = weakref.WeakValueDictionary()


class _Here(threading.local):
    """What holds for a thread. (To ask a thread's namespace for what is not in it takes a microsecond.)"""

    transform = borrowed = False


_here = _Here()


@contextmanager
def in_transform() -> Iterator[None]:
    """Around derivatives that a functional transform (``torch.func.grad``) computes, through values of its own."""
    before = within_transform()
    _here.transform = True
    try:
        yield
    finally:
        _here.transform = before


def within_transform() -> bool:
    """Whether a functional transform computes the derivative that asks."""
    return _here.transform


def watch(index: Tensor, watcher: Watcher) -> None:
    """Tell a watcher of the weight whose index set begins with this tensor, as long as the watcher lives."""
    _watchers[index.data_ptr()] = watcher


def forget(index: Tensor, watcher: Watcher) -> None:
    """Tell this watcher nothing more."""
    if _watchers.get(index.data_ptr()) is watcher:
        del _watchers[index.data_ptr()]


def unwatch(index: Tensor) -> Watcher | None:
    """Take off the watcher of this weight, if it has one: its index set is about to lie elsewhere in memory."""
    return _watchers.pop(index.data_ptr(), None) if _watchers else None


def watcher_of(index: Tensor) -> Watcher | None:
    """Who watches this weight, if anybody does."""
    return _watchers.get(index.data_ptr()) if _watchers else None


def owned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its memory may be used for something else as soon as the operator returns."""
    return tensor.clone() if _here.borrowed else tensor.detach()


def through_dispatcher(run: Callable[..., Any]) -> Callable[..., Any]:
    """An implementation for torch's dispatcher, behind which compiled code lends its buffers and takes them back."""

    @wraps(run)
    def dispatched(*args: Any, **kwargs: Any) -> Any:
        if not _watchers:
            return run(*args, **kwargs)
        _here.borrowed = True
        try:
            return run(*args, **kwargs)
        finally:
            _here.borrowed = False

    return dispatched
