"""What an exploration is scored by: gradients that have come into ``grad``, whatever happens to their memory later."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sparsecore


class Positions(nn.Module):
    """Whose parameter's gradient is, in a batch of one, the layer's output gradient itself."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(64, 16))
        self.layer = nn.Linear(20, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.positions[None] + self.layer(x)


def explored(model: nn.Module, step: Callable[[nn.Module, torch.optim.Optimizer], None]) -> list[Tensor]:
    """Index sets after one step and its exploration."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    explorer = sparsecore.DynamicSparsity(
        model, optimizer, interval=1, total_steps=9, generator=torch.Generator().manual_seed(0)
    )
    step(model, optimizer)
    assert explorer.step() is not None
    return [m.col_indices for m in model.modules() if isinstance(m, sparsecore.SparseModule)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return sparsecore.sparsify(nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 8)), 0.3)


@pytest.mark.parametrize("factor", [1e3, torch.inf])
def test_gradients_that_are_only_returned_do_not_count(model: nn.Module, factor: float) -> None:
    x = torch.randn(7, 20)

    def plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(x).square().mean().backward()

    def logging(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(x).square().mean().backward()
        torch.autograd.grad(factor * model(x.flip(1)).sin().sum(), [model[0].values, model[2].values])

    assert same(explored(model, plain), explored(model, logging))


def test_gradients_that_are_returned_and_put_into_grad_count(model: nn.Module) -> None:
    x = torch.randn(7, 20)

    def plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(x).square().mean().backward()

    def by_hand(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        parameters = list(model.parameters())
        grads = torch.autograd.grad(model(x).square().mean(), parameters)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad

    assert same(explored(model, plain), explored(model, by_hand))


def test_micro_batches_with_a_logged_gradient_between_them(model: nn.Module) -> None:
    first, second = torch.randn(7, 20), torch.randn(7, 20)

    def together(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(torch.cat((first, second))).square().sum().backward()

    def apart(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(first).square().sum().backward()
        torch.autograd.grad(1e3 * model(first).sum(), model[0].values)
        model(second).square().sum().backward()

    assert same(explored(model, together), explored(model, apart))


@pytest.mark.parametrize("change", ["clip", "zero"])
def test_gradients_that_share_memory_with_a_parameters(change: str) -> None:
    torch.manual_seed(0)
    model = sparsecore.sparsify(Positions(), 0.3)
    x = torch.randn(1, 64, 20)

    def plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(x).sin().sum().backward()

    def changing(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(x).sin().sum().backward()
        if change == "clip":
            nn.utils.clip_grad_norm_([model.positions], 1e-3)
        else:
            model.positions.grad.zero_()

    assert same(explored(model, plain), explored(model, changing))


def test_inputs_that_change_after_the_backward_pass(model: nn.Module) -> None:
    x = torch.randn(7, 20)

    def plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(x).square().mean().backward()

    def resetting(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        hidden = model[1](model[0](x))
        model[2](hidden).square().mean().backward()
        hidden.detach().zero_()

    assert same(explored(model, plain), explored(model, resetting))


def test_a_layer_without_memory_computes_nothing_from_an_input_that_has_some() -> None:
    with torch.device("meta"):
        linear, conv = (
            sparsecore.SparseLinear(20, 16, density=0.5),
            sparsecore.SparseConv2d(3, 4, 2, density=0.5),
        )
        table = sparsecore.SparseEmbedding(9, 20, density=0.5)
    for call in (
        lambda: linear(torch.ones(1, 20)),
        lambda: conv(torch.ones(1, 3, 4, 4)),
        lambda: table(torch.arange(3)),
        lambda: sparsecore.score_topk(torch.ones(1, 20), table, 2),
    ):
        with pytest.raises(
            sparsecore.SparsecoreError, match="expected all operands on one device, got cpu and meta"
        ):
            call()
    assert linear(torch.ones(1, 20, device="meta")).shape == (1, 16)
