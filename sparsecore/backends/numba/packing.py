"""Activations as panels (`panels`): how wide they are, and how they are filled."""

from __future__ import annotations

import numpy as np
import torch

from sparsecore.backends.numba.jit import device_function, kernel, share_out
from sparsecore.backends.numba.memory import workspace
from sparsecore.backends.numba.simd import transpose_part

WIDTH = 128
_OWN = 4 << 20  # bytes of panels of all threads, each of which has its own


def width_of(batch: int) -> int:
    """Lanes of a panel for this many examples."""
    return next((w for w in (16, 32, 64) if batch <= w), WIDTH)


def padded(batch: int) -> int:
    """Lanes of all panels of a batch."""
    rest = batch % WIDTH
    return batch - rest + (width_of(rest) if rest else 0)


def parts(batch: int, cols: int) -> list[slice]:
    """Examples whose panels of ``cols`` features together are at most 16 MiB, or one panel: scratch that is kept from
    call to call (fresh pages of larger scratch took as long as the product at 600 x 20000), in the shared cache."""
    step = max(1, ((1 << 22) - 64) // (cols * WIDTH)) * WIDTH
    return [slice(first, first + step) for first in range(0, batch, step)]


def panels_of(x: np.ndarray, n_chunks: int) -> np.ndarray:
    """Room for all panels of x, with zeros behind them: a row for each chunk, which fills its own (`own_panels`), or,
    of large ones, a single row that is filled here.

    A thread that reads what another has just written waits for it, the longer the less cache they share: where two
    processors had none in common, a product of 16 examples at 600 x 20000 took twice as long with two threads.
    """
    size = padded(x.shape[0]) * x.shape[1]
    panels = room(n_chunks, size + 64, torch.from_numpy(x).dtype)
    panels[:, size:] = 0
    if len(panels) < n_chunks:
        pack(x, panels[0], n_chunks)
    return panels


def room(n_chunks: int, size: int, dtype: torch.dtype) -> np.ndarray:
    """A row of at least ``size`` numbers for each chunk, or, of large ones, a single row for all."""
    own = n_chunks * size * dtype.itemsize <= _OWN
    return workspace("panels", n_chunks if own else 1, size, dtype)


@device_function
def own_panels(x, panels, n_chunks, chunk):
    """The row that a chunk reads, filled if it is its own."""
    if panels.shape[0] < n_chunks:
        return panels[0]
    mine = panels[chunk]
    pack_groups(x, mine, 0, -(-x.shape[1] // 16))
    return mine


@device_function
def lanes_of(batch):
    """Lanes of the panel that begins when ``batch`` examples are left."""
    return 16 if batch <= 16 else 32 if batch <= 32 else 64 if batch <= 64 else 128


@kernel
def pack(x, panels, n_chunks, chunk):
    """x (batch, cols) -> its panels one after the other, each (cols, lanes); lanes beyond the batch are 0."""
    if chunk < 0:
        return share_out(chunk, n_chunks)
    groups = -(-x.shape[1] // 16)
    pack_groups(x, panels, groups * chunk // n_chunks, groups * (chunk + 1) // n_chunks)


@device_function
def pack_groups(x, panels, first, last):
    """Of the features, so many groups of 16."""
    batch, n = x.shape
    flat = x.reshape(-1)
    for p in range(0, batch, 128):
        lanes = lanes_of(batch - p)
        for lane in range(0, lanes, 16):
            here = max(0, min(16, batch - p - lane))
            for j in range(first * 16, last * 16, 16):
                t = p * n + j * lanes + lane
                transpose_part(flat, (p + lane) * n + j, n, here, min(16, n - j), panels, t, lanes, 16)
