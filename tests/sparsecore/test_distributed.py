"""Several processes: the same index sets on every rank, and what one process would have computed."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import scipy.sparse
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from processes import WORLD, process, run
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sparsecore
from sparsecore import DynamicSparsity, SparsecoreError, TopologyError, broadcast_topology
from sparsecore.topology.ranks import _hash

pytestmark = [
    pytest.mark.feature("several processes (DistributedDataParallel, gloo)"),
    pytest.mark.skipif(
        not dist.is_available() or sys.platform == "win32", reason="no torch.distributed with gloo"
    ),
]
STEPS, INTERVAL, BATCH = 100, 5, 12  # 20 explorations


class Model(nn.Module):
    """A table, a bag, a wide layer (columns of 16 bits) and a narrow one; half of a batch meets the second table."""

    def __init__(self, seed: int, encoding: str, accumulate: int | None = None) -> None:
        super().__init__()
        make: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed), "dtype": torch.float64}
        self.table = sparsecore.SparseEmbedding(50, 8, density=0.4, accumulate_rows=accumulate, **make)
        self.bag = sparsecore.SparseEmbeddingBag(30, 8, density=0.4, **make)
        self.wide = sparsecore.SparseLinear(16, 300, density=0.2, bias=False, **make)
        self.out = sparsecore.SparseLinear(300, 3, density=0.5, **make)
        for module in (self.table, self.bag, self.wide, self.out):
            module.set_encoding(encoding)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        ids, bags = batch
        x = torch.cat((self.table(ids), self.bag(bags)), 1)
        return self.out(torch.tanh(self.wide(x)))


class Others(nn.Module):
    """Hops of a graph, at some of its nodes, a convolution, pairs, a bias: each rank comes with a graph of its own."""

    def __init__(self, seed: int, encoding: str) -> None:
        super().__init__()
        make: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed), "dtype": torch.float64}
        edges = scipy.sparse.random_array((20, 30), density=0.2, rng=seed)
        self.graph = sparsecore.normalized_bipartite(edges, torch.float64)
        self.table = sparsecore.SparseEmbedding(50, 8, density=0.4, **make)
        self.items = sparsecore.SparseEmbedding(30, 8, density=0.4, **make)
        self.conv = sparsecore.SparseConv2d(1, 4, 2, density=0.5, bias=False, **make)
        self.out = sparsecore.SparseLinear(16, 3, density=0.5, bias_density=0.7, **make)
        for module in (self.table, self.items, self.conv, self.out):
            module.set_encoding(encoding)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        ids, bags = batch
        rows = sparsecore.propagate_mean(self.graph, self.table, 2, ids)
        maps = self.conv(rows.view(-1, 1, 2, 4)).flatten(1)
        pairs = sparsecore.gather_dot(self.table, ids, self.items, bags)
        return self.out(torch.tanh(torch.cat((maps, pairs), 1)))


def batches(step: int, part: slice) -> tuple[tuple[Tensor, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(50, (BATCH,), generator=generator)
    bags = torch.randint(30, (BATCH, 4), generator=generator)
    target = torch.randn(BATCH, 3, generator=generator, dtype=torch.float64)
    return (ids[part], bags[part]), target[part]


def train(
    model: nn.Module,
    part: slice,
    steps: int = STEPS,
    device: str = "cpu",
    in_parts: bool = False,
    **settings: Any,
) -> list[Any]:
    """Train; the reports. The loss is a mean, as DistributedDataParallel takes means of gradients.

    In parts: two micro-batches a step, the gradients of the first of which stay on their rank until the second.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    explorer = DynamicSparsity(
        model,
        optimizer,
        interval=INTERVAL,
        total_steps=STEPS,
        generator=torch.Generator().manual_seed(3 + part.start),
        **settings,
    )
    reports = []
    for step in range(steps):
        optimizer.zero_grad()
        middle = (part.start + part.stop) // 2
        parts = (slice(part.start, middle), slice(middle, part.stop)) if in_parts else (part,)
        for number, micro in enumerate(parts, 1):
            (ids, bags), target = batches(step, micro)
            with model.no_sync() if number < len(parts) else nullcontext():
                loss = (model((ids.to(device), bags.to(device))) - target.to(device)).square().mean()
                (loss / len(parts)).backward()
        optimizer.step()
        reports.append(explorer.step())
    return reports


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _make(seed: int, encoding: str, settings: dict[str, Any]) -> nn.Module:
    if settings.pop("others", False):
        return Others(seed, encoding)
    return Model(seed, encoding, settings.pop("accumulate", None))


