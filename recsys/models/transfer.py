"""Weights of one model as the initial values of another, dense or sparse."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from recsys.errors import ConfigError
from recsys.models.base import Recommender
from sparsecore.nn.base import SparseModule

__all__ = ["check_parts", "copy_layer", "copy_weight", "dense_weight"]

Weight = Tensor | SparseModule


def copy_layer(name: str, target: nn.Module, source: nn.Module, scale: float = 1.0) -> None:
    """``target <- scale * source`` for a table, or a linear layer with its bias; `name` is for messages."""
    copy_weight(name, _weight(target), _weight(source), scale)
    ours, theirs = getattr(target, "bias", None), getattr(source, "bias", None)
    if ours is not None and theirs is not None:
        copy_weight(f"{name}.bias", ours, theirs, scale)


@torch.no_grad()
def copy_weight(name: str, target: Weight, source: Weight, scale: float = 1.0) -> None:
    """``target <- scale * source`` for weights that are stored in whichever way:

    dense <- dense or sparse: all values, zero where the source stores nothing;
    sparse <- sparse of the same nnz: index set and values;
    sparse <- dense: the values at the places of the target's index set, which stays.

    Raises:
        ConfigError: the shapes differ, or the number of weights of two sparse ones.
    """
    shapes = [tuple(w.dense_shape if isinstance(w, SparseModule) else w.shape) for w in (target, source)]
    if torch.Size(shapes[0]).numel() != torch.Size(shapes[1]).numel() or shapes[0][-1] != shapes[1][-1]:
        raise ConfigError(
            f"pre-trained weight {name!r} has shape {shapes[1]}, this model needs {shapes[0]}: "
            "train both with the same widths on the same data"
        )
    if not isinstance(target, SparseModule):
        target.copy_(dense_weight(source).view(target.shape)).mul_(scale)
    elif not isinstance(source, SparseModule):
        target.values.copy_(source.reshape(-1)[target.pattern.positions()]).mul_(scale)
    elif target.nnz != source.nnz:
        raise ConfigError(
            f"pre-trained weight {name!r} stores {source.nnz} values, this model {target.nnz}: take parts of the "
            "same density, or dense ones"
        )
    else:
        target.write_index(source.pattern.crow, source.pattern.col)
        target.values.copy_(source.values).mul_(scale)


def dense_weight(weight: nn.Module | Tensor) -> Tensor:
    """What is stored, with its zeros, detached: for small weights, and for once."""
    weight = _weight(weight) if isinstance(weight, nn.Module) else weight
    return (
        weight.pattern.to_dense(weight.values.detach())
        if isinstance(weight, SparseModule)
        else weight.detach()
    )


def check_parts(model: Recommender, parts: Mapping[str, Recommender], known: Mapping[str, type]) -> None:
    """Raise ConfigError unless every part has a name and a class out of `known`."""
    for name, part in parts.items():
        if name not in known:
            raise ConfigError(
                f"train.pretrained.{name}: {type(model).__name__} takes {' and '.join(known)}, not {name!r}"
            )
        if not isinstance(part, known[name]):
            raise ConfigError(
                f"train.pretrained.{name}: expected a run of {known[name].__name__}, got {type(part).__name__}"
            )


def _weight(layer: nn.Module) -> Weight:
    return layer if isinstance(layer, SparseModule) else layer.get_parameter("weight")
