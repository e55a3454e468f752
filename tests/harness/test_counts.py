"""Counts of whole training steps against an independent count: of dense models by torch, of sparse ones one by one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import sparsecore
from harness.suite.models import SMALL, config_of
from recsys.training.probe import StepProbe
from recsys.training.session import load_dataset
from sparsecore.nn.base import SparseModule

DATA = {"users": 40, "items": 50, "interactions": 600, "clusters": 4}
_BAGS = ("aten::_embedding_bag", "aten::_embedding_bag_forward_only")


class OneByOne(TorchDispatchMode):
    """Multiply-adds of sparsecore's operators from their index sets, of all others from torch's registry."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name.startswith("sparsecore::"):
            self.macs += one_by_one(name.removeprefix("sparsecore::"), args)
        elif (
            name in _BAGS
            or name == "aten::_embedding_bag_backward"
            or name == "aten::_embedding_bag_dense_backward"
        ):
            self.macs += args[1].numel() * args[0].shape[1]
        elif name == "aten::_embedding_bag_per_sample_weights_backward":
            self.macs += args[2].numel() * args[1].shape[1]
        elif func._overloadpacket in flop_registry:
            self.macs += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out) // 2
        return out


def one_by_one(name: str, args: Any) -> int:
    """Of one call, with loops over the positions that are stored."""
    if name in ("gather", "scatter_grad"):
        return 0
    if name == "gather_dot":  # rows are expanded: every column of a pair is multiplied
        return sum(1 for _ in itertools.product(range(args[7].numel()), range(args[8])))
    if name.startswith("propagate"):
        crow, col = args[0].tolist(), args[1].tolist()
        edges = [(i, col[k]) for i in range(len(crow) - 1) for k in range(crow[i], crow[i + 1])]
        if name == "propagate":
            return len(edges) * args[6].shape[1]
        if name == "propagate_mean_grad":
            return args[9] * len(edges) * args[8].shape[1]
        table, cols, hops = args[7].tolist(), args[9], args[10]
        return sum(table[j + 1] - table[j] for _, j in edges) + (hops - 1) * len(edges) * cols
    crow = (args[1] if name in ("bag", "bag_dot", "spmm", "spmm_t") else args[0]).tolist()
    if name.startswith("bag"):
        ids = (args[2] if name == "bag_grad" else args[3]).tolist()
        return sum(crow[r + 1] - crow[r] for r in ids)
    batch = (args[2] if name == "sddmm" else args[3]).shape[0]
    return sum(1 for _ in range(batch) for r in range(len(crow) - 1) for _ in range(crow[r], crow[r + 1]))


def probe(model: str, form: str) -> StepProbe:
    config = config_of(model, form, DATA)
    made = StepProbe(config, load_dataset(config))
    for module in made.trainer.model.modules():
        if isinstance(module, SparseModule):
            module.set_encoding("csr")  # so that row pointers and columns can be read here
    return made


@pytest.mark.parametrize("model", SMALL)
@pytest.mark.parametrize("form", ["static@0.5", "dsl@0.25"])
def test_sparse_steps(model: str, form: str) -> None:
    made = probe(model, form)
    batch = next(made._batches)
    by_formula, by_hand = sparsecore.MacCounter(), OneByOne()
    loss_of = made.trainer.model.loss
    with by_formula.phase("forward"), by_hand:
        loss = loss_of(batch, 0)
    assert by_formula.macs["forward"] == by_hand.macs > 0
    with by_formula.phase("backward"), by_hand:
        loss.backward()
    assert by_formula.total == by_hand.macs
    assert by_formula.macs["backward"] > 0


@pytest.mark.parametrize("model", SMALL)
def test_dense_steps_agree_with_torchs_counter(model: str) -> None:
    """But for lookups of weighted bags, which torch takes for free: they are added one by one."""
    made = probe(model, "dense")
    batch = next(made._batches)
    ours, by_hand = sparsecore.MacCounter(), OneByOne()
    with FlopCounterMode(display=False) as torchs, ours.phase("step"), by_hand:
        made.trainer.model.loss(batch, 0).backward()
    assert ours.total == by_hand.macs
    assert ours.total >= torchs.get_total_flops() // 2
    if model not in ("cdae", "multvae"):
        bags = by_hand.macs - torchs.get_total_flops() // 2
        assert bags == 0 or model in ("ultragcn",), bags
