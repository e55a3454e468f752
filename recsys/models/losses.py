"""Losses that take interactions as lists, never as a dense matrix of zeros and ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recsys.models.base import Interactions

__all__ = ["gaussian_kl", "multinomial_nll"]


class _MultinomialNLL(torch.autograd.Function):
    """-(1/B) sum_u sum_{i in u} log softmax(logits_u)_i, with one (B, n) buffer in backward and none in
    forward.

    `F.log_softmax` would keep a second (B, n) tensor from forward to backward and autograd would make a
    third; here only the logits and one number per user are kept.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, items: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
        normaliser = logits.logsumexp(dim=1)
        ctx.save_for_backward(logits, normaliser, items, rows, counts)
        return (torch.dot(counts, normaliser) - logits[rows, items].sum()) / logits.shape[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits, normaliser, items, rows, counts = ctx.saved_tensors
        scale = grads[0] / logits.shape[0]
        # (softmax * n_u - x) / B
        out = torch.sub(logits, normaliser.unsqueeze(1)).exp_().mul_((counts * scale).unsqueeze(1))
        flat = rows * logits.shape[1] + items
        out.view(-1).scatter_add_(0, flat, (-scale).expand(flat.numel()))
        return out, None, None, None


def multinomial_nll(logits: Tensor, batch: Interactions) -> Tensor:
    """Multinomial negative log-likelihood of interaction lists, the mean over the users of the batch.

    -(1/B) sum_u sum_{i in u} log softmax(logits_u)_i, as in Liang et al. (2018), "Variational autoencoders
    for collaborative filtering", equation 2. A user without interactions adds 0.

    Args:
        logits: (B, n_items).
        batch: the interactions of B users.

    Raises:
        ValueError: if logits and batch do not have the same number of users.
    """
    if logits.shape[0] != batch.size:
        raise ValueError(f"logits have {logits.shape[0]} rows, but the batch has {batch.size} users")
    return _MultinomialNLL.apply(logits, batch.items, batch.rows, batch.counts.to(logits.dtype))


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, 1)), summed over the last dimension, the mean over the batch."""
    return 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(dim=1).mean()
