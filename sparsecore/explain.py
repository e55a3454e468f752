"""What a model stores, and what runs it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from sparsecore.backends import backend_name
from sparsecore.errors import SparsecoreError
from sparsecore.nn.base import SparseModule

__all__ = ["Explanation", "LayerExplanation", "explain"]


@dataclass(frozen=True)
class LayerExplanation:
    """One weight.

    Attributes:
        name: of the module.
        kind: its class.
        shape: (rows, cols).
        nnz: stored weights.
        encoding: index types, pointers and columns.
        bytes: values and indices.
        dense_bytes: the same weight stored dense.
        backend: what runs its operations now.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    nnz: int
    encoding: str
    bytes: int
    dense_bytes: int
    backend: str

    @property
    def density(self) -> float:
        """``nnz / (rows * cols)``."""
        return self.nnz / (self.shape[0] * self.shape[1])


@dataclass(frozen=True)
class Explanation:
    """All sparse weights of a model; ``str()`` of it is a table.

    Attributes:
        layers: one entry for each sparse module, in the model's order.
        dense_parameters: number of parameters that are stored dense.
    """

    layers: tuple[LayerExplanation, ...]
    dense_parameters: int

    def __str__(self) -> str:
        head = ("layer", "type", "shape", "nnz", "density", "indices", "bytes", "of dense", "backend")
        rows = [
            (
                e.name or "(model)", e.kind, f"{e.shape[0]} x {e.shape[1]}", f"{e.nnz:,}", f"{e.density:.3g}",
                e.encoding, f"{e.bytes:,}", f"{e.bytes / e.dense_bytes:.0%}", e.backend,
            )
            for e in self.layers
        ]  # fmt: skip
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in (head, *rows)
        ]
        return "\n".join([*lines, f"parameters stored dense: {self.dense_parameters:,}"])


def explain(model: nn.Module) -> Explanation:
    """Per sparse weight: shape, nnz, density, index encoding, bytes against dense, and the backend that runs it.

    Raises:
        SparsecoreError: if the model has no sparse weight.

    Example:
        >>> print(explain(model))
    """
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, SparseModule):
            element = module.values.element_size()
            types = [str(t.dtype).removeprefix("torch.") for t in module.index if t is not None]
            layers.append(
                LayerExplanation(
                    name=name,
                    kind=type(module).__name__,
                    shape=module.shape,
                    nnz=module.nnz,
                    encoding=f"{module.encoding} {'/'.join(types)}",
                    bytes=module.nnz * element + module.index_bytes,
                    dense_bytes=module.shape[0] * module.shape[1] * element,
                    backend=backend_name(module.values.device),
                )
            )
    if not layers:
        raise SparsecoreError(
            "the model has no sparse weight to explain; call sparsify(model, density) first"
        )
    sparse = {id(m.values) for m in model.modules() if isinstance(m, SparseModule)}
    dense = sum(p.numel() for p in model.parameters() if id(p) not in sparse)
    return Explanation(tuple(layers), dense)
