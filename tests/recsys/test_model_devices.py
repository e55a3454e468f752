"""Training on a GPU: on one, against the CPU; and without one, on tensors that only know where they would be."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import sparsecore
from recsys.errors import ConfigError, RecsysError
from recsys.models import devices
from recsys.models.base import Interactions
from recsys.models.devices import find_device, moved
from recsys.recommender import SavedRecommender
from recsys.training import session
from recsys.training.trainer import Trainer

TRAINED = ["bprmf", "cdae", "convncf", "lightgcn", "multvae", "neumf", "sasrec", "ultragcn"]
no_gpu = not torch.cuda.is_available()


def placed(model: nn.Module, fake: Callable[[Tensor], Tensor]) -> nn.Module:
    """The model with tensors that hold nothing and are on another device than the CPU."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(fake(parameter.detach()))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)
    return model


@pytest.mark.feature("models on a GPU: one device, no waiting (simulated)")
@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("method", ["dense", "static"])
def test_a_step_stays_on_the_device_and_waits_for_nothing(
    make_config, tiny, monkeypatch, name: str, method: str
) -> None:
    """A mix of devices, or a shape that depends on what a tensor holds, is an error of such tensors."""
    settings = ["model.dropout=0.5"] if name in ("cdae", "multvae", "neumf", "convncf", "sasrec") else []
    trainer = Trainer(make_config(method, *settings, model=name), tiny)
    if name == "ultragcn":
        trainer.model.similar_items()
    with trainer.batches() as batches:
        batch = next(iter(batches))
    mode = FakeTensorMode()

    def fake(tensor: Tensor, device: str | torch.device = "meta") -> Tensor:
        with mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    model = placed(trainer.model.train(), fake)
    with monkeypatch.context() as patch:
        patch.setattr(devices, "sent", fake)
        batch = moved(batch, torch.device("meta"))
    with mode:
        loss = model.loss(batch, 3)
        loss.backward()
    assert loss.device.type == "meta"
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.device.type == "meta" for gradient in gradients)


@pytest.mark.gpu
@pytest.mark.skipif(no_gpu, reason="no CUDA device")
@pytest.mark.feature("models on a GPU")
@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("method", ["dense", "masked", "dsl"])
def test_training_on_a_gpu_equals_training_on_the_cpu(
    make_config, tiny, name: str, method: str, float64
) -> None:
    trainers = [
        Trainer(make_config(method, f"train.device={device}", "train.epochs=3", model=name), tiny)
        for device in ("cpu", "cuda")
    ]
    losses = [[trainer.run_epoch()["loss"] for _ in range(3)] for trainer in trainers]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)
    for module in (module for trainer in trainers for module in trainer.model.modules()):
        if isinstance(module, sparsecore.SparseModule):
            module.set_encoding("csr")  # each device has the one that it reads best
    cpu, gpu = (trainer.model.state_dict() for trainer in trainers)
    for key, tensor in cpu.items():
        assert gpu[key].device.type == "cuda"
        torch.testing.assert_close(gpu[key].cpu(), tensor, rtol=1e-5, atol=1e-8, msg=key)
    for part in (tiny.validation, tiny.test):
        for key, value in trainers[0].evaluate(part).items():
            assert trainers[1].evaluate(part)[key] == pytest.approx(value, abs=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(no_gpu, reason="no CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.feature("models on a GPU")
@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("method", ["dense", "dsl"])
def test_a_training_step_does_not_wait_for_the_gpu(make_config, tiny, name: str, method: str) -> None:
    """The third one: the first ones compile kernels and make the optimizer's state, the fifth one explores."""
    trainer = Trainer(make_config(method, "train.device=cuda", model=name), tiny)
    with trainer.batches() as batches:
        batch = next(iter(batches))
    for _ in range(2):
        trainer.train_step(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.train_step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(no_gpu, reason="no CUDA device")
@pytest.mark.feature("models on a GPU")
def test_a_run_goes_on_and_serves_on_another_device(make_config, tiny, tmp_path) -> None:
    config = make_config("dsl", "train.device=cuda", "train.epochs=4", "train.stop_epoch=2")
    session.train(config, tmp_path / "run", dataset=tiny, quiet=True)
    found = {device: session.evaluate_run(tmp_path / "run", device=device) for device in ("cpu", "cuda")}
    assert found["cpu"]["test"] == pytest.approx(found["cuda"]["test"], abs=1e-3)
    lists = [
        SavedRecommender.load(tmp_path / "run", device).recommend(tiny.user_ids[0], k=5)
        for device in ("cpu", "cuda")
    ]
    assert [item for item, _ in lists[0]] == [item for item, _ in lists[1]]


def test_thinned_interactions_are_the_same_with_weights_and_without() -> None:
    batch = Interactions(torch.tensor([3, 1, 2, 0]), torch.tensor([0, 3, 3, 4]), torch.arange(3))
    kept = torch.tensor([True, False, True, True])
    fewer, weights = batch.thinned(kept, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert fewer.items.tolist() == [3, 2, 0]
    assert fewer.pointers.tolist() == [0, 2, 2, 3]
    assert weights is not None
    assert weights.tolist() == [1.0, 3.0, 4.0]
    assert batch.thinned(kept, None)[1] is None


def test_a_device_that_is_not_there_is_refused(make_config, tiny) -> None:
    with pytest.raises(ConfigError, match="device 'gpu' cannot be used here"):
        find_device("gpu")
    with pytest.raises(
        ConfigError, match="device 'meta' cannot be used here: it holds shapes and no numbers"
    ):
        find_device("meta")
    if no_gpu:
        with pytest.raises(RecsysError, match="device 'cuda' cannot be used here"):
            Trainer(make_config("dsl", "train.device=cuda"), tiny)


def test_the_device_does_not_change_what_a_run_is(make_config) -> None:
    assert make_config("dsl").hash == make_config("dsl", "train.device=cuda:1").hash
