"""Kernels that are handed addresses, which takes a small part of the time in which a tensor becomes a numpy array.

With each address goes a number of the type that lies there: kernels are compiled for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from sparsecore.backends.numba.jit import device_function
from sparsecore.backends.numba.simd_types import I64, element

__all__ = ["NUMBER", "address", "index_at", "peek", "plain", "poke", "split_at"]

# A number of each type, by which a kernel knows what lies at an address.
NUMBER = {
    torch.float32: np.float32(0),
    torch.float64: np.float64(0),
    torch.uint8: np.uint8(0),
    torch.int8: np.int8(0),
    torch.int16: np.int16(0),
    torch.int32: np.int32(0),
    torch.int64: np.int64(0),
}
_WORD = np.uint32(0)  # of a bitmap
_NO_COLUMN = np.uint8(0)


def plain(tensor: Any) -> Any:
    """A part of a weight (or None) as kernels here read it. It must outlive its address's use."""
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def index_at(crow: Tensor, col: Tensor | None) -> tuple[Any, ...]:
    """An index set as kernels here take it: address, type and words of a row; address and type of the columns."""
    if col is None:
        return crow.data_ptr(), _WORD, crow.shape[1], 0, _NO_COLUMN
    return crow.data_ptr(), NUMBER[crow.dtype], 0, col.data_ptr(), NUMBER[col.dtype]


@intrinsic
def address(typing_context, array):
    """Where the memory of a contiguous array begins."""

    def emit(context, builder, signature, arguments):
        first = element(context, builder, signature.args[0], arguments[0], I64(0))
        return builder.ptrtoint(first, I64)

    return types.int64(array), emit


@intrinsic
def peek(typing_context, address, index, like):
    """The number of the type of ``like`` that lies ``index`` numbers behind an address."""

    def emit(context, builder, signature, arguments):
        kind = context.get_value_type(like)
        place = builder.inttoptr(arguments[0], ir.PointerType(kind))
        return builder.load(builder.gep(place, [arguments[1]]), typ=kind)

    return like(types.int64, types.int64, like), emit


@intrinsic
def poke(typing_context, address, index, number):
    """Write a number ``index`` numbers behind an address."""

    def emit(context, builder, signature, arguments):
        kind = context.get_value_type(number)
        place = builder.inttoptr(arguments[0], ir.PointerType(kind))
        builder.store(arguments[2], builder.gep(place, [arguments[1]]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, number), emit


@device_function
def split_at(index, kind, rows, n_chunks, chunk):
    """`jit.split` for pointers at an address."""
    target = (np.int64(peek(index, rows, kind)) + rows) * chunk // n_chunks
    low, high = 0, rows
    while low < high:
        middle = (low + high) // 2
        if np.int64(peek(index, middle, kind)) + middle >= target:
            high = middle
        else:
            low = middle + 1
    return low
