"""What growth is scored by: the gradient of the step that was taken, and nothing else that runs the same operators."""

from __future__ import annotations

import copy
import gc
import pickle
import tempfile
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from strategies import of_numba
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparsecore
from sparsecore import DynamicSparsity, SparseLinear, SparseModule, TopologyError

SIZE = 12


def make(model: nn.Module | None = None) -> tuple[nn.Module, torch.optim.Optimizer, DynamicSparsity]:
    torch.manual_seed(0)
    if model is None:
        model = nn.Sequential(nn.Linear(SIZE, 16), nn.Tanh(), nn.Linear(16, SIZE)).double()
    sparsecore.sparsify(model, 0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(3)
    return (
        model,
        optimizer,
        DynamicSparsity(model, optimizer, interval=1, total_steps=50, generator=generator),
    )


def batch(seed: int = 1) -> Tensor:
    return torch.randn(9, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def recorded(model: nn.Module) -> list[Tensor]:
    """The dense gradients that the next exploration would score by."""
    modules = [m for m in model.modules() if isinstance(m, SparseModule)]
    return [m._recorder.block(slice(0, m.shape[0])) for m in modules if m._recorder is not None]


def expected(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> list[Tensor]:
    dense = sparsecore.densify(copy.deepcopy(model))
    for parameter in dense.parameters():
        parameter.grad = None
    loss(dense).backward()
    return [m.weight.grad for m in dense.modules() if isinstance(m, nn.Linear) and m.weight.grad is not None]


def same(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> None:
    found, right = recorded(model), expected(model, loss)
    assert len(found) == len(right) == 2
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b)


def loss_of(x: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: F.mse_loss(model(x), x.flip(0))


def test_adversarial_inputs_are_not_counted() -> None:
    model, _, _explorer = make()
    x = batch().requires_grad_()
    for _ in range(2):
        (grad,) = torch.autograd.grad(10 * loss_of(x)(model), x)
        x = (x + 0.1 * grad.sign()).detach().requires_grad_()
    assert all(m._recorder.uses == [] for m in model.modules() if isinstance(m, SparseModule) and m._recorder)
    loss_of(x.detach())(model).backward()
    same(model, loss_of(x.detach()))


def test_a_gradient_penalty_counts_once() -> None:
    model, _, _explorer = make()
    x = batch()

    def penalized(model: nn.Module) -> Tensor:
        given = x.clone().requires_grad_()
        loss = loss_of(given)(model)
        (grad,) = torch.autograd.grad(loss, given, create_graph=True)
        return loss + grad.square().sum()

    penalized(model).backward()
    same(model, penalized)


@pytest.mark.parametrize("to_none", [True, False])
def test_a_step_that_was_thrown_away_is_not_counted(to_none: bool) -> None:
    model, optimizer, explorer = make()
    (loss_of(batch(5))(model) * float("inf")).backward()  # a scaler skips this step
    optimizer.zero_grad(set_to_none=to_none)
    loss_of(batch())(model).backward()
    same(model, loss_of(batch()))
    optimizer.step()
    assert explorer.step() is not None


def test_micro_batches_add_up_also_from_one_buffer() -> None:
    model, _, _explorer = make()
    buffer = torch.empty_like(batch())
    for seed in range(3):
        buffer.copy_(batch(seed))
        loss_of(buffer)(model).backward()
    same(model, lambda dense: sum(loss_of(batch(seed))(dense) for seed in range(3)))


def test_tensors_that_are_saved_elsewhere() -> None:
    model, _, _explorer = make()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        loss = loss_of(batch())(model)
    loss.backward()
    same(model, loss_of(batch()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_parts_beside_others(reentrant: bool) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(SIZE, SIZE).double(), nn.Linear(SIZE, SIZE).double()
            self.recompute = True

        def forward(self, x: Tensor) -> Tensor:
            inner = self._inner(x)
            if self.recompute:
                inner = checkpoint(self._inner, x.clone().requires_grad_(), use_reentrant=reentrant)
            return self.second(self.first(inner))  # both are used inside and outside

        def _inner(self, x: Tensor) -> Tensor:
            return torch.tanh(self.second(torch.tanh(self.first(x))))

    model, _, _explorer = make(Twice())
    loss_of(batch())(model).backward()
    same(model, loss_of(batch()))


def test_an_index_set_that_moves_in_memory_is_still_watched() -> None:
    for change in (
        lambda model: model[0].set_encoding("csr" if model[0].encoding == "bitmap" else "bitmap"),
        lambda model: model.share_memory(),
        lambda model: model._apply(lambda t: t.clone()),  # as .to(device) does
    ):
        model, optimizer, explorer = make()
        change(model)
        loss_of(batch())(model).backward()
        same(model, loss_of(batch()))
        optimizer.step()
        report = explorer.step()
        assert report is not None
        assert all(layer.pruned for layer in report.layers.values())


def test_copies_and_pickles_go_on_alike() -> None:
    runs = []
    for way in (None, copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))):
        run = make() if way is None else way(make())
        model, optimizer, explorer = run
        for seed in range(3):
            optimizer.zero_grad()
            loss_of(batch(seed))(model).backward()
            optimizer.step()
            report = explorer.step()
            assert report is not None
            assert all(layer.pruned for layer in report.layers.values())
        runs.append([m.pattern.to_mask() for m in model.modules() if isinstance(m, SparseModule)])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_nothing_is_kept_for_an_explorer_that_is_gone() -> None:
    model, optimizer, explorer = make()
    for seed in range(5):  # nobody explores
        optimizer.zero_grad()
        loss_of(batch(seed))(model).backward()
    recorders = [m._recorder for m in model.modules() if isinstance(m, SparseModule)]
    assert all(recorder is not None and len(recorder.uses) == 1 for recorder in recorders)
    del explorer
    gc.collect()
    loss_of(batch())(model).backward()
    assert all(recorder is not None and recorder.uses == [] for recorder in recorders)
    again = DynamicSparsity(model, optimizer, interval=1, total_steps=9)
    again = DynamicSparsity(
        model, optimizer, interval=1, total_steps=9
    )  # the first one ends after this one began
    optimizer.zero_grad()
    loss_of(batch())(model).backward()
    same(model, loss_of(batch()))
    assert again.step() is not None


def test_exploring_before_the_backward_pass_is_refused() -> None:
    model, optimizer, explorer = make()
    loss_of(batch())(model).backward()
    optimizer.step()
    late = loss_of(batch())(model)
    explorer.step()
    with pytest.raises(
        RuntimeError, match=r"changed between a forward pass and its backward|inplace operation"
    ):
        late.backward()


def test_a_weight_that_is_read_past_its_module_is_named() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = SparseLinear(SIZE, SIZE, density=0.5, dtype=torch.float64)
            self.outer = SparseLinear(SIZE, SIZE, density=0.5, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(F.linear(x, self.inner.weight))

    model = Reader()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    explorer = DynamicSparsity(model, optimizer, interval=1, total_steps=9)
    model(batch()).sum().backward()
    with pytest.warns(UserWarning, match=r"no gradient has come to inner .*exclude="):
        explorer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.zero_grad()
        model(batch()).sum().backward()
        explorer.step()  # said once


def test_optimizers_that_do_not_fit() -> None:
    layer = SparseLinear(SIZE, SIZE, density=0.5)
    with pytest.raises(
        TopologyError, match=r"expected a torch.optim.Optimizer or a list of them, got NoneType"
    ):
        DynamicSparsity(layer, None, interval=1, total_steps=9)  # type: ignore[arg-type]
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(TopologyError, match="does not hold the values of the model: build it"):
        DynamicSparsity(layer, other, interval=1, total_steps=9)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    explorer = DynamicSparsity(layer, optimizer, interval=1, total_steps=9)
    layer.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
    layer(torch.randn(3, SIZE)).sum().backward()
    with pytest.raises(TopologyError, match=r"load_state_dict\(assign=True\)"):
        explorer.step()


def test_an_explorer_can_be_saved_whole() -> None:
    _, _, explorer = make()
    with tempfile.TemporaryFile() as file:
        torch.save(explorer, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    assert loaded.timetable.drop_fraction(7) == explorer.timetable.drop_fraction(7)


def _ten_weights(sparse):
    """Rows 50 to 59 of 100 hold one weight each."""
    weight = torch.zeros(100, 4)
    weight[50:60, 0] = torch.arange(1.0, 11.0)
    table = sparsecore.SparseEmbedding.from_sparse(weight.to_sparse_csr())
    table.sparse = sparse
    return table


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("cut", [False, True])
def test_a_micro_batch_whose_gradient_is_zero_at_stored_places_counts(sparse, cut):
    """Row 1 has the largest gradient, and stores nothing."""
    table = _ten_weights(sparse=sparse)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.0)
    explorer = sparsecore.DynamicSparsity(
        table, optimizer, interval=1, total_steps=5, drop_fraction=0.3, schedule="constant"
    )
    losses = (100 * table(torch.tensor([1, 2]))).sum(), table(torch.tensor([55])).sum()
    for loss in losses if cut else [losses[0] + losses[1]]:
        loss.backward()
    optimizer.step()
    explorer.step()
    assert table.pattern.to_mask()[1].sum() == 3


@of_numba
def test_all_updates_in_the_backward_passes_of_a_step_count():
    table = _ten_weights(sparse=True)
    optimizer = sparsecore.optim.SGD(table.parameters(), lr=0.0, in_backward=True)
    explorer = sparsecore.DynamicSparsity(
        table, optimizer, interval=1, total_steps=5, drop_fraction=0.3, schedule="constant"
    )
    (100 * table(torch.tensor([1, 2]))).sum().backward()
    table(torch.tensor([55])).sum().backward()
    explorer.step()
    assert table.pattern.to_mask()[1].sum() == 3


def test_gradients_are_summed_only_while_an_exploration_is_to_come():
    table = sparsecore.SparseEmbedding(100, 4, density=0.3, accumulate_rows=50)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)

    def train(explorer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            table(torch.arange(5)).sum().backward()
            optimizer.step()
            if explorer is not None:
                explorer.step()
        return table.accumulator.ids.numel()

    explorer = sparsecore.DynamicSparsity(
        table, optimizer, interval=2, total_steps=8, stop_fraction=0.5, drop_fraction=0.2
    )
    assert [train(explorer, 1) for _ in range(6)] == [5, 0, 5, 0, 0, 0]
    for options in ({"interval": None}, {"interval": 2, "total_steps": 8, "stop_fraction": 0.0}):
        assert train(sparsecore.DynamicSparsity(table, optimizer, **options), 3) == 0
    explorer = sparsecore.DynamicSparsity(table, optimizer, interval=9, total_steps=90)
    assert train(explorer, 1) == 5
    # One that another has taken the place of takes nothing from it; when the last has gone, nobody looks.
    explorer = sparsecore.DynamicSparsity(table, optimizer, interval=9, total_steps=90)
    table.accumulator.reset()
    assert train(None, 1) == 5
    table.accumulator.reset()
    del explorer
    assert train(None, 1) == 0


def test_a_table_that_is_looked_up_and_multiplied_by_learns_from_both() -> None:
    table = sparsecore.SparseEmbedding(14, SIZE, density=0.3, dtype=torch.float64)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
    explorer = DynamicSparsity(table, optimizer, interval=1, total_steps=9)
    ids = torch.tensor([3, 5, 3])
    sparsecore.ops.spmm(*table.operands, table(ids).tanh()).square().sum().backward()
    weight = table.pattern.to_dense(table.values.detach()).requires_grad_()
    F.linear(weight[ids].tanh(), weight).square().sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(recorded(table), [weight.grad])
    torch.testing.assert_close(table.values.grad, weight.grad.view(-1)[table.pattern.positions()])
    optimizer.step()
    report = explorer.step()
    assert report is not None
    assert report.pruned > 0
