"""Operands of the operations that are measured: sparse weights with their dense forms, and random ids."""

from __future__ import annotations

import importlib.util
import itertools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsecore import Pattern
from sparsecore.encoding import choose_encoding, encode
from sparsecore.pages import ask_huge_pages

__all__ = [
    "IDS",
    "Forms",
    "Run",
    "Table",
    "Weight",
    "by_torch_sparse",
    "on_huge_pages",
    "random_ids",
    "same_ids_again",
    "state_on_huge_pages",
    "torch_csr",
]

Run = Callable[[], object]
_seeds = itertools.count()
_STATE: dict[type, tuple[str, ...]] = {torch.optim.SGD: ("momentum_buffer",), torch.optim.Adagrad: ("sum",)}
IDS = 64  # of ids: each call looks up rows that no cache holds


@dataclass(frozen=True)
class Forms:
    """Ways to compute one thing.

    Attributes:
        ours: our operator.
        dense: dense forms by name; the fastest of them is "dense".
        others: forms of torch.sparse, scipy and torch-sparse by name.
        flops: useful operations, two for each multiply-add with a nonzero.
        nbytes: bytes that have to be read or written at least.
        resident: bytes of our operands between calls: values, index, optimizer state; 0 if nobody asks for them.
        dense_resident: of the dense form's.
    """

    ours: Run
    dense: Mapping[str, Run]
    others: Mapping[str, Run] = field(default_factory=dict)
    flops: float = 0.0
    nbytes: float = 0.0
    resident: int = 0
    dense_resident: int = 0


def torch_csr(crow: Tensor, col: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(crow, col, values, shape, check_invariants=False)


def on_huge_pages(tensor: Tensor) -> Tensor:
    """A copy on huge pages, as sparse weights are: what torch gives dense ones where THP_MEM_ALLOC_ENABLE=1 is set."""
    return ask_huge_pages(torch.empty_like(tensor)).copy_(tensor)


def state_on_huge_pages(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer, its state made beforehand, what is shaped as a parameter on huge pages."""
    names = _STATE.get(type(optimizer), ("exp_avg", "exp_avg_sq"))
    step = {torch.optim.SGD: {}, torch.optim.SparseAdam: {"step": 0}}.get(
        type(optimizer), {"step": torch.tensor(0.0)}
    )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = {name: on_huge_pages(torch.zeros_like(parameter)) for name in names}
            optimizer.state[parameter] = {**step, **state}
    return optimizer


def by_torch_sparse(
    pattern: Pattern, values: Tensor, dense: Tensor, transposed: bool = False
) -> dict[str, Run]:
    """The product with a dense matrix by PyTorch Geometric's torch-sparse, where that is installed."""
    if importlib.util.find_spec("torch_sparse") is None:
        return {}
    matrix = pattern.to_torch_sparse(values)
    matrix = matrix.t() if transposed else matrix
    return {"torch-sparse": lambda: matrix @ dense}


class Weight:
    """A sparse weight, and its dense form. Its encoding is the one that a module would choose, or the one given."""

    is_table = False

    def __init__(
        self, rows: int, cols: int, density: float, skewed: bool = False, encoding: str | None = None
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        if skewed:  # all nonzeros in full rows
            mask = torch.zeros(rows, cols, dtype=torch.bool)
            mask[torch.randperm(rows, generator=generator)[: max(1, round(density * rows))]] = True
            self.pattern = Pattern.from_mask(mask)
        else:
            self.pattern = Pattern.random((rows, cols), density, generator=generator)
        self.rows, self.cols, self.nnz = rows, cols, self.pattern.nnz
        self.values = ask_huge_pages(torch.empty(self.nnz)).normal_(generator=generator)  # as a module does
        self.index: tuple[Tensor, Tensor | None] = (self.pattern.crow, self.pattern.col)
        if (encoding or choose_encoding(self.nnz, (rows, cols), table=self.is_table)) == "bitmap":
            self.index = encode(self.pattern.crow, self.pattern.col, cols), None

    def dense(self) -> Tensor:
        return self.pattern.to_dense(self.values)

    def dense_on_huge_pages(self) -> Tensor:
        return on_huge_pages(self.dense())

    def csr(self) -> Tensor:
        crow, col = self.pattern.crow.to(torch.int32), self.pattern.col.to(torch.int32)
        return torch_csr(crow, col, self.values, (self.rows, self.cols))

    def turned_csr(self) -> Tensor:
        """Of the transposed weight."""
        turned = self.csr().to_sparse_coo().t().coalesce().to_sparse_csr()
        crow, col = turned.crow_indices().to(torch.int32), turned.col_indices().to(torch.int32)
        return torch_csr(crow, col, turned.values(), (self.cols, self.rows))

    def scipy(self) -> Any:
        import scipy.sparse

        parts = self.values.numpy(), self.pattern.col.numpy().astype("int32"), self.pattern.crow.numpy()
        return scipy.sparse.csr_array(parts, shape=(self.rows, self.cols))

    @property
    def nbytes(self) -> int:
        """Of values and index."""
        return sum(t.numel() * t.element_size() for t in (self.values, *self.index) if t is not None)

    @property
    def row_bytes(self) -> float:
        """Bytes of an average row: values and index."""
        index = sum(t.numel() * t.element_size() for t in self.index if t is not None)
        return (4 * self.nnz + index) / self.rows


class Table(Weight):
    """One whose rows are looked up."""

    is_table = True


def same_ids_again() -> None:
    """From here on `random_ids` gives what it gave first: rows' nonzeros, and so counts, depend on the ids."""
    global _seeds
    _seeds = itertools.count()


def random_ids(rows: int, *shape: int, lists: int = IDS) -> Callable[[], Tensor]:
    """A function that gives other random ids at every call, and other ones than every other such function."""
    generator = torch.Generator().manual_seed(next(_seeds))
    drawn = [torch.randint(rows, shape, generator=generator) for _ in range(lists)]
    turn = itertools.cycle(drawn)
    return lambda: next(turn)
