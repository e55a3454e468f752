"""Operands of measurements on a device: sparse weights, drawn inputs, and what is compared with what."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsecore import Graph, Pattern, normalized_bipartite
from sparsecore.encoding import choose_encoding, encode

__all__ = [
    "DENSITIES",
    "HIGH_DENSITIES",
    "Forms",
    "Operation",
    "Run",
    "Weight",
    "bipartite",
    "by_torch_sparse",
    "forget_weights",
    "ids_of",
    "inputs",
    "normal",
    "only_csr",
    "relative_error",
    "weight_of",
]

DENSITIES = (0.5, 0.25, 0.1, 0.05)
HIGH_DENSITIES = (0.9, 0.75, *DENSITIES)  # where sparse may still be no slower at 0.5
_INPUTS = 8  # drawn for each operand that changes from call to call

Run = Callable[[int], Any]


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """``|ours - reference| / |reference|``, Euclidean, in float64; infinite for NaN and for other shapes."""
    if ours.shape != reference.shape:
        return float("inf")
    difference = torch.linalg.vector_norm(ours.double() - reference.double())
    error = float(difference / torch.linalg.vector_norm(reference.double()).clamp(min=1e-30))
    return error if error == error else float("inf")


@dataclass(frozen=True)
class Forms:
    """Ways to compute one thing from input number i.

    Attributes:
        ours: our operator.
        dense: forms by name to compare with; the fastest of them is "dense", the first is the reference.
        others: more forms over sparse weights, by name.
        error: of our result against the reference's.
    """

    ours: Run
    dense: Mapping[str, Run]
    others: Mapping[str, Run] = field(default_factory=dict)
    error: Callable[[Any, Any], float] = relative_error


@dataclass(frozen=True)
class Operation:
    """Something to measure: ``build(density, device, **size)`` makes its forms; ``quick`` is a size that only runs.

    With ``rival``, our form is also run by the torch backend over csr. With ``tf32``, dense and sparse products of
    float32 may be as exact as TF32's.
    """

    build: Callable[..., Forms]
    size: Mapping[str, int]
    quick: Mapping[str, int]
    densities: tuple[float | None, ...] = DENSITIES
    rival: bool = False
    tf32: bool = False


class Weight:
    """A sparse weight on a device in the encoding that modules have there, or csr; and its dense form."""

    def __init__(self, rows: int, cols: int, density: float, device: str, csr: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.shape, self.device = (rows, cols), device
        self.pattern = Pattern.random(self.shape, density, generator=generator).to(device)
        self.values = torch.randn(self.pattern.nnz, generator=generator).to(device)
        self.index: tuple[Tensor, Tensor | None] = (self.pattern.crow, self.pattern.col)
        self.nnz = self.pattern.nnz
        # On the CPU csr too: what the torch backend, which runs there, reads as it is.
        if not csr and choose_encoding(self.nnz, self.shape, device) == "bitmap" and device != "cpu":
            self.index = encode(*self.index, cols), None

    @functools.cached_property
    def positions(self) -> Tensor:
        return self.pattern.positions()

    @functools.cached_property
    def dense(self) -> Tensor:
        return self.pattern.to_dense(self.values)

    @functools.cached_property
    def mask(self) -> Tensor:
        """Ones and zeros of the values' type, as published code keeps masks."""
        return self.pattern.to_dense(torch.ones_like(self.values))

    def at_nonzeros(self, ours: Tensor, reference: Tensor) -> float:
        """Error of numbers of the nonzeros, or of a masked matrix there, against a whole matrix."""
        if ours.shape == reference.shape:
            ours = ours.reshape(-1)[self.positions]
        return relative_error(ours, reference.reshape(-1)[self.positions])


@functools.cache
def _made(rows: int, cols: int, density: float, device: str, csr: bool) -> Weight:
    return Weight(rows, cols, density, device, csr)


_csr_only: ContextVar[bool] = ContextVar("csr", default=False)


def weight_of(rows: int, cols: int, density: float, device: str) -> Weight:
    """The weight of that size, the same for all who ask until `forget_weights`."""
    return _made(rows, cols, density, device, _csr_only.get())


@contextmanager
def only_csr() -> Iterator[None]:
    """Forms that are built here have csr weights."""
    token = _csr_only.set(True)
    try:
        yield
    finally:
        _csr_only.reset(token)


@functools.cache
def bipartite(users: int, items: int, edges: int, device: str) -> tuple[Graph, Tensor]:
    """A graph whose degrees fall like a power, and the same as torch's own CSR, until `forget_weights`."""
    import scipy.sparse

    rng = np.random.default_rng(0)
    # More draws than edges: the popular meet the popular again and again. Popularity says nothing about the number.
    draws = [np.floor(n * rng.random(2 * edges) ** 3).astype(np.int64) for n in (users, items)]
    keys = np.unique(rng.permutation(users)[draws[0]] * items + rng.permutation(items)[draws[1]])
    keys = np.sort(rng.permutation(keys)[:edges])
    ratings = scipy.sparse.coo_array((np.ones(len(keys)), (keys // items, keys % items)), (users, items))
    graph = normalized_bipartite(ratings).to(device)
    crow, col, weight = graph.arrays()[:3]
    with warnings.catch_warnings():  # the comparator's own
        warnings.simplefilter("ignore")
        shape = (graph.n_nodes, graph.n_nodes)
        wide = torch.sparse_csr_tensor(crow.long(), col.long(), weight, shape, check_invariants=False)
    return graph, wide


def has_torch_sparse() -> bool:
    return importlib.util.find_spec("torch_sparse") is not None


def by_torch_sparse(
    pattern: Pattern, values: Tensor, x: Callable[[int], Tensor], transposed: bool = False
) -> dict[str, Run]:
    """``W x`` (or ``W^T x``) by PyTorch Geometric's torch-sparse, where that is installed."""
    if not has_torch_sparse():
        return {}

    @functools.cache  # at the first call: what cannot be loaded is a form that fails
    def matrix() -> Any:
        made = pattern.to_torch_sparse(values)
        return made.t() if transposed else made

    return {"torch-sparse": lambda i: matrix() @ x(i)}


def forget_weights() -> None:
    """Free the operands that operations share."""
    _made.cache_clear()
    bipartite.cache_clear()


def inputs(draw: Callable[[], Tensor]) -> Callable[[int], Tensor]:
    """Some drawn operands, by the number of a call."""
    drawn = [draw() for _ in range(_INPUTS)]
    return lambda i: drawn[i % _INPUTS]


def ids_of(weight: Weight, batch: int) -> Callable[[int], Tensor]:
    """Rows of the weight, at random."""
    return inputs(lambda: torch.randint(weight.shape[0], (batch,), device=weight.device))


def normal(*shape: int, device: str) -> Callable[[int], Tensor]:
    """Activations from N(0, 1)."""
    return inputs(lambda: torch.randn(*shape, device=device))
