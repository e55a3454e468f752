"""Exploration of an index set: prune, grow, fill up, and move what belongs to the nonzeros along.

An index is what the other operators take, ``(crow, col)`` or ``(bitmap, None)``; what is returned is in the same
encoding. These are plain functions, not ``torch.library`` operators: nothing here has a derivative.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from sparsecore.backends import backend_name, load

__all__ = ["GradientSource", "Index", "fill", "grow", "overlay_", "prune", "realign_", "record_"]

Index = tuple[Tensor, Tensor | None]


class GradientSource(Protocol):
    """What can compute any rows of a weight's dense gradient."""

    def rows(self) -> Tensor | None:
        """Rows that can differ from zero, int64, ascending, unique; None for all."""

    def block(self, rows: Tensor | slice) -> Tensor:
        """Their dense gradient, (len(rows), cols); the caller may write into it."""


def _load(device: torch.device) -> ModuleType:
    """The backend's part for exploration: a module of its own, since static training and serving never need it."""
    load(device)  # says what is missing, if something is
    return importlib.import_module(f"sparsecore.backends.{backend_name(device)}.explore")


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def prune(values: Tensor, index: Index, shape: tuple[int, int], k: int) -> Index:
    """Index of the weights that stay when the k of smallest magnitude go; among equals the first ones go.

    Raises:
        FloatingPointError: if a value is NaN or infinite.
    """
    return _load(values.device).prune(_wide(values), index, shape, k)


def grow(
    source: GradientSource, index: Index, shape: tuple[int, int], k: int, skip_row: int | None = None
) -> Index:
    """Index with the k positions of largest |gradient| outside it added, among equals the first ones.

    Positions without a gradient are never added: there may be fewer than k. Scores stream through in blocks of rows
    with a running top-k, so that memory is O(block + k).

    Args:
        source: computes rows of the dense gradient; it may be asked for some of them more than once.
        index: from `prune`; its memory may be reused.
        shape: of the weight.
        k: how many to grow.
        skip_row: a row that stays empty.

    Raises:
        FloatingPointError: if the gradient is NaN or infinite anywhere.
    """
    return _load(index[0].device).grow(source, index, shape, k, skip_row)


def fill(
    index: Index,
    shape: tuple[int, int],
    n: int,
    generator: torch.Generator | None,
    skip_row: int | None = None,
) -> Index:
    """Index with n free positions added, every subset equally likely; with fewer if fewer are free.

    Args:
        index: its memory may be reused.
        shape: of the weight.
        n: how many to add.
        generator: CPU generator; what it draws does not depend on the backend.
        skip_row: a row that stays empty.
    """
    return _load(index[0].device).fill(index, shape, n, generator, skip_row)


def overlay_(block: Tensor, values: Tensor, index: Index, rows: Tensor | slice) -> Tensor:
    """The block, with the numbers of its rows' stored positions in their places; it may be written into.

    Args:
        block: (len(rows), cols).
        values: (nnz,).
        index: what is stored.
        rows: a slice, or int64 ids.
    """
    return _load(values.device).overlay_(block, values, index, rows)


def realign_(tensors: Sequence[tuple[Tensor, float]], old: Index, new: Index, shape: tuple[int, int]) -> int:
    """Move the numbers that belong to the nonzeros of ``old`` to their places in ``new``, in place.

    Args:
        tensors: (nnz,) each, with the number that a position gets which ``old`` does not have.
        old, new: indices of equally many nonzeros.
        shape: of the weight.

    Returns:
        How many positions both have.
    """
    wide = [(_wide(tensor), fresh) for tensor, fresh in tensors]
    kept = _load(old[0].device).realign_(wide, old, new, shape)
    for (tensor, _), (moved, _) in zip(tensors, wide, strict=True):
        if moved is not tensor:
            tensor.copy_(moved)  # exact: the numbers are its own
    return kept


def record_(history: Tensor, index: Index, shape: tuple[int, int]) -> int:
    """Set the bit of every stored position; returns how many were not set before.

    Args:
        history: uint8, bit p % 8 of byte p // 8 belongs to position p = row * cols + column.
        index: what is stored.
        shape: of the weight.
    """
    return _load(history.device).record_(history, index, shape)
