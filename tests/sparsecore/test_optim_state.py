"""State of optimizers that is not theirs, gradients that came late, and tables that are updated in the backward pass of
what asked for something else.
"""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from strategies import of_numba
from torch import nn

import sparsecore
from sparsecore import optim

OURS = {
    "SGD": lambda p, **o: optim.SGD(p, lr=0.1, momentum=0.9, **o),
    "Adam": optim.Adam,
    "AdamW": optim.AdamW,
    "Adagrad": optim.Adagrad,
}


def table(density=0.5, rows=100, **options):
    generator = torch.Generator().manual_seed(rows)
    return sparsecore.SparseEmbedding(rows, 8, density=density, sparse=True, generator=generator, **options)


@pytest.mark.parametrize("make", OURS.values(), ids=OURS)
@pytest.mark.parametrize(("saved", "now"), [(10, 1000), (1000, 10)])
def test_state_of_another_size_is_refused(make, saved, now):
    before, after = nn.Parameter(torch.zeros(saved)), nn.Parameter(torch.zeros(now))
    old, new = make([before]), make([after])
    before.grad = torch.ones(saved)
    old.step()
    new.load_state_dict(old.state_dict())
    after.grad = torch.ones(now)
    with pytest.raises(
        sparsecore.SparsecoreError, match=rf"has shape \({saved},\), the parameter \({now},\)"
    ):
        new.step()
    assert not after.detach().any()


@pytest.mark.parametrize("in_backward", [False, True])
def test_state_of_another_density_is_refused(in_backward):
    few, many = table(0.1), table(0.5)
    old = optim.Adam(few.parameters(), in_backward=in_backward)
    new = optim.Adam(many.parameters(), in_backward=in_backward)
    few(torch.arange(5)).sum().backward()
    old.step()
    new.load_state_dict(old.state_dict())
    before = many.values.detach().clone()

    def step():
        many(torch.arange(5)).sum().backward()
        new.step()

    with pytest.raises(sparsecore.SparsecoreError, match="at another density"):
        step()
    assert torch.equal(many.values.detach(), before)


@pytest.mark.parametrize("make", OURS.values(), ids=OURS)
def test_a_gradient_from_before_the_parameter_was_replaced_is_refused(make):
    parameter = nn.Parameter(torch.zeros(1000))
    parameter.grad = torch.ones(1000)
    parameter.data = torch.zeros(10)
    with pytest.raises(sparsecore.SparsecoreError, match="zero_grad"):
        make([parameter]).step()


def test_sparse_momentum_of_torch_goes_on_as_ours():
    mine, its = table(), table()
    assert torch.equal(mine.values, its.values)
    torchs = torch.optim.SGD(its.parameters(), lr=0.1, momentum=0.9)
    its(torch.arange(5)).sum().backward()
    torchs.step()
    torchs.zero_grad()
    mine.load_state_dict(its.state_dict())
    ours = optim.SGD(mine.parameters(), lr=0.1, momentum=0.9)
    ours.load_state_dict(copy.deepcopy(torchs.state_dict()))
    for model, optimizer in ((mine, ours), (its, torchs)):
        (3 * model(torch.arange(5))).sum().backward()
        optimizer.step()
    torch.testing.assert_close(mine.values.detach(), its.values.detach())


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("kind", [optim.Adam, optim.Adagrad])
def test_counts_that_are_plain_numbers(kind, in_backward):
    """Those of torch's SparseAdam, and of checkpoints of old versions of torch."""
    model = table()
    old = torch.optim.SparseAdam(model.parameters())
    model(torch.arange(5)).sum().backward()
    old.step()
    model.zero_grad()
    saved = old.state_dict()
    assert saved["state"][0]["step"] == 1
    if kind is optim.Adagrad:
        saved = kind(model.parameters()).state_dict()
        saved["state"][0]["step"] = 1
    new = kind(model.parameters(), in_backward=in_backward)
    saved["param_groups"][0] |= {"lr_decay": 0.0, "weight_decay": 0.0, "in_backward": in_backward}
    new.load_state_dict(saved)
    model(torch.arange(5)).sum().backward()
    new.step()
    assert float(new.state[model.values]["step"]) == 2


def test_steps_per_weight_are_not_counted_in_16_bits():
    parameter = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(sparsecore.SparsecoreError, match="bfloat16 cannot count"):
        optim.Adam([parameter], per_weight_step=True).step()
    optim.Adam([parameter]).step()
    assert parameter.detach().any()


@pytest.mark.parametrize(
    "first",
    [lambda t: t(torch.zeros(3, dtype=torch.int64)), lambda t: t(torch.zeros(0, dtype=torch.int64))],
    ids=["padding", "no ids"],
)
def test_a_micro_batch_that_touches_nothing_stored(first):
    model = table(padding_idx=0)
    first(model).sum().backward()
    assert model.values.grad._nnz() == 0
    model(torch.tensor([5])).sum().backward()
    first(model).sum().backward()
    alone = table(padding_idx=0)
    alone(torch.tensor([5])).sum().backward()
    assert torch.equal(model.values.grad.to_dense(), alone.values.grad.to_dense())


@of_numba
def test_updates_in_the_backward_pass_are_of_what_it_was_asked_for():
    a, b = table(), table(rows=50)
    optimizer = optim.SGD([*a.parameters(), *b.parameters()], lr=0.1, in_backward=True)

    def scores():
        return sparsecore.gather_dot(a, torch.arange(5), b, torch.arange(10).view(5, 2)).sum()

    def moved(run):
        before = [t.values.detach().clone() for t in (a, b)]
        run()
        return [not torch.equal(t.values.detach(), old) for t, old in zip((a, b), before, strict=True)]

    assert moved(lambda: scores().backward(inputs=[a.values])) == [True, False]
    assert a.values.grad is None
    assert moved(lambda: scores().backward()) == [True, True]
    # `grad` returns the gradient, and trains nothing.
    found = []
    assert moved(lambda: found.extend(torch.autograd.grad(scores(), [a.values]))) == [False, False]
    assert moved(lambda: found.extend(torch.autograd.grad(a(torch.arange(5)).sum(), [a.values]))) == [
        False,
        False,
    ]
    assert found[1].to_dense().sum() == (a.pattern.to_mask()[:5]).sum()
    del optimizer
    gc.collect()
    scores().backward()  # nobody updates in it any more
    torch.testing.assert_close(found[0].to_dense(), a.values.grad.to_dense())