def _two(rank: int, folder: Path, encoding: str, settings: dict[str, Any]) -> Any:
    model = broadcast_topology(_make(rank, encoding, settings))  # index sets of another seed on each rank
    each = BATCH // WORLD
    part = slice(rank * each, (rank + 1) * each)
    reports = train(DistributedDataParallel(model), part, **settings)
    return _state(model), [r.nnz for r in reports if r is not None]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoding", "settings"),
    [
        ("csr", {}),
        ("bitmap", {}),
        ("csr", {"grow": "random"}),
        ("csr", {"accumulate": 50}),
        ("csr", {"others": True}),
    ],
    ids=["csr", "bitmap", "random", "rows", "other layers"],
)
def test_two_processes_equal_one(encoding: str, settings: dict[str, Any], tmp_path: Path) -> None:
    found = run(_two, tmp_path, encoding, settings)
    for result in found:
        assert not isinstance(result, str), result
    (first, explored), (second, _) = found
    assert len(explored) == 20
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    settings = dict(settings)
    one = _make(0, encoding, settings)
    train(one, slice(0, BATCH), **settings)
    for name, tensor in _state(one).items():
        if tensor.is_floating_point():
            torch.testing.assert_close(first[name], tensor, rtol=1e-7, atol=1e-9, msg=name)
        else:
            assert torch.equal(first[name], tensor), name


def _in_parts(rank: int, folder: Path) -> Any:
    found = []
    for views in (False, True):
        model = broadcast_topology(Model(rank, "csr"))
        parallel = DistributedDataParallel(model, gradient_as_bucket_view=views)
        reports = train(parallel, slice(6 * rank, 6 * rank + 6), 4 * INTERVAL, in_parts=True)
        found.append((_state(model), [r.nnz for r in reports if r is not None]))
    return found


def test_gradients_that_wait_for_those_of_the_next_micro_batch(tmp_path: Path) -> None:
    """Growth is scored by all micro-batches of all ranks, those of `no_sync()` too."""
    one = Model(0, "csr")
    train(one, slice(0, BATCH), 4 * INTERVAL)
    for rank in run(_in_parts, tmp_path):
        assert not isinstance(rank, str), rank
        for state, explored in rank:
            assert len(explored) == 4
            for name, tensor in _state(one).items():
                if tensor.is_floating_point():
                    torch.testing.assert_close(state[name], tensor, rtol=1e-7, atol=1e-9, msg=name)
                else:
                    assert torch.equal(state[name], tensor), name


def _by_nccl(rank: int, folder: Path, grow: str) -> None:
    os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("nccl", init_method=f"file://{folder}/ranks", rank=rank, world_size=1)
    model = broadcast_topology(Model(0, "csr").cuda())
    reports = train(DistributedDataParallel(model), slice(0, BATCH), device="cuda", grow=grow)
    state = {name: tensor.cpu() for name, tensor in _state(model).items()}
    torch.save((state, len([r for r in reports if r is not None])), folder / "found.pt")
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(
    not (torch.cuda.is_available() and dist.is_nccl_available()), reason="no CUDA device with nccl"
)
@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_nccl_with_one_process_equals_the_cpu(grow: str, tmp_path: Path) -> None:
    """The same calls as with several, each of which would need a GPU of its own."""
    context = mp.spawn(_by_nccl, (tmp_path, grow), nprocs=1, join=False)
    ended = context.join(timeout=100)
    for unfinished in context.processes:
        unfinished.kill()
    assert ended
    state, explored = torch.load(tmp_path / "found.pt", weights_only=True)
    assert explored == 20
    one = Model(0, "csr")
    train(one, slice(0, BATCH), grow=grow)
    for name, tensor in _state(one).items():
        if tensor.is_floating_point():
            torch.testing.assert_close(state[name], tensor, rtol=1e-7, atol=1e-9, msg=name)
        else:
            assert torch.equal(state[name], tensor), name


