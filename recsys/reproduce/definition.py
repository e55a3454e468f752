"""What a table of results is made of, and what others have published for its rows."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator

from recsys.config import Config
from recsys.errors import ConfigError
from recsys.settings import Section

__all__ = [
    "PartRow",
    "Published",
    "PublishedResult",
    "TableDefinition",
    "TableRow",
    "load_published",
    "load_table",
    "tables",
]

Method = Literal["dense", "masked", "static", "dsl"]


class PartRow(Section):
    """A preset, and settings that differ from the preset's."""

    preset: str
    set: dict[str, Any] = Field(default={})

    @field_validator("set", mode="before")
    @classmethod
    def _flat(cls, given: Any) -> Any:
        """TOML reads ``train.lr = 0.01`` without quotes as a table: it sets one setting, not all of [train]."""
        return dict(_flattened(given)) if isinstance(given, dict) else given


class TableRow(PartRow):
    """What a row shows.

    metrics: those to show; none: those of the table.
    pretrained: what runs take initial weights from, by the name of the part (`train.pretrained`): a preset that is
        trained first, with the method, density and seed of the run.
    """

    metrics: list[str] = Field(default=[])
    pretrained: dict[str, PartRow] = Field(default={})


def _flattened(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and "." not in key:
            yield from _flattened(value, f"{above}{key}.")
        else:
            yield above + key, value


class TableDefinition(Section):
    """Rows of presets, each trained with every method, density and seed. epochs: 0 takes those of the preset."""

    title: str
    rows: list[TableRow]
    seeds: int = Field(default=3, gt=0)
    epochs: int = Field(default=0, ge=0)
    methods: list[Method] = Field(default=["dense", "static", "masked", "dsl"], min_length=1)
    densities: list[float] = Field(default=[0.7, 0.5, 0.25, 0.1], min_length=1)
    metrics: list[str] = Field(default=["recall@20", "ndcg@20"], min_length=1)


class PublishedResult(Section):
    """Metrics of a dense model on a data set, where they are printed, and in what they differ from ours.

    negatives: how many sampled items each target was ranked among; 0 for the whole catalogue.
    """

    model: str
    dataset: str
    negatives: int = 0
    values: dict[str, float]
    source: str
    note: str = ""


class Published(Section):
    """All published results that are known; `about` goes with them."""

    about: str
    results: list[PublishedResult]

    def find(self, config: Config) -> list[PublishedResult]:
        """Those of a model on a data set, whatever its split (``ml-1m/dsl_multvae`` is ``ml-1m``), ranked alike."""
        ranking = config.evaluation
        negatives = ranking.negatives if ranking.protocol == "sampled" else 0
        wanted = config.model.name, config.data.name.partition("/")[0], negatives
        return [one for one in self.results if (one.model, one.dataset, one.negatives) == wanted]


def tables() -> list[str]:
    """Names of the tables that come with the package."""
    folder = resources.files("recsys") / "tables"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


def load_table(name: str) -> TableDefinition:
    """A table of the package, or of a file that ends in .toml.

    Raises:
        ConfigError: unknown, unreadable or not valid.
    """
    if name.endswith(".toml"):
        return _read(Path(name), TableDefinition)
    if name not in tables():
        raise ConfigError(
            f"unknown table {name!r}; valid: {', '.join(tables())}, or the path of a .toml file"
        )
    return _read(resources.files("recsys") / "tables" / f"{name}.toml", TableDefinition)


def load_published() -> Published:
    """What comes with the package."""
    return _read(resources.files("recsys") / "published.toml", Published)


Read = TypeVar("Read", TableDefinition, Published)


def _read(path: Path | Traversable, kind: type[Read]) -> Read:
    try:
        return kind.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"cannot read the table {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors()]
        raise ConfigError(f"{path}: {'; '.join(problems)}") from None
