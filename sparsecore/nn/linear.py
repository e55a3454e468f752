"""Linear layer with a sparse weight."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sparsecore import ops
from sparsecore.errors import ConversionError, SparsecoreError
from sparsecore.interop import split
from sparsecore.nn.base import SparseModule
from sparsecore.nn.bias import SparseBias, copy_bias, make_bias
from sparsecore.nn.magnitude import magnitude_pattern
from sparsecore.pattern import Pattern

__all__ = ["SparseLinear"]


class SparseLinear(SparseModule):
    """``y = x W^T + b`` with W stored as nnz values and their index set: ``torch.nn.Linear`` with ``density=``.

    Args:
        in_features: columns of W.
        out_features: rows of W.
        bias: add a dense bias of ``out_features`` numbers.
        device, dtype: as in torch.
        density: fraction of W that is stored, in (0, 1]; ``nnz = round(density * rows * cols)`` exactly.
        bias_density: store the bias sparse too, at this density (the DSL authors prune biases).
        generator: CPU generator of the index set and of the values.

    Shapes: x ``(*, in_features)`` -> y ``(*, out_features)``. Work: ``nnz`` multiply-adds per sample, forward, and
    twice that backward (none for dX where x needs no gradient). Initialised as ``nn.Linear`` is (uniform in
    ``+-1/sqrt(in_features)``), without rescaling for the density.

    Raises:
        DensityError: density outside (0, 1], or so low that nothing is stored.

    Example:
        >>> layer = SparseLinear(600, 20000, density=0.1)
        >>> layer.nnz
        1200000
    """

    bias: nn.Parameter | SparseBias | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        density: float,
        bias_density: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        pattern = Pattern.random((out_features, in_features), density, generator=generator)
        super().__init__(pattern, device, dtype)
        self.in_features = in_features
        self.out_features = out_features
        if not bias:
            self.bias = None
        elif bias_density is None:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.bias = SparseBias(out_features, device, dtype, density=bias_density, generator=generator)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw values and bias anew, as ``nn.Linear`` does; the index set stays, if there is one.

        After deferred initialisation (``to_empty()``) there is none: it is drawn, too.
        """
        self.draw_index(generator)
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.values, -bound, bound, generator=generator)
        if self.bias is not None:
            bias = self.bias
            if isinstance(bias, SparseBias):
                bias.draw_index(generator)
                bias = bias.values
            nn.init.uniform_(bias, -bound, bound, generator=generator)

    def forward(self, input: Tensor) -> Tensor:
        """x (*, in_features) -> (*, out_features)."""
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            raise SparsecoreError(
                f"expected input with {self.in_features} features in its last dimension, got shape {tuple(input.shape)}"
            )
        flat = input if input.dim() == 2 else input.reshape(-1, self.in_features)
        bias = self.bias
        dense_bias = None if isinstance(bias, SparseBias) else bias
        output = ops.spmm(*self.operands, flat, dense_bias)
        if isinstance(bias, SparseBias):
            output = bias(output)
        return output if input.dim() == 2 else output.view(*input.shape[:-1], self.out_features)

    @classmethod
    def from_dense(
        cls,
        module: nn.Linear,
        *,
        density: float | None = None,
        mask: Tensor | None = None,
        bias_density: float | None = None,
    ) -> SparseLinear:
        """The sparse form of a dense layer: its largest magnitudes, or the weights under a mask. Values are copied.

        Raises:
            ConversionError: if both or neither of density and mask are given, or the mask's shape is wrong.
        """
        if not isinstance(module, nn.Linear):
            raise ConversionError(f"SparseLinear.from_dense needs an nn.Linear, got {type(module).__name__}")
        weight = module.weight.detach()
        pattern = magnitude_pattern(weight, density, mask)
        layer = cls.__new__(cls)
        SparseModule.__init__(layer, pattern, weight.device, weight.dtype)
        layer.in_features, layer.out_features = module.in_features, module.out_features
        layer.bias = make_bias(module.bias, bias_density)
        with torch.no_grad():
            layer.values.copy_(weight.reshape(-1)[pattern.positions()])
        layer.values.requires_grad_(module.weight.requires_grad)
        layer.train(module.training)
        return layer

    @classmethod
    def from_sparse(cls, matrix: Any, bias: Tensor | None = None) -> SparseLinear:
        """A layer from an existing sparse weight, (out_features, in_features), on its device. It is copied.

        Args:
            matrix: of torch (COO, CSR, CSC, BSR, BSC), of scipy (any format) or of torch-sparse (``SparseTensor``); see
                `sparsecore.split` for what becomes of its order.
            bias: dense bias, (out_features,); none if absent.

        Raises:
            PatternError: if it is not a sparse matrix.
            ConversionError: if it stores nothing, or the bias has another length.
        """
        pattern, values = split(matrix)
        rows, cols = pattern.shape
        if bias is not None and bias.shape != (rows,):
            raise ConversionError(f"bias must have shape ({rows},), got {tuple(bias.shape)}")
        layer = cls.__new__(cls)
        SparseModule._from_values(layer, pattern, values)
        layer.in_features, layer.out_features = cols, rows
        layer.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        return layer

    def to_dense(self) -> nn.Linear:
        """An ``nn.Linear`` with the same weights, zeros where nothing is stored."""
        dense = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, self.values.device, self.values.dtype
        )
        with torch.no_grad():
            dense.weight.copy_(self.pattern.to_dense(self.values))
        copy_bias(self.bias, dense.bias)
        dense.weight.requires_grad_(self.values.requires_grad)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._shape_repr()}"
        )