def _unsynced(rank: int, folder: Path, what: str) -> str:
    model = Model(rank if what == "start" else 0, "csr")
    if what == "values":  # every rank trains on its own: index sets part at an exploration
        try:
            train(model, slice(6 * rank, 6 * rank + 6))
        except TopologyError as error:
            return str(error)
    else:
        try:
            DynamicSparsity(model, torch.optim.SGD(model.parameters(), lr=1.0), total_steps=9)
        except TopologyError as error:
            return str(error)
    return "no error"


@pytest.mark.parametrize("what", ["start", "values"])
def test_ranks_that_differ_stop_the_run(what: str, tmp_path: Path) -> None:
    found = run(_unsynced, tmp_path, what)
    assert found[0] == found[1]
    assert "on ranks 1 are not those of rank 0" in found[0]
    assert "broadcast_topology(model)" in found[0]
    assert "DistributedDataParallel" in found[0]


def _alone(rank: int, folder: Path) -> int:
    groups = [dist.new_group([r]) for r in range(WORLD)]
    own, other = groups[rank], groups[1 - rank]
    model = Model(rank, "csr")
    with pytest.raises(TopologyError, match="process_group does not hold this rank"):
        DynamicSparsity(
            model, torch.optim.SGD(model.parameters(), lr=1.0), total_steps=9, process_group=other
        )
    explorer = DynamicSparsity(
        model, torch.optim.SGD(model.parameters(), lr=1.0), total_steps=9, process_group=own
    )
    return int(explorer.ranks is None)


def test_a_group_of_one_trains_alone(tmp_path: Path) -> None:
    assert run(_alone, tmp_path) == [1, 1]


