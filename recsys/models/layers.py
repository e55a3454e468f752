"""The layers that make dense and sparse one code path, and which of a model's weights are sparse."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

import sparsecore
from recsys.models.devices import sent

__all__ = ["Density", "Layers", "add_bias", "dropout"]


@dataclass(frozen=True)
class Density:
    """How much of each weight of a model is stored, by the weight's name.

    A weight has the name of its layer (``output``, ``mlp.0``), the bias of a layer that of the layer and ``.bias``
    (``output.bias``), other biases their own (``input_bias``). A weight is stored at `density` where a pattern of
    `include` and none of `exclude` matches its name, else dense. A bias also has to be named as one: a pattern
    reaches biases only if it ends with "bias".

    Attributes:
        density: fraction in (0, 1].
        include, exclude: shell patterns of names.
    """

    density: float = 1.0
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    @classmethod
    def of(cls, density: float | Density) -> Density:
        """One density for every weight, or what is one already."""
        return density if isinstance(density, Density) else cls(density)

    def at(self, name: str) -> float:
        """The density of the weight of a name."""
        bias = name.endswith("bias")
        include = [pattern for pattern in self.include if pattern.endswith("bias") or not bias]
        chosen = any(fnmatchcase(name, pattern) for pattern in include)
        return self.density if chosen and not any(fnmatchcase(name, p) for p in self.exclude) else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which `Density(**values)` takes."""
        return {"density": self.density, "include": list(self.include), "exclude": list(self.exclude)}


class Layers:
    """Makes the layers of a model: torch's own where a weight is dense, sparsecore's where it is not.

    Args:
        density: of every weight, or by name.
        generator: index sets follow from it, in the order in which layers are made. Initial values do not (torch's
            layers cannot draw from one): a model draws them itself.
    """

    def __init__(self, density: float | Density = 1.0, generator: torch.Generator | None = None) -> None:
        self.density, self.generator = Density.of(density), generator

    def linear(
        self, name: str, in_features: int, out_features: int, bias: bool = True
    ) -> nn.Linear | sparsecore.SparseLinear:
        """``nn.Linear`` or ``SparseLinear``."""
        density = self.density.at(name)
        of_bias = self.density.at(f"{name}.bias") if bias else 1.0
        if density == 1 and of_bias == 1:
            return nn.Linear(in_features, out_features, bias)
        return sparsecore.SparseLinear(
            in_features,
            out_features,
            bias,
            density=density,
            bias_density=of_bias if of_bias < 1 else None,
            generator=self.generator,
        )

    def conv2d(
        self, name: str, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1
    ) -> nn.Conv2d | sparsecore.SparseConv2d:
        """``nn.Conv2d`` or ``SparseConv2d``, without padding."""
        density, of_bias = self.density.at(name), self.density.at(f"{name}.bias")
        if density == 1 and of_bias == 1:
            return nn.Conv2d(in_channels, out_channels, kernel_size, stride)
        return sparsecore.SparseConv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            density=density,
            bias_density=of_bias if of_bias < 1 else None,
            generator=self.generator,
        )

    def embedding(
        self, name: str, num_embeddings: int, embedding_dim: int
    ) -> nn.Embedding | sparsecore.SparseEmbedding:
        """``nn.Embedding`` or ``SparseEmbedding``."""
        density = self.density.at(name)
        if density == 1:
            return nn.Embedding(num_embeddings, embedding_dim)
        return sparsecore.SparseEmbedding(
            num_embeddings, embedding_dim, density=density, generator=self.generator
        )

    def embedding_bag(
        self, name: str, num_embeddings: int, embedding_dim: int
    ) -> nn.EmbeddingBag | sparsecore.SparseEmbeddingBag:
        """``nn.EmbeddingBag(mode="sum")`` or ``SparseEmbeddingBag``."""
        density = self.density.at(name)
        if density == 1:
            return nn.EmbeddingBag(num_embeddings, embedding_dim, mode="sum")
        return sparsecore.SparseEmbeddingBag(
            num_embeddings, embedding_dim, density=density, generator=self.generator
        )

    def bias(self, name: str, features: int) -> nn.Parameter | sparsecore.SparseBias:
        """A bias that a model adds itself, by `add_bias`, zero at first."""
        density = self.density.at(name)
        if density == 1:
            return nn.Parameter(torch.zeros(features))
        return sparsecore.SparseBias(features, density=density, generator=self.generator)


def add_bias(input: torch.Tensor, bias: nn.Parameter | sparsecore.SparseBias) -> torch.Tensor:
    """``x + b`` of what `Layers.bias` has made."""
    return bias(input) if isinstance(bias, sparsecore.SparseBias) else input + bias


def dropout(input: torch.Tensor, probability: float, generator: torch.Generator) -> torch.Tensor:
    """``input`` with every number zeroed with this probability, to 2^-16, and the others scaled up to keep the mean.

    As `torch.nn.functional.dropout`, from a generator of one's own. Four numbers share a draw of 64 bits: on a CPU the
    draws would otherwise take longer than the layers around them.
    """
    zeroed = round(probability * 2**16)
    draws = torch.empty(-(-input.numel() // 4), dtype=torch.int64)
    draws.random_(-(2**63), None, generator=generator)
    kept = draws.view(torch.int16)[: input.numel()].view(input.shape) >= zeroed - 2**15
    return input * sent(kept, input.device).to(input.dtype).mul_(2**16 / (2**16 - zeroed))
