"""Packages that are used where they are installed, and asked for by name where they are needed and missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from sparsecore.errors import SparsecoreError

__all__ = ["optional"]

_INSTALL = {
    "torch_sparse": "pip install --no-build-isolation torch-scatter torch-sparse (built from source, or wheels from "
    "PyTorch Geometric for many versions of torch)",
    "triton": 'pip install "triton>=3.2"',
}


def optional(name: str) -> ModuleType:
    """The package, imported.

    Raises:
        SparsecoreError: where it is missing or made for another torch, with the way to install it.
    """
    try:
        return importlib.import_module(name)
    except (
        ImportError,
        OSError,
        RuntimeError,
    ) as error:  # the last two: its libraries do not fit to this torch
        raise SparsecoreError(
            f"this needs the package {name}, and importing it says: {error}. Install: {_INSTALL[name]}"
        ) from error
