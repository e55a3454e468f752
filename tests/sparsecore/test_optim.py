"""Optimizers against torch's: same numbers, same state dicts; lazy updates; a step count for every weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from devices import BACKENDS, devices, of_numba
from torch import Tensor, nn

import sparsecore
from sparsecore import DynamicSparsity, SparsecoreError, SparseLinear, optim
from sparsecore.ops.embedding import sparse_vector

pytestmark = pytest.mark.feature("our optimizers")

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("Adam", {}),
    ("Adam", {"lr": 0.01, "betas": (0.7, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
    ("Adam", {"betas": (0.0, 0.0)}),
    ("AdamW", {}),
    ("AdamW", {"lr": 0.01, "weight_decay": 0.3}),
    ("SGD", {}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.4}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("Adagrad", {}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.2}),
]
every_case = pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: str(value))
every_name = pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad"])
every_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float32", "float64"])
every_backend = pytest.mark.parametrize("backend", BACKENDS)

SHAPES = [(1,), (15,), (16,), (17,), (33, 3), (2, 3, 4), (0,), (70_001,)]


def pair(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    ours = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    return ours, [nn.Parameter(p.detach().clone()) for p in ours]


def same_gradients(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    for p, q in zip(ours, theirs, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()


def assert_close(ours: Any, theirs: Any, dtype: torch.dtype) -> None:
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@every_case
@every_dtype
@pytest.mark.parametrize("threads", [1, 2])
def test_equals_torch(name: str, options: dict[str, Any], dtype: torch.dtype, threads: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    ours, theirs = pair(SHAPES, dtype)
    a, b = getattr(optim, name)(ours, **options), getattr(torch.optim, name)(theirs, **options)
    for _ in range(20):
        same_gradients(ours, theirs)
        a.step()
        b.step()
    assert_close(ours, theirs, dtype)
    for p, q in zip(ours, theirs, strict=True):
        for key, state in b.state[q].items():
            if isinstance(state, Tensor):
                torch.testing.assert_close(
                    a.state[p][key], state, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
                )


FUSED = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]


@pytest.mark.parametrize("device", FUSED)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_torchs_fused_kernel_which_cuda_runs(
    name: str, sparse: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All numbers, and those that a sparse gradient names; the state stays as it is elsewhere."""
    torch.manual_seed(0)
    results = []
    places = torch.tensor([0, 3, 7])
    gradients = [torch.randn(3 if sparse else 9, dtype=torch.float64) for _ in range(4)]
    for fused in (True, False):
        monkeypatch.setattr("sparsecore.optim.adam._in_one_kernel", lambda p: fused)  # noqa: B023
        values = nn.Parameter(torch.arange(9, dtype=torch.float64, device=device))
        optimizer = getattr(optim, name)([values], lr=0.1, weight_decay=0.1)
        for gradient in gradients:
            gradient = gradient.to(device)
            values.grad = sparse_vector(places.to(device), gradient, 9) if sparse else gradient
            with sparsecore.backend("torch"):
                optimizer.step()
        assert optimizer.state[values]["step"].device.type == "cpu"
        results.append(
            (values.detach(), *(optimizer.state[values][key] for key in ("step", "exp_avg", "exp_avg_sq")))
        )
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@every_case
@pytest.mark.parametrize("ours_first", [True, False])
def test_either_loads_what_the_other_saved(name: str, options: dict[str, Any], ours_first: bool) -> None:
    torch.manual_seed(0)
    kinds = [getattr(optim, name), getattr(torch.optim, name)]
    first, second = kinds if ours_first else kinds[::-1]
    parameters, reference = pair([(20,), (3, 5)], torch.float64)
    before, throughout = first(parameters, **options), getattr(torch.optim, name)(reference, **options)
    for _ in range(3):
        same_gradients(parameters, reference)
        before.step()
        throughout.step()
    after = second(parameters, **options)
    after.load_state_dict(before.state_dict())
    for _ in range(3):
        same_gradients(parameters, reference)
        after.step()
        throughout.step()
    assert_close(parameters, reference, torch.float64)


