"""The explorer: exact budgets, what moves and what stays, refusals, saving and continuing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse
import torch
from devices import devices
from torch import Tensor, nn
from torch.nn.utils import prune

import sparsecore
from sparsecore import DynamicSparsity, SparseEmbedding, SparseLinear, TopologyError
from sparsecore.encoding import encode
from sparsecore.nn.base import SparseModule
from sparsecore.pattern import Pattern
from sparsecore.topology.rewrite import Exchange, rewrite
from sparsecore.topology.schedule import make_schedule

pytestmark = pytest.mark.feature("explorations")


def layer(rows: int = 12, cols: int = 10, density: float = 0.3, seed: int = 0) -> SparseLinear:
    return SparseLinear(
        cols, rows, bias=False, density=density, generator=torch.Generator().manual_seed(seed)
    )


def one_step(module: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    module(x).square().sum().backward()
    optimizer.step()


def test_prunes_the_smallest_and_grows_the_largest_gradient() -> None:
    module = layer()
    optimizer = torch.optim.SGD(
        module.parameters(), lr=0.0
    )  # weights stand still: every decision can be checked
    explorer = DynamicSparsity(
        module, optimizer, interval=1, drop_fraction=0.25, schedule="constant", total_steps=9
    )
    x = torch.randn(7, 10)
    before = module.pattern.to_dense(module.values.detach())
    stored = module.pattern.to_mask()
    dense = before.clone().requires_grad_()
    (x @ dense.T).square().sum().backward()
    assert dense.grad is not None
    k = math.ceil(0.25 * module.nnz)
    magnitudes = before[stored].abs().sort().values
    one_step(module, optimizer, x)
    report = explorer.step()
    assert report is not None
    pruned = stored & (before.abs() <= magnitudes[k - 1])
    candidates = dense.grad.abs().masked_fill(stored & ~pruned, -1)
    threshold = candidates.flatten().sort(descending=True).values[k - 1]
    expected = (stored & ~pruned) | (candidates >= threshold)
    assert torch.equal(module.pattern.to_mask(), expected)
    after = module.pattern.to_dense(module.values.detach())
    assert torch.equal(
        after[expected & stored], before[expected & stored]
    )  # survivors and regrown keep their value
    assert not after[expected & ~stored].any()  # new ones start at zero
    assert (report.pruned, report.grown, report.nnz) == (k, k, module.nnz)
    assert report.regrown == int((expected & pruned).sum())
    assert report.ever_active == pytest.approx(float((stored | expected).float().mean()))


def test_it_says_which_steps_explore() -> None:
    module = layer()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    explorer = DynamicSparsity(module, optimizer, interval=3, total_steps=9, stop_fraction=0.7)
    said, done = [], []
    for _ in range(10):
        said.append(explorer.explores_next)
        one_step(module, optimizer, torch.randn(7, 10))
        done.append(explorer.step() is not None)
    assert said == done == [step in (3, 6) for step in range(1, 11)]


@pytest.mark.parametrize(
    ("make", "fresh"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), {"momentum_buffer": 0.0}),
        (lambda p: torch.optim.Adam(p, lr=0.1), {"exp_avg": 0.0, "exp_avg_sq": 0.0}),
        (lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True), {"exp_avg": 0.0, "max_exp_avg_sq": 0.0}),
        (lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.25), {"sum": 0.25}),
        (lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9), {"square_avg": 0.0, "momentum_buffer": 0.0}),
    ],
    ids=["sgd", "adam", "adamw", "adagrad", "rmsprop"],
)
def test_state_moves_with_its_weight(
    make: Callable[..., torch.optim.Optimizer], fresh: dict[str, float]
) -> None:
    module = layer()
    optimizer = make(module.parameters())
    parameter = module.values
    one_step(module, optimizer, torch.randn(7, 10))
    state = optimizer.state[parameter]
    identity = {key: id(value) for key, value in state.items()}
    dense = {key: module.pattern.to_dense(state[key]) for key in fresh}
    values, gradient = module.pattern.to_dense(parameter.detach()), module.pattern.to_dense(parameter.grad)
    stored = module.pattern.to_mask()
    survivors = torch.arange(module.nnz) % 3 != 0
    leaving = int((~survivors).sum())
    new = torch.nonzero(~stored.view(-1)).view(-1)[:leaving]
    kept = torch.zeros(stored.numel(), dtype=torch.bool)
    kept[module.pattern.positions()[survivors]] = True
    kept[new] = True
    pattern = Pattern.from_mask(kept.view(stored.shape))
    index = (pattern.crow, pattern.col)
    if module.encoding == "bitmap":
        index = (encode(*index, pattern.shape[1]), None)
    buffers = [id(t) for t in module.index]
    assert rewrite(module, Exchange(index, leaving), [optimizer]) == leaving
    module.check_invariants()
    assert buffers == [id(t) for t in module.index]
    assert module.values is parameter
    assert identity == {key: id(value) for key, value in state.items()}
    now = module.pattern.to_mask()
    stay, begun = now & stored, now & ~stored
    assert int(begun.sum()) == leaving
    for key, initial in fresh.items():
        moved = module.pattern.to_dense(state[key])
        assert torch.equal(moved[stay], dense[key][stay])
        assert bool((moved[begun] == initial).all())
    assert torch.equal(module.pattern.to_dense(parameter.detach())[stay], values[stay])
    assert torch.equal(module.pattern.to_dense(parameter.grad)[stay], gradient[stay])
    assert not module.pattern.to_dense(parameter.grad)[begun].any()


def test_budget_does_not_drift() -> None:
    """The authors' code loses weights where fewer rows have a gradient than must grow (49.6 to 28.0 % in 20 rounds)."""
    table = SparseEmbedding(500, 16, density=0.5, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(table.parameters(), lr=1e-3)
    explorer = DynamicSparsity(table, optimizer, interval=1, drop_fraction=0.5, total_steps=20)
    assert table.nnz == 4000
    for step in range(20):
        optimizer.zero_grad()
        table(
            torch.arange(step, step + 8)
        ).square().sum().backward()  # 8 of 500 rows: 128 positions for 2000 places
        optimizer.step()
        report = explorer.step()
        assert report is not None
        table.check_invariants()
        assert report.nnz == table.pattern.nnz == int(table.pattern.to_mask().sum()) == 4000
        assert report.grown == report.pruned
        assert table.density == 0.5


def test_random_growth_fills_where_gradients_end() -> None:
    table = SparseEmbedding(200, 8, padding_idx=3, density=0.2, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
    explorer = DynamicSparsity(table, optimizer, interval=1, drop_fraction=0.9, total_steps=10)
    stored = table.pattern.to_mask()
    optimizer.zero_grad()
    table(torch.tensor([3, 5, 9])).sum().backward()
    optimizer.step()
    explorer.step()
    now = table.pattern.to_mask()
    assert bool(now[5].all())
    assert bool(now[9].all())  # every position with a gradient is grown first
    assert not now[3].any()  # never the padding row
    elsewhere = now & ~stored
    elsewhere[[5, 9]] = False
    assert int(elsewhere.any(1).sum()) > 50  # the rest is spread over all rows


@pytest.mark.parametrize("device", devices())
def test_accumulated_rows_decide_growth(device: str) -> None:
    table = SparseEmbedding(
        100, 8, density=0.2, accumulate_rows=20, generator=torch.Generator().manual_seed(0)
    ).to(device)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.0)
    explorer = DynamicSparsity(
        table, optimizer, interval=5, drop_fraction=0.2, schedule="constant", total_steps=10
    )
    for step in range(5):  # five steps, four rows each; the last alone would know rows 16 to 19 only
        optimizer.zero_grad()
        (table(torch.arange(4 * step, 4 * step + 4, device=device)) * (5 - step)).sum().backward()
        optimizer.step()
        stored = table.pattern.to_mask()
        report = explorer.step()
    assert report is not None
    new = table.pattern.to_mask() & ~stored
    assert bool(new[:4].any())  # the first step's rows, whose gradients were the largest
    assert not new[16:].any()
    assert table.accumulator is not None
    assert not table.accumulator.uses  # used up


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("sparse", [False, True])
def test_accumulated_rows_of_scores_of_pairs(sparse: bool, device: str) -> None:
    """Both sides of `gather_dot`, over several steps, against the dense gradients of the dense tables."""
    make: dict = {"density": 0.3, "accumulate_rows": 9, "sparse": sparse, "dtype": torch.float64}
    tables = [SparseEmbedding(9, 4, **make), SparseEmbedding(7, 4, **make)]
    model = nn.ModuleList(tables).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    explorer = DynamicSparsity(model, optimizer, interval=9, total_steps=90)
    dense = [t.to_dense().weight.detach().requires_grad_() for t in tables]
    for step in range(3):
        a = torch.tensor([1, 3, 1], device=device)
        b = torch.tensor([[0, 1], [2, 2], [step, 6]], device=device)
        sparsecore.gather_dot(tables[0], a, tables[1], b).sin().sum().backward()
        (dense[0][a].unsqueeze(1) * dense[1][b]).sum(2).sin().sum().backward()
    for table, weight in zip(tables, dense, strict=True):
        sums = table.accumulator
        assert sums is not None
        assert weight.grad is not None
        whole = torch.zeros_like(weight.grad)
        whole[sums.rows()] = sums.block(sums.rows())
        torch.testing.assert_close(whole, weight.grad)
    assert explorer.accumulators().keys() == {"0", "1"}


def test_micro_batches_add_up() -> None:
    a, b = layer(), layer()
    x = torch.randn(8, 10)
    for module, parts in ((a, [x]), (b, list(x.split(2)))):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
        explorer = DynamicSparsity(module, optimizer, interval=1, drop_fraction=0.4, total_steps=4)
        for part in parts:
            module(part).square().sum().backward()
        optimizer.step()
        explorer.step()
    assert torch.equal(a.pattern.positions(), b.pattern.positions())


@pytest.mark.parametrize("where", ["gradient", "weights"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite_is_refused_before_anything_is_written(where: str, bad: float) -> None:
    good, module = layer(seed=1, rows=10), layer(seed=2, rows=10)
    model = nn.Sequential(good, module)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    explorer = DynamicSparsity(model, optimizer, interval=2, drop_fraction=0.5, total_steps=10)
    one_step(model, optimizer, torch.randn(4, 10))
    explorer.step()
    one_step(model, optimizer, torch.randn(4, 10))
    if where == "gradient":
        model(torch.full((1, 10), bad)).sum().backward()  # values stay finite: no step follows
        model.zero_grad()
    else:
        with torch.no_grad():
            module.values[3] = bad
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), explorer.generator.get_state()))
    with pytest.raises(TopologyError, match=r"nothing was rewritten.*[Ll]ower the learning rate"):
        explorer.step()
    now = (model.state_dict(), optimizer.state_dict(), explorer.generator.get_state())
    torch.testing.assert_close(now, saved, rtol=0, atol=0, equal_nan=True)
    # The run can go on: the next exploration works.
    with torch.no_grad():
        module.values.nan_to_num_(0.0, 0.0, 0.0)
    for _ in range(2):
        one_step(model, optimizer, torch.randn(4, 10))
        report = explorer.step()
    assert report is not None
    assert report.pruned > 0


