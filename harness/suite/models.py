"""Training step and recommendation of all six models: dense, masked, static and dynamic sparse."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from harness.suite import frozen
from harness.suite.workload import Form, Workload, density_of, method_of

__all__ = ["DENSITIES", "SMALL", "SMALL_DATA", "config_of", "models"]

DENSITIES = (0.5, 0.25, 0.1)
_TRAINED = ("dense", *(f"{method}@{f:g}" for method in ("masked", "static", "dsl") for f in DENSITIES))
_SERVED = ("dense", *(f"dsl@{f:g}" for f in DENSITIES))
SMALL_DATA: dict[str, Any] = {"users": 1000, "items": 1500, "interactions": 30_000, "clusters": 12}

# Of each model: settings that make it small, and those of training.
SMALL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "neumf": ({"factors": 32, "layers": [128, 64, 32], "init_std": 0.1}, {"batch_size": 256, "lr": 3e-3}),
    "convncf": (
        {
            "dim": 16,
            "channels": [16, 16],
            "kernels": [4, 4],
            "embedding_regularization": 0.0,
            "conv_regularization": 0.0,
            "output_regularization": 0.0,
            "init_std": 0.3,
        },
        {"batch_size": 256, "lr": 3e-3},
    ),
    "cdae": ({"hidden": 128}, {"batch_size": 64, "lr": 3e-3}),
    "multvae": ({"hidden": 200, "latent": 64, "anneal_steps": 1000}, {"batch_size": 64, "lr": 3e-3}),
    "lightgcn": ({"dim": 32, "hops": 2}, {"batch_size": 1024, "lr": 1e-2}),
    "ultragcn": (
        {"dim": 32, "negatives": 50, "negative_weight": 10.0, "init_std": 0.05},
        {"batch_size": 256, "lr": 3e-3},
    ),
}

# Presets whose shapes are those of published work, with the data that they need.
_REAL = {
    "neumf-ml-1m": "ml-1m",
    "cdae-ml-1m": "ml-1m",
    "multvae-ml-1m": "ml-1m",
    "convncf-ml-1m": "ml-1m",
    "lightgcn-gowalla": "gowalla",
    "ultragcn-yelp2018": "yelp2018",
}
_NEEDS = ("sparsecore.MacCounter", "recsys.training.probe.StepProbe", "recsys.config.load_config")


def config_of(model: str, form: str, data: dict[str, Any] = SMALL_DATA, **train: Any) -> Any:
    """Settings of a small model trained as a form says, on synthetic data of these sizes."""
    from recsys.config import load_config

    sizes, training = SMALL[model]
    options = {
        "data.options": data,
        "model.name": model,
        **{f"model.{name}": value for name, value in sizes.items()},
        "sparsity.method": method_of(form),
        "sparsity.density": density_of(form),
        "sparsity.interval": 20,
        **{f"train.{name}": value for name, value in {**training, **train}.items()},
    }
    return load_config(options=options)


def _small(model: str) -> tuple[Callable[[str], Any], Any]:
    """Settings by form, and the data."""
    from recsys.training.session import load_dataset

    return (lambda form: config_of(model, form)), load_dataset(config_of(model, "dense"))


def _preset(preset: str) -> tuple[Callable[[str], Any], Any]:
    from recsys.config import load_config
    from recsys.training.session import load_dataset

    def config(form: str) -> Any:
        chosen = {"sparsity.method": method_of(form), "sparsity.density": density_of(form)}
        return load_config(preset, options=chosen)

    return config, load_dataset(config("dense"))


def _training(source: Callable[[], tuple[Callable[[str], Any], Any]]) -> Callable[[], dict[str, Form]]:
    def build() -> dict[str, Form]:
        from recsys.training.probe import StepProbe

        config, dataset = source()
        forms = {}
        for name in _TRAINED:
            probe = StepProbe(config(name), dataset)

            def counts(probe: StepProbe = probe) -> dict[str, float]:
                found = {f"macs_{phase}": macs for phase, macs in probe.macs().items()}
                size = probe.resident_bytes()
                return {**found, "resident_bytes": size.total, "state_bytes": size.optimizer_state}

            peak = probe.exploring_step if probe.explores else probe.step
            forms[name] = Form(probe.step, counts, peak)
        # A decoder's products, or rows of tables: either way about as long as a step of these small models.
        forms["frozen"] = Form(frozen.products(2000, 500, 0.2, 64))
        return forms

    return build


def _serving(source: Callable[[], tuple[Callable[[str], Any], Any]]) -> Callable[[], dict[str, Form]]:
    def build() -> dict[str, Form]:
        import sparsecore
        from recsys.training.probe import typical_user
        from recsys.training.session import saved_recommender
        from recsys.training.trainer import Trainer

        config, dataset = source()
        user, forms = typical_user(dataset), {}
        for name in _SERVED:
            server = saved_recommender(Trainer(config(name), dataset))

            def ask(server: Any = server) -> object:
                return server.recommend(user)

            def counts(server: Any = server, ask: Callable[[], object] = ask) -> dict[str, float]:
                counter = sparsecore.MacCounter()
                with counter.phase("call"):
                    ask()
                return {
                    "macs": counter.total,
                    "resident_bytes": sparsecore.resident_bytes(server.model).total,
                }

            forms[name] = Form(ask, counts)
        forms["frozen"] = Form(frozen.products(1000, 64, 0.5, 8))
        return forms

    return build


def models() -> list[Workload]:
    """Training and serving of every model: small ones on synthetic data, and presets on real data."""
    sources: list[tuple[str, str, Callable[[], Any], str | None]] = [
        (model, "synthetic data: 1,000 users, 1,500 items", partial(_small, model), None) for model in SMALL
    ]
    sources += [
        (preset, f"{data}, its preset", partial(_preset, preset), data) for preset, data in _REAL.items()
    ]
    found = []
    for name, what, source, data in sources:
        model = name.partition("-")[0]
        needs = (*_NEEDS, f"recsys.models.{model}")
        found += [
            Workload(
                f"{name}-train",
                "train",
                f"training step of {model}, {what}; memory's peak with an exploration",
                _TRAINED,
                _training(source),
                needs,
                data,
                quick=data is None,
            ),
            Workload(
                f"{name}-recommend",
                "infer",
                f"ten items for a user by {model}, {what}",
                _SERVED,
                _serving(source),
                needs,
                data,
                quick=data is None,
            ),
        ]
    return found
