"""Exploration as in the torch backend: torch-sparse has nothing for it."""

from sparsecore.backends.torch.explore import fill, grow, overlay_, prune, realign_, record_

__all__ = ["fill", "grow", "overlay_", "prune", "realign_", "record_"]