def test_continues_bit_for_bit_after_saving() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(6, 10) for _ in range(12)]

    def build() -> tuple[nn.Module, torch.optim.Optimizer, DynamicSparsity]:
        model = nn.Sequential(layer(10, 10, seed=4), nn.Tanh(), layer(9, 10, seed=5))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        generator = torch.Generator().manual_seed(8)
        explorer = DynamicSparsity(
            model, optimizer, interval=3, total_steps=12, grow="random", generator=generator
        )
        return model, optimizer, explorer

    whole = build()
    for x in batches:
        one_step(whole[0], whole[1], x)
        whole[2].step()
    first = build()
    for x in batches[:5]:
        one_step(first[0], first[1], x)
        first[2].step()
    states = [copy.deepcopy(part.state_dict()) for part in first]
    second = build()
    for part, state in zip(second, states, strict=True):
        part.load_state_dict(state)
    for x in batches[5:]:
        one_step(second[0], second[1], x)
        second[2].step()
    torch.testing.assert_close(whole[0].state_dict(), second[0].state_dict(), rtol=0, atol=0)
    assert {n: h.fraction for n, h in whole[2].history.items()} == {
        n: h.fraction for n, h in second[2].history.items()
    }


def test_state_of_another_run_is_refused() -> None:
    module = layer()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    explorer = DynamicSparsity(module, optimizer, interval=3, total_steps=12)
    other = DynamicSparsity(module, optimizer, interval=4, total_steps=12)
    with pytest.raises(TopologyError, match="interval=3"):
        other.load_state_dict(explorer.state_dict())
    model = nn.Sequential(layer())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TopologyError, match="the saved explorer has weights"):
        DynamicSparsity(model, optimizer, interval=3, total_steps=12).load_state_dict(explorer.state_dict())


