"""The windows that a convolution looks at, as rows of a matrix (im2col)."""

from __future__ import annotations

import numbers
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecore.errors import SparsecoreError

__all__ = ["Windows"]

Pair = tuple[int, int]


@dataclass(frozen=True)
class Windows:
    """Where the windows of a 2-D convolution lie; pairs are (height, width).

    Attributes:
        kernel, stride, dilation: as in ``torch.nn.Conv2d``.
        padding: zeros around the input as ``torch.nn.functional.pad`` takes them: left, right, top, bottom.
    """

    kernel: Pair
    stride: Pair
    dilation: Pair
    padding: tuple[int, int, int, int]

    @classmethod
    def of(
        cls,
        kernel_size: int | Pair,
        stride: int | Pair,
        padding: int | str | Pair,
        dilation: int | Pair,
    ) -> Windows:
        """From the arguments of ``torch.nn.Conv2d``.

        Raises:
            SparsecoreError: for sizes out of range, another word than "same" or "valid", or "same" with a stride.
        """
        kernel = _pair("kernel_size", kernel_size, 1)
        steps, spread = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
        if padding == "valid":
            padding = 0
        if isinstance(padding, str):
            if padding != "same":
                raise SparsecoreError(f"padding must be a number, a pair, 'same' or 'valid', got {padding!r}")
            if steps != (1, 1):
                raise SparsecoreError(f"padding='same' needs stride 1, got {steps}; give numbers instead")
            # Of an odd number of zeros the larger half comes last, as in torch.
            total = [d * (k - 1) for k, d in zip(kernel, spread, strict=True)]
            (top, left), (bottom, right) = [t // 2 for t in total], [t - t // 2 for t in total]
            return cls(kernel, steps, spread, (left, right, top, bottom))
        height, width = _pair("padding", padding, 0)
        return cls(kernel, steps, spread, (width, width, height, height))

    def count(self, height: int, width: int) -> Pair:
        """How many windows an input has below each other and side by side: the size of the output.

        Raises:
            SparsecoreError: if not even one fits.
        """
        padded = (height + sum(self.padding[2:]), width + sum(self.padding[:2]))
        spans = [d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]
        if padded[0] < spans[0] or padded[1] < spans[1]:
            raise SparsecoreError(
                f"an input of {height} x {width} (padded: {padded[0]} x {padded[1]}) is smaller than the kernel, "
                f"which spans {spans[0]} x {spans[1]}"
            )
        down, across = [(p - s) // t + 1 for p, s, t in zip(padded, spans, self.stride, strict=True)]
        return down, across

    def rows(self, input: Tensor) -> Tensor:
        """The windows of x (B, C, H, W) as rows: (B h w, C kh kw), with (h, w) from `count`.

        Columns are ordered as a convolution's weight is: channel, row, column. The result is written once, whatever
        the input's memory format; a 1 x 1 kernel on an input in channels_last format gives a view. Windows that
        overlap are written as often as they overlap.
        """
        down, across = self.count(*input.shape[2:])
        if any(self.padding):
            input = F.pad(input, self.padding)
        (kh, kw), (dh, dw) = self.kernel, self.dilation
        if self.kernel == self.stride and self.dilation == (1, 1):
            input = input[:, :, : down * kh, : across * kw]
            if kh == kw > 1 and input.numel() and input.is_contiguous(memory_format=torch.channels_last):
                # torch's own kernel for this format takes about half the time of a general copy.
                windows = F.pixel_unshuffle(input, kh).permute(0, 2, 3, 1)
            else:
                windows = input.unflatten(3, (across, kw)).unflatten(2, (down, kh)).permute(0, 2, 4, 1, 3, 5)
        else:
            windows = input.unfold(2, dh * (kh - 1) + 1, self.stride[0])
            windows = windows.unfold(3, dw * (kw - 1) + 1, self.stride[1])[..., ::dh, ::dw]
            windows = windows.permute(0, 2, 3, 1, 4, 5)
        return windows.reshape(input.shape[0] * down * across, input.shape[1] * kh * kw)


def _pair(name: str, value: int | Pair, least: int) -> Pair:
    pair = (value, value) if isinstance(value, numbers.Integral) else tuple(value)  # type: ignore[arg-type]
    if len(pair) != 2 or not all(isinstance(v, numbers.Integral) and v >= least for v in pair):
        raise SparsecoreError(
            f"{name} must be an integer of at least {least} or a pair of them, got {value!r}"
        )
    return int(pair[0]), int(pair[1])
