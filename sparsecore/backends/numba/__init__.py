"""CPU kernels, compiled by numba on first use and cached on disk."""

from sparsecore.backends.numba.bags import bag, bag_dot, bag_grad
from sparsecore.backends.numba.embedding import gather
from sparsecore.backends.numba.gather_dot import gather_dot
from sparsecore.backends.numba.graph import propagate, propagate_sample
from sparsecore.backends.numba.graph_rows import propagate_from, propagate_rows
from sparsecore.backends.numba.linear import sddmm, spmm, spmm_t
from sparsecore.backends.numba.optimizer import adagrad_, adam_, sgd_
from sparsecore.backends.numba.row_updates import adam_rows_
from sparsecore.backends.numba.scatter import scatter_grad, sum_rows, touched, touched_spans
from sparsecore.backends.numba.small import id_range
from sparsecore.backends.numba.spans import spans_of_places, spans_of_rows
from sparsecore.backends.numba.table_rows import propagate_table
from sparsecore.backends.numba.topk import score_topk

__all__ = [
    "adagrad_",
    "adam_",
    "adam_rows_",
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
    "sgd_",
    "spans_of_places",
    "spans_of_rows",
    "spmm",
    "spmm_t",
    "sum_rows",
    "touched",
    "touched_spans",
]
