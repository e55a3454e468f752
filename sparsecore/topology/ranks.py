"""Training in several processes: every rank holds the same index sets, because it takes the same decisions.

With `torch.nn.parallel.DistributedDataParallel` the ranks hold the same values and differ in their batches. Pruning
looks at values alone. Growth looks at gradients, which are added up over the ranks a block of rows at a time; random
growth draws from the same generator state. A hash of every index set is compared after each exploration.

The exception are tables whose rows are split over the ranks (`sparsecore.shard_rows`): each rank decides for its rows
by itself, from gradients that are complete as they arrive, and draws by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparsecore.encoding import stored
from sparsecore.errors import TopologyError
from sparsecore.nn.base import SparseModule
from sparsecore.nn.graph import Graph
from sparsecore.nn.index_buffers import NO_INDEX
from sparsecore.ops.explore import GradientSource

__all__ = ["Ranks", "SummedGradient", "broadcast_topology", "expect_layout"]

_CHUNK = 1 << 20


class Ranks:
    """The ranks that train copies of one model."""

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.first = dist.get_global_rank(group, 0) if group is not None else 0

    @classmethod
    def find(cls, group: Any = None) -> Ranks | None:
        """Of a group, or of the default group if one is initialised; None where a rank is alone."""
        if group is None and not (dist.is_available() and dist.is_initialized()):
            return None
        if group is not None and dist.get_rank(group) < 0:
            raise TopologyError(
                "process_group does not hold this rank: give each rank the group whose ranks train copies of its model"
            )
        found = cls(group)
        return found if found.size > 1 else None

    def any(self, flags: Sequence[bool], device: torch.device) -> list[bool]:
        """For each flag, whether some rank has it."""
        found = torch.tensor(flags, dtype=torch.int32, device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX, self.group)
        return [bool(flag) for flag in found.tolist()]

    def same_state(self, generator: torch.Generator) -> None:
        """Give a generator the state that it has on the first rank."""
        state = [generator.get_state()]
        dist.broadcast_object_list(state, self.first, self.group)
        generator.set_state(state[0])

    def own(self, common: torch.Generator, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator that is another one on every rank, seeded by a draw from one that is the same on all."""
        seed = int(torch.randint(2**62, (1,), generator=common))
        return torch.Generator(device).manual_seed(seed + self.rank)

    def union(self, rows: Tensor | None, device: torch.device) -> Tensor | None:
        """Rows that some rank has, ascending; None if one has all."""
        mine = torch.empty(0, dtype=torch.int64) if rows is None else rows
        sizes = self.gather(torch.tensor([-1 if rows is None else mine.numel()], device=device))
        if int(sizes.min()) < 0:
            return None
        padded = torch.full((int(sizes.max()),), -1, dtype=torch.int64, device=device)
        padded[: mine.numel()] = mine
        found = torch.unique(self.gather(padded))
        return found[found >= 0]

    def add(self, block: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        block = block.contiguous()
        dist.all_reduce(block, group=self.group)
        return block

    def check(self, modules: Mapping[str, SparseModule]) -> None:
        """Compare the index sets of weights that ranks hold copies of, by their hashes.

        Raises:
            TopologyError: on every rank, naming the weights that differ and the ranks on which they do.
        """
        if not modules:
            return
        device = next(iter(modules.values())).values.device
        mine = torch.stack([_hash(module).to(device) for module in modules.values()])
        everyone = self.gather(mine).view(self.size, -1).cpu()
        differs = everyone != everyone[0]
        if bool(differs.any()):
            names = [
                name or "the model" for name, d in zip(modules, differs.any(0).tolist(), strict=True) if d
            ]
            ranks = differs.any(1).nonzero().view(-1).tolist()
            raise TopologyError(
                f"the index sets of {', '.join(names)} on ranks {', '.join(map(str, ranks))} are not those of "
                "rank 0. Ranks must hold the same index sets (broadcast_topology(model) before the first step) and "
                "the same values (train through DistributedDataParallel); for a model of its own on each rank give "
                "DynamicSparsity a process_group of that rank alone"
            )

    def gather(self, mine: Tensor) -> Tensor:
        """The tensors of all ranks, which are of one shape, one after another."""
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine, self.group)
        return torch.cat(parts)


class SummedGradient:
    """A weight's gradient summed over the ranks: a source of growth scores that is the same on all of them.

    Args:
        mine: what this rank has; None if its batches did not reach the weight.
        ranks: all of them must ask for the same blocks in the same order.
        values: the weight's, for type and device.
        cols: of the weight.
    """

    def __init__(self, mine: GradientSource | None, ranks: Ranks, values: Tensor, cols: int) -> None:
        self.mine, self.ranks, self.values, self.cols = mine, ranks, values, cols
        nothing = torch.empty(0, dtype=torch.int64, device=values.device)
        self._own = nothing if mine is None else mine.rows()
        self._all = ranks.union(self._own, values.device)

    def rows(self) -> Tensor | None:
        """Rows that some rank's batches reached; None for all."""
        return self._all

    def block(self, rows: Tensor | slice) -> Tensor:
        """Dense gradient of these rows, summed over the ranks."""
        return self.ranks.add(self._block(rows))

    def _block(self, rows: Tensor | slice) -> Tensor:
        if self.mine is not None and self._own is None:
            return self.mine.block(rows)
        ids = (
            torch.arange(rows.start, rows.stop, device=self.values.device)
            if isinstance(rows, slice)
            else rows
        )
        found = torch.zeros(ids.numel(), self.cols, dtype=self.values.dtype, device=self.values.device)
        if self.mine is not None and self._own is not None:
            reached = torch.isin(ids, self._own.to(ids.device))
            if bool(reached.any()):
                found[reached] = self.mine.block(ids[reached])
        return found


