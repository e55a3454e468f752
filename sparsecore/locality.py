"""An order of the nodes of a graph in which those that have neighbours in common are close together.

A row of ``A X`` reads rows of X that may lie anywhere. Where X is larger than a processor's own cache, most of the time
goes into fetching them again and again from farther away. In this order rows that are computed soon after one another
read the same rows of X, and these lie side by side.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array

__all__ = ["node_order"]

_LEAF = 256  # nodes of a block that is not divided any more: 64 KiB of X at 64 columns
_ITERATIONS = 30  # of a power method that needs not converge: any cut that parts few edges will do


def node_order(matrix: csr_array, first: int = 0, seed: int = 0) -> NDArray[np.int64]:
    """An order of the nodes of a square matrix in which those with many neighbours in common are close together.

    The nodes are halved again and again, each half along the second eigenvector of its own normalised adjacency
    (spectral bisection; Fiedler 1973, Pothen, Simon and Liou 1990), which a few steps of the power method approximate,
    in all blocks at once. Only which entries there are counts, not their values.

    Args:
        matrix: (n, n); taken as undirected.
        first: the nodes before this one come first, those from it on afterwards, each by blocks. In a bipartite graph
            rows of one side read nodes of the other alone: with the two sides apart a block needs half the cache.
        seed: of the vectors that the power method begins with.

    Returns:
        (n,) the nodes in their new order. It takes about as long as 30 log2(n / 256) products with one column.
    """
    n = matrix.shape[0]
    links = coo_array(matrix)
    rows, cols = np.concatenate([links.row, links.col]), np.concatenate([links.col, links.row])
    block = np.zeros(n, np.int64)
    generator = np.random.default_rng(seed)
    for level in range(max(0, int(np.ceil(np.log2(max(n, 1) / _LEAF))))):
        inside = block[rows] == block[cols]
        rows, cols = rows[inside], cols[inside]
        direction = _second_eigenvector(rows, cols, block, 1 << level, generator)
        by_block = np.lexsort((direction, block))
        sizes = np.bincount(block, minlength=1 << level)
        place = np.empty(n, np.int64)
        place[by_block] = np.arange(n) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        block = 2 * block + (place >= sizes[block] // 2)
    return np.lexsort((block, np.arange(n) >= first))


def _second_eigenvector(
    rows: NDArray[Any],
    cols: NDArray[Any],
    block: NDArray[np.int64],
    n_blocks: int,
    generator: np.random.Generator,
) -> NDArray[np.float64]:
    """Of ``D^-1/2 A D^-1/2`` in each block, about, divided by the root of the degrees; A has no edge between blocks."""
    n = len(block)
    degree = np.maximum(np.bincount(rows, minlength=n), 1).astype(np.float64)
    root = np.sqrt(degree)
    scaled: Any = csr_array((1 / (root[rows] * root[cols]), (rows, cols)), shape=(n, n))
    total = np.bincount(block, degree, n_blocks)
    x = generator.standard_normal(n)
    for _ in range(_ITERATIONS):
        # Without its part along the first eigenvector, the root of the degrees. A + 1 has no large negative eigenvalue.
        x -= (np.bincount(block, root * x, n_blocks) / total)[block] * root
        x += scaled @ x
        x /= np.sqrt(np.bincount(block, x * x, n_blocks) + 1e-30)[block]
    return x / root
