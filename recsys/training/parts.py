"""What changes a model in training: its optimizer, the schedule of its rate, and the explorer of sparse weights."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler

import sparsecore
from recsys.config import SparsityConfig, TrainConfig
from recsys.data import Dataset
from recsys.errors import DataError
from recsys.models.base import Recommender
from recsys.models.fitted import Fitted
from recsys.models.layers import Density
from recsys.training.densities import parameter_densities

__all__ = ["make_explorer", "make_optimizer", "make_schedule", "steps_of_epoch"]


def steps_of_epoch(model: Recommender, dataset: Dataset, batch_size: int) -> int:
    """Updates of an epoch, at least one but for models that are fitted at once.

    Raises:
        DataError: there is nothing to make an update with.
    """
    steps = model.steps_per_epoch(dataset, batch_size)
    if not steps and not isinstance(model, Fitted):
        raise DataError(
            f"{dataset.name}: there is nothing to train {type(model).__name__} on: no user has both an item that was "
            "chosen and one that was not"
        )
    return steps


def make_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of `train`, over all parameters."""
    kind = {"adam": torch.optim.Adam, "adagrad": torch.optim.Adagrad}[train.optimizer]
    # fused: one pass over parameter, gradient and state, several times faster than the default on a CPU.
    return kind(model.parameters(), lr=train.lr, fused=True)


def make_schedule(optimizer: torch.optim.Optimizer, train: TrainConfig, steps: int) -> LRScheduler | None:
    """What lowers the rate after every update, to 0 after so many; None for a constant one."""
    if train.lr_schedule == "constant":
        return None
    if train.lr_schedule == "cosine":
        return CosineAnnealingLR(optimizer, steps)
    return LinearLR(optimizer, 1.0, 0.0, steps)


def make_explorer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    sparsity: SparsityConfig,
    density: Density,
    steps: int,
    generator: torch.Generator,
    masks: dict[str, torch.Tensor] | None = None,
) -> sparsecore.DynamicSparsity | sparsecore.MaskedSparsity | None:
    """What prunes and grows during so many updates; None where nothing moves.

    At density 1 there is nowhere to move to: the layers are dense ones. `masks`: those that a masked run begins with;
    without, they are drawn, to be replaced by those of the run that goes on.
    """
    if sparsity.method in ("dense", "static") or sparsity.density == 1:
        return None
    options: dict[str, Any] = dict(
        interval=sparsity.interval,
        drop_fraction=sparsity.drop_fraction,
        end_drop_fraction=sparsity.end_drop_fraction,
        schedule=sparsity.schedule,
        grow=sparsity.grow,
        stop_fraction=sparsity.stop_fraction,
        total_steps=steps,
        generator=generator,
    )
    if sparsity.method == "masked":
        density_or_masks: dict[str, Any] = {"masks": masks}
        if masks is None:
            density_or_masks = {"density": parameter_densities(model, density)}
        return sparsecore.MaskedSparsity(model, optimizer, **density_or_masks, **options)
    with warnings.catch_warnings():
        # Runs of an epoch or two, to try something, are usual here.
        warnings.filterwarnings("ignore", message="nothing will be explored", category=UserWarning)
        return sparsecore.DynamicSparsity(model, optimizer, **options)
