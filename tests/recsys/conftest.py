"""A data set and settings small enough that a training run takes a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from recsys.config import Config, load_config
from recsys.data import Dataset, load

# Of each model: settings that make it small, batch size, learning rate (of no use to one that is fitted at once).
SMALL: dict[str, tuple[dict[str, Any], int, float]] = {
    "bprmf": ({"dim": 32}, 64, 3e-2),
    "cdae": ({"hidden": 32}, 16, 1e-2),
    "convncf": (
        {
            "dim": 16,
            "channels": [8, 8],
            "kernels": [4, 4],
            "embedding_regularization": 0.0,
            "conv_regularization": 0.0,
            "output_regularization": 0.0,
            "init_std": 0.3,
        },
        64,
        1e-2,
    ),
    "ease": ({"regularization": 10.0}, 64, 1e-3),
    "itemknn": ({"neighbors": 20}, 64, 1e-3),
    "lightgcn": ({"dim": 16, "hops": 2}, 128, 2e-2),
    "multvae": ({"hidden": 32, "latent": 8, "anneal_steps": 1000}, 16, 5e-3),
    "neumf": ({"factors": 8, "layers": [16, 16, 8], "init_std": 0.1}, 64, 2e-2),
    "popularity": ({}, 64, 1e-3),
    "sasrec": ({"hidden": 16, "blocks": 1, "max_length": 20, "dropout": 0.1}, 16, 2e-2),
    "ultragcn": ({"dim": 32, "negatives": 20, "negative_weight": 3.0, "init_std": 0.05}, 64, 2e-2),
}
TINY_DATA = {"users": 120, "items": 60, "interactions": 1800, "clusters": 6}


@pytest.fixture(scope="session")
def tiny() -> Dataset:
    return load("synthetic", seed=1, **TINY_DATA)


@pytest.fixture
def make_config() -> Callable[..., Config]:
    """Settings for the tiny data: `make_config("dsl", "train.epochs=3")`."""

    def make(method: str = "dsl", *overrides: str, model: str = "multvae") -> Config:
        sizes, batch_size, lr = SMALL[model]
        options: dict[str, Any] = {
            "data.seed": 1,
            "data.options": TINY_DATA,
            "model.name": model,
            **{f"model.{name}": value for name, value in sizes.items()},
            "sparsity.method": method,
            "sparsity.density": 0.4,
            "sparsity.interval": 5,
            "train.epochs": 12,
            "train.batch_size": batch_size,
            "train.lr": lr,
        }
        return load_config(overrides=overrides, options=options)

    return make


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sweeps train here, one run after another, which is quicker than processes; returns the folders trained in."""
    from recsys.sweep import engine, workers

    trained: list[str] = []

    def run_here(tasks, jobs, threads, on_event):
        failures = {}
        for task in tasks:
            on_event(workers.Event("start", task))
            done = workers._train(
                task, threads, lambda record, task=task: on_event(workers.Event("epoch", task, record=record))
            )
            trained.append(task.folder.name)
            if isinstance(done, workers.Failure):
                failures[task.folder] = done
                on_event(workers.Event("failed", task, failure=done))
            else:
                on_event(workers.Event("done", task))
        return failures

    monkeypatch.setattr(engine, "run_tasks", run_here)
    return trained
