"""First calls are measured of every kernel that an operator comes to.

Among the last tests: what it calls others have compiled by then.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numba.core.dispatcher import Dispatcher

from harness import compile_times
from sparsecore.backends import numba as kernels
from sparsecore.backends.numba import jit
from sparsecore.encoding import has_expand


def _is_serial(found: object) -> bool:
    """Whether `jit.serial_kernel` made it: not a helper that is inlined, nor the loop that shares out chunks."""
    if not isinstance(found, Dispatcher) or found is jit._share:
        return False
    return hasattr(found._cache, "_cache_file") and found.targetoptions.get("inline") != "always"


def _modules() -> list[Any]:
    names = [module.name for module in pkgutil.iter_modules(kernels.__path__)]
    return [importlib.import_module(f"{kernels.__name__}.{name}") for name in names]


def _name(function: Callable[..., Any]) -> str:
    return f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}"


@pytest.mark.skipif(
    os.environ.get("SPARSECORE_BACKEND", "numba") != "numba",
    reason="about numba's kernels: another backend was asked for",
)
@pytest.mark.skipif(has_expand(), reason="the calls were chosen where kernels choose without AVX-512")
def test_every_kernel_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    called: set[str] = set()
    known: set[str] = set()
    run_kernel = jit.kernel.__call__

    def kernel(self: jit.kernel, *arguments: Any) -> Any:
        called.add(_name(self._compiled.py_func))
        return run_kernel(self, *arguments)

    def serial(found: Any) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            called.add(_name(found.py_func))
            return found(*arguments)

        return run

    for module in _modules():
        for name, found in list(vars(module).items()):
            if isinstance(found, jit.kernel):
                known.add(_name(found._compiled.py_func))
            elif _is_serial(found):
                known.add(_name(found.py_func))
                monkeypatch.setattr(module, name, serial(found))
    monkeypatch.setattr(jit.kernel, "__call__", kernel)
    before = torch.get_num_threads()
    try:
        for _, run in compile_times._calls():
            for n_threads in (1, 2):
                torch.set_num_threads(n_threads)
                run()
    finally:
        torch.set_num_threads(before)
    assert known
    assert not known - called
