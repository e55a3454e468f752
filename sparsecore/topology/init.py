"""How many weights each layer stores."""

from __future__ import annotations

from collections.abc import Sequence

from sparsecore.errors import DensityError
from sparsecore.sizes import check_density

__all__ = ["allocate"]


def allocate(shapes: Sequence[tuple[int, ...]], density: float, distribution: str = "uniform") -> list[float]:
    """Density of each weight such that together they store ``density`` of all positions.

    * ``"uniform"``: the same density everywhere;
    * ``"er"``: proportional to ``(n_out + n_in) / (n_out * n_in)`` (Erdos-Renyi; Mocanu et al., 2018): small layers
      are kept denser;
    * ``"erk"``: the same with a kernel's extents added in the numerator and multiplied in the denominator (Evci et
      al., RigL, 2020); for matrices it equals ``"er"``.

    A layer whose share would pass 1 is stored whole and the rest is shared out anew.

    Args:
        shapes: ``(n_out, n_in)`` of each weight, kernel extents after them.
        density: overall density in (0, 1].
        distribution: one of the three names.

    Returns:
        One density in (0, 1] for each shape.

    Raises:
        DensityError: for a density outside (0, 1] or so low that nothing is stored, or an unknown distribution.
    """
    if distribution not in ("uniform", "er", "erk"):
        raise DensityError(f"distribution must be 'uniform', 'er' or 'erk', got {distribution!r}")
    if not shapes:
        raise DensityError("there is no weight to share a density out to")
    sizes = [_product(shape) for shape in shapes]
    if 0 in sizes:
        raise DensityError(
            f"a weight of shape {tuple(shapes[sizes.index(0)])} has nothing to store: leave it dense"
        )
    check_density(density)
    if round(float(density) * sum(sizes)) < 1:
        raise DensityError(
            f"density {density:g} of weights with {sum(sizes)} positions in all leaves no nonzero at all; each weight "
            "has to store one at least"
        )
    if distribution == "uniform" or density == 1.0:
        return [float(density)] * len(sizes)
    raw = [
        sum(shape) / size if distribution == "erk" else (shape[0] + shape[1]) / (shape[0] * shape[1])
        for shape, size in zip(shapes, sizes, strict=True)
    ]
    whole: set[int] = set()
    while True:
        rest = [i for i in range(len(sizes)) if i not in whole]
        if not rest:
            return [1.0] * len(sizes)
        budget = density * sum(sizes) - sum(sizes[i] for i in whole)
        scale = budget / sum(raw[i] * sizes[i] for i in rest)
        over = {i for i in rest if raw[i] * scale >= 1.0}
        if not over:
            return [1.0 if i in whole else raw[i] * scale for i in range(len(sizes))]
        whole |= over


def _product(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size