def broadcast_topology(model: nn.Module, process_group: Any = None) -> nn.Module:
    """Give all ranks the index sets of the first one; before the model is wrapped in DistributedDataParallel.

    Index sets are buffers, and change in place on all ranks alike. DistributedDataParallel would send them again at
    every step, and refuses those of 16 bits: it is told to leave them alone, and the edges of graphs, which all ranks
    get from the first one, too. The values are its parameters, which it sends itself. Of tables whose rows are split
    over ranks (`sparsecore.shard_rows`) nothing is sent, and it is told to leave their values alone too.

    Args:
        model: with at least one sparse module; the same on all ranks but for the positions of its nonzeros.
        process_group: of torch.distributed; the default group if absent.

    Returns:
        The model.

    Raises:
        TopologyError: without a process group, without sparse weights, or for models that differ in more than the
            positions of their nonzeros; then on all ranks.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise TopologyError("torch.distributed has no process group: call init_process_group() first")
    modules = {name: m for name, m in model.named_modules() if isinstance(m, SparseModule)}
    if not modules:
        raise TopologyError("the model has no sparse weight; call sparsify(model, density) first")
    ranks = Ranks(process_group)
    forms: list[Any] = [None] * ranks.size
    copies = {name: m for name, m in modules.items() if m.row_mesh is None}
    graphs = {name: m for name, m in model.named_modules() if isinstance(m, Graph)}
    own: list[Any] = [(name, m.shape, m.nnz, m.encoding, str(m.values.dtype)) for name, m in copies.items()]
    own += [
        (name, *((key, t.numel(), str(t.dtype)) for key, t in m.named_buffers()))
        for name, m in graphs.items()
    ]
    dist.all_gather_object(forms, own, process_group)
    for rank, form in enumerate(forms):
        if form != forms[0]:
            odd = next((a for a, b in zip(form, forms[0], strict=False) if a != b), form[-1])
            raise TopologyError(
                f"the sparse weights of rank {rank} are not those of rank 0, or its graphs (first difference: {odd}): "
                "build the same model with the same densities on all ranks"
            )
    ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    sent = [tensor for module in copies.values() for tensor in module.index if tensor is not None]
    sent += [tensor for graph in graphs.values() for tensor in graph.buffers()]
    for tensor in sent:
        if tensor.numel():
            dist.broadcast(tensor.view(torch.uint8), ranks.first, process_group)
    for name, graph in graphs.items():
        ignored.update(f"{name}.{key}" if name else key for key, _ in graph.named_buffers())
    for name, module in modules.items():
        left_alone: list[str] = [
            key for key in ("crow_indices", "col_indices", "bitmap") if key in module._buffers
        ]
        left_alone += [] if name in copies else ["values"]
        ignored.update(f"{name}.{key}" if name else key for key in left_alone)
    model._ddp_params_and_buffers_to_ignore = sorted(ignored)  # type: ignore[assignment]
    return model


def expect_layout(modules: Mapping[str, SparseModule], ranks: Ranks | None) -> None:
    """Refuse to explore weights of which this rank does not hold what an exploration has to see.

    Raises:
        TopologyError: for values that FSDP has cut up, whose pieces no index set fits, and for tables whose rows are
            split over other ranks than those that explore together.
    """
    members = None if ranks is None else dist.get_process_group_ranks(ranks.group or dist.group.WORLD)
    for name, module in modules.items():
        if not module.has_index:
            raise TopologyError(f"{name or 'the model'} has {NO_INDEX}")
        if type(module.values) not in (nn.Parameter, Tensor) or module.values.numel() != stored(module.index):
            raise TopologyError(
                f"the values of {name or 'the model'} are cut up over ranks (FSDP), but an exploration needs them "
                "whole. Train sparse modules with DistributedDataParallel, and split large tables by "
                "sparsecore.shard_rows(table, mesh); fully_shard may have the dense submodules"
            )
        mesh = module.row_mesh
        if mesh is not None and mesh.size() > 1 and mesh.mesh.tolist() != members:
            raise TopologyError(
                f"the rows of {name} are split over ranks {mesh.mesh.tolist()}, but "
                f"{'this rank explores alone' if members is None else f'ranks {members} explore together'}: "
                "give DynamicSparsity the process_group of the mesh"
            )


def _hash(module: SparseModule) -> Tensor:
    """A number that two different index sets share only by chance, int64, on the module's device."""
    found = torch.zeros((), dtype=torch.int64, device=module.values.device)
    for tensor in module.index:
        if tensor is not None:
            for chunk in tensor.detach().reshape(-1).split(_CHUNK):
                place = torch.arange(1, chunk.numel() + 1, device=found.device)
                mixed = (chunk.to(torch.int64) + 1) * (place * 6364136223846793005 | 1)  # wraps around
                found = found * 0x100000001B3 + (mixed ^ (mixed >> 29)).sum()
    return found
