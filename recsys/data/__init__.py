"""Interactions in, training matrix and evaluation users out: `load(name)` is the one door."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from recsys.data.dataset import Dataset, EvalSet, Oracle
from recsys.data.split import SplitOptions
from recsys.data.synthetic import synthetic

if TYPE_CHECKING:
    from recsys.data.loaders import available, load

__all__ = ["Dataset", "EvalSet", "Oracle", "SplitOptions", "available", "load", "synthetic"]


def __getattr__(name: str) -> Any:
    # Not imported at once: drawing data needs no reader of files (pyarrow), which a bare GPU machine may lack.
    if name in __all__:
        from recsys.data import loaders

        return getattr(loaders, name)
    raise AttributeError(f"module 'recsys.data' has no attribute {name!r}")
