"""Which implementation runs an operation: by device, overridable for a block of code or by environment.

CPU tensors go to ``numba``, CUDA tensors to ``triton`` where it can compile (`has_triton`), all others to ``torch``.
``with sparsecore.backend("torch"):`` or the environment variable ``SPARSECORE_BACKEND``, read at the import, override
it. A backend is a module with one function per operation (see ``sparsecore.ops``).

``triton`` has kernels of our own for what torch does slowly on a GPU (results/gpu.md) and torch's functions for
everything else. An option, named as the package that it needs, is ``torch_sparse``: ``torch`` with sparse times dense
products by torch-sparse.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

import torch

from sparsecore.errors import SparsecoreError
from sparsecore.optional import has_triton, optional

__all__ = ["asked_for", "backend", "backend_name", "load"]

_NAMES = ("numba", "torch", "torch_sparse", "triton")
_environment = os.environ.get("SPARSECORE_BACKEND")  # once: to look there costs a microsecond
_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
_override: ContextVar[str | None] = ContextVar("sparsecore_backend", default=None)
_loaded: dict[str, ModuleType] = {}
_usual: dict[torch.device, ModuleType] = {}  # what runs where nobody said otherwise


def _checked(name: str, source: str) -> str:
    if name not in _NAMES:
        raise SparsecoreError(f"{source} must be one of {', '.join(_NAMES)}, got {name!r}")
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every operation of the block on the backend ``name``: "numba", "torch", "torch_sparse" or "triton".

    Forward and backward choose separately: run ``loss.backward()`` inside the block too.

    Raises:
        SparsecoreError: for an unknown name, and for a backend whose package is not installed.
    """
    _module(_checked(name, "backend"))
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def backend_name(device: torch.device) -> str:
    """Name of the backend that an operation on this device uses now."""
    name = asked_for()
    if name:
        _checked(name, "SPARSECORE_BACKEND")
        if name == "numba" and device.type != "cpu":
            raise SparsecoreError(f"the numba backend runs on the CPU, not on {device.type}; use 'torch'")
        if name == "triton" and device.type == "cpu" and not _interpreted:
            raise SparsecoreError(
                "the triton backend runs on a GPU, and on the CPU in Triton's interpreter alone: "
                "set TRITON_INTERPRET=1 before sparsecore is imported, or use 'numba' or 'torch'"
            )
        return name
    if device.type == "cpu":
        return "numba"
    return "triton" if device.type == "cuda" and has_triton() else "torch"


def asked_for() -> str | None:
    """Name of the backend that somebody asked for, if anybody did."""
    return _override.get() or _environment


def load(device: torch.device) -> ModuleType:
    """The backend module for tensors on this device; imported at the first use, so that an import costs nothing."""
    if _environment or _override.get() is not None:
        return _module(backend_name(device))
    module = _usual.get(device)
    if module is None:
        module = _usual[device] = _module(backend_name(device))
    return module


def _module(name: str) -> ModuleType:
    module = _loaded.get(name)
    if module is None:
        if name in ("torch_sparse", "triton"):
            optional(name)
        module = _loaded[name] = importlib.import_module(f"sparsecore.backends.{name}")
    return module
