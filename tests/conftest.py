"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# A slow or busy machine is no failure, so there are no deadlines; in CI the same examples run every time.
settings.register_profile("local", deadline=None, max_examples=30)
settings.register_profile("ci", settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread unless a test asks for more: on a busy machine every small parallel region costs milliseconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real datasets; the test is skipped, with the reason, where it is not set."""
    folder = os.environ.get("SPARSECORE_DATA")
    if not folder:
        pytest.skip("SPARSECORE_DATA is not set: no real datasets")
    return Path(folder)
