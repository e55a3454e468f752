"""The operations of sparse training: one ``torch.library`` operator each, the only door to the kernels.

Every operator takes plain tensors (values, index arrays, activations), so that autograd, ``torch.compile``, FLOP
counters and profilers see it; it has a fake (shape) implementation and derivatives that are operators of this
package themselves, so that second derivatives exist. A backend (``sparsecore.backends``) supplies what runs.

Notation: W is a sparse matrix (``values``, ``crow``, ``col``) of shape (rows, cols); E a sparse table of the same form.

=====================  ==================================================  =======================
operator               result                                              multiply-adds
=====================  ==================================================  =======================
``gather``             E[ids], dense (n, cols)                             0
``gather_touched``     the same with a sparse gradient                     0
``gather_dot``         A[ids_a] . B[ids_b], of the shape of ids_b          entries cols
``touched``            gradient at the rows that occur alone, (t,) twice   as bag_grad
``scatter_grad``       gradient of gather, (nnz,)                          0 (additions only)
``bag``                sum of weights[e] E[ids[e]] per bag, (bags, cols)   nonzeros read
``bag_grad``           gradient of bag at the nonzeros, (nnz,)             nonzeros read
``bag_dot``            gradient of bag in its weights, (entries,)          nonzeros read
``spmm``               X W^T, (B, rows)                                    B nnz
``spmm_t``             dY W, (B, cols)                                     B nnz
``sddmm``              dY^T X at the nonzeros, (nnz,)                      B nnz
``score_topk``         k best of each row of X E^T, (B, k) twice           B nnz
``propagate``          A X for a graph A, (M, d)                           nnz(A) d
``propagate_rows``     (A X)[ids], (n, d)                                  edges of ids, times d
``propagate_rows_t``   A[ids]^T X, the gradient of that, (N, d)            the same
``propagate_mean``     mean of E, AE, .., A^h E; dense (N, d)              see `_mean_macs`
``propagate_mean_grad``  its gradient at E's nonzeros, (nnz,)              h nnz(A) d
=====================  ==================================================  =======================
"""

from sparsecore.ops.dot import gather_dot, gather_dot_touched
from sparsecore.ops.embedding import bag, bag_dot, bag_grad, gather, gather_touched, scatter_grad, touched
from sparsecore.ops.graph import (
    propagate,
    propagate_mean,
    propagate_mean_grad,
    propagate_rows,
    propagate_rows_t,
)
from sparsecore.ops.linear import sddmm, spmm, spmm_t
from sparsecore.ops.topk import score_topk

__all__ = [
    "bag",
    "bag_dot",
    "bag_grad",
    "gather",
    "gather_dot",
    "gather_dot_touched",
    "gather_touched",
    "propagate",
    "propagate_mean",
    "propagate_mean_grad",
    "propagate_rows",
    "propagate_rows_t",
    "scatter_grad",
    "score_topk",
    "sddmm",
    "spmm",
    "spmm_t",
    "touched",
]