def test_schedules() -> None:
    cosine = make_schedule("cosine", 0.5, 0.005, 100)
    assert cosine(0) == 0.5
    assert cosine(50) == pytest.approx(0.2525)
    assert cosine(100) == pytest.approx(0.005)
    assert cosine(1000) == pytest.approx(0.005)
    assert make_schedule("linear", 0.4, 0.0, 10)(5) == pytest.approx(0.2)
    assert make_schedule("constant", 0.3, 0.0, 10)(9) == pytest.approx(0.3)


def test_interval_and_end() -> None:
    module = layer()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    explorer = DynamicSparsity(module, optimizer, interval=4, total_steps=40, stop_fraction=0.5)
    explored = []
    for step in range(1, 41):
        one_step(module, optimizer, torch.randn(3, 10))
        if explorer.step() is not None:
            explored.append(step)
    assert explored == [4, 8, 12, 16, 20]


def test_without_exploration_nothing_is_recorded() -> None:
    module = layer()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    explorer = DynamicSparsity(module, optimizer, interval=3, total_steps=9)
    assert module._recorder is None
    for step in range(1, 7):
        one_step(module, optimizer, torch.randn(3, 10))
        explorer.step()
        assert (module._recorder is not None) == ((step + 1) % 3 == 0)
    static = DynamicSparsity(module, optimizer, interval=None)
    assert static.step() is None