@every_name
def test_groups_schedulers_and_closures(name: str) -> None:
    torch.manual_seed(0)
    ours, theirs = pair([(20,), (30,)], torch.float64)
    optimizers = []
    for kind, (first, second) in ((getattr(optim, name), ours), (getattr(torch.optim, name), theirs)):
        optimizer = kind([{"params": [first], "lr": 0.3}, {"params": [second], "weight_decay": 0.1}], lr=0.01)
        optimizers.append((optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)))
    for _ in range(5):
        for (optimizer, scheduler), parameters in zip(optimizers, (ours, theirs), strict=True):

            def closure(parameters: Any = parameters, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = sum((p**2).sum() for p in parameters)
                loss.backward()
                return loss

            assert optimizer.step(closure) > 0
            scheduler.step()
    assert_close(ours, theirs, torch.float64)


@every_name
def test_a_parameter_without_gradient_is_left_alone(name: str) -> None:
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = getattr(optim, name)([used, unused], weight_decay=0.1)
    used.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(unused, torch.ones(3))
    assert not torch.equal(used, torch.ones(3))


@every_name
def test_odd_memory_layouts(name: str) -> None:
    torch.manual_seed(0)
    base = torch.randn(6, 5, dtype=torch.float64)
    ours, theirs = nn.Parameter(base.clone().t()), nn.Parameter(base.clone().t())  # not contiguous
    plain, copy = pair([(6, 5)], torch.float64)
    a = getattr(optim, name)([ours, *plain])
    b = getattr(torch.optim, name)([theirs, *copy])
    for _ in range(3):
        ours.grad = torch.randn(5, 6, dtype=torch.float64)
        theirs.grad = ours.grad.clone()
        plain[0].grad = torch.randn(5, 6, dtype=torch.float64).t()
        copy[0].grad = plain[0].grad.clone()
        a.step()
        b.step()
    assert_close([ours, *plain], [theirs, *copy], torch.float64)


@every_name
def test_half_precision_runs_torchs_own(name: str) -> None:
    ours, theirs = pair([(40,)], torch.bfloat16)
    a, b = getattr(optim, name)(ours), getattr(torch.optim, name)(theirs)
    same_gradients(ours, theirs)
    a.step()
    b.step()
    assert torch.equal(ours[0], theirs[0])


def test_an_update_is_seen_by_autograd() -> None:
    p = nn.Parameter(torch.ones(3))
    loss = (p**2).sum()
    p.grad = torch.ones(3)
    optim.Adam([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_name
def test_hooks_run_once(name: str) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = getattr(optim, name)([p])
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    p.grad = torch.ones(3)
    optimizer.step()
    assert calls == [1]


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_a_state_with_an_unsupported_option_is_refused(option: str) -> None:
    p = nn.Parameter(torch.ones(3))
    saved = torch.optim.Adam([p], **{option: True}).state_dict()  # type: ignore[arg-type]
    with pytest.raises(SparsecoreError, match=option):
        optim.Adam([p]).load_state_dict(saved)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: optim.Adam([p], lr=-1),
        lambda p: optim.Adam([p], betas=(1.0, 0.9)),
        lambda p: optim.AdamW([p], weight_decay=-1),
        lambda p: optim.SGD([p], momentum=-1),
        lambda p: optim.SGD([p], nesterov=True),
        lambda p: optim.Adagrad([p], lr_decay=-1),
    ],
)
def test_arguments_are_checked(make: Callable[[Tensor], Any]) -> None:
    with pytest.raises(SparsecoreError):
        make(nn.Parameter(torch.ones(1)))


# ---------------------------------------------------------------- sparse gradients


def sparse(places: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.sparse_coo_tensor(places[None], values, shape, check_invariants=True)


def lazily(name: str, options: dict[str, Any], start: Tensor, steps: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Every element (or row) with an optimizer of its own, which sees only the steps that name it.

    Bias is corrected by the number of all steps, as in ``torch.optim.SparseAdam``.
    """
    out = start.clone()
    for row in range(start.shape[0]):
        p = nn.Parameter(start[row : row + 1].clone())
        optimizer = getattr(torch.optim, name)([p], **options)
        for number, (places, values) in enumerate(steps, 1):
            if (places == row).any():
                p.grad = values[places == row].sum(0, keepdim=True)
                if "step" in optimizer.state[p]:
                    optimizer.state[p]["step"].fill_(number - 1)
                elif name.startswith("Adam"):
                    optimizer.state[p].update(
                        step=torch.tensor(number - 1.0),
                        exp_avg=torch.zeros_like(p),
                        exp_avg_sq=torch.zeros_like(p),
                    )
                optimizer.step()
        out[row] = p.detach()[0]
    return out


@every_case
@every_backend
@pytest.mark.parametrize("width", [None, 1, 5, 40])
def test_lazy_updates(name: str, options: dict[str, Any], backend: str, width: int | None) -> None:
    if options.get("dampening"):
        return  # the first step of a buffer is the parameter's, not each element's
    generator = torch.Generator().manual_seed(0)
    shape: tuple[int, ...] = (120,) if width is None else (120, width)
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    steps = []
    for step in range(5):
        # Rows that follow one another, rows that repeat, and none at all.
        n = (60, 7, 0, 200, 1)[step]
        places = torch.randint(120, (n,), generator=generator)
        places = places.sort().values if step == 0 else places
        steps.append((places, torch.randn(n, *shape[1:], generator=generator, dtype=torch.float64)))
    p = nn.Parameter(start.clone())
    optimizer = getattr(optim, name)([p], **options)
    with sparsecore.backend(backend):
        for places, values in steps:
            p.grad = sparse(places, values, shape)
            optimizer.step()
    torch.testing.assert_close(p.detach(), lazily(name, options, start, steps), atol=1e-12, rtol=1e-12)


@every_name
@every_dtype
def test_all_touched_equals_dense(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    (p,), (q,) = pair([(1000,)], dtype)
    a, b = getattr(optim, name)([p], weight_decay=0.1), getattr(optim, name)([q], weight_decay=0.1)
    for _ in range(5):
        q.grad = torch.randn(1000, dtype=dtype)
        p.grad = sparse(torch.arange(1000), q.grad, (1000,))
        a.step()
        b.step()
    assert torch.equal(p, q)


def test_gradients_of_several_lookups_add_up() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(50, 8, sparse=True)
    dense = nn.Embedding(50, 8)
    dense.load_state_dict(table.state_dict())
    a, b = optim.Adagrad(table.parameters()), torch.optim.Adagrad(dense.parameters())
    for _ in range(4):
        ids = [torch.randint(50, (20,)) for _ in range(3)]
        for module, optimizer in ((table, a), (dense, b)):
            optimizer.zero_grad()
            sum((module(i) ** 2).sum() for i in ids).backward()
            optimizer.step()
    torch.testing.assert_close(table.weight, dense.weight)


def test_lazy_adam_is_sparse_adam_but_for_eps() -> None:
    torch.manual_seed(0)
    ours = nn.Embedding(500, 16, sparse=True)
    theirs = nn.Embedding(500, 16, sparse=True)
    theirs.load_state_dict(ours.state_dict())
    a = optim.Adam(ours.parameters(), eps=1e-20)
    b = torch.optim.SparseAdam(theirs.parameters(), eps=1e-20)
    for _ in range(10):
        ids = torch.randint(500, (64,))
        for table, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            (table(ids) ** 3).sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)


@every_backend
def test_a_place_outside_is_refused(backend: str) -> None:
    p = nn.Parameter(torch.ones(5))
    p.grad = torch.sparse_coo_tensor(torch.tensor([[7]]), torch.ones(1), (5,), check_invariants=False)
    with sparsecore.backend(backend), pytest.raises((IndexError, RuntimeError)):
        optim.SGD([p]).step()


def test_only_the_first_dimension_may_be_sparse() -> None:
    p = nn.Parameter(torch.ones(5, 2))
    p.grad = torch.sparse_coo_tensor(torch.tensor([[1], [1]]), torch.ones(1), (5, 2), check_invariants=True)
    with pytest.raises(SparsecoreError, match="first dimension"):
        optim.Adam([p]).step()


# ---------------------------------------------------------------- a step count for every weight


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@every_dtype
@every_backend
@pytest.mark.parametrize("lazy", [False, True])
def test_counting_steps_per_weight(name: str, dtype: torch.dtype, backend: str, lazy: bool) -> None:
    """Weights whose state was emptied after three steps go on as new ones do."""
    torch.manual_seed(0)
    n, options = 70, {"lr": 0.1, "weight_decay": 0.1}
    p = nn.Parameter(torch.randn(n, dtype=dtype))
    optimizer = getattr(optim, name)([p], per_weight_step=True, **options)
    new = torch.rand(n) < 0.3
    old_grads, grads = torch.randn(3, n, dtype=dtype), torch.randn(5, n, dtype=dtype)

    def step(grad: Tensor) -> None:
        p.grad = sparse(torch.arange(n), grad.clone(), (n,)) if lazy else grad.clone()
        with sparsecore.backend(backend):
            optimizer.step()

    reference = nn.Parameter(p.detach().clone())
    throughout = getattr(torch.optim, name)([reference], **options)
    for grad in old_grads:
        step(grad)
        reference.grad = grad
        throughout.step()
    for key in ("exp_avg", "exp_avg_sq", "step_per_weight"):
        optimizer.state[p][key][new] = 0
    fresh = nn.Parameter(reference.detach()[new])
    anew = getattr(torch.optim, name)([fresh], **options)
    for grad in grads:
        step(grad)
        reference.grad, fresh.grad = grad, grad[new]
        throughout.step()
        anew.step()
    assert_close([p[~new], p[new]], [reference[~new], fresh], dtype)


def test_counts_begin_at_the_step_where_they_are_switched_on() -> None:
    (p,), (q,) = pair([(20,)], torch.float64)
    a, b = optim.Adam([p]), optim.Adam([q])
    for step in range(6):
        if step == 3:
            a.param_groups[0]["per_weight_step"] = True
        same_gradients([p], [q])
        a.step()
        b.step()
    torch.testing.assert_close(p, q)


def test_counts_survive_a_state_dict() -> None:
    p = nn.Parameter(torch.randn(20))
    a = optim.Adam([p], per_weight_step=True)
    for _ in range(3):
        p.grad = torch.randn(20)
        a.step()
    b = optim.Adam([p])
    b.load_state_dict(a.state_dict())
    assert b.param_groups[0]["per_weight_step"] is True
    assert torch.equal(b.state[p]["step_per_weight"], torch.full((20,), 3.0))


@pytest.mark.parametrize("per_weight_step", [False, True])
def test_exploration_gives_new_weights_an_empty_state(per_weight_step: bool) -> None:
    torch.manual_seed(0)
    layer = SparseLinear(40, 30, density=0.3)
    optimizer = optim.Adam(layer.parameters(), lr=0.01, per_weight_step=per_weight_step)
    explorer = DynamicSparsity(layer, optimizer, interval=4, total_steps=40)
    for _ in range(4):
        optimizer.zero_grad()
        layer(torch.randn(16, 40)).pow(2).sum().backward()
        optimizer.step()
        explorer.step()
    state = optimizer.state[layer.values]
    new = layer.values == 0
    assert 0 < int(new.sum()) < layer.nnz
    assert not state["exp_avg"][new].any()
    if per_weight_step:
        assert set(state["step_per_weight"][new].tolist()) == {0.0}
        assert set(state["step_per_weight"][~new].tolist()) == {4.0}


# ---------------------------------------------------------------- small numbers


@of_numba
@every_dtype
def test_moments_do_not_become_subnormal(dtype: torch.dtype) -> None:
    """Arithmetic on subnormal numbers is up to 2.4 times slower here; weights that get no gradient end there."""
    p = nn.Parameter(torch.ones(20, dtype=dtype))
    optimizer = optim.Adam([p])
    p.grad = torch.full_like(p, 1.0)
    optimizer.step()
    tiny = torch.finfo(dtype).tiny
    optimizer.state[p]["exp_avg"].fill_(-tiny)
    optimizer.state[p]["exp_avg_sq"].fill_(tiny)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert not optimizer.state[p]["exp_avg"].any()
    assert not optimizer.state[p]["exp_avg_sq"].any()
    assert torch.isfinite(p).all()
    optimizer = optim.SGD([p], lr=0.1, momentum=0.9)
    optimizer.step()
    optimizer.state[p]["momentum_buffer"].fill_(-tiny)
    optimizer.step()
    assert not optimizer.state[p]["momentum_buffer"].any()


@of_numba
@every_dtype
@pytest.mark.parametrize("eps", [1e-10, 0.0])
def test_adagrads_sums_do_not_become_subnormal_where_eps_outweighs_them(
    dtype: torch.dtype, eps: float
) -> None:
    small = torch.finfo(dtype).tiny ** 0.5 / 16  # its square is subnormal
    ours, theirs = (nn.Parameter(torch.zeros(20, dtype=dtype)) for _ in range(2))
    optimizers = optim.Adagrad([ours], lr=0.1, eps=eps), torch.optim.Adagrad([theirs], lr=0.1, eps=eps)
    for _ in range(3):
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = torch.full_like(p, small)
            optimizer.step()
    assert bool(optimizers[0].state[ours]["sum"].any()) is (eps == 0.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-3 if eps == 0.0 else 1e-5, atol=0.0)


@pytest.mark.parametrize("kind", [optim.Adam, optim.AdamW, optim.SGD, optim.Adagrad])
def test_torchs_arguments(kind: type[torch.optim.Optimizer]) -> None:
    p = nn.Parameter(torch.ones(3))
    kind([p], lr=0.1, foreach=False, fused=True, maximize=False, differentiable=False)
    with pytest.raises(SparsecoreError, match="does not support maximize=True"):
        kind([p], maximize=True)
    if kind is optim.Adam:
        kind([p], weight_decay=0.1, decoupled_weight_decay=False)
        with pytest.raises(SparsecoreError, match="use AdamW"):
            kind([p], weight_decay=0.1, decoupled_weight_decay=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'momentun'"):
        kind([p], momentun=0.9)


@every_dtype
def test_adam_passes_nan_on_as_torch_does(dtype: torch.dtype) -> None:
    ours, torchs = (nn.Parameter(torch.ones(40, dtype=dtype)) for _ in range(2))
    optimizers = optim.Adam([ours]), torch.optim.Adam([torchs])
    for p, optimizer in zip((ours, torchs), optimizers, strict=True):
        p.grad = torch.ones_like(p)
        p.grad[[3, 37]] = torch.nan
        optimizer.step()
        p.grad = torch.ones_like(p)
        optimizer.step()
    torch.testing.assert_close(ours, torchs, equal_nan=True)
    assert ours.isnan().nonzero().flatten().tolist() == [3, 37]


def _two_tables(device: str = "cpu") -> tuple[sparsecore.SparseEmbedding, sparsecore.SparseEmbedding]:
    made = []
    for seed, encoding in ((1, "csr"), (2, "bitmap")):
        g = torch.Generator().manual_seed(seed)
        table = sparsecore.SparseEmbedding(40, 24, density=0.3, sparse=True, dtype=torch.float64, generator=g)
        made.append(table.to(device))
        table.set_encoding(encoding)
    return made[0], made[1]


def _loss(a: sparsecore.SparseEmbedding, b: sparsecore.SparseEmbedding, turn: int, kind: str) -> Tensor:
    g = torch.Generator().manual_seed(turn)
    drawn = torch.randint(40, (30,), generator=g), torch.randint(40, (30, 2), generator=g)
    ids, others = (tensor.to(a.values.device) for tensor in drawn)
    if kind == "lookup":
        return (a(ids) * b(ids).detach()).sum() + b(others).pow(2).sum()
    return torch.tanh(sparsecore.gather_dot(a, ids, a if kind == "one table" else b, others)).sum()


@every_case
@every_backend
@pytest.mark.parametrize("kind", ["lookup", "one table", "two tables"])
def test_in_backward_equals_a_step_afterwards(
    name: str, options: dict[str, Any], backend: str, kind: str
) -> None:
    """Values and state after several steps, with a learning rate that falls, a lookup or fused scores at a time."""
    results = []
    for in_backward in (False, True):
        tables = _two_tables()
        values = [table.values for table in tables]
        optimizer = getattr(optim, name)(values, in_backward=in_backward, **options)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        with sparsecore.backend(backend):
            for turn in range(4):
                optimizer.zero_grad()
                _loss(*tables, turn, kind).backward()
                if in_backward:
                    assert all(v.grad is None for v in values)
                optimizer.step()
                schedule.step()
        state = [optimizer.state[v] for v in values]
        results.append(
            [v.detach() for v in values] + [s[k] for s in state for k in sorted(s) if s[k] is not None]
        )
    assert len(results[0]) == len(results[1])
    assert_close(results[0], results[1], torch.float64)


@pytest.mark.parametrize("device", devices())
def test_in_backward_counts_explores_and_survives_a_state_dict(device: str) -> None:
    """The same multiply-adds, explorations and saved states as with a step afterwards."""
    outcomes = []
    for in_backward in (False, True):
        a, b = _two_tables(device)
        model = nn.ModuleList([a, b])
        optimizer = optim.Adam(model.parameters(), in_backward=in_backward)
        explorer = DynamicSparsity(model, optimizer, interval=2, total_steps=8)
        counter = sparsecore.MacCounter()
        for turn in range(6):
            optimizer.zero_grad()
            with counter.phase("all"):
                _loss(a, b, turn, "two tables").backward()
            assert (a.values.grad is None) == in_backward
            optimizer.step()
            explorer.step()
            if turn == 3:
                saved = optimizer.state_dict()
                optimizer = optim.Adam(model.parameters(), lr=1.0, in_backward=not in_backward)
                optimizer.load_state_dict(saved)
                assert optimizer.param_groups[0]["in_backward"] == in_backward
                explorer.optimizers = [optimizer]
        outcomes.append((a.values.detach(), a.pattern.positions(), b.values.detach(), counter.macs))
    torch.testing.assert_close(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1], outcomes[1][1])
    torch.testing.assert_close(outcomes[0][2], outcomes[1][2])
    assert outcomes[0][3] == outcomes[1][3]


def test_in_backward_ends_with_the_optimizer_and_leaves_dense_gradients_to_step() -> None:
    a, b = _two_tables()
    b.sparse = False
    optimizer = optim.SGD([a.values, b.values], lr=0.1, in_backward=True)
    before = a.values.detach().clone()
    ids = torch.tensor([3, 3, 5])
    (a(ids).sum() + b(ids).sum()).backward()
    assert a.values.grad is None
    assert b.values.grad is not None
    changed = before != a.values
    in_rows = torch.zeros(40, 24, dtype=torch.bool)
    in_rows[[3, 5]] = True
    assert torch.equal(changed, in_rows.view(-1)[a.pattern.positions()])
    del optimizer
    a(ids).sum().backward()
    assert a.values.grad is not None


def test_in_backward_refuses_values_that_were_needed_afterwards() -> None:
    """Two fused scores of one table in a step: the first update would change what the second derivative reads."""
    a, _ = _two_tables()
    optimizer = optim.SGD([a.values], lr=0.1, in_backward=True)
    ids = torch.arange(5)
    loss = sparsecore.gather_dot(a, ids, a, ids + 1).sum() + sparsecore.gather_dot(a, ids, a, ids + 2).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert optimizer.param_groups[0]["in_backward"]


def test_options_that_would_be_ignored_are_refused() -> None:
    for option in ("maximize", "amsgrad", "capturable"):
        with pytest.raises(SparsecoreError, match=f"does not support {option}=True"):
            optim.Adam([{"params": [nn.Parameter(torch.zeros(2))], option: True}])
    optimizer = optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    with pytest.raises(SparsecoreError, match="does not support maximize=True"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "maximize": True})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("decoupled", [False, True])
def test_the_other_weight_decay_is_refused(decoupled: bool) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    theirs, ours, wrong = (
        (torch.optim.AdamW, optim.AdamW, optim.Adam)
        if decoupled
        else (torch.optim.Adam, optim.Adam, optim.AdamW)
    )
    saved = theirs([parameter], weight_decay=0.1).state_dict()
    if "decoupled_weight_decay" not in saved["param_groups"][0]:
        pytest.skip("this torch does not say which it is")
    ours([parameter]).load_state_dict(saved)
    with pytest.raises(SparsecoreError, match="weight decay of this group is that of"):
        wrong([parameter]).load_state_dict(saved)
    wrong([parameter]).load_state_dict(theirs([parameter], weight_decay=0.0).state_dict())
