"""Torch's notes about its sparse tensors, which say nothing to who never made one.

Torch gives each once a process. They are provoked at the import, and ignored: to filter warnings around every sparse
tensor would cost microseconds, make Python forget which of the user's it has shown, and is not safe among threads.
"""

from __future__ import annotations

import warnings

import torch

__all__ = ["hush"]


def hush() -> None:
    """Provoke "support is in beta state" and, as torch 2.11 says although they are declined, "checks are disabled"."""
    zero = torch.zeros(1, dtype=torch.int64, device="cpu")
    pointers, value = torch.tensor([0, 1], device="cpu"), torch.ones(1, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_coo_tensor(zero.view(1, 1), value, (1,), is_coalesced=True, check_invariants=False)
        torch.sparse_csr_tensor(pointers, zero, value, (1, 1), check_invariants=False)
