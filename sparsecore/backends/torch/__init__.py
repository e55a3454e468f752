"""The same operations through torch.sparse and torch indexing: CUDA, and the CPU reference."""

from sparsecore.backends.torch.embedding import bag, bag_dot, bag_grad, gather, scatter_grad
from sparsecore.backends.torch.graph import add_rows_, propagate, propagate_table, sample
from sparsecore.backends.torch.linear import sddmm, spmm, spmm_t

__all__ = [
    "add_rows_",
    "bag",
    "bag_dot",
    "bag_grad",
    "gather",
    "propagate",
    "propagate_table",
    "sample",
    "scatter_grad",
    "sddmm",
    "spmm",
    "spmm_t",
]
