"""Averages of a model's weights over training steps (SWA, EMA), for weights whose index sets move."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import swa_utils

from sparsecore.errors import SparsecoreError
from sparsecore.nn.base import SparseModule
from sparsecore.ops import explore

__all__ = ["AveragedModel"]


class AveragedModel(swa_utils.AveragedModel):
    """``torch.optim.swa_utils.AveragedModel`` for models with sparse weights: same arguments, same use.

    torch's own averages stored values by their place in memory, which an exploration gives to other weights, and with
    ``use_buffers=True`` the index sets too, as if they were numbers. This one gives the average the index set that the
    model has now: a weight that is still stored keeps its average, one that has just been grown begins with 0 (what it
    was in the dense form until then), and the average of one that has been pruned is dropped.

    Example:
        >>> average = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
        >>> for batch in batches:
        ...     step(batch)
        ...     explorer.step()
        ...     average.update_parameters(model)
    """

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """One more step into the average, as torch's.

        Raises:
            SparsecoreError: the model has not the sparse modules of the one that the average was made of.
        """
        pairs = _pairs(self.module, model)
        for mine, now in pairs:
            mine.set_encoding(now.encoding)
            device = mine.values.device
            index = now.index[0].to(device), None if now.index[1] is None else now.index[1].to(device)
            explore.realign_([(mine.values.data, 0.0)], mine.index, index, mine.shape)
            _copy(mine, index)
        super().update_parameters(model)
        for mine, now in pairs:  # with use_buffers=True they were averaged along with the others
            _copy(mine, now.index)


def _pairs(average: nn.Module, model: nn.Module) -> list[tuple[SparseModule, SparseModule]]:
    ours = [module for module in average.modules() if isinstance(module, SparseModule)]
    theirs = [module for module in model.modules() if isinstance(module, SparseModule)]
    mine, now = ([(m.shape, m.nnz) for m in modules] for modules in (ours, theirs))
    if mine != now:
        raise SparsecoreError(
            f"the average was made of a model whose sparse modules have (shape, nonzeros) {mine}, this one has {now}: "
            "average models of one kind and density"
        )
    return list(zip(ours, theirs, strict=True))


def _copy(module: SparseModule, index: explore.Index) -> None:
    for mine, new in zip(module.index, index, strict=True):
        if mine is not None and new is not None:
            mine.copy_(new)
