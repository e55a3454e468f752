"""What TensorBoard is told of a run: the figures of its log, as curves."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from recsys.errors import RecsysError

__all__ = ["TensorBoardLog", "require_tensorboard"]


def require_tensorboard() -> None:
    """Raise RecsysError where TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise RecsysError(
            "train.tensorboard needs the package tensorboard, which is not installed; "
            'install it with: pip install "sparsecore[tensorboard]", or leave the setting away'
        )


class TensorBoardLog:
    """Curves over epochs: loss, validation metrics, drop fraction, share of positions ever active, seconds.

    Args:
        folder: where to write.
        epoch: how many epochs are complete; curves that an interrupted run wrote after them are hidden.

    Raises:
        RecsysError: if TensorBoard is not installed.
    """

    def __init__(self, folder: Path, epoch: int = 0) -> None:
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=epoch + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def write(self, record: dict[str, Any]) -> None:
        """Add the log record of an epoch."""
        curves = {f"train/{name}": record[name] for name in ("loss", "seconds") if name in record}
        curves |= {f"validation/{name}": value for name, value in record.get("validation", {}).items()}
        for name in ("drop_fraction", "ever_active"):
            if name in record:
                curves[f"sparsity/{name}"] = record[name]
        for name, value in curves.items():
            self._writer.add_scalar(name, value, record["epoch"])
        self._writer.flush()
