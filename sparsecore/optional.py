"""Packages that are used where they are installed, and asked for by name where they are needed and missing."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from functools import cache
from types import ModuleType

from sparsecore.errors import SparsecoreError

__all__ = ["has_triton", "optional"]

_INSTALL = {
    "torch_sparse": "pip install --no-build-isolation torch-scatter torch-sparse (built from source, or wheels from "
    "PyTorch Geometric for many versions of torch)",
    "triton": 'pip install "triton>=3.2"',
}


@cache
def has_triton() -> bool:
    """Whether kernels for CUDA can be compiled: by triton, which torch's builds for CUDA bring, and a C compiler, with
    which triton builds what launches a kernel (on Windows it brings one).
    """
    if importlib.util.find_spec("triton") is None:
        return False
    return os.name == "nt" or bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))


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
