"""What is not a step: quality after a short training, saved models, the time an import takes."""

from __future__ import annotations

import atexit
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from harness.suite import frozen
from harness.suite.models import SMALL, config_of
from harness.suite.workload import Form, Workload

__all__ = ["SEEDS", "others", "quality"]

SEEDS = 3
_QUALITY = ("dense", "masked@0.25", "static@0.25", "dsl@0.25")
_EPOCHS = 10
_DATA = {"users": 300, "items": 250, "interactions": 9000, "clusters": 8}
_SAVED = ("dense", "dsl@0.25")


def _train(model: str, form: str) -> Callable[[], Mapping[str, float]]:
    def counts() -> Mapping[str, float]:
        from recsys.training.session import load_dataset, train

        losses = []
        for seed in range(SEEDS):
            config = config_of(model, form, _DATA, seed=seed, epochs=_EPOCHS, evaluate_every=_EPOCHS)
            losses.append(1 - train(config, dataset=load_dataset(config), quiet=True)["test"]["ndcg@20"])
        return {
            "quality_loss": sum(losses) / SEEDS,
            **{f"quality_loss_{seed}": loss for seed, loss in enumerate(losses)},
        }

    return counts


def _short(model: str) -> dict[str, Form]:
    return {form: Form(None, _train(model, form)) for form in _QUALITY}


def quality() -> list[Workload]:
    """The same short training of each small model, on the same data, from the same seeds."""
    return [
        Workload(
            f"{model}-quality",
            "quality",
            f"1 - NDCG@20 of {model} after {_EPOCHS} epochs on synthetic data, mean over {SEEDS} seeds",
            _QUALITY,
            partial(_short, model),
            ("recsys.training.session.train", "recsys.config.load_config", f"recsys.models.{model}"),
            quick=True,
        )
        for model in SMALL
    ]


def _import(module: str) -> Callable[[], object]:
    # Without the folder that this process was started in, so that the same revision is found as here.
    command = [sys.executable, "-P", "-c", f"import {module}"]
    return lambda: subprocess.run(command, check=True, capture_output=True)


def _saving(model: str) -> Callable[[], dict[str, Form]]:
    def build() -> dict[str, Form]:
        from recsys.recommender import SavedRecommender
        from recsys.training.session import load_dataset, saved_recommender
        from recsys.training.trainer import Trainer

        place = Path(tempfile.mkdtemp(prefix="harness-"))
        atexit.register(shutil.rmtree, place, ignore_errors=True)
        forms = {}
        for name in _SAVED:
            config = config_of(model, name)
            server: Any = saved_recommender(Trainer(config, load_dataset(config)))
            folder = place / name

            def both(server: Any = server, folder: Path = folder) -> None:
                server.save(folder, overwrite=True)
                SavedRecommender.load(folder)

            def size(folder: Path = folder) -> dict[str, float]:
                return {"file_bytes": (folder / "model.safetensors").stat().st_size}

            forms[name] = Form(both, size)
        forms["frozen"] = Form(frozen.stream(500_000))
        return forms

    return build


def others() -> list[Workload]:
    """Import, save and load."""
    return [
        Workload(
            "import",
            "other",
            "a fresh interpreter that imports sparsecore; frozen is one that imports torch",
            ("import",),
            lambda: {"import": Form(_import("sparsecore"), None), "frozen": Form(_import("torch"))},
            quick=True,
            samples=3,
        ),
        *(
            Workload(
                f"{model}-save-load",
                "other",
                f"saving a recommender ({model}) and loading it again",
                _SAVED,
                _saving(model),
                ("recsys.recommender.SavedRecommender", f"recsys.models.{model}"),
                quick=True,
            )
            for model in ("multvae", "lightgcn")
        ),
    ]
