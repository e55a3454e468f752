"""What cannot be trained as copies on several ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from sparsecore.errors import SparsecoreError

__all__ = ["refuse_sparse_gradient"]


def refuse_sparse_gradient(values: Tensor) -> None:
    """Refuse the sparse gradient of a table that DistributedDataParallel is to average over the ranks.

    It takes sparse gradients from ``nn.Embedding`` alone: from others it ends in an error about storage, and where an
    optimizer updates the table during the backward pass (``in_backward=True``), ranks drift apart without a word.

    Raises:
        SparsecoreError: in the forward pass of a DistributedDataParallel that has this parameter.
    """
    outer = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if outer is None or not (values.requires_grad and torch.is_grad_enabled()):
        return
    if any(parameter is values for parameter in getattr(outer, "_module_parameters", ())):
        raise SparsecoreError(
            "DistributedDataParallel cannot average the gradient of a table with sparse=True: make the table with "
            "sparse=False, or split its rows over the ranks (sparsecore.shard_rows)"
        )
