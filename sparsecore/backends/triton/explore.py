"""Exploration as the torch backend does it, but for the random draw, which takes torch hundreds of small steps."""

from functools import partial

from sparsecore.backends.torch import explore as by_torch
from sparsecore.backends.torch.explore import grow, overlay_, prune, realign_, record_
from sparsecore.backends.triton.draw import members

__all__ = ["fill", "grow", "overlay_", "prune", "realign_", "record_"]

fill = partial(by_torch.fill, members=members)
