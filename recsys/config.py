"""What a training run is made of: a validated tree of settings, from presets, TOML files and the command
line.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError, model_validator

from recsys.errors import ConfigError
from recsys.models.settings import MODEL_SETTINGS, WITHOUT_PRODUCTS, FittedConfig, ModelConfig, MultVAEConfig
from recsys.sections import DataConfig, EvaluationConfig, SparsityConfig, TrainConfig, nearest
from recsys.settings import Section

__all__ = [
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "SparsityConfig",
    "TrainConfig",
    "load_config",
    "parse_value",
    "presets",
]

_HASHED = re.compile(r"-seed\d+-[0-9a-f]{8}$")  # the folder of a cell, see `recsys.sweep.grid.Cell`


class Config(Section):
    """A whole run. `to_dict` and `hash` identify it; `load_config` makes it."""

    data: DataConfig = DataConfig()
    model: ModelConfig = MultVAEConfig()
    sparsity: SparsityConfig = SparsityConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _precision_matters(self) -> Config:
        if self.train.precision != "float32" and isinstance(self.model, WITHOUT_PRODUCTS):
            raise ValueError(
                f"train.precision: {self.model.name} has no products of dense weights that could be in "
                f"{self.train.precision}; expected 'float32'"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, without the settings that are None: TOML has no word for them."""
        return self.model_dump(mode="json", exclude_none=True)

    def to_toml(self) -> str:
        return tomli_w.dumps(self.to_dict())

    @property
    def hash(self) -> str:
        """16 hexadecimal digits that change with every setting that decides what comes out.

        The place of the data does not, nor do a further log, the device, and the place of runs of a sweep or table that
        weights are taken from, whose names hold the hash of their settings.
        """
        content = self.to_dict()
        content["data"].pop("dir", None)
        if Path(self.data.name).is_absolute():
            content["data"]["name"] = Path(self.data.name).name
        content["train"].pop("tensorboard")
        content["train"].pop("device")
        parts = content["train"]["pretrained"]
        content["train"]["pretrained"] = {
            part: Path(folder).name if _HASHED.search(Path(folder).name) else folder
            for part, folder in parts.items()
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def anchored(self) -> Config:
        """A copy whose paths do not depend on where it is read: relative ones are taken from the working directory."""
        from recsys.data.loaders import anchored  # settings alone need not wait for scipy

        data, pretrained = self.data, self.train.pretrained
        name = anchored(data.name, data.dir)
        place = None if data.dir is None else str(Path(data.dir).resolve())
        parts = {part: str(Path(folder).resolve()) for part, folder in pretrained.items()}
        return self.replace(data={"name": name, "dir": place}, train={"pretrained": parts})

    def replace(self, **sections: Mapping[str, Any]) -> Config:
        """A copy with some settings changed, validated: `config.replace(train={"epochs": 3})`."""
        tree = self.to_dict()
        for name, values in sections.items():
            tree[name] = {**tree.get(name, {}), **values}
        return _validate(tree)


def presets() -> list[str]:
    """Names of the presets that come with the package."""
    folder = resources.files("recsys") / "presets"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


def load_config(
    preset: str | None = None,
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    variation: Mapping[str, Any] | None = None,
) -> Config:
    """Settings from, in rising precedence: defaults, a preset, a TOML file, `options`, `overrides`, `variation`.

    Args:
        preset: one of `presets()`.
        path: a TOML file with tables data, model, sparsity, train and evaluation.
        overrides: "table.key=value", value in TOML (`train.lr=0.01`, `train.ks=[10, 20]`); a word without
            quotes is text.
        options: {"table.key": value}; None means not given.
        variation: {"table.key": value}, what this run has other than its siblings.

    Where one of the last three names another model than preset and file, their settings of that model are dropped: they
    are not the new one's. So are a preset's ``data.options`` where another data set is named, which they would divide
    anew.

    Raises:
        ConfigError: unknown preset or key (naming the nearest valid one), unreadable file, value out of its
            range.
    """
    tree: dict[str, Any] = {}
    if preset is not None:
        if preset not in presets():
            raise ConfigError(
                f"unknown preset {preset!r}{nearest(preset, presets())}; valid: {', '.join(presets())}"
            )
        _merge(tree, tomllib.loads((resources.files("recsys") / "presets" / f"{preset}.toml").read_text()))
    file = {} if path is None else _read(Path(path))
    found: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set expects table.key=value (such as train.lr=0.01), got {text!r}")
        found[key.strip()] = parse_value(value.strip())
    layers = [
        {key: value for key, value in (options or {}).items() if value is not None},
        found,
        variation or {},
    ]
    flat_file = {f"data.{key}": value for key, value in _table(file, "data").items()}
    if _other(tree, "data", [flat_file, *layers]):
        tree["data"].pop("options", None)
    _merge(tree, file)
    if _other(tree, "model", layers):
        tree["model"] = {}
    for layer in layers:
        for key, value in layer.items():
            _set(tree, key, copy.deepcopy(value))  # another one may set a key inside it
    return _validate(tree)


def _table(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = tree.get(name, {})
    return table if isinstance(table, Mapping) else {}


def _other(tree: Mapping[str, Any], table: str, layers: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a layer names another model or data set than this table of the tree."""
    names = [layer[f"{table}.name"] for layer in layers if f"{table}.name" in layer]
    return (
        bool(names) and isinstance(tree.get(table), dict) and tree[table].get("name", names[-1]) != names[-1]
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def parse_value(text: str) -> Any:
    """A value in TOML; a word without quotes is text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _merge(tree: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *tables, last = key.split(".")
    for table in tables:
        tree = tree.setdefault(table, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{key!r}: {table!r} is a value, not a table of settings")
    tree[last] = value


def _validate(tree: dict[str, Any]) -> Config:
    # A `model` table that sets widths only means the default model.
    if isinstance(tree.get("model"), dict):
        tree = {**tree, "model": {"name": "multvae", **tree["model"]}}
    if _is_fitted(tree.get("model")) and isinstance(tree.get("sparsity", {}), dict):
        tree = {**tree, "sparsity": {"method": "dense", **tree.get("sparsity", {})}}
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(detail, tree) for detail in error.errors())) from None


def _is_fitted(model: Any) -> bool:
    """Whether a `model` table names a model that has no weights to be sparse."""
    section = MODEL_SETTINGS.get(str(model.get("name"))) if isinstance(model, dict) else None
    return section is not None and issubclass(section, FittedConfig)


def _explain(detail: Any, tree: Mapping[str, Any]) -> str:
    """One problem in our words: which key, what was wrong with it, what would be right."""
    # pydantic puts the tag of a union ("multvae") into the location; nobody wrote it.
    location = [str(part) for part in detail["loc"]]
    if location[:1] == ["model"] and len(location) > 1:
        location.pop(1)
    if detail["type"] == "boolean":  # found by the table, not by the key; see `Section`
        location.append(detail["ctx"]["field"])
    key = ".".join(location)
    if detail["type"] == "extra_forbidden":
        valid = _fields(location[:-1], tree)
        table = f"[{'.'.join(location[:-1])}]" if location[:-1] else "the top level"
        elsewhere = _tables_with(location[-1], tree)
        meant = f", did you mean {' or '.join(map(repr, elsewhere))}?" if elsewhere else ""
        return f"unknown key {key!r}{meant or nearest(location[-1], valid)}; valid in {table}: {', '.join(valid)}"
    if detail["type"] == "union_tag_invalid":
        name, valid = str(tree["model"]["name"]), sorted(MODEL_SETTINGS)
        return f"unknown model {name!r}{nearest(name, valid)}; valid: {', '.join(valid)}"
    message = detail["msg"].removeprefix("Value error, ")
    given = detail.get("input")
    shown = f", got {given!r}" if isinstance(given, str | int | float | bool | list) else ""
    if key == "sparsity.density" and isinstance(given, int | float) and 1 < given <= 100:
        shown += f"; {given:g} % is {given / 100:g}"
    if detail["type"] == "list_type" and isinstance(given, str | int | float):
        parts = given.split(",") if isinstance(given, str) else [given]
        written = [parse_value(part.strip()) if isinstance(part, str) else part for part in parts]
        shown += f"; a list is written --set '{key}={json.dumps(written)}'"
    # What is wrong with two tables together has no key, and names them itself.
    return f"{key}: {message}{shown}" if key else message


def _tables_with(key: str, tree: Mapping[str, Any]) -> list[str]:
    """The key as it is spelled in full, in every table that has it."""
    model = tree.get("model", {"name": MultVAEConfig.model_fields["name"].default})
    known = isinstance(model, dict) and model.get("name") in MODEL_SETTINGS
    tables = [table for table in Config.model_fields if table != "model" or known]
    found = [f"{table}.{key}" for table in tables if key in _fields([table], {"model": model})]
    from recsys.data.folders import LOAD_OPTIONS  # slow to import

    return [*found, f"data.options.{key}"] if key in LOAD_OPTIONS else found


def _fields(location: Iterable[str], tree: Mapping[str, Any]) -> list[str]:
    section: Any = Config
    for name in location:
        is_model = name == "model"
        section = MODEL_SETTINGS[tree["model"]["name"]] if is_model else section.model_fields[name].annotation
    return list(section.model_fields)
