"""The settings of every model, as a run's configuration holds them. Importing this imports no model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from recsys.settings import Section

__all__ = [
    "MODEL_SETTINGS",
    "WITHOUT_PRODUCTS",
    "BPRMFConfig",
    "CDAEConfig",
    "ConvNCFConfig",
    "EASEConfig",
    "FittedConfig",
    "ItemKNNConfig",
    "LightGCNConfig",
    "ModelConfig",
    "MultVAEConfig",
    "NeuMFConfig",
    "PopularityConfig",
    "SASRecConfig",
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
    popularity: float = Field(default=0.0, ge=0)


class BPRMFConfig(Section):
    """Settings of `recsys.models.bprmf.BPRMF`."""

    name: Literal["bprmf"] = "bprmf"
    dim: int = Field(default=64, gt=0)
    regularization: float = Field(default=1e-4, ge=0)
    init_std: float = Field(default=0.1, gt=0)
    popularity: float = Field(default=0.0, ge=0)


class SASRecConfig(Section):
    """Settings of `recsys.models.sasrec.SASRec`."""

    name: Literal["sasrec"] = "sasrec"
    hidden: int = Field(default=50, gt=0)
    blocks: int = Field(default=2, ge=0)
    heads: int = Field(default=1, gt=0)
    max_length: int = Field(default=50, gt=0)
    dropout: float = Field(default=0.5, ge=0, lt=1)

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> SASRecConfig:
        if self.hidden % self.heads:
            raise ValueError(f"hidden = {self.hidden} cannot be divided among heads = {self.heads}")
        return self


class ConvNCFConfig(Section):
    """Settings of `recsys.models.convncf.ConvNCF`."""

    name: Literal["convncf"] = "convncf"
    dim: int = Field(default=64, gt=0)
    channels: list[Annotated[int, Field(gt=0)]] = Field(default=[32] * 6, min_length=1)
    kernels: list[Annotated[int, Field(gt=0)]] = Field(default=[2] * 6, min_length=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    embedding_regularization: float = Field(default=0.01, ge=0)
    conv_regularization: float = Field(default=1.0, ge=0)
    output_regularization: float = Field(default=10.0, ge=0)
    unregularized_epochs: int = Field(default=1, ge=0)
    popularity: float = Field(default=0.0, ge=0)
    init_std: float = Field(default=0.01, gt=0)


class CDAEConfig(Section):
    """Settings of `recsys.models.cdae.CDAE`."""

    name: Literal["cdae"] = "cdae"
    hidden: int = Field(default=64, gt=0)
    activation: Literal["sigmoid", "relu", "tanh", "identity"] = "relu"
    dropout: float = Field(default=0.5, ge=0, lt=1)
    rescale: bool = True
    loss: Literal["bce", "sampled", "squared", "multinomial"] = "bce"
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
    offset: Literal["none", "prior"] = "none"


class NeuMFConfig(Section):
    """Settings of `recsys.models.neumf.NeuMF`."""

    name: Literal["neumf"] = "neumf"
    factors: int = Field(default=8, gt=0)
    layers: list[Annotated[int, Field(gt=0)]] = Field(default=[64, 32, 16, 8], min_length=2)
    parts: Literal["both", "gmf", "mlp"] = "both"
    negatives: int = Field(default=4, gt=0)
    popularity: float = Field(default=0.0, ge=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    regularization: float = Field(default=0.0, ge=0)
    loss: Literal["samples", "means"] = "samples"
    init_std: float = Field(default=0.01, gt=0)


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
    | ConvNCFConfig
    | EASEConfig
    | ItemKNNConfig
    | LightGCNConfig
    | MultVAEConfig
    | NeuMFConfig
    | PopularityConfig
    | SASRecConfig
    | UltraGCNConfig,
    Field(discriminator="name"),
]

MODEL_SETTINGS: dict[str, type[Section]] = {
    section.model_fields["name"].default: section
    for section in (
        BPRMFConfig,
        CDAEConfig,
        ConvNCFConfig,
        EASEConfig,
        ItemKNNConfig,
        LightGCNConfig,
        MultVAEConfig,
        NeuMFConfig,
        PopularityConfig,
        SASRecConfig,
        UltraGCNConfig,
    )
}

# Tables whose rows are looked up, and models that are not trained: no step multiplies by a dense weight matrix.
WITHOUT_PRODUCTS = (BPRMFConfig, LightGCNConfig, UltraGCNConfig, FittedConfig)
