"""Triton kernels for looked-up rows, their gradients, their products, top-k, linear layers and
explorations; torch's functions for everything else.

They read either encoding as it is stored (linear layers, and top-k for many queries, make a bitmap of csr for the call
where it is dense enough), add up in a fixed order (the same bits every time), and hold no dense form of the weight. The
host waits for the device to learn the size of a sparse gradient, and in a draw. An id outside the table is not noticed
on a GPU.

Tested in Triton's interpreter (``TRITON_INTERPRET=1``, tensors on the CPU), compiled for a GPU without one, and on one.
"""

from sparsecore.backends.torch import (
    id_range,
    propagate_from,
    propagate_rows,
)
from sparsecore.backends.triton.dots import bag_dot, gather_dot
from sparsecore.backends.triton.embedding import bag, gather
from sparsecore.backends.triton.graph import propagate, propagate_sample, propagate_table
from sparsecore.backends.triton.linear import sddmm, spmm, spmm_t
from sparsecore.backends.triton.scatter import bag_grad, scatter_grad, touched
from sparsecore.backends.triton.topk import score_topk

__all__ = [
    "bag",
    "bag_dot",
    "bag_grad",
    "gather",
    "gather_dot",
    "id_range",
    "propagate",
    "propagate_from",
    "propagate_rows",
    "propagate_sample",
    "propagate_table",
    "scatter_grad",
    "score_topk",
    "sddmm",
    "spmm",
    "spmm_t",
    "touched",
]
