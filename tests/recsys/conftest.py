"""A data set and settings small enough that a training run takes a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from recsys.config import Config, load_config
from recsys.data import Dataset, load

TINY_DATA = {"users": 120, "items": 60, "interactions": 1800, "clusters": 6}


@pytest.fixture(scope="session")
def tiny() -> Dataset:
    return load("synthetic", seed=1, **TINY_DATA)


@pytest.fixture
def make_config() -> Callable[..., Config]:
    """Settings for the tiny data: `make_config("dsl", "train.epochs=3")`."""

    def make(method: str = "dsl", *overrides: str, model: str = "multvae") -> Config:
        sizes: dict[str, Any] = (
            {"hidden": 32, "latent": 8, "anneal_steps": 1000}
            if model == "multvae"
            else {"dim": 16, "hops": 2}
        )
        options: dict[str, Any] = {
            "data.seed": 1,
            "data.options": TINY_DATA,
            "model.name": model,
            **{f"model.{name}": value for name, value in sizes.items()},
            "sparsity.method": method,
            "sparsity.density": 0.4,
            "sparsity.interval": 5,
            "train.epochs": 12,
            "train.batch_size": 16 if model == "multvae" else 128,
            "train.lr": 5e-3 if model == "multvae" else 2e-2,
        }
        return load_config(overrides=overrides, options=options)

    return make
