"""From a name and settings to a model: the one place that knows which recommenders there are."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from recsys.errors import ConfigError, DataError
from recsys.models.base import Recommender
from recsys.models.bprmf import BPRMF
from recsys.models.cdae import CDAE
from recsys.models.convncf import ConvNCF
from recsys.models.fitted import EASE, Fitted, ItemKNN, Popularity
from recsys.models.layers import Density
from recsys.models.lightgcn import LightGCN
from recsys.models.multvae import MultVAE
from recsys.models.neumf import NeuMF
from recsys.models.sasrec import SASRec
from recsys.models.ultragcn import UltraGCN

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from scipy.sparse import csr_array

__all__ = ["FITTED", "MODELS", "build_model", "model_class"]


def build_model(
    settings: Mapping[str, Any],
    train: csr_array,
    density: float | Density = 1.0,
    generator: torch.Generator | None = None,
    order: NDArray[np.int64] | None = None,
) -> Recommender:
    """A new model.

    Args:
        settings: {"name": one of `MODELS` or `FITTED`, and keyword arguments of its class}.
        train: (n_users, n_items) interactions: the number of items, and the graph of a model that has one.
        density: of its weights, or by name; 1 means dense layers.
        generator: its initial values, index sets and noise follow from it.
        order: `Dataset.order`, read by a model of sequences only.

    Raises:
        ConfigError: for a name that is not known.
        DataError: for a model of sequences without an order.
    """
    options = dict(settings)
    kind = model_class(options.pop("name"))
    if kind.ordered:
        if order is None:
            raise DataError(
                f"model {settings['name']} needs to know in which order users have chosen, and this data does not "
                "tell; use data whose interactions have timestamps, or a model that reads no order"
            )
        options["order"] = order
    return kind.from_train(train, density=density, generator=generator, **options)


def model_class(name: str) -> type[Recommender]:
    """The class of a model.

    Raises:
        ConfigError: for a name that is not known.
    """
    classes: dict[str, type[Recommender]] = {**MODELS, **FITTED}
    if name not in classes:
        known = sorted(classes)
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f", did you mean {nearest[0]!r}?" if nearest else ""
        raise ConfigError(f"unknown model {name!r}{hint}; known: {', '.join(known)}")
    return classes[name]


MODELS: dict[str, type[Recommender]] = {
    "bprmf": BPRMF,
    "cdae": CDAE,
    "convncf": ConvNCF,
    "lightgcn": LightGCN,
    "multvae": MultVAE,
    "neumf": NeuMF,
    "sasrec": SASRec,
    "ultragcn": UltraGCN,
}

FITTED: dict[str, type[Fitted]] = {
    "ease": EASE,
    "itemknn": ItemKNN,
    "popularity": Popularity,
}
