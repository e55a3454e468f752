"""Files and folders that appear whole or not at all, and what is said where they cannot be written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from recsys.errors import RecsysError

__all__ = ["check_place", "new_folder", "replacing", "save_tensors", "writing"]


def check_place(path: Path) -> None:
    """Raise RecsysError where neither a file nor a folder can be made at `path`; before anything long is begun."""
    above = _nearest(path.parent)
    if not above.is_dir():
        raise RecsysError(f"cannot write {path}: {above} is not a folder; choose another --output")
    if not os.access(above, os.W_OK):
        raise RecsysError(f"cannot write {path}: no permission to write in {above}; choose another --output")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A block that does nothing but write `path`; what goes wrong in it, such as a full disk, becomes one line.

    Raises:
        RecsysError: saying what could not be written, how much space is left, and what to do.
    """
    try:
        yield
    # torch.save and save_tensors tell of a full disk by RuntimeError.
    except (OSError, RuntimeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error).partition("\n")[0]
        free = shutil.disk_usage(_nearest(path.parent)).free
        raise RecsysError(
            f"cannot write {path}: {reason} ({free / 1e6:,.0f} MB are free there); make room or choose another place. "
            "A run that had begun is continued with recsys train --resume"
        ) from error


def _nearest(path: Path) -> Path:
    """The path, or the first above it that is there."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file beside `path` and move it there at the end; on any error, Ctrl-C included, `path` is as
    before. Errors as of `writing`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a folder beside `path` and move it there at the end, in place of the one that was there; errors as of
    `writing`.
    """
    path = path.absolute()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        with writing(path):
            temporary.mkdir(parents=True)
            yield temporary
            if path.exists():
                os.replace(path, old)
            os.replace(temporary, path)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file with the permissions that any other new file would get.

    Raises:
        RuntimeError: it cannot be written.
    """
    # Imported here: who writes no tensors needs no safetensors (harness.gpu_check, on a bare machine).
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # safetensors makes its file readable by the owner only; an existing file keeps its mode.
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise RuntimeError(str(error)) from error
    path.chmod(mode)
