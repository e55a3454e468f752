"""Weights that are updated while the backward pass runs: which, and by whom.

A sparse gradient that an optimizer is to use once need not become a tensor: the optimizer takes the looked-up rows and
their gradient as they are. `sparsecore.optim` registers a parameter here, the derivatives of lookups ask.
"""

from __future__ import annotations

import weakref
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["RowUpdater", "asked_for", "forget", "register", "updater_of"]


class RowUpdater(Protocol):
    """An optimizer that can update looked-up rows."""

    def update_rows(
        self,
        parameter: Tensor,
        crow: Tensor,
        col: Tensor | None,
        ids: Tensor,
        grad: Tensor,
        sources: Tensor | None,
        weights: Tensor | None,
    ) -> None:
        """One step with the gradient that `sparsecore.ops.embedding.touched` makes of the same arguments."""


_updaters = WeakTensorKeyDictionary()


def register(parameter: Tensor, updater: RowUpdater) -> None:
    """The updater steps this parameter from now on, as long as both live; a later one takes its place."""
    _updaters[parameter] = weakref.ref(updater)


def forget(parameter: Tensor, updater: RowUpdater) -> None:
    """This updater steps the parameter no longer."""
    if updater_of(parameter) is updater:
        del _updaters[parameter]


def updater_of(parameter: Tensor) -> RowUpdater | None:
    """Who updates this parameter during the backward pass, if anybody does."""
    if not _updaters:
        return None
    reference = _updaters.get(parameter)
    return None if reference is None else reference()


def asked_for(parameter: Tensor) -> bool:
    """Whether the backward pass that runs adds to the parameter's gradient: not one that ``torch.autograd.grad`` began,
    nor one with ``inputs=`` that leaves the parameter out.
    """
    try:
        return torch._C._will_engine_execute_node(get_gradient_edge(parameter).node)
    except RuntimeError:  # torch.autograd.grad asked for this parameter's gradient: it is to be returned
        return False
