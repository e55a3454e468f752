"""What one exploration decides for one weight, before anything is written."""

from __future__ import annotations

import torch

from sparsecore.encoding import stored
from sparsecore.errors import TopologyError
from sparsecore.nn.base import SparseModule
from sparsecore.ops import explore
from sparsecore.topology.rewrite import Exchange

__all__ = ["plan_exchange"]


def plan_exchange(
    module: SparseModule,
    k: int,
    source: explore.GradientSource | None,
    generator: torch.Generator | None = None,
    name: str = "the model",
) -> Exchange:
    """Prune the k smallest weights, grow where the gradient outside the others is largest, fill up at random.

    A weight that was pruned may be grown at once: then it never left.

    Args:
        module: holds the weight; it is not touched.
        k: how many to prune, and to grow.
        source: computes rows of the dense gradient; None grows at random only.
        generator: CPU generator.
        name: of the weight, for errors.

    Raises:
        TopologyError: if weights, or the gradient anywhere, are NaN or infinite.
    """
    shape, skip = module.shape, module.empty_row
    try:
        index = explore.prune(module.values.detach(), module.index, shape, k)
    except FloatingPointError:
        raise TopologyError(
            f"weights of {name} are NaN or infinite: nothing was rewritten. An update has made them so: go back to a "
            "checkpoint (model, optimizer and explorer), and lower the learning rate or clip gradients"
        ) from None
    if source is not None:
        try:
            index = explore.grow(source, index, shape, k, skip)
        except FloatingPointError:
            raise TopologyError(
                f"the gradient of {name} is NaN or infinite: nothing was rewritten. Lower the learning rate or "
                "clip gradients; with a gradient scaler call step() only after steps that it has not skipped (it has "
                "where scaler.get_scale() is lower after scaler.update())"
            ) from None
    missing = module.nnz - stored(index)
    if missing:
        index = explore.fill(index, shape, missing, generator, skip)
    return Exchange(index, k)
