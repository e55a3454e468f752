"""Errors that sparsecore raises for input it cannot use. All of them are ``ValueError``."""

from __future__ import annotations


class SparsecoreError(ValueError):
    """Base class: the message says what was expected, what came, and what to do."""


class PatternError(SparsecoreError):
    """An index set that is not a valid sparsity pattern."""


class DensityError(SparsecoreError):
    """A density or a number of nonzeros that no pattern of the given shape can have."""


class TopologyError(SparsecoreError):
    """A prune/grow step that would not be sound: refused before anything is rewritten."""


class ConversionError(SparsecoreError):
    """A module or model that cannot be made sparse (or dense again)."""
