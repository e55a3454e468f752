"""Where the tests of a backend run: on the CPU and, marked ``gpu``, on CUDA.

Without hypothesis, which a bare machine lacks (`harness.gpu_check`).
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from sparsecore import Pattern

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
_CHOSEN = os.environ.get(
    "SPARSECORE_BACKEND"
)  # where the environment asks for one, everything runs on that one
BACKENDS = (_CHOSEN,) if _CHOSEN else ("numba", "torch", "triton") if INTERPRETED else ("numba", "torch")
of_numba = pytest.mark.skipif(
    BACKENDS[0] != "numba", reason="about numba's kernels: another backend was asked for"
)


def devices(backend: str = "torch") -> list[Any]:
    """Parameters of a test; on a device where the backend cannot run they are skipped, with the reason."""
    no_cuda = "no CUDA device" if not torch.cuda.is_available() else ""
    no_cpu = ""
    if backend == "triton":
        no_cuda = no_cuda or ("" if HAS_TRITON else "triton is not installed")
        no_cpu = "" if INTERPRETED else "needs triton, and TRITON_INTERPRET=1 from the start (tox -e triton)"
    return [
        pytest.param("cpu", marks=pytest.mark.skipif(bool(no_cpu), reason=no_cpu)),
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(bool(no_cuda), reason=no_cuda)]),
    ]


def values_for(pattern: Pattern, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Values of a pattern, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(pattern.nnz, generator=generator, dtype=dtype) + 0.5
    return drawn * (torch.randint(2, (pattern.nnz,), generator=generator) * 2 - 1)


def misaligned(t: torch.Tensor) -> torch.Tensor:
    """The same numbers in memory that begins one number behind a cache line."""
    found = t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)
    assert t.numel() == 0 or found.data_ptr() % 64 == t.element_size()
    return found


class AsOnAGpu(TorchFunctionMode):
    """Tensors on the CPU say that they are on a GPU, and what is made there is made on the CPU: code whose ways part by
    the device takes those of a GPU, on any machine. With `sparsecore.backend("torch")`, which runs on both.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.is_cpu.__get__:
            return False
        if func == torch.Tensor.device.__get__:
            return torch.device("cuda")
        args = [torch.device("cpu") if isinstance(a, torch.device) else a for a in args]
        if isinstance((kwargs or {}).get("device"), torch.device):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return func(*args, **(kwargs or {}))
