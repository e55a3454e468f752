"""What every module with a sparse weight has in common: values, indices, conversion, checks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from sparsecore.encoding import (
    ENCODINGS,
    check_bitmap,
    choose_encoding,
    decode,
    encode,
    stored,
)  # fmt: skip
from sparsecore.errors import ConversionError, PatternError, SparsecoreError
from sparsecore.nn.index_buffers import expect_index, integers_kept, keeps_contents, no_longer_expect_index
from sparsecore.ops.recording import unwatch, watch
from sparsecore.pages import ask_huge_pages
from sparsecore.pattern import Pattern
from sparsecore.sizes import default_device
from sparsecore.topology.use import Recorder

__all__ = ["SparseModule", "weight_parameter"]

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class SparseModule(nn.Module):
    """A module with one sparse weight of shape ``(rows, cols)`` and a constant number of nonzeros.

    Attributes:
        values: ``nn.Parameter``, shape ``(nnz,)``: the stored weights, row-major, ascending columns. It is never
            replaced: a topology update writes into it, so optimizers keep holding it.
        crow_indices: shape ``(rows + 1,)``: row pointers.
        col_indices: shape ``(nnz,)``: columns, in the narrowest integer type.
        bitmap: int32, shape ``(rows + 1, words)``, see `sparsecore.encoding`.
        row_mesh: the mesh of ranks that the rows of a table are split over (`sparsecore.shard_rows`); this module then
            holds one rank's. None: ranks that train one model hold copies of this weight.

    Either the first two of the index arrays are buffers or the third, as `encoding` says. In the bitmap encoding the
    first two can still be read, but are decoded at every access.
    """

    values: nn.Parameter
    crow_indices: Tensor
    col_indices: Tensor
    bitmap: Tensor
    row_mesh: DeviceMesh | None = None
    _recorder: Recorder | None
    _is_table = False  # whether rows are looked up one by one

    def __init__(
        self, pattern: Pattern, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self._shape, self._nnz = pattern.shape, pattern.nnz
        self._recorder = None
        device = default_device() if device is None else device
        dtype = torch.get_default_dtype() if dtype is None else dtype
        _expect_dtype(dtype)
        pattern = pattern.to(device)
        self.values = nn.Parameter(ask_huge_pages(torch.empty(pattern.nnz, device=device, dtype=dtype)))
        self._store(pattern, self._best_encoding(pattern.col.device))

    def _from_values(self, pattern: Pattern, values: Tensor) -> None:
        """Initialise with these values; for the ``from_*`` constructors."""
        if pattern.nnz == 0:
            raise ConversionError("the matrix stores nothing at all; leave this module dense")
        if not values.is_floating_point():
            raise ConversionError(
                f"a weight needs floating-point values, got {str(values.dtype).removeprefix('torch.')}: convert the "
                "matrix first (matrix.astype('float32'), matrix.float())"
            )
        SparseModule.__init__(self, pattern, values.device, values.dtype)
        with torch.no_grad():
            self.values.copy_(values)

    # ---- what is stored

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (rows, cols) of the weight."""
        return self._shape

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """Shape that the weight has in the module's dense form; row-major it is the same matrix."""
        return self._shape

    @property
    def encoding(self) -> str:
        """How the index set is stored: ``"csr"`` or ``"bitmap"``."""
        return "bitmap" if "bitmap" in self._buffers else "csr"

    @property
    def index(self) -> tuple[Tensor, Tensor | None]:
        """The index set as operators take it: ``(crow, col)``, or ``(bitmap, None)``."""
        buffers: Any = self._buffers
        bitmap = buffers.get("bitmap")
        return (buffers["crow_indices"], buffers["col_indices"]) if bitmap is None else (bitmap, None)

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values and index set as operators take them.

        Raises:
            SparsecoreError: if the values are not as many as the index set has places: kernels trust them.
        """
        values = self.values
        if values.shape[0] != self._nnz:
            raise SparsecoreError(
                f"this weight stores {self._nnz} values, got {values.shape[0]}: they are of a model of another "
                "density, or cut up"
            )
        return values, *self.index

    @property
    def pattern(self) -> Pattern:
        """The index set: a view of the buffers, or decoded from the bitmap."""
        crow, col = self.index
        if col is None:
            crow, col = decode(crow, self._shape[1])
        return Pattern(crow, col, self._shape)

    @property
    def index_bytes(self) -> int:
        """Bytes of the stored index set."""
        return sum(t.numel() * t.element_size() for t in self.index if t is not None)

    def set_encoding(self, encoding: str) -> None:
        """Store the index set as ``"csr"`` or ``"bitmap"`` from now on; values and their order stay as they are.

        A module that is new, or moved to another kind of device, chooses by itself
        (`sparsecore.encoding.choose_encoding`).

        Raises:
            SparsecoreError: for another name.
        """
        if encoding not in ENCODINGS:
            raise SparsecoreError(f"encoding must be one of {', '.join(ENCODINGS)}, got {encoding!r}")
        if encoding != self.encoding:
            self._store(self.pattern, encoding)

    def _best_encoding(self, device: torch.device) -> str:
        return choose_encoding(self.nnz, self._shape, device, self.values.dtype, table=self._is_table)

    def _store(self, pattern: Pattern, encoding: str) -> None:
        with self._watched_elsewhere():
            for name in ("crow_indices", "col_indices", "bitmap"):
                self._buffers.pop(name, None)
            if encoding == "bitmap":
                self.register_buffer("bitmap", encode(pattern.crow, pattern.col, pattern.shape[1]))
            else:
                self.register_buffer("crow_indices", pattern.crow)
                self.register_buffer("col_indices", pattern.col)

    @contextmanager
    def _watched_elsewhere(self) -> Iterator[None]:
        """Around what puts the index set elsewhere in memory: whoever watches this weight goes on watching it."""
        watcher = unwatch(self.index[0]) if "values" in self._parameters and self._buffers else None
        try:
            yield
        finally:
            if watcher is not None:
                watch(self.index[0], watcher)
                if isinstance(watcher, Recorder):
                    watcher.index = self.index

    @torch.no_grad()
    def write_index(self, crow: Tensor, col: Tensor) -> None:
        """Replace the index set, given as CSR, in place: nnz and encoding stay. It is trusted."""
        if self.encoding == "bitmap":
            self.bitmap.copy_(encode(crow, col, self._shape[1]))
        else:
            self.crow_indices.copy_(crow)
            self.col_indices.copy_(col)
        no_longer_expect_index(self)

    @property
    def has_index(self) -> bool:
        """Whether an index set is stored: not after ``to_empty()``, until one is drawn or loaded."""
        return self.index[0].is_meta or stored(self.index) > 0

    def draw_index(self, generator: torch.Generator | None = None) -> None:
        """Draw an index set where there is none: ``reset_parameters`` after deferred initialisation."""
        if not self.has_index:
            pattern = Pattern.random(
                self._shape, nnz=self.nnz, skip_row=self.empty_row, generator=generator
            ).to(self.index[0].device)
            self.write_index(pattern.crow, pattern.col)

    def __getattr__(self, name: str) -> Any:
        if name in ("crow_indices", "col_indices") and "bitmap" in self.__dict__.get("_buffers", ()):
            pattern = self.pattern
            return pattern.crow if name == "crow_indices" else pattern.col
        return super().__getattr__(name)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        before = self.index[0].device.type
        was_meta = before == "meta"
        _expect_dtype(fn(self.values.detach()[:0]).dtype)  # before anything is converted
        emptied = was_meta or not keeps_contents(fn)
        with self._watched_elsewhere(), integers_kept(self):
            super()._apply(fn, recurse)
        if emptied and not self.index[0].is_meta:
            for tensor in self.index:  # kernels must not follow what happened to lie in memory
                if tensor is not None:
                    tensor.zero_()
            expect_index(self)
        after = self.index[0].device
        if after.type == "meta":
            if self.encoding == "bitmap":  # nothing to decode: only shapes are left
                self._store(Pattern.meta(self.nnz, self._shape), "csr")
        elif after.type != before and not emptied:
            self.set_encoding(self._best_encoding(after))
        return self

    @property
    def nnz(self) -> int:
        """Number of stored weights; constant for the life of the module."""
        return self.values.numel()

    @property
    def density(self) -> float:
        """``nnz / (rows * cols)``."""
        return self.nnz / (self._shape[0] * self._shape[1])

    @property
    def weight(self) -> Tensor:
        """The weight as a ``torch.sparse_csr`` matrix, for reading: it shares the values, detached from autograd.

        No gradient comes back through it: a module whose own code multiplies by ``layer.weight`` would not train it.
        An exploration writes into the values, while the indices of an earlier matrix may stay: clone it to keep it.
        """
        return self.pattern.to_csr(self.values.detach())

    @property
    def empty_row(self) -> int | None:
        """A row that must stay without nonzeros (an embedding's padding row)."""
        return None

    def check_invariants(self) -> None:
        """Verify the index set and the values against each other, in O(nnz).

        Raises:
            PatternError: naming the first invariant that does not hold.
        """
        self._check_weight(self.pattern, self.values)

    def _check_weight(self, pattern: Pattern, values: Tensor) -> None:
        pattern.check(values)
        if values.numel() != self.nnz:
            raise PatternError(
                f"expected nnz = {self.nnz} values, got {values.numel()}: the densities differ"
            )
        row = self.empty_row
        if row is not None and int(pattern.crow[row + 1]) != int(pattern.crow[row]):
            raise PatternError(f"the padding row {row} must be empty, but it holds nonzeros")

    # ---- saving and loading

    def __getstate__(self) -> dict[str, Any]:
        # What was recorded for an exploration belongs to the run, not to the module.
        return {**self.__dict__, "_recorder": None}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Refuse a damaged or partial weight before anything is copied: kernels read without bounds checks."""
        names: tuple[str, ...] = ("crow_indices", "col_indices", "values")
        if prefix + "bitmap" in state_dict:
            names = ("bitmap", "values")
        found = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        try:
            if 0 < len(found) < len(names):
                raise PatternError(f"{', '.join(names)} belong together, got only {', '.join(found)}")
            if found and not any(tensor.is_meta for tensor in found.values()):
                state_dict = self._checked_state(state_dict, prefix, found)
        except PatternError as error:
            error_msgs.append(f"{prefix.rstrip('.') or 'module'}: {error}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if found:
            no_longer_expect_index(self)

    def _checked_state(
        self, state: dict[str, Tensor], prefix: str, found: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The state with its index set in this module's encoding.

        Raises:
            PatternError: if it is damaged, or of another shape or number of nonzeros.
        """
        if "bitmap" in found:
            check_bitmap(found["bitmap"], self._shape)
            crow, col = decode(found["bitmap"], self._shape[1])
            saved = "bitmap"
        else:
            crow, col, saved = found["crow_indices"], found["col_indices"], "csr"
        self._check_weight(Pattern(crow, col, self._shape), found["values"])
        if saved == self.encoding:
            return state
        kept = {key: t for key, t in state.items() if key not in {prefix + name for name in found}}
        kept[prefix + "values"] = found["values"]
        if self.encoding == "bitmap":
            kept[prefix + "bitmap"] = encode(crow, col, self._shape[1])
        else:
            kept[prefix + "crow_indices"], kept[prefix + "col_indices"] = crow, col
        return kept

    def _shape_repr(self) -> str:
        return f"nnz={self.nnz}, density={self.density:.4g}"


def _expect_dtype(dtype: torch.dtype) -> None:
    if dtype not in _DTYPES:
        raise SparsecoreError(
            "a sparse weight needs a floating-point dtype of 64, 32 or 16 bits, got "
            + str(dtype).removeprefix("torch.")
        )


def weight_parameter(module: nn.Module) -> nn.Parameter:
    """The trainable weight of a sparse or a dense module: ``values`` or ``weight``.

    One initialiser can serve both: ``nn.init.normal_(weight_parameter(layer), std=0.01)``. Initialisers that read
    the fan-in from the tensor's shape (Xavier, Kaiming) need it computed from the dense shape instead.
    """
    parameter = module.values if isinstance(module, SparseModule) else getattr(module, "weight", None)
    if not isinstance(parameter, nn.Parameter):
        raise ConversionError(f"{type(module).__name__} has no weight parameter")
    return parameter
