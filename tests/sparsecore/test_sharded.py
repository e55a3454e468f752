"""Tables whose rows are split over ranks: what one process would have computed, with a share of its memory."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from processes import WORLD, run
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sparsecore
from sparsecore import DynamicSparsity, SparsecoreError, broadcast_topology, shard_rows
from sparsecore.topology.grow import plan_exchange

pytestmark = [
    pytest.mark.feature("tables split by rows (shard_rows), FSDP2"),
    pytest.mark.slow,
    pytest.mark.skipif(
        not dist.is_available() or sys.platform == "win32", reason="no torch.distributed with gloo"
    ),
]
ROWS, BAGS, DIM, BATCH, PADDING = 51, 30, 8, 12, 3  # 51 rows do not split evenly


def mesh_of_all() -> Any:
    return dist.device_mesh.init_device_mesh("cpu", (WORLD,))


class Model(nn.Module):
    """A table with a padding row and a bag, both split where there is a mesh, and a layer that is not."""

    def __init__(
        self,
        seed: int,
        mesh: Any = None,
        sparse: bool = False,
        encoding: str = "csr",
        accumulate: int = 0,
        device: str = "cpu",
    ) -> None:
        super().__init__()
        make: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed), "dtype": torch.float64}
        with torch.device(device):
            table = sparsecore.SparseEmbedding(
                ROWS, DIM, PADDING, sparse, density=0.4, accumulate_rows=accumulate, **make
            )
            bag = sparsecore.SparseEmbeddingBag(BAGS, DIM, density=0.4, **make)
        self.out = sparsecore.SparseLinear(2 * DIM, 3, density=0.5, **make)
        if device == "cpu":
            table.set_encoding(encoding)
        self.table = table if mesh is None else shard_rows(table, mesh)
        self.bag = bag if mesh is None else shard_rows(bag, mesh)

    def forward(self, ids: Tensor, bags: Tensor, weights: Tensor) -> Tensor:
        return self.out(torch.cat((self.table(ids), self.bag(bags, None, weights)), 1))


def batch(step: int, part: slice) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(ROWS, (BATCH,), generator=generator)
    ids[0] = ids[-1]  # two ranks want one row
    bags = torch.randint(BAGS, (BATCH, 4), generator=generator)
    numbers = torch.randn(BATCH, 7, generator=generator, dtype=torch.float64)
    return (ids[part], bags[part], numbers[part, :4]), numbers[part, 4:]


def part_of(rank: int) -> slice:
    each = BATCH // WORLD
    return slice(rank * each, (rank + 1) * each)


def optimizer_for(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    if kind == "adam":
        return torch.optim.Adam(model.parameters(), lr=0.02)
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return sparsecore.optim.Adam(model.parameters(), lr=0.02)


def train(model: nn.Module, kind: str, part: slice, steps: int = 6) -> tuple[list[Tensor], nn.Module]:
    """Outputs of every step; the gradients of the last one stay."""
    optimizer, outputs = optimizer_for(model, kind), []
    for step in range(steps):
        inputs, target = batch(step, part)
        optimizer.zero_grad()
        output = model(*inputs)
        (output - target).square().mean().backward()
        optimizer.step()
        outputs.append(output.detach())
    return outputs, model


def whole(model: Any) -> dict[str, Tensor]:
    """Dense weights of all three, by name."""
    table, bag = model.table, model.bag
    if isinstance(table, sparsecore.ShardedEmbedding):
        table, bag = table.unshard(), bag.unshard()
    assert type(table) is sparsecore.SparseEmbedding
    assert type(bag) is sparsecore.SparseEmbeddingBag
    modules = {"table": table, "bag": bag, "out": model.out}
    for module in modules.values():
        module.check_invariants()
    return {name: m.weight.to_dense() for name, m in modules.items()}


KINDS = ("adam", "sgd", "lazy")


def dense_gradient(module: Any) -> Tensor:
    grad = module.values.grad
    return module.pattern.to_dense(grad.to_dense() if grad.is_sparse else grad)


def _static(rank: int, folder: Path) -> Any:
    found: dict[str, Any] = {}
    for kind in KINDS:
        # Other data on each rank: that of rank 0 is taken.
        model = Model(rank, mesh_of_all(), sparse=kind == "lazy", encoding=["csr", "bitmap"][kind == "sgd"])
        assert model.table.shard.encoding == ("bitmap" if kind == "sgd" else "csr")
        parallel = DistributedDataParallel(broadcast_topology(model))
        outputs, _ = train(parallel, kind, part_of(rank))
        tables = {"table": model.table, "bag": model.bag}
        gradients = {name: (t.rank, t.bounds, dense_gradient(t.shard)) for name, t in tables.items()}
        shares = {name: sparsecore.resident_bytes(t.shard).total for name, t in tables.items()}
        found[kind] = (outputs, gradients, whole(model), shares, [t.shard.nnz for t in tables.values()])
    return found


def test_static_training_equals_one_process(results: Any) -> None:
    found = results("static")
    for kind in KINDS:
        one = Model(0, sparse=kind == "lazy")
        outputs, _ = train(one, kind, slice(None))
        sizes = {name: sparsecore.resident_bytes(getattr(one, name)).total for name in ("table", "bag")}
        expected = whole(one)
        for step, output in enumerate(outputs):
            both = torch.cat([result[kind][0][step] for result in found])
            torch.testing.assert_close(both, output, rtol=1e-9, atol=1e-12, msg=f"{kind}, step {step}")
        for _, gradients, weights, shares, _ in (result[kind] for result in found):
            for name, weight in expected.items():
                torch.testing.assert_close(weights[name], weight, rtol=1e-9, atol=1e-12)
            for name, (rank, bounds, gradient) in gradients.items():
                mine = dense_gradient(getattr(one, name))[bounds[rank] : bounds[rank + 1]]
                torch.testing.assert_close(gradient, mine, rtol=1e-9, atol=1e-12)
                assert shares[name] < 0.65 * sizes[name]
        nnz = torch.tensor([result[kind][4] for result in found]).sum(0)
        assert nnz.tolist() == [one.table.nnz, one.bag.nnz]


def _explored(rank: int, grow: str, accumulate: int) -> Any:
    model = Model(0, mesh_of_all(), encoding="bitmap" if accumulate else "csr", accumulate=accumulate)
    assert accumulate == 0 or model.table.shard.accumulator.capacity == accumulate // 2
    parallel = DistributedDataParallel(broadcast_topology(model))
    optimizer = torch.optim.Adam(parallel.parameters(), lr=0.02)
    explorer = DynamicSparsity(parallel, optimizer, interval=2, total_steps=40, grow=grow)
    before, nnz, reports = whole(model), [t.shard.nnz for t in (model.table, model.bag)], []
    for step in range(40):
        inputs, target = batch(step, part_of(rank))
        optimizer.zero_grad()
        (parallel(*inputs) - target).square().mean().backward()
        optimizer.step()
        reports.append(explorer.step())
    for table, stored in zip((model.table, model.bag), nnz, strict=True):
        table.shard.check_invariants()
        assert table.shard.nnz == stored
    assert [r.nnz for r in reports if r] == [sum(nnz) + model.out.nnz] * 20
    after = whole(model)
    assert not after["table"][PADDING].any()
    for name in after:
        assert (after[name] != 0).ne(before[name] != 0).any(), name
    # A gradient that is not finite on one rank alone stops all of them, and changes nothing.
    explorer.rewind(1)
    inputs, target = batch(0, part_of(rank))
    optimizer.zero_grad()
    parallel(*inputs).mean().backward()
    values = model.table.shard.values.data
    kept = values[0].clone()
    if rank == 1:
        values[0] = torch.nan
    with pytest.raises(sparsecore.TopologyError) as refused:
        explorer.step()
    values[0] = kept
    for name, weight in whole(model).items():
        assert torch.equal(weight, after[name]), name
    return after, str(refused.value)


@pytest.mark.parametrize(("grow", "accumulate"), [("gradient", 0), ("gradient", 20), ("random", 0)])
def test_each_rank_explores_its_rows(grow: str, accumulate: int, results: Any) -> None:
    found = results(f"{grow}-{accumulate}")
    (first, other), (second, own) = found
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name
    assert "weights of module.table.shard1 are NaN" in own
    assert "another rank refused" in other


def _first_growth(rank: int, folder: Path) -> Any:
    """The loss is linear in the table, so its dense gradient is known: sums of fixed rows, divided by the ranks."""
    table = sparsecore.SparseEmbedding(
        20, 6, density=0.3, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    sharded = shard_rows(table, mesh_of_all())
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.0)
    explorer = DynamicSparsity(
        sharded, optimizer, interval=1, drop_fraction=0.3, schedule="constant", total_steps=9
    )
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(20, (WORLD, 30), generator=generator)
    factors = torch.randn(WORLD, 30, 6, generator=generator, dtype=torch.float64)
    old = sharded.unshard()
    (sharded(ids[rank]) * factors[rank]).sum().backward()
    optimizer.step()
    explorer.step()
    gradient = torch.zeros(20, 6, dtype=torch.float64).index_add_(
        0, ids.view(-1), factors.view(-1, 6) / WORLD
    )
    first, last = sharded.bounds[rank], sharded.bounds[rank + 1]

    class Known:
        def rows(self) -> None:
            return None

        def block(self, rows: Any) -> Tensor:
            return gradient[first:last][rows].clone()

    dense = old.weight.to_dense()[first:last]
    expected = sparsecore.SparseEmbedding.from_sparse(dense.to_sparse_csr())
    exchange = plan_exchange(expected, -(-3 * expected.nnz // 10), Known())
    for mine, new in zip(sharded.shard.index, exchange.index, strict=True):
        assert mine is new is None or torch.equal(mine, new)
    assert not torch.equal(sharded.shard.weight.to_dense() != 0, dense != 0)


def test_growth_sees_the_gradient_of_all_ranks(results: Any) -> None:
    assert results("first growth") == [None, None]


def _checkpoint(rank: int, folder: Path) -> Any:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=True)

    def build(seed: int) -> tuple[Any, ...]:
        torch.manual_seed(seed)
        model = Model(seed, mesh_of_all(), sparse=True, device="meta")  # nnz of a rank goes by its rows alone
        parallel = DistributedDataParallel(broadcast_topology(model))
        tables = [*model.table.parameters(), *model.bag.parameters()]
        rest = [p for p in model.parameters() if all(p is not t for t in tables)]
        optimizer = sparsecore.optim.Adam([{"params": tables, "lr": 0.05}, {"params": rest}], lr=0.02)
        return parallel, optimizer, DynamicSparsity(parallel, optimizer, interval=2, total_steps=40)

    def go(parallel: Any, optimizer: Any, explorer: Any, steps: range) -> dict[str, Tensor]:
        for step in steps:
            inputs, target = batch(step, part_of(rank))
            optimizer.zero_grad()
            (parallel(*inputs) - target).square().mean().backward()
            optimizer.step()
            explorer.step()
        moments = [s["exp_avg"] for s in optimizer.state.values()]
        return {**whole(parallel.module), **{str(i): m for i, m in enumerate(moments)}}

    def state(parallel: Any, optimizer: Any, explorer: Any) -> dict[str, Any]:
        weights, moments = get_state_dict(parallel, optimizer, options=options)
        return {"model": weights, "optimizer": moments, "explorer": explorer.state_dict()}

    built = build(0)
    go(*built, range(7))
    dcp.save(state(*built), checkpoint_id=folder / "checkpoint")
    expected = go(*built, range(7, 14))
    parallel, optimizer, explorer = build(1)
    loaded = state(parallel, optimizer, explorer)
    dcp.load(loaded, checkpoint_id=folder / "checkpoint")
    set_state_dict(
        parallel,
        optimizer,
        model_state_dict=loaded["model"],
        optim_state_dict=loaded["optimizer"],
        options=options,
    )
    explorer.load_state_dict(loaded["explorer"])
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.02]
    found = go(parallel, optimizer, explorer, range(7, 14))
    return expected, found, sorted(loaded["model"])


def test_a_checkpoint_goes_on_to_the_same_bits(results: Any) -> None:
    for rank, result in enumerate(results("checkpoint")):
        expected, found, names = result
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
        assert f"module.table.shard{rank}.values" in names


def _refused(rank: int, folder: Path) -> Any:
    found = {}

    def message(name: str, call: Any) -> None:
        try:
            call()
        except (SparsecoreError, IndexError) as error:
            found[name] = f"{type(error).__name__}: {error}"

    mesh = mesh_of_all()
    table = sparsecore.SparseEmbedding(6, 4, density=0.5, generator=torch.Generator().manual_seed(0))
    square = dist.device_mesh.init_device_mesh("cpu", (WORLD, 1))
    message("dimensions", lambda: shard_rows(table, square))
    message("rows", lambda: shard_rows(sparsecore.SparseEmbedding(1, 4, density=0.5), mesh))
    message("mesh", lambda: shard_rows(table, dist.group.WORLD))
    message("module", lambda: shard_rows(nn.Embedding(6, 4), mesh))
    message("meta", lambda: shard_rows(sparsecore.SparseEmbedding(2, 4, 0, density=0.5, device="meta"), mesh))
    one_row = torch.zeros(6, 4)
    one_row[0, 0] = 1
    lopsided = sparsecore.SparseEmbedding.from_sparse(one_row.to_sparse_csr())
    message("empty", lambda: shard_rows(lopsided, mesh))
    first_only = dist.device_mesh.DeviceMesh("cpu", [0])
    if rank == 1:
        message("outside", lambda: shard_rows(table, first_only))

    sharded = shard_rows(table, mesh)
    message("ids", lambda: sharded(torch.tensor([0, 5] if rank == 0 else [0, 6])))
    message("negative", lambda: sharded(torch.tensor([-1] if rank == 0 else [1])))
    # The ranks are in step afterwards, also where one of them wants nothing.
    ids = torch.tensor([[0, 5, 5]] if rank == 0 else [[]], dtype=torch.int32)
    rows = sharded(ids)
    expected = sharded.unshard().weight.to_dense()
    assert torch.equal(rows, expected[ids.long()])
    rows.sum().backward()
    bag = shard_rows(sparsecore.SparseEmbeddingBag(6, 4, density=0.5), mesh)
    ids = torch.tensor([1, 2, 5] if rank == 0 else [], dtype=torch.int64)
    offsets = torch.tensor([0, 2, 2] if rank == 0 else [0], dtype=torch.int64)
    weights = torch.full(ids.shape, 0.5, requires_grad=True)
    sums = bag(ids, offsets, weights)
    torch.testing.assert_close(sums, bag.unshard()(ids, offsets, weights))
    sums.sum().backward()
    assert weights.grad is not None
    sums = bag(torch.empty(0, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))  # on all ranks
    assert sums.tolist() == [[0.0] * 4] * 2
    message("densify", lambda: sparsecore.densify(nn.Sequential(sharded)))

    model = nn.Sequential(sharded, nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    alone = [dist.new_group([r]) for r in range(WORLD)][rank]
    message("alone", lambda: DynamicSparsity(model, optimizer, total_steps=9, process_group=alone))
    with torch.device(
        "meta"
    ):  # as many nonzeros on each rank, so that DistributedDataParallel sees no difference
        even = sparsecore.SparseEmbedding(6, 4, density=0.5)
    copied = nn.Sequential(shard_rows(even, mesh), nn.Linear(4, 2))
    message("ddp", lambda: DistributedDataParallel(copied)(torch.tensor([0])))
    return found


def test_what_is_refused(results: Any) -> None:
    found = results("refused")
    first, second = found
    for key, text in {
        "dimensions": "SparsecoreError: the mesh must have 1 dimension, got 2",
        "rows": "SparsecoreError: a table of 1 rows cannot be split over 2 ranks",
        "mesh": "SparsecoreError: shard_rows needs a DeviceMesh",
        "module": "SparsecoreError: shard_rows needs a SparseEmbedding or a SparseEmbeddingBag, got Embedding",
        "meta": "DensityError: the rows of rank 0 would store nothing",
        "empty": "DensityError: the rows of rank 1 would store nothing",
        "densify": "ConversionError: 0.shard{rank} holds one rank's rows of a table",
        "alone": "TopologyError: the rows of 0.shard{rank} are split over ranks [0, 1]",
        "ddp": "SparsecoreError: DistributedDataParallel has taken the ranks' rows of a table for copies",
    }.items():
        for rank, result in enumerate(found):
            assert text.format(rank=rank) in result.get(key, "not refused"), key
    assert "this rank is not in the mesh" in second["outside"]
    assert second["ids"] == "IndexError: ids must be in 0 .. 5, got 6"
    assert first["ids"] == "IndexError: rank 1 asked for ids outside 0 .. 5: nothing was looked up"
    assert first["negative"] == "IndexError: ids must be in 0 .. 5, got -1"
    assert second["negative"].startswith("IndexError: rank 0 asked")


def _drawn(rank: int, folder: Path) -> Any:
    tables = []
    for _ in range(2):
        torch.manual_seed(7)
        with torch.device("meta"):
            table = sparsecore.SparseEmbedding(100, 16, padding_idx=2, density=0.2)
        sharded = shard_rows(table, mesh_of_all())
        assert (sharded.shard.padding_idx is not None) == (rank == 0)
        tables.append(sharded.unshard())
    return [(t.nnz, t.weight.to_dense()) for t in tables], sharded.shard.nnz, sharded.bounds


def test_a_table_on_meta_is_drawn_by_its_ranks(results: Any) -> None:
    found = results("drawn")
    ([(nnz, dense), (_, again)], share, bounds), (_, other, _) = found
    assert nnz == 320 == share + other
    assert bounds == [0, 50, 100]
    assert torch.equal(dense, again)
    assert not dense[2].any()
    assert not torch.equal(dense[:50], dense[50:])
    assert 0.8 < dense[dense != 0].std() < 1.2


@sparsecore.backend("torch")  # FSDP frees memory of the values, which numpy does not allow
def _fsdp(rank: int, folder: Path) -> Any:
    from torch.distributed.fsdp import fully_shard

    found: dict[str, Any] = {}
    mesh = mesh_of_all()
    for kind in ("adam", "lazy"):
        model = Model(0)
        fully_shard(model, mesh=mesh)
        outputs, _ = train(model, kind, part_of(rank), steps=3)
        found[kind] = outputs
    for stage in ("before", "between"):
        model = Model(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        try:
            if stage == "before":
                fully_shard(model, mesh=mesh)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                DynamicSparsity(model, optimizer, total_steps=9)
            else:
                explorer = DynamicSparsity(model, optimizer, interval=1, total_steps=9)
                fully_shard(model, mesh=mesh)
                explorer.step()
        except sparsecore.TopologyError as error:
            found[stage] = str(error)
    model = Model(0, mesh)
    ids = batch(0, part_of(rank))[0]
    fully_shard(model, mesh=mesh, ignored_params={*model.table.parameters(), *model.bag.parameters()})
    found["ignored"] = model(*ids).detach()
    model = Model(0, mesh, device="meta")  # as many nonzeros on each rank: FSDP sees no difference
    fully_shard(model.bag, mesh=mesh)
    try:
        model(*ids)
    except SparsecoreError as error:
        found["managed"] = str(error)
    return found


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="FSDP2 of torch 2.6 does not run on CPUs")
def test_fully_sharded_models(results: Any) -> None:
    """Static sparse layers train under FSDP2; what would go wrong is refused."""
    found = results("fsdp")
    for result in found:
        assert "out are cut up over ranks (FSDP)" in result["before"]
        assert "are cut up over ranks (FSDP)" in result["between"]
        assert "give fully_shard ignored_params" in result["managed"]
    for kind in ("adam", "lazy"):
        outputs, _ = train(Model(0), kind, slice(None), steps=3)
        for step, output in enumerate(outputs):
            both = torch.cat([result[kind][step] for result in found])
            torch.testing.assert_close(both, output, rtol=1e-9, atol=1e-12)
    both = torch.cat([result["ignored"] for result in found])
    torch.testing.assert_close(both, Model(0)(*batch(0, slice(None))[0]).detach())


def _by_nccl(rank: int, folder: Path) -> None:
    os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("nccl", init_method=f"file://{folder}/ranks", rank=rank, world_size=1)
    mesh = dist.device_mesh.init_device_mesh("cuda", (1,))
    draw = torch.Generator().manual_seed(0)
    table = sparsecore.SparseEmbedding(ROWS, DIM, PADDING, density=0.4, generator=draw).cuda()
    ids, expected = batch(0, slice(None))[0][0].cuda(), table.weight.to_dense()
    sharded = shard_rows(table, mesh)
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.0)
    explorer = DynamicSparsity(sharded, optimizer, interval=1, total_steps=9)
    rows = sharded(ids)
    torch.testing.assert_close(rows, expected[ids])
    rows.square().sum().backward()
    gradient = torch.zeros_like(expected).index_add_(0, ids, 2 * rows.detach())
    torch.testing.assert_close(dense_gradient(sharded.shard), gradient * (expected != 0))
    assert torch.equal(sharded.unshard().weight.to_dense(), expected)
    optimizer.step()
    assert explorer.step() is not None
    sharded.shard.check_invariants()
    (folder / "done").touch()
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(
    not (torch.cuda.is_available() and dist.is_nccl_available()), reason="no CUDA device with nccl"
)
def test_the_only_rank_of_nccl(tmp_path: Path) -> None:
    """The same calls as with several, each of which would need a GPU of its own."""
    context = mp.spawn(_by_nccl, (tmp_path,), nprocs=1, join=False)
    ended = context.join(timeout=100)
    for unfinished in context.processes:
        unfinished.kill()
    assert ended
    assert (tmp_path / "done").exists()


def _everything(rank: int, folder: Path) -> dict[str, Any]:
    tasks: dict[str, Any] = {
        "static": _static,
        "gradient-0": lambda rank, _: _explored(rank, "gradient", 0),
        "gradient-20": lambda rank, _: _explored(rank, "gradient", 20),
        "random-0": lambda rank, _: _explored(rank, "random", 0),
        "first growth": _first_growth,
        "checkpoint": _checkpoint,
        "refused": _refused,
        "drawn": _drawn,
        "fsdp": _fsdp,
    }
    found = {}
    for name, task in tasks.items():
        try:
            found[name] = task(rank, folder)
        except Exception:
            found[name] = traceback.format_exc()
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Any]]:
    """What a task gave on every rank. One pair of processes runs all tasks: starting it takes longer than they do."""
    everything = run(_everything, tmp_path_factory.mktemp("sharded"))

    def of(name: str) -> list[Any]:
        for rank in everything:
            assert not isinstance(rank, str), rank
            assert not isinstance(rank[name], str), rank[name]
        return [rank[name] for rank in everything]

    return of
