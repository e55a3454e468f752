"""Which runs a sweep is made of: the product of its axes and seeds, without those that would be one and the same."""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recsys.config import Config, SparsityConfig, parse_value
from recsys.errors import ConfigError
from recsys.models.settings import FittedConfig

__all__ = ["Cell", "Grid", "make_grid", "parse_axis"]

_EXPLORATION = ("interval", "drop_fraction", "end_drop_fraction", "schedule", "stop_fraction", "grow")
# Settings that a method does not read: varying them would repeat the same run.
_UNREAD = {
    "dense": {f"sparsity.{name}" for name in SparsityConfig.model_fields if name != "method"},
    "static": {f"sparsity.{name}" for name in _EXPLORATION},
}


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        name: its settings in words, "dsl density=0.25"; cells that differ in the seed only share it.
        settings: {"table.key": value} in which it differs from other cells.
        config: all of its settings, its seed among them.
    """

    name: str
    settings: dict[str, Any]
    config: Config

    @property
    def seed(self) -> int:
        return self.config.train.seed

    @property
    def folder(self) -> str:
        """Name of the folder of its run, unique by the hash of the settings."""
        words = re.sub(r"[^A-Za-z0-9._+-]+", "-", self.name.replace("=", "")).strip("-")
        return f"{words}-seed{self.seed}-{self.config.hash[:8]}"


@dataclass(frozen=True)
class Grid:
    """The cells of a sweep, seed by seed: an interrupted sweep then has all cells with the same seeds.

    Attributes:
        axes: {"table.key": values}, as given.
        cells: every run once.
        names: the name of the cell at each point, a value of every axis in their order; points at which a method does
            not read a setting share a cell.
    """

    axes: dict[str, list[Any]]
    cells: list[Cell]
    names: list[tuple[tuple[Any, ...], str]]

    @property
    def varied(self) -> dict[str, list[Any]]:
        """The axes with more than one value."""
        return {key: values for key, values in self.axes.items() if len(values) > 1}


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """``("sparsity.density", [0.5, 0.25])`` of ``"sparsity.density=0.5,0.25"``.

    Values are TOML, words without quotes text: ``train.ks=[10],[20]``, ``sparsity.method=dense,dsl``.

    Raises:
        ConfigError: no key, or no value.
    """
    key, equals, given = text.partition("=")
    if not equals or not key.strip() or not given.strip():
        raise ConfigError(
            f"--grid expects table.key=value,value,... (such as sparsity.density=0.5,0.25), got {text!r}"
        )
    try:
        values = tomllib.loads(f"values = [{given}]")["values"]
    except tomllib.TOMLDecodeError:
        values = [parse_value(value.strip()) for value in given.split(",") if value.strip()]
    return key.strip(), values


def make_grid(
    make_config: Callable[[Mapping[str, Any]], Config],
    axes: Sequence[tuple[str, list[Any]]],
    seeds: int,
) -> Grid:
    """All cells of the product of `axes`, with `seeds` seeds each.

    Args:
        make_config: the run's settings with some of them changed, {"table.key": value}. Its own ``train.seed`` is the
            first of the seeds, which follow one another.
        axes: of `parse_axis`.
        seeds: runs of each cell.

    Raises:
        ConfigError: an axis given twice, or of seeds; a value that is not valid; two data files of one name.
    """
    keys = [key for key, _ in axes]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"--grid {key} was given twice; put its values into one, separated by commas")
        if key in ("train.seed", "train"):
            raise ConfigError(f"--grid {key}: seeds are varied by --seeds")
    first = make_config({}).train.seed
    cells: dict[str, Cell] = {}
    names = []
    for seed in range(first, first + seeds):
        for point in itertools.product(*(values for _, values in axes)):
            given = dict(zip(keys, point, strict=True))
            made = make_config(given)
            method = made.sparsity.method
            read = {key: value for key, value in given.items() if key not in _unread(made)}
            config = make_config({**read, "train.seed": seed})
            cell = cells.setdefault(config.hash, Cell(_name(read, keys, method), read, config))
            if cell.config.data.name != config.data.name:  # the hash does not know the folder
                raise ConfigError(
                    f"--grid data.name: {cell.config.data.name} and {config.data.name} have one name; rename a file, "
                    "or take a sweep for each"
                )
            if cell.settings != read:
                raise ConfigError(
                    f"--grid: {cell.settings} and {read} would be one run, whose name does not tell them apart; take a "
                    "sweep for each"
                )
            if seed == first:
                names.append((point, cell.name))
    return Grid(dict(axes), list(cells.values()), names)


def _unread(config: Config) -> set[str]:
    """Settings that a run does not read: varying them would repeat it."""
    sparsity = config.sparsity
    if isinstance(config.model, FittedConfig):
        return {f"sparsity.{name}" for name in SparsityConfig.model_fields}
    unread = set(_UNREAD.get(sparsity.method, ()))
    if sparsity.include:
        unread.add("sparsity.weights")
    if sparsity.density == 1:
        unread |= _UNREAD["static"]
    return unread


def _name(settings: Mapping[str, Any], keys: Sequence[str], method: str) -> str:
    """Settings by the last part of their keys, where that says enough."""
    last = [key.rpartition(".")[2] for key in keys]
    words = []
    for key, value in settings.items():
        short = key.rpartition(".")[2]
        words.append(
            str(value)
            if key in ("sparsity.method", "model.name", "data.name")
            else f"{short if last.count(short) == 1 else key}={value}"
        )
    return " ".join(words) or method
