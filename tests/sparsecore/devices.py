"""Where the tests of a backend run: on the CPU and, marked ``gpu``, on CUDA."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"


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
