"""Batches made in advance are the same batches; nothing is left running, whatever happens."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from recsys.models.build import MODELS
from recsys.training import trainer as trainer_module
from recsys.training.prefetch import prefetch
from recsys.training.trainer import Trainer


def running():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert not running()


@pytest.mark.parametrize("depth", [1, 2, 7])
@pytest.mark.parametrize("count", [0, 1, 5, 300])
def test_items_and_their_order(depth, count):
    assert list(prefetch(iter(range(count)), depth)) == list(range(count))


def test_is_ahead_by_the_depth_at_most():
    taken, full = [], threading.Event()

    def numbers():
        for i in range(100):
            taken.append(i)
            if i == 3:
                full.set()
            yield i

    items = prefetch(numbers(), depth=3)
    assert next(items) == 0
    assert full.wait(10)  # made without anybody asking: 3 that wait
    time.sleep(0.02)
    assert len(taken) <= 1 + 3 + 1  # given away, waiting, in the maker's hand
    items.close()


def test_error_comes_after_the_items_before_it():
    def broken():
        yield 1
        yield 2
        raise RuntimeError("no third")

    items = prefetch(broken())
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(RuntimeError, match="no third"):
        next(items)


def test_closing_ends_the_thread_and_closes_the_iterator():
    closed = []

    def endless():
        try:
            while True:
                yield 0
        finally:
            closed.append(True)

    items = prefetch(endless())
    next(items)
    assert running()
    items.close()
    assert not running()
    assert closed == [True]


def test_closing_what_was_never_begun():
    prefetch(iter([1, 2])).close()


def test_depth_must_be_positive():
    with pytest.raises(ValueError, match="depth"):
        prefetch(iter([]), 0)


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


@pytest.mark.parametrize("model", sorted(MODELS))
def test_training_is_the_same_to_the_bit(make_config, tiny, monkeypatch, model):
    found = []
    for cores in (torch.get_num_threads() + 1, torch.get_num_threads()):
        with monkeypatch.context() as patch:
            patch.setattr(trainer_module, "usable_cores", lambda cores=cores: cores)
            trainer = Trainer(make_config("dsl", model=model), tiny)
            losses = [trainer.run_epoch()["loss"] for _ in range(2)]
        found.append((losses, weights(trainer), trainer.order.get_state()))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])
    assert torch.equal(found[0][2], found[1][2])


@pytest.mark.parametrize("spare", [0, 1])
def test_a_thread_makes_batches_where_a_core_is_left(make_config, tiny, monkeypatch, spare):
    monkeypatch.setattr(trainer_module, "usable_cores", lambda: torch.get_num_threads() + spare)
    with Trainer(make_config("dense", model="bprmf"), tiny).batches() as batches:
        next(batches)
        assert len(running()) == spare


@pytest.mark.parametrize("spare", [0, 1])
@pytest.mark.parametrize("step", [1, 4])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_epoch_leaves_the_order_as_it_was(make_config, tiny, monkeypatch, error, step, spare):
    monkeypatch.setattr(trainer_module, "usable_cores", lambda: torch.get_num_threads() + spare)
    trainer = Trainer(make_config("dsl", model="bprmf"), tiny)
    trainer.run_epoch()
    before, steps = trainer.order.get_state(), []

    def interrupt():
        steps.append(0)
        if len(steps) == step:
            raise error

    with pytest.raises(error):
        trainer.run_epoch(interrupt)
    assert not running()
    assert torch.equal(trainer.order.get_state(), before)
    assert trainer.epoch == 1
