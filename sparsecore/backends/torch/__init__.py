"""The same operations through torch.sparse and torch indexing: CUDA, and the CPU reference."""

from sparsecore.backends.torch.embedding import (
    bag,
    bag_dot,
    bag_grad,
    gather,
    gather_dot,
    id_range,
    scatter_grad,
    touched,
)
from sparsecore.backends.torch.graph import (
    propagate,
    propagate_from,
    propagate_rows,
    propagate_sample,
    propagate_table,
)
from sparsecore.backends.torch.linear import sddmm, spmm, spmm_t
from sparsecore.backends.torch.topk import score_topk

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