def test_frozen_full_and_unused_weights_stay() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.frozen = layer(10, 10), layer(10, 10), layer(10, 10)
            self.full = layer(10, 10, density=1.0)
            self.frozen.values.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.full(self.frozen(self.used(x)))

    model = Model()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    explorer = DynamicSparsity(model, optimizer, interval=1, total_steps=5)
    before = {
        name: m.pattern.positions() for name, m in model.named_children() if isinstance(m, SparseModule)
    }
    one_step(model, optimizer, torch.randn(5, 10))
    with pytest.warns(UserWarning, match="no gradient has come to unused") as said:
        report = explorer.step()
    assert said[0].filename == __file__
    one_step(model, optimizer, torch.randn(5, 10))
    explorer.step()  # said once
    assert report is not None
    now = {name: model.get_submodule(name).pattern.positions() for name in before}  # type: ignore[union-attr, operator]
    moved = {name for name in before if not torch.equal(now[name], before[name])}
    assert moved == {"used"}
    assert {name for name, part in report.layers.items() if part.pruned} == {"used"}


def test_a_gradient_that_came_unseen_is_refused() -> None:
    module = layer()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    explorer = DynamicSparsity(module, optimizer, interval=1, total_steps=9)
    one_step(module, optimizer, torch.randn(7, 10))
    assert explorer.step() is not None
    before = module.pattern
    module.values.grad = torch.randn(module.nnz)  # as the replay of a CUDA graph leaves it
    with pytest.raises(TopologyError, match="CUDA graph"):
        explorer.step()
    assert torch.equal(module.pattern.positions(), before.positions())
    module.values.grad.zero_()  # unused, and zero_grad(set_to_none=False)
    with pytest.warns(UserWarning, match="no gradient has come to the model"):
        report = explorer.step()
    assert report is not None
    assert report.layers[""].pruned == 0
    one_step(module, optimizer, torch.randn(7, 10))
    report = explorer.step()
    assert report is not None
    assert report.layers[""].pruned > 0


