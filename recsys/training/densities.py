"""Which weights of a run's model are sparse, and how many numbers each holds."""

from __future__ import annotations

import math
import re
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from recsys.config import Config
from recsys.errors import ConfigError
from recsys.models.build import model_class
from recsys.models.fitted import Fitted
from recsys.models.layers import Density
from sparsecore import SparseModule

__all__ = ["dense_size", "density_of", "expect_sparse_weights", "nnz_per_tensor", "parameter_densities"]


def density_of(config: Config) -> Density:
    """Which weights are sparse, and how much of them is stored, by a run's settings."""
    sparsity = config.sparsity
    include = sparsity.include or (
        model_class(config.model.name).paper if sparsity.weights == "paper" else ["*"]
    )
    return Density(sparsity.density, tuple(include), tuple(sparsity.exclude))


def parameter_densities(model: nn.Module, density: Density) -> dict[str, float]:
    """The density of every parameter of a dense model that would be sparse, by the parameter's name."""
    named = {name: density.at(name.removesuffix(".weight")) for name in _of_layers(model)}
    return {name: share for name, share in named.items() if share < 1}


def _of_layers(model: nn.Module) -> list[str]:
    """Names of the parameters that `Layers` has made: all but the scales and shifts of normalisations."""
    norms = {p for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    return [name for name, parameter in model.named_parameters() if parameter not in norms]


def nnz_per_tensor(model: nn.Module, explorer: Any = None) -> dict[str, int]:
    """Number of weights that may differ from zero, for every parameter of a model.

    A sparse layer stores just these; of a masked one they are counted in its mask.
    """
    masks = getattr(explorer, "masks", {})
    return {
        name: int(masks[name].sum()) if name in masks else parameter.numel()
        for name, parameter in model.named_parameters()
    }


def dense_size(model: nn.Module) -> int:
    """How many weights the model would have if it were dense."""
    sparse = [module for module in model.modules() if isinstance(module, SparseModule)]
    size = sum(parameter.numel() for parameter in model.parameters())
    return size + sum(math.prod(module.shape) - module.nnz for module in sparse)


def expect_sparse_weights(model: nn.Module, config: Config) -> None:
    """Refuse a model of which no weight would be sparse, although the method is a sparse one.

    Raises:
        ConfigError: the patterns match nothing, or the model has no weights at all.
    """
    density, name = density_of(config), config.model.name
    if isinstance(model, Fitted):
        raise ConfigError(
            f"{name} has no weights that could be sparse: expected sparsity.method = 'dense', "
            f"got {config.sparsity.method!r}"
        )
    names = [re.sub(r"\.(weight|values)$", "", parameter) for parameter in _of_layers(model)]
    for setting, patterns in (("include", config.sparsity.include), ("exclude", config.sparsity.exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(weight, pattern) for weight in names):
                raise ConfigError(
                    f"sparsity.{setting}: no weight of {name} matches {pattern!r}; its weights are: {', '.join(names)}"
                )
    if density.density < 1 and not any(density.at(weight) < 1 for weight in names):
        raise ConfigError(
            f"sparsity.include = {list(density.include)} and sparsity.exclude = {list(density.exclude)} "
            f"leave no weight of {name} to be sparse; its weights are: {', '.join(names)}"
        )
