"""Averages of weights whose index sets move."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

import sparsecore
from sparsecore import DynamicSparsity, SparseModule
from sparsecore.optim import AveragedModel

RULES = {"swa": None, "ema": get_ema_multi_avg_fn(0.9)}


def make(encoding: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 8)).double()
    sparsecore.sparsify(model, 0.3)
    for module in model.modules():
        if isinstance(module, SparseModule):
            module.set_encoding(encoding)
    return model


def dense_forms(model: nn.Module) -> list[Tensor]:
    sparse = [m for m in model.modules() if isinstance(m, SparseModule)]
    return [module.pattern.to_dense(module.values.detach()) for module in sparse]


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("encoding", ["csr", "bitmap"])
def test_the_average_is_that_of_the_dense_forms_where_weights_have_stayed(
    encoding: str, rule: str, use_buffers: bool
) -> None:
    model = make(encoding)
    average = AveragedModel(model, multi_avg_fn=RULES[rule], use_buffers=use_buffers)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    explorer = DynamicSparsity(model, optimizer, interval=3, total_steps=100)
    expected = None
    for step in range(10):
        optimizer.zero_grad()
        model(torch.randn(16, 40, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        explorer.step()
        average.update_parameters(model)
        now = dense_forms(model)
        if expected is None:
            expected = [weight.clone() for weight in now]
        else:
            share = 0.1 if rule == "ema" else 1 / (step + 1)
            expected = [old + share * (new - old) for old, new in zip(expected, now, strict=True)]
        # The average of what is not stored now is dropped.
        masks = [m.pattern.to_mask() for m in model.modules() if isinstance(m, SparseModule)]
        expected = [weight * mask for weight, mask in zip(expected, masks, strict=True)]
    for module in average.modules():
        if isinstance(module, SparseModule):
            module.check_invariants()
    assert expected is not None
    for mine, right in zip(dense_forms(average), expected, strict=True):
        torch.testing.assert_close(mine, right)
    assert torch.isfinite(average.eval()(torch.randn(4, 40, dtype=torch.float64))).all()


def test_it_is_saved_and_copied_as_torchs() -> None:
    model = make("csr")
    average = AveragedModel(model)
    average.update_parameters(model)
    twin = AveragedModel(make("csr"))
    twin.load_state_dict(average.state_dict())
    x = torch.randn(4, 40, dtype=torch.float64)
    assert torch.equal(twin.eval()(x), average.eval()(x))
    assert torch.equal(copy.deepcopy(average)(x), average(x))


def test_torchs_average_of_buffers_is_no_index_set() -> None:
    """Why the README says so: integers are averaged too, and cut off."""
    module = sparsecore.SparseLinear(64, 64, density=0.05)
    module.set_encoding("csr")
    swa = torch.optim.swa_utils
    average = swa.AveragedModel(module, multi_avg_fn=swa.get_ema_multi_avg_fn(0.9999), use_buffers=True)
    for _ in range(3):
        average.update_parameters(module)  # which never changes
    with pytest.raises(sparsecore.PatternError):
        average.module.check_invariants()


def test_another_density_is_refused_before_anything_changes():
    models = [nn.Sequential(sparsecore.SparseLinear(20, 30, density=d), nn.Linear(30, 2)) for d in (0.5, 0.1)]
    average = sparsecore.optim.AveragedModel(models[0])
    before = {name: tensor.clone() for name, tensor in average.state_dict().items()}
    for other in (models[1], nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 2))):
        with pytest.raises(ValueError, match="average models of one kind and density"):
            average.update_parameters(other)
    for name, tensor in average.state_dict().items():
        assert torch.equal(tensor, before[name]), name