def test_evaluation_between_steps_leaves_no_trace() -> None:
    module = layer()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    DynamicSparsity(module, optimizer, interval=1, total_steps=5)
    assert module._recorder is not None
    module.eval()
    module(torch.randn(3, 10))
    with torch.no_grad():
        module(torch.randn(3, 10))
    assert module._recorder.uses == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interval": 0, "total_steps": 5}, "interval must be a positive whole number"),
        ({"interval": 2.0, "total_steps": 5}, "interval must be a positive whole number .* got 2.0"),
        ({"interval": 5}, "total_steps is needed"),
        ({"interval": 5, "total_steps": 0}, "total_steps must be at least 1"),
        ({"total_steps": 5, "drop_fraction": 1.5}, r"drop_fraction must be in \[0, 1\], got 1.5"),
        (
            {"total_steps": 5, "schedule": "cos"},
            "schedule must be one of cosine, linear, constant, got 'cos'",
        ),
        ({"total_steps": 5, "grow": "magic"}, "grow must be"),
        ({"total_steps": 5, "stop_fraction": -1}, "stop_fraction must be"),
        ({"total_steps": 5, "stop_fraction": None}, "stop_fraction must be a number, got None"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    module = layer()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(TopologyError, match=message):
        DynamicSparsity(module, optimizer, **settings)


def test_a_run_too_short_to_explore_is_told() -> None:
    module = layer()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.warns(
        UserWarning, match="nothing will be explored: interval is 100, and the run has 99"
    ) as told:
        DynamicSparsity(module, optimizer, total_steps=99)
    assert told[0].filename == __file__
    DynamicSparsity(module, optimizer, total_steps=100)
    DynamicSparsity(module, optimizer, interval=None)
    DynamicSparsity(module, optimizer, interval=10, total_steps=100, stop_fraction=0.0)  # asked for


def test_bad_models() -> None:
    dense = nn.Linear(3, 3)
    with pytest.raises(TopologyError, match="no sparse weight; call sparsify"):
        DynamicSparsity(dense, torch.optim.SGD(dense.parameters(), lr=0.1), total_steps=5)
    with pytest.raises(TopologyError, match=r"argument must be the model, a nn\.Module, got SGD"):
        DynamicSparsity(torch.optim.SGD(dense.parameters(), lr=0.1), dense, total_steps=5)  # type: ignore[arg-type]
    model = nn.Sequential(nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # too early: these parameters are about to go
    sparsecore.sparsify(model, 0.5)
    with pytest.raises(TopologyError, match=r"does not hold the values of 0: build it .* after sparsify\(\)"):
        DynamicSparsity(model, optimizer, total_steps=5)
    with pytest.raises(TopologyError, match="masks name no parameter"):
        sparsecore.MaskedSparsity(dense, optimizer, {"nope": torch.ones(3, 3)}, total_steps=5)
    for shape in ((3, 2), (1, 3)):
        with pytest.raises(TopologyError, match=r"mask of weight must have its shape \(3, 3\)"):
            sparsecore.MaskedSparsity(dense, optimizer, {"weight": torch.ones(shape)}, total_steps=5)
    with pytest.raises(TopologyError, match="either masks or density"):
        sparsecore.MaskedSparsity(dense, optimizer, total_steps=5)


def test_a_copied_matrix_outlives_an_exploration() -> None:
    module = layer()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    explorer = DynamicSparsity(module, optimizer, interval=1, total_steps=9)
    shared, copied = module.pattern.to_scipy(module.values), module.pattern.to_scipy(module.values).copy()
    weight, before = module.weight.clone(), module.pattern.to_dense(module.values.detach())
    one_step(module, optimizer, torch.randn(3, 10))
    explorer.step()
    assert np.array_equal(shared.data, module.values.detach().numpy())
    assert not np.array_equal(shared.toarray(), module.pattern.to_dense(module.values.detach()).numpy())
    assert np.array_equal(copied.toarray(), before.numpy())
    assert torch.equal(weight.to_dense(), before)


def test_values_that_are_computed_later_are_refused() -> None:
    module = layer()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    explorer = DynamicSparsity(module, optimizer, interval=2, total_steps=9)
    prune.l1_unstructured(module, "values", amount=0.5)
    one_step(module, optimizer, torch.randn(3, 10))
    assert explorer.step() is None
    one_step(module, optimizer, torch.randn(3, 10))
    with pytest.raises(TopologyError, match=r"does not hold the values.*torch\.nn\.utils\.prune"):
        explorer.step()


def test_several_optimizers() -> None:
    model = nn.Sequential(layer(10, 10, seed=1), layer(10, 10, seed=2))
    optimizers = [torch.optim.Adam(model[0].parameters()), torch.optim.SGD(model[1].parameters(), lr=0.1)]
    with pytest.raises(TopologyError, match=r"not hold the values of 1: .* of several optimizers give all"):
        DynamicSparsity(model, optimizers[0], interval=1, total_steps=5)
    explorer = DynamicSparsity(model, optimizers, interval=1, total_steps=5)
    model(torch.randn(4, 10)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    report = explorer.step()
    assert report is not None
    assert report.nnz == sum(m.nnz for m in model)  # type: ignore[misc]


def test_a_step_that_a_scaler_skips_does_not_spoil_accumulated_rows() -> None:
    table = SparseEmbedding(
        50, 8, density=0.3, accumulate_rows=10, generator=torch.Generator().manual_seed(0)
    )
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
    explorer = DynamicSparsity(table, optimizer, interval=2, total_steps=20)
    reports = []
    for step in range(6):
        optimizer.zero_grad()
        factor = math.inf if step == 1 else 1.0
        (table(torch.tensor([step, step + 1])) * factor).sum().backward()
        if step != 1:  # what torch.amp.GradScaler does with such a gradient
            optimizer.step()
        reports.append(explorer.step())
    assert [r is not None for r in reports] == [False, True, False, True, False, True]
    assert all(r is None or r.pruned > 0 for r in reports)


@pytest.mark.parametrize("masked", [False, True])
def test_propagation_never_grows_the_padding_row(masked: bool) -> None:
    graph = sparsecore.Graph.from_scipy(scipy.sparse.csr_array(np.ones((6, 6))))
    table = SparseEmbedding(6, 8, padding_idx=2, density=0.3, generator=torch.Generator().manual_seed(0))
    model: nn.Module = table
    options: dict = {"interval": 1, "total_steps": 9, "drop_fraction": 0.5}
    if masked:
        model = table.to_dense()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        masks = {"weight": table.pattern.to_mask()}
        explorer: object = sparsecore.MaskedSparsity(model, optimizer, masks, **options)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        explorer = DynamicSparsity(model, optimizer, **options)
    for _ in range(4):
        optimizer.zero_grad()
        sparsecore.propagate_mean(graph, model, 1).square().sum().backward()  # type: ignore[arg-type]
        optimizer.step()
        explorer.step()  # type: ignore[attr-defined]
    if masked:
        assert not explorer.masks["weight"][2].any()  # type: ignore[attr-defined]
    else:
        table.check_invariants()


def test_rprop_begins_anew_and_lbfgs_is_refused() -> None:
    module = layer()
    optimizer = torch.optim.Rprop(module.parameters(), lr=0.01)
    explorer = DynamicSparsity(module, optimizer, interval=1, total_steps=5)
    one_step(module, optimizer, torch.randn(5, 10))
    report = explorer.step()
    assert report is not None
    assert report.grown > report.regrown
    assert bool((optimizer.state[module.values]["step_size"] > 0).all())
    with pytest.raises(TopologyError, match="LBFGS"):
        DynamicSparsity(module, torch.optim.LBFGS(module.parameters()), interval=1, total_steps=5)


def test_exploration_of_a_bag_is_counted() -> None:
    bag = sparsecore.SparseEmbeddingBag(20, 8, density=0.3, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(bag.parameters(), lr=0.1)
    explorer = DynamicSparsity(bag, optimizer, interval=1, total_steps=5)
    bag(torch.tensor([[1, 2, 3], [3, 4, 5]])).sum().backward()
    optimizer.step()
    counter = sparsecore.MacCounter()
    with counter.phase("exploration"):
        explorer.step()
    assert counter.macs["exploration"] == 6 * 8  # six looked-up entries, eight columns each


def test_history_can_be_left_out() -> None:
    module = layer()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    explorer = DynamicSparsity(module, optimizer, interval=1, total_steps=5, track_ever_active=False)
    assert sparsecore.resident_bytes(module, optimizer, explorer).topology == 0
    one_step(module, optimizer, torch.randn(5, 10))
    report = explorer.step()
    assert report is not None
    assert math.isnan(report.ever_active)
    explorer.load_state_dict(explorer.state_dict())


def test_saved_gradient_sums_are_checked_and_copied() -> None:
    table = SparseEmbedding(50, 8, density=0.3, accumulate_rows=10)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
    explorer = DynamicSparsity(table, optimizer, interval=5, total_steps=20)
    table(torch.tensor([1, 2])).sum().backward()
    explorer.step()
    state = copy.deepcopy(explorer.state_dict())
    explorer.load_state_dict(state)
    before = state["accumulators"][""]["sums"].clone()
    table(torch.tensor([1, 2])).sum().backward()
    assert torch.equal(state["accumulators"][""]["sums"], before)
    state["accumulators"][""]["sums"] = torch.zeros(2, 5)
    with pytest.raises(TopologyError, match="saved gradient sums"):
        explorer.load_state_dict(state)


class Wrapped(torch.optim.Optimizer):
    """As implementations of SAM wrap the optimizer that they are given."""

    def __init__(self, base: torch.optim.Optimizer, shared: bool) -> None:
        super().__init__(base.param_groups, {})
        self.base, self.param_groups = base, base.param_groups
        if shared:
            self.state = base.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.base.step()


def test_an_optimizer_that_wraps_another_is_refused_unless_it_shows_its_state() -> None:
    module = layer()
    base = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(TopologyError, match="Wrapped keeps state in the optimizer in its base"):
        DynamicSparsity(module, Wrapped(base, shared=False), total_steps=5)
    DynamicSparsity(module, Wrapped(base, shared=True), total_steps=500)


def test_values_of_two_modules_are_refused() -> None:
    model = nn.ModuleList(
        [SparseEmbedding(30, 20, density=0.3), SparseLinear(20, 30, bias=False, density=0.3)]
    )
    model[1].values = model[0].values
    with pytest.raises(TopologyError, match="0 and 1 share their values"):
        DynamicSparsity(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=5)
    module = layer(8, 8)
    again = nn.Sequential(module, module)
    DynamicSparsity(again, torch.optim.SGD(again.parameters(), lr=0.1), total_steps=500)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_of_sparse_gradients_moves_with_its_weight(nesterov: bool) -> None:
    table = SparseEmbedding(50, 8, sparse=True, density=0.5)
    optimizer = torch.optim.SGD(table.parameters(), 0.1, momentum=0.9, nesterov=nesterov)
    explorer = DynamicSparsity(table, optimizer, interval=2, total_steps=10)
    for step in range(6):
        optimizer.zero_grad()
        table(torch.randint(50, (6,))).square().sum().backward()
        optimizer.step()
        momentum = optimizer.state[table.values]["momentum_buffer"]
        before = table.pattern.to_dense(momentum.to_dense())
        report = explorer.step()
        assert (report is None) == (step % 2 == 0)
        kept = table.pattern.to_mask()
        momentum = optimizer.state[table.values]["momentum_buffer"]
        after = table.pattern.to_dense(momentum.to_dense())
        # What was not stored before has none; what still is keeps its own.
        assert torch.equal(after[kept], before[kept])
        assert momentum.is_sparse


def test_settings_of_a_sweep_are_saved_as_plain_numbers(tmp_path) -> None:
    module = layer()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    settings = {
        "interval": np.int64(2), "total_steps": np.int64(20), "drop_fraction": np.float64(0.3),
        "end_drop_fraction": np.float64(0.1), "stop_fraction": np.float32(0.5),
    }  # fmt: skip
    explorer = DynamicSparsity(module, optimizer, **settings)
    torch.save(explorer.state_dict(), tmp_path / "explorer.pt")
    explorer.load_state_dict(torch.load(tmp_path / "explorer.pt", weights_only=True))


@pytest.mark.parametrize("tracked", [True, False])
def test_state_of_another_models_explorer_is_refused(tracked):
    def explorer(rows, tracked=tracked):
        table = sparsecore.SparseEmbedding(rows, 8, density=0.3, accumulate_rows=rows)
        optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
        return table, DynamicSparsity(table, optimizer, interval=3, total_steps=30, track_ever_active=tracked)

    (large, saved), (_, mine) = explorer(1000), explorer(50)
    large(torch.arange(900, 1000)).sum().backward()
    saved.step()
    state = saved.state_dict()
    with pytest.raises(TopologyError, match=r"\[1000, 8\]}, this model has .*\[50, 8\]"):
        mine.load_state_dict(state)
    del state["weights"]  # as saved before they were
    with pytest.raises(
        TopologyError, match="history of" if tracked else "rows up to 999, the table has 50|at most 50"
    ):
        mine.load_state_dict(state)
    with pytest.raises(TopologyError, match=f"track_ever_active={tracked}, this one {not tracked}"):
        explorer(1000, not tracked)[1].load_state_dict(saved.state_dict())
    with pytest.raises(TopologyError, match="no state of an explorer: it has no steps"):
        mine.load_state_dict({})
    assert mine.steps == 0


def test_drop_fractions_must_be_numbers():
    layer = sparsecore.SparseLinear(8, 8, density=0.5)
    with pytest.raises(TopologyError, match="drop_fraction and end_drop_fraction must be numbers, got None"):
        DynamicSparsity(layer, torch.optim.SGD(layer.parameters(), lr=0.1), total_steps=9, drop_fraction=None)
