"""Tables that are split by rows over ranks, for those that one device cannot hold.

Each rank stores index set and values of its own rows alone, as an ordinary table, and looks up any row: it asks the
ranks that hold them (`sparsecore.nn.exchange`).

The values are a plain parameter on each rank, not a DTensor. A DTensor cut along a dimension has pieces of a size that
follows from the whole (``torch.chunk``), but rows hold different numbers of nonzeros, so the values of a block of rows
do not; and what works on values (sparse gradients, fused and in-backward optimizers, explorations) works on plain
tensors. Instead the module that holds a rank's rows has the rank in its name, ``shard0``, ``shard1`` and so on, so that
torch.distributed.checkpoint, which goes by names, stores each.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TypeVar, overload

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from sparsecore.errors import DensityError, SparsecoreError
from sparsecore.nn.embedding import SparseEmbedding, SparseEmbeddingBag, as_ids, bag_entries
from sparsecore.nn.exchange import request, row_bounds, send_back
from sparsecore.pattern import Pattern, pointer_dtype
from sparsecore.topology.accumulate import RowAccumulator
from sparsecore.topology.ranks import Ranks, broadcast_topology

__all__ = ["ShardedEmbedding", "ShardedEmbeddingBag", "shard_rows"]

Table = TypeVar("Table", SparseEmbedding, SparseEmbeddingBag)

# torch's own mark of parameters that are not copies; one that FSDP has put in the place of ours has lost it.
_IGNORED = "_ddp_ignored"


class _ShardedTable(nn.Module):
    """What `shard_rows` makes.

    Attributes:
        shard: this rank's rows, a `SparseEmbedding`; the child module ``shard<rank>``.
        mesh, rank: all ranks, and which of them this is.
        bounds: rank r holds rows ``bounds[r] .. bounds[r + 1] - 1``.
    """

    def __init__(
        self, shard: SparseEmbedding, num_embeddings: int, padding_idx: int | None, mesh: DeviceMesh
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, shard.embedding_dim
        self.padding_idx = padding_idx
        self.mesh, self.rank = mesh, mesh.get_local_rank()
        self.bounds = row_bounds(num_embeddings, mesh.size())
        shard.row_mesh = mesh
        setattr(shard.values, _IGNORED, True)
        self.add_module(f"shard{self.rank}", shard)

    @property
    def shard(self) -> SparseEmbedding:
        """This rank's rows."""
        shard = self._modules[f"shard{self.rank}"]
        assert isinstance(shard, SparseEmbedding)
        return shard

    def _fetch(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Each row once that ids (n,) name, (unique, embedding_dim), and where each id's row is among them, (n,)."""
        self._refuse_wrappers()
        wanted, place = torch.unique(ids, return_inverse=True)
        asked, route = request(wanted, self.bounds, self.mesh.get_group())
        return send_back(self.shard(asked - self.bounds[self.rank]), route), place

    def _refuse_wrappers(self) -> None:
        """Wrappers that take what each rank has for copies of one tensor would mix different rows up."""
        values, active = self.shard.values, DistributedDataParallel._get_active_ddp_module()
        if active is not None and any(p is values for p in active._module_parameters):
            raise SparsecoreError(
                "DistributedDataParallel has taken the ranks' rows of a table for copies of each other, and overwritten"
                " them: build the model anew and call broadcast_topology(model) before DistributedDataParallel(model)"
            )
        if getattr(self.shard, "_is_fsdp_managed_module", False) and not hasattr(values, _IGNORED):
            raise SparsecoreError(
                "fully_shard has taken the ranks' rows of a table for copies of each other: build the model anew and "
                "give fully_shard ignored_params={table.shard.values}"
            )

    def _assemble(self, kind: type[Table]) -> Table:
        """The whole table as one of this kind: every rank sends its part to all others in turn."""
        shard, rows = self.shard, self.num_embeddings
        pattern, values = shard.pattern, shard.values.detach()
        everyone: Tensor = Ranks(self.mesh.get_group()).gather(
            torch.tensor([shard.nnz], device=values.device)
        )
        ends: list[int] = [0, *accumulate(everyone.tolist())]
        pointers = torch.zeros(rows + 1, dtype=torch.int64, device=values.device)
        col = pattern.col.new_empty(ends[-1])
        self._collect(pointers[1:], pattern.crow.diff().to(torch.int64), self.bounds)
        self._collect(col, pattern.col, ends)
        crow = pointers.cumsum(0).to(pointer_dtype(ends[-1]))
        whole = Pattern(crow, col, (rows, self.embedding_dim))
        table = kind._blank(whole, self.padding_idx, values.device, values.dtype)
        self._collect(table.values.detach(), values, ends)
        return _with_modes(table, shard)

    def _collect(self, whole: Tensor, mine: Tensor, ends: list[int]) -> None:
        """Fill a tensor with the ranks' parts; rank r's lies between ``ends[r]`` and ``ends[r + 1]``."""
        group = self.mesh.get_group()
        for rank, (first, last) in enumerate(pairwise(ends)):
            part = whole[first:last]
            if rank == self.rank:
                part.copy_(mine)
            dist.broadcast(part.view(torch.uint8), dist.get_global_rank(group, rank), group)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, ranks={self.mesh.size()}"


class ShardedEmbedding(_ShardedTable):
    """A `SparseEmbedding` whose rows are split over ranks, made by `shard_rows`.

    Shapes: this rank's own ids ``(*)`` int64 or int32 -> ``(*, embedding_dim)``. Each rank's ids may differ from
    others' in number too, but all ranks must look up at the same time, forward and backward: a rank without ids looks
    up none, and its loss must still depend on the result.

    Raises:
        IndexError: on every rank, for an id of any rank outside ``0 .. num_embeddings - 1``.
        SparsecoreError: where a wrapper has mixed the ranks' rows up.
    """

    def forward(self, input: Tensor) -> Tensor:
        """ids (*) -> rows (*, embedding_dim)."""
        rows, place = self._fetch(as_ids(input).reshape(-1))
        return F.embedding(place, rows).view(*input.shape, self.embedding_dim)

    def unshard(self) -> SparseEmbedding:
        """The whole table, on every rank; all must call it. For serving and for files that one process reads."""
        table = self._assemble(SparseEmbedding)
        table.sparse = self.shard.sparse
        return table


class ShardedEmbeddingBag(_ShardedTable):
    """A `SparseEmbeddingBag` whose rows are split over ranks, made by `shard_rows`.

    Rows travel, each once for a rank, and are summed where they were asked for. Otherwise as `ShardedEmbedding`.

    Shapes: as ``SparseEmbeddingBag``.
    """

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """Sum of ``per_sample_weights * rows`` over each bag."""
        ids, ends, weights = bag_entries(input, offsets, per_sample_weights, self.shard.values.dtype)
        rows, place = self._fetch(ids)
        return F.embedding_bag(
            place, rows, ends, mode="sum", per_sample_weights=weights, include_last_offset=True
        )

    def unshard(self) -> SparseEmbeddingBag:
        """The whole table, on every rank; all must call it."""
        return self._assemble(SparseEmbeddingBag)


@overload
def shard_rows(table: SparseEmbedding, mesh: DeviceMesh) -> ShardedEmbedding: ...


@overload
def shard_rows(table: SparseEmbeddingBag, mesh: DeviceMesh) -> ShardedEmbeddingBag: ...


def shard_rows(
    table: SparseEmbedding | SparseEmbeddingBag, mesh: DeviceMesh
) -> ShardedEmbedding | ShardedEmbeddingBag:
    """Split the rows of a table over the ranks of a mesh: each stores about 1/ranks of it, and looks up any row.

    Do this before the optimizer, `DynamicSparsity` and ``broadcast_topology(model)``, which tells
    DistributedDataParallel to leave the table alone. The table given is used up.

    * **Which rows.** Rank r of n holds the block ``rows * r // n .. rows * (r + 1) // n - 1``. Where a few rows are
      asked for most of the time, number them at random: what a rank has to do goes by its rows' popularity.
    * **From what.** A table with data must exist on every rank; that of the first rank is taken. A table made under
      ``torch.device("meta")`` is drawn now, each rank its own rows, so that the whole never exists; each rank then
      stores its exact share of nnz.
    * **Gradients** arrive at the rank that holds the row, summed over ranks and divided by their number: beside
      DistributedDataParallel over the same ranks, everything is as in one process on the mean loss of all batches.
    * **Exploration** prunes and grows each rank's rows by themselves, so the nnz of every rank stays as it is. A whole
      table would shift nonzeros between ranks.
    * **Norms.** ``clip_grad_norm_`` and GradScaler see this rank's rows alone, and would treat ranks differently: clip
      the other parameters, and the table by itself; leave GradScaler out.
    * **Checkpoints.** ``table.shard<rank>.values`` and so on are names of that rank alone. torch.distributed.checkpoint
      saves and loads them with ``get_state_dict`` and ``set_state_dict``, given
      ``StateDictOptions(flatten_optimizer_state_dict=True)``; not from ``optimizer.state_dict()``, which numbers
      parameters alike on all ranks. What is loaded into must have as many nonzeros on each rank, as tables from the
      meta device always do, and as many ranks; ``table.unshard()`` leads to any other number.
      ``DynamicSparsity.state_dict()`` may go along, but not with accumulated rows, which vary in number: save it with
      torch.save for each rank.

    Args:
        table: the same on all ranks but for its data.
        mesh: 1-D, of all ranks that train the model (``init_device_mesh("cpu", (ranks,))``, or
            ``DeviceMesh.from_group(group, "cpu")``).

    Returns:
        To take the table's place: a `ShardedEmbedding` or a `ShardedEmbeddingBag`.

    Raises:
        SparsecoreError: for something else than a sparse table, a mesh that is not 1-D, lacks this rank or is for
            another device, or fewer rows than ranks.
        DensityError: if some rank's rows would store nothing.
        TopologyError: if the ranks' tables differ in shape, nnz, type or encoding.

    Example:
        >>> mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        >>> with torch.device("meta"):
        ...     table = SparseEmbedding(1_000_000_000, 64, density=0.1)
        >>> model.items = shard_rows(table, mesh)
        >>> model = DistributedDataParallel(broadcast_topology(model))
    """
    _check(table, mesh)
    bounds = row_bounds(table.num_embeddings, mesh.size())
    first, last = bounds[mesh.get_local_rank() :][:2]
    padding = table.padding_idx
    own_padding = padding - first if padding is not None and first <= padding < last else None
    make = _drawn if table.values.is_meta else _cut
    shard = make(table, bounds, own_padding, mesh)
    if isinstance(table, SparseEmbeddingBag):
        return ShardedEmbeddingBag(_with_modes(shard, table), table.num_embeddings, padding, mesh)
    shard.sparse = table.sparse
    if table.accumulator is not None:
        share = -(-table.accumulator.capacity // mesh.size())
        shard.accumulator = RowAccumulator(share, table.embedding_dim, own_padding)
    return ShardedEmbedding(_with_modes(shard, table), table.num_embeddings, padding, mesh)


def _check(table: object, mesh: object) -> None:
    if not isinstance(table, (SparseEmbedding, SparseEmbeddingBag)):
        raise SparsecoreError(
            f"shard_rows needs a SparseEmbedding or a SparseEmbeddingBag, got {type(table).__name__}"
        )
    if not isinstance(mesh, DeviceMesh):
        raise SparsecoreError(
            'shard_rows needs a DeviceMesh: init_device_mesh("cpu", (ranks,)), or DeviceMesh.from_group(group, "cpu"); '
            f"got {type(mesh).__name__}"
        )
    if mesh.ndim != 1:
        raise SparsecoreError(
            f"the mesh must have 1 dimension, got {mesh.ndim}; give one dimension of it by name"
        )
    if mesh.get_coordinate() is None:
        raise SparsecoreError("this rank is not in the mesh: only ranks that hold rows may shard a table")
    if table.num_embeddings < mesh.size():
        raise SparsecoreError(
            f"a table of {table.num_embeddings} rows cannot be split over {mesh.size()} ranks; leave it whole"
        )
    if not table.values.is_meta and table.values.device.type != mesh.device_type:
        raise SparsecoreError(
            f"the table is on {table.values.device.type}, the mesh is for {mesh.device_type}: move the table there, or "
            'make it under torch.device("meta")'
        )


def _drawn(
    table: SparseEmbedding | SparseEmbeddingBag, bounds: list[int], padding: int | None, mesh: DeviceMesh
) -> SparseEmbedding:
    """This rank's rows of a new table: as many nonzeros as its share of the positions, other draws on each rank."""
    cols, skip = table.embedding_dim, table.padding_idx
    free = [(row - (skip is not None and skip < row)) * cols for row in bounds]
    stored = [table.nnz * before // free[-1] for before in free]
    _refuse_empty(stored)
    rank, ranks = mesh.get_local_rank(), Ranks(mesh.get_group())
    common = torch.Generator().manual_seed(int(torch.randint(2**62, (1,))))
    ranks.same_state(common)
    shape, nnz = (bounds[rank + 1] - bounds[rank], cols), stored[rank + 1] - stored[rank]
    pattern = Pattern.random(shape, nnz=nnz, skip_row=padding, generator=ranks.own(common))
    shard = SparseEmbedding._blank(pattern, padding, mesh.device_type, table.values.dtype)
    shard.reset_parameters(ranks.own(common, mesh.device_type))
    return shard


def _cut(
    table: SparseEmbedding | SparseEmbeddingBag, bounds: list[int], padding: int | None, mesh: DeviceMesh
) -> SparseEmbedding:
    """This rank's rows of the table that the first rank has."""
    group = mesh.get_group()
    broadcast_topology(table, group)
    dist.broadcast(table.values.detach().view(torch.uint8), dist.get_global_rank(group, 0), group)
    pattern = table.pattern
    ends = [int(pattern.crow[row]) for row in bounds]
    _refuse_empty(ends)
    rank = mesh.get_local_rank()
    rows, stored = slice(bounds[rank], bounds[rank + 1] + 1), slice(ends[rank], ends[rank + 1])
    crow = (pattern.crow[rows] - ends[rank]).to(pointer_dtype(stored.stop - stored.start))
    own = Pattern(crow, pattern.col[stored].clone(), (crow.numel() - 1, table.embedding_dim))
    shard = SparseEmbedding._blank(own, padding, table.values.device, table.values.dtype)
    shard.set_encoding(table.encoding)
    with torch.no_grad():
        shard.values.copy_(table.values[stored])
    return shard


def _refuse_empty(ends: list[int]) -> None:
    empty = [rank for rank, (first, last) in enumerate(pairwise(ends)) if first == last]
    if empty:
        raise DensityError(
            f"the rows of rank {empty[0]} would store nothing: use a higher density or fewer ranks"
        )


def _with_modes(table: Table, other: SparseEmbedding | SparseEmbeddingBag) -> Table:
    """The table, trainable or not and in training or not as another one is."""
    table.values.requires_grad_(other.values.requires_grad)
    return table.train(other.training)
