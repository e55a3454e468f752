"""Lookup tables with sparse rows: single rows, and weighted sums of rows."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from sparsecore import ops
from sparsecore.errors import ConversionError, SparsecoreError
from sparsecore.interop import split
from sparsecore.nn.base import SparseModule
from sparsecore.nn.magnitude import magnitude_pattern
from sparsecore.nn.replicas import refuse_sparse_gradient
from sparsecore.pattern import Pattern
from sparsecore.topology.accumulate import RowAccumulator

__all__ = ["SparseEmbedding", "SparseEmbeddingBag", "as_ids", "bag_entries"]

# Options of torch's tables that change what a row is worth, and the value under which they do nothing.
_NEUTRAL = {"max_norm": None, "scale_grad_by_freq": False, "mode": "sum"}


class _SparseTable(SparseModule):
    """A table of ``num_embeddings`` rows of ``embedding_dim`` numbers, nnz of them stored."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        density: float,
        generator: torch.Generator | None = None,
    ) -> None:
        padding_idx = _padding(padding_idx, num_embeddings)
        pattern = Pattern.random(
            (num_embeddings, embedding_dim), density, skip_row=padding_idx, generator=generator
        )
        super().__init__(pattern, device, dtype)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the values anew from N(0, 1), as torch's tables do; the index set stays, if there is one.

        After deferred initialisation (``to_empty()``) there is none: it is drawn, too.
        """
        self.draw_index(generator)
        nn.init.normal_(self.values, generator=generator)

    @property
    def empty_row(self) -> int | None:
        return self.padding_idx

    @classmethod
    def _blank(
        cls, pattern: Pattern, padding_idx: int | None, device: torch.device | str, dtype: torch.dtype
    ) -> Self:
        """A table of this index set whose values are still to be written."""
        table = cls.__new__(cls)
        SparseModule.__init__(table, pattern, device, dtype)
        table.num_embeddings, table.embedding_dim = pattern.shape
        table.padding_idx = padding_idx
        return table

    @classmethod
    def _from_table(cls, module: Any, density: float | None, mask: Tensor | None) -> Self:
        for option, neutral in _NEUTRAL.items():
            if getattr(module, option, neutral) != neutral:
                raise ConversionError(
                    f"{cls.__name__} does not support {option}={getattr(module, option)!r} "
                    f"(only {neutral!r}); exclude this module or change it first"
                )
        weight = module.weight.detach()
        if module.padding_idx is not None and bool(weight[module.padding_idx].any()):
            raise ConversionError(
                f"the padding row {module.padding_idx} must be zero to become an empty row; zero it first"
            )
        pattern = magnitude_pattern(weight, density, mask, skip_row=module.padding_idx)
        table = cls._blank(pattern, module.padding_idx, weight.device, weight.dtype)
        with torch.no_grad():
            table.values.copy_(weight.reshape(-1)[pattern.positions()])
        table.values.requires_grad_(module.weight.requires_grad)
        return table.train(module.training)

    @classmethod
    def from_sparse(cls, matrix: Any, padding_idx: int | None = None) -> Self:
        """A table from an existing sparse matrix, (num_embeddings, embedding_dim), on its device. It is copied.

        Args:
            matrix: of torch (COO, CSR, CSC, BSR, BSC), of scipy (any format) or of torch-sparse (``SparseTensor``).
            padding_idx: as in ``nn.Embedding``; the matrix stores nothing in that row.

        Raises:
            PatternError: if it is not a sparse matrix, or the padding row is not empty.
            ConversionError: if it stores nothing.
        """
        pattern, values = split(matrix)
        table = cls.__new__(cls)
        SparseModule._from_values(table, pattern, values)
        table.num_embeddings, table.embedding_dim = pattern.shape
        table.padding_idx = _padding(padding_idx, pattern.shape[0])
        table.check_invariants()
        return table

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f"padding_idx={self.padding_idx}, "
        return f"{self.num_embeddings}, {self.embedding_dim}, {padding}{self._shape_repr()}"


class SparseEmbedding(_SparseTable):
    """``torch.nn.Embedding`` with ``density=``: rows are stored sparse and looked up dense.

    Args:
        num_embeddings: rows of the table.
        embedding_dim: columns of the table.
        padding_idx: a row that is always zero: it holds no weights and never grows any.
        device, dtype: as in torch.
        density: fraction of the table that is stored, in (0, 1].
        sparse: as in ``nn.Embedding``: the gradient of ``values`` becomes a ``torch.sparse_coo`` vector of the nonzeros
            that were looked up, for an optimizer that updates those alone (`sparsecore.optim`, lazily; torch's
            SparseAdam, SGD, Adagrad). A step then costs what its batch touches, not what the table holds.
        accumulate_rows: `DynamicSparsity` sums the gradients of up to this many rows over the steps between two
            explorations and scores growth by the sum, not by the last step alone; costs
            ``accumulate_rows * embedding_dim`` numbers. Rows are admitted in the order in which they are looked up.
            Every backward pass adds to the sums, also one whose gradient ``zero_grad()`` drops.
        generator: CPU generator of the index set and of the values.

    Shapes: ids ``(*)`` int64 or int32 -> ``(*, embedding_dim)``. Initialised N(0, 1), without rescaling.

    Raises:
        DensityError: density outside (0, 1], or so low that nothing is stored.
        IndexError: an id outside ``0 .. num_embeddings - 1`` (on the CPU).

    Example:
        >>> table = SparseEmbedding(1_000_000, 64, density=0.25)
        >>> table(torch.tensor([3, 7])).shape
        torch.Size([2, 64])
    """

    accumulator: RowAccumulator | None = None
    sparse: bool = False

    _is_table = True  # not so a bag's: with AVX2 sums of many rows take several times as long from a bitmap

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        density: float,
        accumulate_rows: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, device, dtype, density=density, generator=generator
        )
        self.sparse = sparse
        self.accumulator = self._accumulator(accumulate_rows)

    def _accumulator(self, rows: int) -> RowAccumulator | None:
        return RowAccumulator(rows, self.embedding_dim, self.padding_idx) if rows else None

    def forward(self, input: Tensor) -> Tensor:
        """ids (*) -> rows (*, embedding_dim)."""
        ids = as_ids(input)
        ids = ids if input.dim() == 1 else ids.reshape(-1)
        lookup = ops.gather
        if self.sparse:
            lookup = ops.gather_touched
            if not torch.compiler.is_compiling():
                refuse_sparse_gradient(self.values)
        output = lookup(*self.operands, ids, self.embedding_dim)
        return output if input.dim() == 1 else output.view(*input.shape, self.embedding_dim)

    @classmethod
    def from_dense(
        cls,
        module: nn.Embedding,
        *,
        density: float | None = None,
        mask: Tensor | None = None,
        accumulate_rows: int = 0,
    ) -> SparseEmbedding:
        """The sparse form of a dense table: its largest magnitudes, or the weights under a mask.

        Raises:
            ConversionError: for an option of ``nn.Embedding`` that has no sparse form here, named in the message.
        """
        if not isinstance(module, nn.Embedding):
            raise ConversionError(
                f"SparseEmbedding.from_dense needs an nn.Embedding, got {type(module).__name__}"
            )
        table = cls._from_table(module, density, mask)
        table.sparse = module.sparse
        table.accumulator = table._accumulator(accumulate_rows)
        return table

    def to_dense(self) -> nn.Embedding:
        """An ``nn.Embedding`` with the same rows."""
        dense = nn.Embedding(
            self.num_embeddings, self.embedding_dim, self.padding_idx, sparse=self.sparse,
            device=self.values.device, dtype=self.values.dtype,
        )  # fmt: skip
        with torch.no_grad():
            dense.weight.copy_(self.pattern.to_dense(self.values))
        dense.weight.requires_grad_(self.values.requires_grad)
        return dense.train(self.training)


class SparseEmbeddingBag(_SparseTable):
    """``torch.nn.EmbeddingBag(mode="sum")`` with ``density=``: weighted sums of sparse rows.

    A linear layer whose *input* is sparse too (a user's items) is this: ``x W`` for x given as bags of column ids and
    ``per_sample_weights``. Work: the nonzeros of the rows that are looked up.

    Args: as ``SparseEmbedding``, without accumulation.

    Shapes: flat ids ``(n,)`` with offsets ``(bags,)`` (the first entry of each bag), or ids ``(bags, length)`` without
    offsets -> ``(bags, embedding_dim)``.
    """

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """Sum of ``per_sample_weights * rows`` over each bag."""
        ids, ends, weights = bag_entries(input, offsets, per_sample_weights, self.values.dtype)
        return ops.bag(*self.operands, ids, ends, weights, self.embedding_dim)

    @classmethod
    def from_dense(
        cls, module: nn.EmbeddingBag, *, density: float | None = None, mask: Tensor | None = None
    ) -> SparseEmbeddingBag:
        """The sparse form of a dense ``nn.EmbeddingBag(mode="sum")``.

        Raises:
            ConversionError: for an option that has no sparse form here, named in the message.
        """
        if not isinstance(module, nn.EmbeddingBag):
            raise ConversionError(
                f"SparseEmbeddingBag.from_dense needs an nn.EmbeddingBag, got {type(module).__name__}"
            )
        if module.include_last_offset:
            raise ConversionError("SparseEmbeddingBag does not support include_last_offset=True")
        if module.sparse:
            raise ConversionError("SparseEmbeddingBag does not support sparse=True")
        return cls._from_table(module, density, mask)

    def to_dense(self) -> nn.EmbeddingBag:
        """An ``nn.EmbeddingBag(mode="sum")`` with the same rows."""
        dense = nn.EmbeddingBag(
            self.num_embeddings, self.embedding_dim, mode="sum", padding_idx=self.padding_idx,
            device=self.values.device, dtype=self.values.dtype,
        )  # fmt: skip
        with torch.no_grad():
            dense.weight.copy_(self.pattern.to_dense(self.values))
        dense.weight.requires_grad_(self.values.requires_grad)
        return dense.train(self.training)


def _padding(padding_idx: int | None, rows: int) -> int | None:
    if padding_idx is None:
        return None
    if not -rows <= padding_idx < rows:
        raise SparsecoreError(f"padding_idx must be within {rows} rows, got {padding_idx}")
    return padding_idx % rows


def as_ids(input: Tensor) -> Tensor:
    """Ids as int64.

    Raises:
        SparsecoreError: for another type than int64 or int32.
    """
    if input.dtype is torch.int64:
        return input
    if input.dtype is not torch.int32:
        raise SparsecoreError(f"ids must be int64 or int32, got {input.dtype}")
    return input.to(torch.int64)


def bag_entries(
    input: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """What a bag module is called with, as flat ids (n,), ends of the bags (bags + 1,) and weights (n,).

    Raises:
        SparsecoreError: if the arguments do not fit each other.
    """
    ids = as_ids(input).reshape(-1)
    if input.dim() == 2:
        if offsets is not None:
            raise SparsecoreError("offsets must be left out when the ids are 2-D (every row is a bag)")
        ends = torch.arange(input.shape[0] + 1, device=ids.device) * input.shape[1]
    elif input.dim() != 1:
        raise SparsecoreError(f"ids must be 1-D with offsets, or 2-D, got {input.dim()}-D")
    elif offsets is None:
        raise SparsecoreError("flat ids need offsets: the first entry of every bag")
    else:
        if offsets.dtype not in (torch.int64, torch.int32):
            raise SparsecoreError(f"offsets must be int64 or int32, got {offsets.dtype}")
        if offsets.dim() != 1:
            raise SparsecoreError(f"offsets must be 1-D, got {offsets.dim()}-D")
        offsets = offsets.to(torch.int64)
        ends = torch.cat((offsets, offsets.new_full((1,), ids.numel())))
    if per_sample_weights is None:
        return ids, ends, torch.ones(ids.numel(), device=ids.device, dtype=dtype)
    if per_sample_weights.shape != input.shape:
        raise SparsecoreError(
            f"per_sample_weights must have the ids' shape {tuple(input.shape)}, "
            f"got {tuple(per_sample_weights.shape)}"
        )
    return ids, ends, per_sample_weights.reshape(-1)
