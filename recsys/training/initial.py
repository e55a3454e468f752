"""The model that a run begins with: initial values, and index sets or masks."""

from __future__ import annotations

import torch
from torch import Tensor

import sparsecore
from recsys.config import Config
from recsys.data import Dataset
from recsys.errors import ConfigError
from recsys.models.base import Recommender
from recsys.models.build import build_model
from recsys.models.layers import Density
from recsys.training.densities import density_of, expect_sparse_weights
from recsys.training.pretrained import load_parts
from sparsecore.nn.base import SparseModule

__all__ = ["make_model"]


def make_model(
    config: Config, dataset: Dataset, seed: int, fresh: bool
) -> tuple[Recommender, dict[str, Tensor] | None]:
    """The model of a run, and the masks of a masked one.

    Masked begins as static and dsl do: with their index sets as masks, and their values.

    Args:
        seed: of initial values, index sets and noise.
        fresh: take the weights that `config.train.pretrained` names, and masks. Without it the model is only the
            right one to load a run's weights into, and there are no masks.

    Raises:
        ConfigError: the model has no weights to be sparse, or scores no users that are held out as these are;
            pre-trained parts do not fit.
    """
    sparsity = config.sparsity

    def built(density: float | Density) -> Recommender:
        generator = torch.Generator().manual_seed(seed)
        return build_model(config.model.model_dump(), dataset.train, density, generator, dataset.order)

    simulated = fresh and sparsity.method == "masked" and sparsity.density < 1
    stored = sparsity.method in ("static", "dsl") or simulated
    model = built(density_of(config) if stored else 1.0)
    _expect_known_users(model, config, dataset)
    if sparsity.method != "dense":
        expect_sparse_weights(model, config)
    if fresh and config.train.pretrained:
        model.initialize_from(load_parts(config.train.pretrained, dataset))
    if fresh:
        model.tune()
    if not simulated:
        return model, None
    masks, dense = sparsecore.masks_of(model), built(1.0)
    dense.load_state_dict(_dense_state(model))
    return dense, masks


def _dense_state(model: Recommender) -> dict[str, Tensor]:
    """The weights of a model with sparse layers as those of the same model with dense ones."""
    sparse = {name: module for name, module in model.named_modules() if isinstance(module, SparseModule)}
    state = {}
    for name, value in model.state_dict().items():
        layer, _, own = name.rpartition(".")
        if layer not in sparse or own == "bias":
            state[name] = value
    for name, module in sparse.items():
        weight = name if isinstance(module, sparsecore.SparseBias) else f"{name}.weight"
        state[weight] = module.pattern.to_dense(module.values.detach()).view(module.dense_shape)
    return state


def _expect_known_users(model: Recommender, config: Config, dataset: Dataset) -> None:
    """Refuse held-out users before anything is trained, not when they are to be scored."""
    heldout = any((part.users < 0).any() for part in (dataset.validation, dataset.test))
    if heldout and (model.knows_users or model.ordered):
        why = (
            "scores users of its training data only" if model.knows_users else "needs the order of histories"
        )
        raise ConfigError(
            f"{config.model.name} {why}, but {dataset.name} holds users out (a history to show, without order); take "
            "multvae, ease, itemknn or popularity, or another split (data.options.split)"
        )
