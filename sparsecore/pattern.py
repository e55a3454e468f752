"""The sparsity pattern: a CSR index set whose number of nonzeros never changes.

A pattern of shape ``(rows, cols)`` is a pair of tensors

* ``crow``: row pointers, ``rows + 1`` integers, int32 while ``nnz < 2**31``;
* ``col``: the column of every nonzero, row by row and ascending inside a row, in the narrowest signed
  or unsigned type that holds ``cols - 1`` (uint8, int16, int32, int64).

The *order* of the nonzeros is row-major in every encoding, so the values that belong to a pattern are a
plain 1-D tensor, and ``torch.sparse_csr_tensor(crow, col, values)`` is a view on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sparsecore.errors import DensityError, PatternError
from sparsecore.foreign import canonical_csr, tensor_of
from sparsecore.invariants import INTEGERS, check_csr, check_range, check_shape
from sparsecore.optional import optional
from sparsecore.quiet import hush
from sparsecore.sampling import sample_ranks
from sparsecore.sizes import column_dtype, default_device, exact_nnz, pointer_dtype

if TYPE_CHECKING:
    import scipy.sparse

__all__ = ["Pattern"]

hush()


@dataclass(frozen=True, eq=False)
class Pattern:
    """Index set of a sparse matrix in CSR order; holds no values.

    Attributes:
        crow: row pointers, shape ``(rows + 1,)``, int32 or int64.
        col: column indices, shape ``(nnz,)``, ascending inside each row.
        shape: ``(rows, cols)``.

    The constructor trusts its input (it is used on hot paths); the ``from_*`` functions check theirs,
    and :meth:`check` verifies every invariant of an existing pattern.
    """

    crow: Tensor
    col: Tensor
    shape: tuple[int, int]

    # ---- size

    @property
    def nnz(self) -> int:
        """Number of nonzeros."""
        return self.col.numel()

    @property
    def density(self) -> float:
        """``nnz / (rows * cols)``."""
        return self.nnz / (self.shape[0] * self.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of both index arrays."""
        return sum(t.numel() * t.element_size() for t in (self.crow, self.col))

    # ---- construction

    @classmethod
    def random(
        cls,
        shape: tuple[int, int],
        density: float | None = None,
        *,
        nnz: int | None = None,
        skip_row: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Pattern:
        """Exactly ``nnz`` positions, every subset of that size equally likely; on the CPU.

        Under ``torch.device("meta")`` nothing is drawn.

        Args:
            shape: ``(rows, cols)``.
            density: alternative to ``nnz``: ``nnz = round(density * rows * cols)``.
            nnz: number of nonzeros.
            skip_row: a row that stays empty (an embedding's padding row).
            generator: CPU generator; torch's default generator if absent.

        Raises:
            DensityError: if the number of nonzeros is not in ``1 .. rows * cols``.
        """
        rows, cols = check_shape(shape)
        if (density is None) == (nnz is None):
            raise DensityError("give either density or nnz, and not both")
        if nnz is None:
            assert density is not None
            nnz = exact_nnz(shape, density)
        if skip_row is not None and not 0 <= skip_row < rows:
            raise PatternError(f"skip_row must be in 0 .. {rows - 1}, got {skip_row}")
        free = (rows - (skip_row is not None)) * cols
        if skip_row is not None:
            nnz = min(nnz, free)
        if not 1 <= nnz <= free:
            raise DensityError(f"nnz must be in 1 .. {free} for a {rows} x {cols} weight, got {nnz}")
        if default_device().type == "meta":
            return cls.meta(nnz, shape)
        with torch.device("cpu"):
            return cls._draw(shape, nnz, free, skip_row, generator)

    @classmethod
    def _draw(
        cls,
        shape: tuple[int, int],
        nnz: int,
        free: int,
        skip_row: int | None,
        generator: torch.Generator | None,
    ) -> Pattern:
        rows, cols = shape
        crow = torch.zeros(rows + 1, dtype=torch.int64)
        col = torch.empty(nnz, dtype=column_dtype(cols))
        filled = 0
        for ranks in sample_ranks(free, nnz, generator):
            if skip_row is not None:  # free positions are numbered past the skipped row
                ranks = torch.where(ranks >= skip_row * cols, ranks + cols, ranks)
            row = ranks.div(cols, rounding_mode="floor")
            col[filled : filled + ranks.numel()] = (ranks - row * cols).to(col.dtype)
            first, last = int(row[0]), int(row[-1])
            crow[first + 1 : last + 2] += torch.bincount(row - first)
            filled += ranks.numel()
        return cls(crow.cumsum(0).to(pointer_dtype(nnz)), col, (rows, cols))

    @classmethod
    def meta(cls, nnz: int, shape: tuple[int, int]) -> Pattern:
        """Shapes and types of a pattern on the meta device, without data."""
        crow = torch.empty(shape[0] + 1, dtype=pointer_dtype(nnz), device="meta")
        return cls(crow, torch.empty(nnz, dtype=column_dtype(shape[1]), device="meta"), shape)

    @classmethod
    def from_coo(cls, row: Tensor, col: Tensor, shape: tuple[int, int]) -> Pattern:
        """From coordinates that are sorted by row, then by column, and unique.

        Raises:
            PatternError: if they are not, or if one lies outside ``shape``.
        """
        rows, cols = check_shape(shape)
        row, col = tensor_of(row), tensor_of(col)
        if row.shape != col.shape or row.dim() != 1:
            raise PatternError(
                f"row and col must be 1-D and of one length, got {tuple(row.shape)} and {tuple(col.shape)}"
            )
        if row.dtype not in INTEGERS or col.dtype not in INTEGERS:
            raise PatternError(f"row and col must hold integers, got {row.dtype} and {col.dtype}")
        row64, col64 = row.to(torch.int64), col.to(torch.int64)
        check_range(row64, rows, "row")
        check_range(col64, cols, "column")
        crow = torch.zeros(rows + 1, dtype=torch.int64, device=row.device)
        crow[1:] = torch.bincount(row64, minlength=rows)
        bad = torch.nonzero(row64[1:] < row64[:-1])
        if bad.numel():
            k = int(bad[0])
            raise PatternError(
                f"coordinates must be sorted by row: row {int(row64[k + 1])} follows row {int(row64[k])}; "
                "sort them first (scipy.sparse and Tensor.coalesce do)"
            )
        pattern = cls(
            crow.cumsum(0).to(pointer_dtype(col.numel())), col64.to(column_dtype(cols)), (rows, cols)
        )
        pattern.check()
        return pattern

    @classmethod
    def from_csr(cls, crow: Tensor, col: Tensor, shape: tuple[int, int]) -> Pattern:
        """From CSR index arrays of any integer type; copied into the narrowest encoding and checked.

        Raises:
            PatternError: if they are not a valid pattern of ``shape``.
        """
        rows, cols = check_shape(shape)
        crow, col = tensor_of(crow), tensor_of(col)
        cls(crow, col, (rows, cols)).check()
        # Of the narrowest type already, they would be the caller's own memory, which a weight rewrites in place.
        crow = crow.to(pointer_dtype(col.numel()), copy=True)
        return cls(crow, col.to(column_dtype(cols), copy=True), (rows, cols))

    @classmethod
    def from_torch(cls, matrix: Tensor) -> Pattern:
        """From a ``torch.sparse`` matrix of any layout (values: `split`); what it stores stays, zeros too.

        COO is coalesced on the way. Of blocks (BSR, BSC) every position is stored.
        """
        if matrix.layout in (torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
            matrix = matrix.to_sparse_coo()
        if matrix.layout == torch.sparse_coo:
            if matrix.dim() != 2 or matrix.dense_dim():
                raise PatternError(
                    f"a sparse weight is a matrix, got {matrix.sparse_dim()} sparse and "
                    f"{matrix.dense_dim()} dense dimensions"
                )
            row, col = matrix.coalesce().indices()
            return cls.from_coo(row, col, (matrix.shape[0], matrix.shape[1]))
        if matrix.layout == torch.sparse_csr:
            if matrix.dim() != 2:
                raise PatternError(f"a sparse weight is a matrix, got {matrix.dim()} dimensions")
            return cls.from_csr(
                matrix.crow_indices(), matrix.col_indices(), (matrix.shape[0], matrix.shape[1])
            )
        raise PatternError(f"expected a sparse matrix, got layout {matrix.layout}")

    @classmethod
    def from_scipy(cls, matrix: scipy.sparse.sparray | scipy.sparse.spmatrix) -> Pattern:
        """From any scipy.sparse matrix or array; sorted, duplicates merged, explicit zeros stay (values: `split`)."""
        csr = canonical_csr(matrix)
        # The copies keep torch from holding memory that scipy owns.
        crow = torch.from_numpy(np.array(csr.indptr))
        col = torch.from_numpy(np.array(csr.indices))
        return cls.from_csr(crow, col, (int(csr.shape[0]), int(csr.shape[1])))

    @classmethod
    def from_mask(cls, mask: Tensor) -> Pattern:
        """From a boolean matrix (or from a dense one: where it is not zero)."""
        mask = tensor_of(mask)
        if mask.dim() != 2 or mask.layout != torch.strided:
            raise PatternError(f"expected a dense 2-D mask, got {mask.dim()}-D with layout {mask.layout}")
        row, col = torch.nonzero(mask, as_tuple=True)
        return cls.from_coo(row, col, (mask.shape[0], mask.shape[1]))

    from_dense = from_mask

    # ---- conversion; values that are not one for each nonzero are refused with a PatternError

    def _expect(self, values: Tensor) -> None:
        if values.shape != self.col.shape:
            raise PatternError(
                f"expected {self.nnz} values in one dimension, got shape {tuple(values.shape)}"
            )

    def row_indices(self) -> Tensor:
        """Row of every nonzero, int64, shape ``(nnz,)``."""
        counts = (self.crow[1:] - self.crow[:-1]).to(torch.int64)
        return torch.repeat_interleave(counts, output_size=self.nnz)

    def positions(self) -> Tensor:
        """Row-major linear position ``row * cols + col`` of every nonzero, int64, ascending."""
        return self.row_indices().mul_(self.shape[1]).add_(self.col)

    def to_coo(self, values: Tensor) -> Tensor:
        """Coalesced ``torch.sparse_coo`` matrix with these values (int64 indices, as torch wants them)."""
        self._expect(values)
        indices = torch.stack((self.row_indices(), self.col.to(torch.int64)))
        return torch.sparse_coo_tensor(indices, values, self.shape, is_coalesced=True, check_invariants=False)

    def to_csr(self, values: Tensor) -> Tensor:
        """``torch.sparse_csr`` matrix that shares ``values``; int32 indices where they fit.

        Clone it where training goes on: an exploration writes into the values, and the indices stay as they were.
        """
        self._expect(values)
        index = torch.int32 if max(self.nnz, *self.shape) < 2**31 else torch.int64
        return torch.sparse_csr_tensor(
            self.crow.to(index), self.col.to(index), values, self.shape, check_invariants=False
        )

    def to_dense(self, values: Tensor) -> Tensor:
        """Dense matrix with these values, zero elsewhere; differentiable in ``values``."""
        self._expect(values)
        flat = values.new_zeros(self.shape[0] * self.shape[1])
        return flat.index_put((self.positions(),), values).view(self.shape)

    def to_scipy(self, values: Tensor) -> scipy.sparse.csr_array:
        """``scipy.sparse.csr_array`` that shares ``values`` where they are on the CPU.

        Copy it where training goes on: an exploration writes into the values, and the indices stay as they were.

        Raises:
            PatternError: for values of a type that scipy does not have.
        """
        import scipy.sparse

        if values.dtype == torch.bfloat16:
            raise PatternError("scipy has no bfloat16: convert the values with .to(torch.float32)")
        self._expect(values)
        data = values.detach().cpu().numpy()
        index = np.int32 if max(self.nnz, *self.shape) < 2**31 else np.int64
        return scipy.sparse.csr_array(
            (data, self.col.cpu().numpy().astype(index), self.crow.cpu().numpy().astype(index)),
            shape=self.shape,
        )

    def to_torch_sparse(self, values: Tensor) -> Any:
        """``torch_sparse.SparseTensor`` (PyTorch Geometric's) that shares ``values``; int64 indices, as it wants them.

        Raises:
            SparsecoreError: where torch-sparse is not installed.
        """
        self._expect(values)
        return optional("torch_sparse").SparseTensor(
            rowptr=self.crow.to(torch.int64),
            col=self.col.to(torch.int64),
            value=values,
            sparse_sizes=self.shape,
            is_sorted=True,
            trust_data=True,
        )

    def to_mask(self) -> Tensor:
        """Dense boolean matrix, true at the nonzeros."""
        return self.to_dense(torch.ones(self.nnz, dtype=torch.bool, device=self.col.device))

    def to(self, device: torch.device | str) -> Pattern:
        """The same pattern on another device."""
        return Pattern(self.crow.to(device), self.col.to(device), self.shape)

    # ---- invariants

    def check(self, values: Tensor | None = None) -> None:
        """Verify every invariant, in O(nnz).

        Pointers start at 0, never fall and end at nnz; columns are in range, ascending and unique inside each
        row; index types are integers; ``values``, if given, is 1-D with nnz entries.

        Raises:
            PatternError: naming the first invariant that does not hold, with the place and the value.
        """
        check_csr(self.crow, self.col, self.shape, values)
