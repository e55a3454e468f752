"""Vectors of 16 numbers inside numba kernels.

numba cannot prove that two arrays do not overlap, so it keeps sums of an inner loop in memory instead of in registers.
These intrinsics emit LLVM vector code directly: a 16-lane value lives in registers (one AVX-512 register for float32,
two for float64, two AVX2 or four NEON ones elsewhere; LLVM splits it), and is loaded or stored as a whole. Portable
LLVM operations are used: where the processor has no instruction for one, LLVM writes it out lane by lane. Expanding and
compressing are instructions of AVX-512, and permutations of AVX2 for float32 (`simd_permuted`).

A *mask* is a uint16: bit i belongs to lane i. Indices count elements from the start of a C-contiguous array and are
**not** checked.
"""

from __future__ import annotations

from sparsecore.backends.numba.processor import has_avx512
from sparsecore.backends.numba.simd_arithmetic import (
    absolute,
    add,
    consecutive,
    div,
    fma,
    hidden,
    horizontal_sum,
    mul,
    splat,
    sqrt,
    sub,
    sum_of_each,
    sum_of_rows,
    zeros,
)
from sparsecore.backends.numba.simd_lanes import (
    compress,
    expand,
    spread,
    transpose,
    transpose_part,
    unpack,
)
from sparsecore.backends.numba.simd_masks import (
    at_least,
    bits,
    bits64,
    breaks,
    count,
    first_lanes,
    greater,
    lowest,
    positions,
    positions_few,
    where,
)
from sparsecore.backends.numba.simd_memory import (
    at,
    copy,
    load,
    load_masked,
    lookup,
    prefetch,
    prefetch_far,
    put,
    store,
    store_masked,
)
from sparsecore.backends.numba.simd_types import LANES, VectorType

__all__ = [
    "LANES", "VectorType", "absolute", "add", "at", "at_least", "bits", "bits64", "breaks", "compress", "consecutive",
    "copy", "count", "div", "expand", "first_lanes", "fma", "greater", "has_avx512", "hidden", "horizontal_sum", "load",
    "load_masked", "lookup", "lowest", "mul", "positions", "positions_few", "prefetch", "prefetch_far", "put", "splat",
    "spread", "sqrt", "store", "store_masked", "sub", "sum_of_each", "sum_of_rows", "transpose", "transpose_part",
    "unpack", "where", "zeros",
]  # fmt: skip
