"""Exact counts: multiply-adds of the operations that ran, bytes that are resident."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from sparsecore.nn.base import SparseModule
from sparsecore.topology.explorer import DynamicSparsity

__all__ = ["MacCounter", "ResidentBytes", "release_results", "resident_bytes"]


def _bag_flops(weight: Tensor, indices: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """A dense EmbeddingBag multiplies and adds every column of every row that it reads."""
    return 2 * indices.numel() * weight.shape[1]


def _bag_backward_flops(grad: Tensor, indices: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return 2 * indices.numel() * grad.shape[1]


def _bag_weights_backward_flops(
    grad: Tensor, weight: Tensor, indices: Tensor, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    return 2 * indices.numel() * weight.shape[1]


_RAW: tuple[Any, ...] = (_bag_flops, _bag_backward_flops, _bag_weights_backward_flops)


def _attention_flops(
    query: Tensor, key: Tensor, value: Tensor, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward_flops(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


def _vector_flops(matrix: Tensor, vector: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return 2 * matrix.numel()


def _added_vector_flops(
    start: Tensor, matrix: Tensor, vector: Tensor, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    return 2 * matrix.numel()


_RAW += (_attention_flops, _attention_backward_flops, _vector_flops, _added_vector_flops)
for _formula in _RAW:
    _formula._get_raw = True

# torch counts dense bags as free; next to sparse bags, which are counted, that would flatter the dense baseline.
# Nor does it know attention on the CPU and products with one vector.
_NOT_TORCHS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._embedding_bag: _bag_flops,
    torch.ops.aten._embedding_bag_forward_only: _bag_flops,
    torch.ops.aten._embedding_bag_backward: _bag_backward_flops,
    torch.ops.aten._embedding_bag_dense_backward: _bag_backward_flops,
    torch.ops.aten._embedding_bag_per_sample_weights_backward: _bag_weights_backward_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    torch.ops.aten.mv: _vector_flops,
    torch.ops.aten.addmv: _added_vector_flops,
}


class MacCounter:
    """Count multiply-adds by phase, from the operations that actually run.

    Matrix products, convolutions and attention are counted by torch's ``FlopCounterMode``, sparsecore's operations by
    the formulas registered with them (exact: from nnz and from the rows that are read). Additions without a
    multiplication, elementwise functions, softmax and the optimizer's update are not counted, nor are dense operators
    that nobody has a formula for (``nn.LSTM`` on the CPU, ``nn.Bilinear``, and the fused path that
    ``nn.TransformerEncoder`` takes for inference); one multiply-add is one MAC (2 FLOPs).

    Example:
        >>> counter = MacCounter()
        >>> with counter.phase("forward"):
        ...     loss = model(x).sum()
        >>> with counter.phase("backward"):
        ...     loss.backward()
        >>> counter.macs
        {'forward': 12000000, 'backward': 24000000}
    """

    def __init__(self) -> None:
        self.macs: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add what runs in the block to ``macs[name]``."""
        with FlopCounterMode(display=False, custom_mapping=_NOT_TORCHS) as flops:
            yield
        self.macs[name] = self.macs.get(name, 0) + flops.get_total_flops() // 2

    @property
    def total(self) -> int:
        """Multiply-adds of all phases."""
        return sum(self.macs.values())


@dataclass(frozen=True)
class ResidentBytes:
    """Bytes that stay allocated between training steps.

    Attributes:
        weights: all parameters (sparse values, dense weights, biases).
        indices: index arrays of sparse weights.
        gradients: ``.grad`` of all parameters.
        optimizer_state: every tensor of the optimizer's state.
        topology: masks of a simulation, or the explorer's history bits and accumulated rows.
        other: buffers that are not indices (graphs, running statistics).
        results: memory of large outputs and gradients (8 MiB and more) that the numba backend keeps for each weight, to
            use it again, where no gradient lies in it.
    """

    weights: int
    indices: int
    gradients: int
    optimizer_state: int
    topology: int
    other: int
    results: int = 0

    @property
    def total(self) -> int:
        """Sum of all."""
        return (
            self.weights
            + self.indices
            + self.gradients
            + self.optimizer_state
            + self.topology
            + self.other
            + self.results
        )


def resident_bytes(
    model: nn.Module, optimizer: Optimizer | Sequence[Optimizer] = (), explorer: Any = None
) -> ResidentBytes:
    """Count the bytes of a model, its optimizer and its explorer as they are now, each storage once.

    Call it after a step, when gradients and optimizer state exist.

    Args:
        model: sparse, dense or masked.
        optimizer: one or several.
        explorer: `DynamicSparsity` or `MaskedSparsity`, if there is one.
    """
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    seen: set[tuple[Any, int]] = set()
    results = sys.modules.get("sparsecore.backends.numba.memory")  # not imported: nothing is kept

    def size(tensors: Sequence[Any]) -> int:
        total = 0
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                # All memory of the meta device begins at 0.
                key = (storage.device, storage.data_ptr() or storage._cdata)
                if key not in seen:
                    seen.add(key)
                    total += storage.nbytes()
        return total

    indices = _indices(model)
    parameters = list(model.parameters())
    return ResidentBytes(
        weights=size([p.data for p in parameters]),
        indices=size(indices),
        gradients=size([t for p in parameters for t in _parts(p.grad)]),
        optimizer_state=size([t for o in optimizers for state in o.state.values() for t in state.values()]),
        topology=size(_topology_tensors(explorer)),
        other=size([t for buffer in model.buffers() for t in _parts(buffer)]),
        results=size(results.kept_results(t for t in indices if t is not None)) if results else 0,
    )


def release_results(model: nn.Module) -> None:
    """Give back the memory of large results that sparse layers keep for their next call.

    For after something that is not done again soon, such as an evaluation between epochs: `ResidentBytes.results` is 0
    then. The next large result takes memory from the system again.
    """
    results = sys.modules.get("sparsecore.backends.numba.memory")
    if results:
        results.release(t for t in _indices(model) if t is not None)


def _indices(model: nn.Module) -> list[Tensor | None]:
    return [t for m in model.modules() if isinstance(m, SparseModule) for t in m.index]


def _parts(tensor: Tensor | None) -> list[Tensor]:
    """What a gradient or a buffer consists of: indices and values of a sparse one."""
    if tensor is None:
        return []
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]


def _topology_tensors(explorer: Any) -> list[Tensor]:
    if explorer is None:
        return []
    if isinstance(explorer, DynamicSparsity):
        accumulated = [t for a in explorer.accumulators().values() for t in a.state_dict().values()]
        return [history.bits for history in explorer.history.values()] + accumulated
    return [*explorer.multipliers.values(), *explorer.ever_active.values()]
