"""2-D convolution with a sparse weight."""

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
from sparsecore.nn.patches import Pair, Windows
from sparsecore.pattern import Pattern

__all__ = ["SparseConv2d"]


class SparseConv2d(SparseModule):
    """``torch.nn.Conv2d`` with ``density=``: its weight is a sparse matrix (out_channels, in_channels * kh * kw).

    The windows of the input are written as rows of a matrix (im2col) and multiplied with the weight, as in
    `SparseLinear`; training keeps that matrix, which is ``kh kw / (stride height * stride width)`` times as large as
    the input. Input and output in ``torch.channels_last`` format save a copy; the output always is.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation: as in ``nn.Conv2d``; padding also
            ``"same"`` (stride 1 only) or ``"valid"``. (A kernel of 2 x 2 with stride 2 needs no padding for "same" as
            TensorFlow defines it, ``ceil(size / stride)`` windows, on an input of even size.)
        groups: 1; there is no other.
        bias: add a dense bias of ``out_channels`` numbers.
        padding_mode: ``"zeros"``; there is no other.
        device, dtype: as in torch.
        density: fraction of the weight that is stored, in (0, 1]; nnz is rounded from it exactly.
        bias_density: store the bias sparse too, at this density.
        generator: CPU generator of the index set and of the values.

    Shapes: x ``(B, in_channels, H, W)`` or ``(in_channels, H, W)`` -> y ``(B, out_channels, h, w)``. Work: ``nnz h w``
    multiply-adds per example, forward, and twice that backward. Initialised as ``nn.Conv2d`` is (uniform in
    ``+-1/sqrt(in_channels kh kw)``).

    Raises:
        DensityError: density outside (0, 1], or so low that nothing is stored.
        SparsecoreError: for groups or a padding mode without a sparse form, or sizes out of range.

    Example:
        >>> layer = SparseConv2d(32, 32, kernel_size=2, stride=2, density=0.5)
        >>> layer.nnz
        2048
    """

    bias: nn.Parameter | SparseBias | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | str | Pair = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        density: float,
        bias_density: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        _expect_plain(groups, padding_mode, SparsecoreError)
        windows = Windows.of(kernel_size, stride, padding, dilation)
        shape = (out_channels, in_channels * math.prod(windows.kernel))
        super().__init__(Pattern.random(shape, density, generator=generator), device, dtype)
        self._set(in_channels, windows, padding)
        if not bias:
            self.bias = None
        elif bias_density is None:
            self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        else:
            self.bias = SparseBias(out_channels, device, dtype, density=bias_density, generator=generator)
        self.reset_parameters(generator)

    def _set(self, in_channels: int, windows: Windows, padding: int | str | Pair) -> None:
        self.in_channels, self.out_channels = in_channels, self.shape[0]
        self.windows = windows
        self.kernel_size, self.stride, self.dilation = windows.kernel, windows.stride, windows.dilation
        self.padding = padding if isinstance(padding, str) else (windows.padding[2], windows.padding[0])
        self.groups, self.padding_mode = 1, "zeros"

    @property
    def dense_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels, *self.kernel_size)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw values and bias anew, as ``nn.Conv2d`` does; the index set stays, if there is one.

        After deferred initialisation (``to_empty()``) there is none: it is drawn, too.
        """
        self.draw_index(generator)
        bound = 1 / math.sqrt(self.shape[1])
        nn.init.uniform_(self.values, -bound, bound, generator=generator)
        if self.bias is not None:
            bias = self.bias
            if isinstance(bias, SparseBias):
                bias.draw_index(generator)
                bias = bias.values
            nn.init.uniform_(bias, -bound, bound, generator=generator)

    def forward(self, input: Tensor) -> Tensor:
        """x (B, in_channels, H, W) or (in_channels, H, W) -> (B, out_channels, h, w) or (out_channels, h, w)."""
        if input.dim() not in (3, 4) or input.shape[-3] != self.in_channels:
            raise SparsecoreError(
                f"expected input of shape (B, {self.in_channels}, H, W) or ({self.in_channels}, H, W), "
                f"got {tuple(input.shape)}"
            )
        batch = input if input.dim() == 4 else input.unsqueeze(0)
        rows = self.windows.rows(batch)
        bias = self.bias
        dense_bias = None if isinstance(bias, SparseBias) else bias
        output = ops.spmm(*self.operands, rows, dense_bias)
        if isinstance(bias, SparseBias):
            output = bias(output)
        count = self.windows.count(*batch.shape[2:])
        output = output.view(batch.shape[0], *count, self.out_channels).permute(0, 3, 1, 2)
        return output if input.dim() == 4 else output.squeeze(0)

    def expand(self) -> Tensor:
        """The weight as a dense tensor (out_channels, in_channels, kh, kw) that gradients flow through.

        For a small kernel that a model applies in another way than `forward` does, such as one that makes use of the
        input's structure. Explorations see the use.
        """
        ids = torch.arange(self.shape[0], device=self.values.device)
        rows = ops.gather(*self.operands, ids, self.shape[1])
        return rows.view(self.dense_shape)

    @classmethod
    def from_dense(
        cls,
        module: nn.Conv2d,
        *,
        density: float | None = None,
        mask: Tensor | None = None,
        bias_density: float | None = None,
    ) -> SparseConv2d:
        """The sparse form of a dense layer: its largest magnitudes, or the weights under a mask. Values are copied.

        Args:
            mask: of the weight's shape, or (out_channels, in_channels * kh * kw).

        Raises:
            ConversionError: if both or neither of density and mask are given, the mask's shape is wrong, or the layer
                has groups or a padding mode without a sparse form.
        """
        if not isinstance(module, nn.Conv2d):
            raise ConversionError(f"SparseConv2d.from_dense needs an nn.Conv2d, got {type(module).__name__}")
        _expect_plain(module.groups, module.padding_mode, ConversionError)
        weight = module.weight.detach()
        matrix = weight.reshape(weight.shape[0], -1)
        if mask is not None and mask.shape == weight.shape:
            mask = mask.reshape(matrix.shape)
        pattern = magnitude_pattern(matrix, density, mask)
        layer = cls.__new__(cls)
        SparseModule.__init__(layer, pattern, weight.device, weight.dtype)
        padding: Any = module.padding
        windows = Windows.of(_two(module.kernel_size), _two(module.stride), padding, _two(module.dilation))
        layer._set(module.in_channels, windows, padding)
        with torch.no_grad():
            layer.values.copy_(matrix.reshape(-1)[pattern.positions()])
        layer.bias = make_bias(module.bias, bias_density)
        layer.values.requires_grad_(module.weight.requires_grad)
        layer.train(module.training)
        return layer

    @classmethod
    def from_sparse(
        cls,
        matrix: Any,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | str | Pair = 0,
        dilation: int | Pair = 1,
        bias: Tensor | None = None,
    ) -> SparseConv2d:
        """A layer from an existing sparse weight, (out_channels, in_channels * kh * kw), of torch or scipy.

        Args:
            matrix: the weight; see `sparsecore.split` for what becomes of its order.
            kernel_size, stride, padding, dilation: as in ``nn.Conv2d``.
            bias: dense bias, (out_channels,); none if absent.

        Raises:
            PatternError: if it is not a sparse matrix.
            ConversionError: if it stores nothing, its columns are no multiple of the kernel, or the bias has another
                length.
        """
        windows = Windows.of(kernel_size, stride, padding, dilation)
        pattern, values = split(matrix)
        rows, cols = pattern.shape
        if cols % math.prod(windows.kernel):
            raise ConversionError(
                f"the matrix has {cols} columns, which is no multiple of the kernel {windows.kernel}"
            )
        if bias is not None and bias.shape != (rows,):
            raise ConversionError(f"bias must have shape ({rows},), got {tuple(bias.shape)}")
        layer = cls.__new__(cls)
        SparseModule._from_values(layer, pattern, values)
        layer._set(cols // math.prod(windows.kernel), windows, padding)
        layer.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        return layer

    def to_dense(self) -> nn.Conv2d:
        """An ``nn.Conv2d`` with the same weights, zeros where nothing is stored."""
        dense = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            bias=self.bias is not None,
            device=self.values.device,
            dtype=self.values.dtype,
        )
        with torch.no_grad():
            dense.weight.copy_(self.pattern.to_dense(self.values).view(self.dense_shape))
        copy_bias(self.bias, dense.bias)
        dense.weight.requires_grad_(self.values.requires_grad)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        )
        if self.padding not in ((0, 0), "valid"):
            text += f", padding={self.padding!r}"
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        if self.bias is None:
            text += ", bias=False"
        return f"{text}, {self._shape_repr()}"


def _expect_plain(groups: int, padding_mode: str, error: type[SparsecoreError]) -> None:
    if groups != 1:
        raise error(f"SparseConv2d has no groups, got groups={groups}; leave this layer dense")
    if padding_mode != "zeros":
        raise error(f"SparseConv2d pads with zeros only, got padding_mode={padding_mode!r}; leave it dense")


def _two(sizes: tuple[int, ...]) -> Pair:
    height, width = sizes
    return height, width
