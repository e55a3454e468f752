"""The application that commands are added to: how errors look, the options they share, how settings come together."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

if TYPE_CHECKING:
    from recsys.config import Config


_MOST_THREADS = 1024  # no machine has more cores, and far more cannot be started


class _Friendly(TyperGroup):
    """Errors that the user can mend are one line and exit code 2; Ctrl-C is exit code 130; others keep their
    traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            _complain(str(interrupt) or "interrupted")
            raise typer.Exit(130) from None
        except ValueError as error:
            if not _expected(error):
                raise
            _complain(str(error))
            raise typer.Exit(2) from None


def _expected(error: ValueError) -> bool:
    from recsys.errors import RecsysError

    # Only where sparsecore was imported can it have raised; importing it here would compile nothing but take
    # a second.
    errors = sys.modules.get("sparsecore.errors")
    known = (RecsysError,) if errors is None else (RecsysError, errors.SparsecoreError)
    return isinstance(error, known)


def _complain(message: str) -> None:
    line = " ".join(message.split())
    Console(markup=False, stderr=True, soft_wrap=True).print(f"error: {line}", style="red", highlight=False)


app = typer.Typer(
    cls=_Friendly,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Recommender models whose weights are trained and stored sparse.",
)
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        help="Folder of datasets, or of a file that has moved. Default: environment SPARSECORE_DATA.",
    ),
]
DatasetName = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        help="synthetic, a name of `recsys data list`, or a file or folder. Default: the preset's, else synthetic.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars and no table of epochs.")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, max=_MOST_THREADS, help="CPU threads. Default: all cores.")
]
Device = Annotated[
    str | None,
    typer.Option(help="Where to compute: cpu, cuda or cuda:N. Default: the run's or preset's, else cpu."),
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed", min=0, help="Seed of everything random in training. Default: the preset's, else 0."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Override a setting, such as train.lr=0.01."),
]


def _preset_names() -> str:
    names = (file.name for file in (resources.files("recsys") / "presets").iterdir())
    return ", ".join(sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml")))


Model = Annotated[
    str | None,
    typer.Option(
        help="neumf, convncf, cdae, multvae, lightgcn, ultragcn, bprmf, sasrec, popularity, itemknn or ease. "
        "Default: the preset's, else multvae."
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        help="dense, masked, static or dsl. Default: the preset's, else dsl (dense for popularity, itemknn and ease)."
    ),
]
DensityOption = Annotated[
    float | None,
    typer.Option("--density", help="Fraction of weights kept, in (0, 1]. Default: the preset's, else 0.25."),
]
Epochs = Annotated[int | None, typer.Option(help="Epochs to train at most. Default: the preset's, else 50.")]
Preset = Annotated[str | None, typer.Option(help=f"Settings that come with recsys: {_preset_names()}.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file of settings.")]
Jobs = Annotated[int, typer.Option(min=1, help="Runs at a time, each in a process of its own.")]
JobThreads = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, max=_MOST_THREADS, help="CPU threads of each run. Default: cores / jobs."
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Folder to write the run to. Default: of train a new one in runs/; of quickstart none.",
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace the run in --output; its saved recommender stays until the new one is ready.",
    ),
]


def make_config(
    preset: str | None,
    path: Path | None,
    dataset: str | None,
    data_dir: Path | None,
    seed: int | None,
    overrides: list[str] | None,
    options: dict[str, Any] | None = None,
    variation: Mapping[str, Any] | None = None,
) -> Config:
    from recsys.config import load_config
    from recsys.errors import ConfigError

    given = options or {}
    if given.get("sparsity.method") == "dense" and given.get("sparsity.density") is not None:
        raise ConfigError(
            "--density is of the methods masked, static and dsl: --method dense keeps all weights"
        )
    place = None if data_dir is None else str(data_dir)
    plain = {"data.name": dataset, "data.dir": place, "train.seed": seed, **given}
    # The settings are kept with the run, which may be evaluated from elsewhere.
    return load_config(preset, path, overrides or [], plain, variation).anchored()


def use_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
