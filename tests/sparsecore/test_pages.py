"""Huge pages are asked for where it pays, and only there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsecore import SparseLinear
from sparsecore.pages import ask_huge_pages


def _asked(tensor: Tensor) -> bool:
    """Whether the mapping that holds the middle of the tensor has the kernel's flag ``hg``."""
    middle = tensor.data_ptr() + tensor.numel() * tensor.element_size() // 2
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if found:
            inside = int(found[1], 16) <= middle < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("no mapping holds the tensor")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists() or not Path("/proc/self/smaps").exists(),
    reason="this system has no transparent huge pages",
)
def test_large_weights_ask_for_huge_pages() -> None:
    large = torch.empty(12 << 20)
    assert ask_huge_pages(large) is large
    assert _asked(large)
    module = SparseLinear(4096, 2048, density=0.5)
    assert _asked(module.values)


@pytest.mark.parametrize(
    "tensor",
    [torch.empty(0), torch.ones(3), torch.empty(12 << 20, device="meta")],
    ids=["empty", "small", "meta"],
)
def test_others_are_left_alone(tensor: Tensor) -> None:
    assert ask_huge_pages(tensor) is tensor
