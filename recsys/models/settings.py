"""The settings of every model, as a run's configuration holds them. Importing this imports no model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from recsys.settings import Section

__all__ = [
    "MODEL_SETTINGS",
    "BPRMFConfig",
    "CDAEConfig",
    "EASEConfig",
    "FittedConfig",
    "ItemKNNConfig",
    "LightGCNConfig",
    "ModelConfig",
    "MultVAEConfig",
    "PopularityConfig",
    "UltraGCNConfig",
]


class MultVAEConfig(Section):
    """Settings of `recsys.models.multvae.MultVAE`."""

    name: Literal["multvae"] = "multvae"
    hidden: int = Field(default=600, gt=0)
    latent: int = Field(default=200, gt=0)
    dropout: float = Field(default=0.5, ge=0, lt=1)
    beta_cap: float = Field(default=0.2, ge=0)
    anneal_steps: int = Field(default=200_000, gt=0)


class LightGCNConfig(Section):
    """Settings of `recsys.models.lightgcn.LightGCN`."""

    name: Literal["lightgcn"] = "lightgcn"
    dim: int = Field(default=64, gt=0)
    hops: int = Field(default=3, gt=0)
    regularization: float = Field(default=1e-4, ge=0)
    init: Literal["normal", "xavier_uniform"] = "normal"


class BPRMFConfig(Section):
    """Settings of `recsys.models.bprmf.BPRMF`."""

    name: Literal["bprmf"] = "bprmf"
    dim: int = Field(default=64, gt=0)
    regularization: float = Field(default=1e-4, ge=0)
    init_std: float = Field(default=0.1, gt=0)


class CDAEConfig(Section):
    """Settings of `recsys.models.cdae.CDAE`."""

    name: Literal["cdae"] = "cdae"
    hidden: int = Field(default=64, gt=0)
    activation: Literal["sigmoid", "relu", "tanh", "identity"] = "relu"
    dropout: float = Field(default=0.5, ge=0, lt=1)
    rescale: bool = True
    loss: Literal["bce", "sampled", "multinomial"] = "bce"
    negatives: int = Field(default=5, gt=0)
    regularization: float = Field(default=0.0, ge=0)


class UltraGCNConfig(Section):
    """Settings of `recsys.models.ultragcn.UltraGCN`."""

    name: Literal["ultragcn"] = "ultragcn"
    dim: int = Field(default=64, gt=0)
    negatives: int = Field(default=800, gt=0)
    negative_weight: float = Field(default=300.0, ge=0)
    item_weight: float = Field(default=5e-4, ge=0)
    regularization: float = Field(default=1e-4, ge=0)
    w1: float = Field(default=1e-8, ge=0)
    w2: float = Field(default=1.0, ge=0)
    w3: float = Field(default=1e-8, ge=0)
    w4: float = Field(default=1.0, ge=0)
    neighbors: int = Field(default=10, ge=0)
    init_std: float = Field(default=1e-4, gt=0)


class FittedConfig(Section):
    """Settings of a model that is fitted at once (`recsys.models.fitted`) and has no weights to be sparse."""


class PopularityConfig(FittedConfig):
    """Settings of `recsys.models.fitted.Popularity`."""

    name: Literal["popularity"] = "popularity"


class ItemKNNConfig(FittedConfig):
    """Settings of `recsys.models.fitted.ItemKNN`."""

    name: Literal["itemknn"] = "itemknn"
    neighbors: int = Field(default=100, gt=0)
    shrinkage: float = Field(default=0.0, ge=0)


class EASEConfig(FittedConfig):
    """Settings of `recsys.models.fitted.EASE`."""

    name: Literal["ease"] = "ease"
    regularization: float = Field(default=500.0, gt=0)
    max_items: int = Field(default=30_000, gt=0)


ModelConfig = Annotated[
    BPRMFConfig
    | CDAEConfig
    | EASEConfig
    | ItemKNNConfig
    | LightGCNConfig
    | MultVAEConfig
    | PopularityConfig
    | UltraGCNConfig,
    Field(discriminator="name"),
]

MODEL_SETTINGS: dict[str, type[Section]] = {
    section.model_fields["name"].default: section
    for section in (
        BPRMFConfig,
        CDAEConfig,
        EASEConfig,
        ItemKNNConfig,
        LightGCNConfig,
        MultVAEConfig,
        PopularityConfig,
        UltraGCNConfig,
    )
}