class Branches(nn.Module):
    """The second rank's batches leave one of the layers out."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.always = sparsecore.SparseLinear(6, 20, density=0.4, generator=draw)
        self.sometimes = sparsecore.SparseLinear(6, 20, density=0.4, generator=draw)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        return self.always(x) + self.sometimes(x) if both else self.always(x)


def _leaving_out(rank: int, folder: Path) -> Any:
    model = Branches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    explorer = DynamicSparsity(model, optimizer, interval=1, total_steps=9)
    torch.manual_seed(rank)
    for _ in range(3):
        optimizer.zero_grad()
        parallel(torch.randn(4, 6), both=rank == 0).square().sum().backward()
        optimizer.step()
        report = explorer.step()
    assert report is not None
    return {name: layer.pruned for name, layer in report.layers.items()}


def test_a_rank_may_leave_a_weight_out(tmp_path: Path) -> None:
    """Its gradient there comes from the other rank; it explores all the same."""
    first, second = run(_leaving_out, tmp_path)
    assert first == second
    assert min(first.values()) > 0


def _other_model(rank: int, folder: Path) -> str:
    density = 0.5 if rank == 0 else 0.25
    model = nn.Sequential(sparsecore.SparseLinear(8, 8, density=density))
    try:
        broadcast_topology(model)
    except TopologyError as error:
        return str(error)
    return "no error"


def test_other_models_are_refused_on_all_ranks(tmp_path: Path) -> None:
    found = run(_other_model, tmp_path)
    assert found[0] == found[1]
    assert "sparse weights of rank 1 are not those of rank 0" in found[0]


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("pairs", [False, True])
def test_sparse_gradients_are_refused(in_backward: bool, pairs: bool, tmp_path: Path) -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = sparsecore.SparseEmbedding(50, 8, sparse=True, density=0.4)

        def forward(self, ids: Tensor) -> Tensor:
            if pairs:
                return sparsecore.gather_dot(self.table, ids, self.table, ids)
            return self.table(ids)

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        inner = Scores()
        optimizer = sparsecore.optim.Adam(inner.parameters(), in_backward=in_backward)
        model, ids = DistributedDataParallel(inner), torch.tensor([1, 2])
        with pytest.raises(SparsecoreError, match="sparse=True: make the table with sparse=False"):
            model(ids)
        with torch.no_grad():
            assert torch.equal(model(ids), inner(ids))
        inner.table.sparse = False
        model(ids).sum().backward()
        ignoring = Scores()
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(ignoring, ["table.values"])
        ignoring.rest = nn.Linear(1, 1)  # DistributedDataParallel wants something to do
        DistributedDataParallel(ignoring)(ids).sum().backward()
        assert ignoring.table.values.grad is not None
        del optimizer  # until here it would have updated the table
    finally:
        dist.destroy_process_group()


def test_broadcast_needs_a_group_and_weights() -> None:
    with pytest.raises(TopologyError, match="init_process_group"):
        broadcast_topology(nn.Sequential(sparsecore.SparseLinear(4, 4, density=0.5)))


def _saving(rank: int, folder: Path, dies: bool) -> Any:
    """Go on from the checkpoint, if there is one, and save every ten steps; the second rank may die on its way."""
    torch.manual_seed(0)
    saved = folder / "checkpoint.pt"
    model = broadcast_topology(Model(rank, "csr"))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    explorer = DynamicSparsity(model, optimizer, interval=INTERVAL, total_steps=STEPS)
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        explorer.load_state_dict(state["explorer"])
    wrapped = DistributedDataParallel(model)
    part = slice(6 * rank, 6 * rank + 6)
    for step in range(explorer.steps, 40):
        inputs, target = batches(step, part)
        optimizer.zero_grad()
        (wrapped(inputs) - target).square().mean().backward()
        optimizer.step()
        explorer.step()
        if rank == 0 and explorer.steps % 10 == 0:
            parts = {"model": model, "optimizer": optimizer, "explorer": explorer}
            torch.save({name: p.state_dict() for name, p in parts.items()}, saved.with_suffix(".new"))
            saved.with_suffix(".new").rename(saved)
        if dies and rank == 1 and step == 33:
            os._exit(9)
    return explorer.steps, _state(model)


@pytest.mark.slow
def test_a_killed_rank_leaves_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killed.mkdir()
    whole.mkdir()
    with pytest.raises(mp.ProcessExitedException):
        mp.spawn(process, (_saving, killed, True), nprocs=WORLD)
    (killed / "ranks").unlink(missing_ok=True)
    assert torch.load(killed / "checkpoint.pt", weights_only=True)["explorer"]["steps"] == 30
    (steps, resumed), (_, other) = run(_saving, killed, False)
    (_, expected), _ = run(_saving, whole, False)
    assert steps == 40
    for name, tensor in expected.items():
        assert torch.equal(tensor, resumed[name]), name
        assert torch.equal(tensor, other[name]), name


def test_hashes_tell_index_sets_apart() -> None:
    layer = sparsecore.SparseLinear(8, 8, density=0.5)
    same = sparsecore.SparseLinear(8, 8, density=0.5)
    same.load_state_dict(layer.state_dict())
    assert _hash(layer) == _hash(same)
    seen = {int(_hash(sparsecore.SparseLinear(8, 8, density=0.5))) for _ in range(200)}
    assert len(seen) == 200
    crow, col = same.crow_indices.clone(), same.col_indices.clone()
    crow[1] += 1  # one nonzero in the row above
    same.set_encoding("csr")
    layer.set_encoding("csr")
    before = _hash(layer)
    same.crow_indices.copy_(crow)
    same.col_indices.copy_(col)
    assert _hash(same) != before
