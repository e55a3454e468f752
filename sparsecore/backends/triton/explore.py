"""Exploration as the torch backend does it: there are no kernels for it yet."""

from sparsecore.backends.torch.explore import fill, grow, overlay_, prune, realign_, record_

__all__ = ["fill", "grow", "overlay_", "prune", "realign_", "record_"]
