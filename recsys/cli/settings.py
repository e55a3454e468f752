"""`recsys settings`: every key that --set, --grid and files of settings take."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer
from rich.console import Console
from rich.table import Table

from recsys.cli.app import app

if TYPE_CHECKING:
    from recsys.settings import Section

_KEYS = re.compile(r"(\w+(?:, \w+)*): (.*)")


@app.command()
def settings(
    model: Annotated[
        str | None, typer.Argument(help="Show this model's [model] instead of the rest.")
    ] = None,
) -> None:
    """Print every setting with its type, default and meaning; those of [model] with the name of a model."""
    from recsys.config import Config, nearest
    from recsys.errors import ConfigError
    from recsys.models.settings import MODEL_SETTINGS

    console = Console(markup=False)
    if model is None:
        for name, field in Config.model_fields.items():
            if name != "model":
                console.print(_table(name, type(field.default), described(type(field.default))))
        console.print(
            f"[model]: recsys settings MODEL, one of {', '.join(sorted(MODEL_SETTINGS))}", highlight=False
        )
        return
    if model not in MODEL_SETTINGS:
        raise ConfigError(
            f"unknown model {model!r}{nearest(model, list(MODEL_SETTINGS))}; valid: {', '.join(sorted(MODEL_SETTINGS))}"
        )
    from recsys.models.build import model_class

    found = model_class(model)
    text = inspect.getdoc(found) or ""
    console.print(
        text.partition("\nArgs:")[0], highlight=False, soft_wrap=True
    )  # the formulas that descriptions speak of
    console.print(_table("model", MODEL_SETTINGS[model], {"name": "which model", **described(found)}))


def described(kind: type) -> dict[str, str]:
    """{key: meaning} in a class's docstring: lines ``key: ...`` or ``key, key: ...`` with what is indented below."""
    text = (inspect.getdoc(kind) or "").partition("\nRaises:")[0]
    found: dict[str, str] = {}
    keys: list[str] = []
    for line in inspect.cleandoc(text.partition("\nArgs:\n")[2] or text.partition("\n")[2]).splitlines():
        begun = _KEYS.match(line)
        if begun:
            keys = begun[1].split(", ")
            found |= dict.fromkeys(keys, begun[2])
        elif line.startswith(" "):
            found |= {key: f"{found[key]} {line.strip()}" for key in keys}
        else:
            keys = []
    return found


def _table(name: str, section: type[Section], meanings: dict[str, str]) -> Table:
    table = Table(title=f"[{name}]", title_justify="left")
    table.add_column("key", no_wrap=True)
    for column in ("type", "default", "meaning"):
        table.add_column(column)
    for key, field in section.model_fields.items():
        kind = " ".join([_kind(field.annotation), *_bounds(field.metadata)])
        table.add_row(f"{name}.{key}", kind, _shown(field.default), meanings.get(key, ""))
    return table


def _bounds(limits: Iterable[Any]) -> list[str]:
    """Those of pydantic's fields, or of annotated types."""
    limits = [one for limit in limits for one in getattr(limit, "metadata", [limit])]
    return [f"{sign} {getattr(one, word)}" for one in limits for word, sign in _BOUNDS if hasattr(one, word)]


_BOUNDS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        inner, *limits = get_args(annotation)
        return " ".join([_kind(inner), *_bounds(limits)])
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if get_origin(annotation) is types.UnionType:
        return " | ".join(_kind(one) for one in get_args(annotation) if one is not type(None))
    of = [_kind(one) for one in get_args(annotation) if one is not Ellipsis]
    name = str(getattr(get_origin(annotation) or annotation, "__name__", annotation))
    return f"{name} of {', '.join(of)}" if of else name


def _shown(default: Any) -> str:
    return "none" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
