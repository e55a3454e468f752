"""Weights of one model as the initial values of another, dense or sparse."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from recsys.errors import ConfigError
from recsys.models.base import Recommender
from sparsecore import Pattern
from sparsecore.nn.base import SparseModule

__all__ = ["check_parts", "copy_layer", "copy_weight", "dense_weight"]

Weight = Tensor | SparseModule
# A dense tensor with a larger share of zeros has been trained under a mask. Without one a number is exactly zero only
# by chance: initial values are about once in 2^24.
_MASKED = 1e-3


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
    sparse <- dense: the values at the places of the target's index set, which stays;
    sparse <- dense with zeros, of a masked run: its mask becomes the index set, see `_carried_mask`.

    Raises:
        ConfigError: the shapes differ, or the number of weights of two that are sparse or masked.
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
        own = target.pattern.to_mask()
        mask = _carried_mask(name, source.reshape(own.shape), own)
        if mask is not own:
            pattern = Pattern.from_mask(mask)
            target.write_index(pattern.crow, pattern.col)
        target.values.copy_(source.reshape(-1)[target.pattern.positions()]).mul_(scale)
    elif target.nnz != source.nnz:
        raise ConfigError(
            f"pre-trained weight {name!r} stores {source.nnz} values, this model {target.nnz}: take parts of the "
            "same density, or dense ones"
        )
    else:
        target.write_index(source.pattern.crow, source.pattern.col)
        target.values.copy_(source.values).mul_(scale)


def _carried_mask(name: str, values: Tensor, drawn: Tensor) -> Tensor:
    """The mask that a weight begins with which has been given `values`, one of `drawn`, a mask of the same shape.

    `drawn` itself where the values have no zeros to tell a mask by. Else, of values that come from a sparse or masked
    part, their own mask: where they are not zero, and, as weights that were just grown are zero too, as many places of
    `drawn` as are missing to the number of its own.

    Raises:
        ConfigError: more values are not zero than `drawn` has places.
    """
    own = values != 0
    found, places = int(own.sum()), int(drawn.sum())
    if own.numel() - found <= _MASKED * own.numel():
        return drawn
    if found > places:
        raise ConfigError(
            f"pre-trained weight {name!r} has {found} numbers that are not zero of {own.numel()}, this model keeps "
            f"{places}: take parts of the same density, or dense ones"
        )
    free = torch.nonzero((drawn & ~own).view(-1)).view(-1)
    mask = own.clone()
    # Evenly among them: places are in the order of rows, and the first ones would all be of the same users.
    mask.view(-1)[free[torch.arange(places - found) * len(free) // max(1, places - found)]] = True
    return mask


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
