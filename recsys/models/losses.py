"""Losses that take interactions as lists, never as a dense matrix of zeros and ones."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from recsys.models.base import Interactions

__all__ = [
    "bernoulli_nll",
    "gaussian_kl",
    "multinomial_nll",
    "sampled_bernoulli_nll",
    "sampled_squares",
    "squared_norm",
    "widened",
]


_WIDE = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


def widened(scores: Tensor) -> Tensor:
    """Scores as a loss takes them: what autocast has computed in 16 bits in float32, others as they are."""
    return scores.to(_WIDE.get(scores.dtype, scores.dtype))


def _scaled(grad: Tensor, outer: Tensor) -> Tensor:
    """grad * outer, a number that is nearly always 1. Asking costs less than a pass, but on a GPU it would wait."""
    if outer.device.type == "cpu" and not torch.compiler.is_compiling() and bool(outer == 1):
        return grad
    return grad * outer


class _MultinomialNLL(torch.autograd.Function):
    """-(1/B) sum_u sum_{i in u} log softmax(logits_u)_i, and its gradient at once, in one (B, n) buffer.

    Autograd's own steps would keep the log-probabilities and make two more buffers of that size backward; writing
    the gradient over them in forward takes about half the time of a logsumexp and a separate softmax. Logits of 16 bits
    are widened on the way in, and only their gradient is kept.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, items: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
        users = logits.shape[0]
        log_p = logits.log_softmax(dim=1, dtype=_WIDE.get(logits.dtype))
        loss = -log_p[rows, items].sum() / users
        if ctx.needs_input_grad[0]:
            # (softmax * n_u - x) / B
            grad = log_p.exp_().mul_((counts / users).unsqueeze(1))
            flat = rows * logits.shape[1] + items
            grad.view(-1).scatter_add_(0, flat, grad.new_full((), -1 / users).expand(flat.numel()))
            ctx.save_for_backward(grad.to(logits.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return _scaled(grad, grads[0]), None, None, None


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
    _check_users(logits, batch)
    counts = batch.counts.to(_WIDE.get(logits.dtype, logits.dtype))
    return _MultinomialNLL.apply(logits, batch.items, batch.rows, counts)


class _BernoulliNLL(torch.autograd.Function):
    """(1/B) sum_u (sum_i softplus(logits_ui) - sum_{i in u} logits_ui), and its gradient at once, in one (B, n) buffer.

    The dense targets of zeros and ones are never made: they only matter where an interaction is.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, items: Tensor, rows: Tensor) -> Tensor:
        users = logits.shape[0]
        wide = widened(logits)
        buffer = F.softplus(wide)
        loss = (buffer.sum() - wide[rows, items].sum()) / users
        if ctx.needs_input_grad[0]:
            # (sigmoid - x) / B
            grad = torch.sigmoid(wide, out=buffer).div_(users)
            flat = rows * logits.shape[1] + items
            grad.view(-1).scatter_add_(0, flat, grad.new_full((), -1 / users).expand(flat.numel()))
            ctx.save_for_backward(grad.to(logits.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return _scaled(grad, grads[0]), None, None


def bernoulli_nll(logits: Tensor, batch: Interactions) -> Tensor:
    """Binary cross-entropy with *all* items, summed over the items, the mean over the users of the batch.

    -(1/B) sum_u (sum_{i in u} log sigmoid(logits_ui) + sum_{i not in u} log sigmoid(-logits_ui))

    Args:
        logits: (B, n_items).
        batch: the interactions of B users, each at most once.

    Raises:
        ValueError: if logits and batch do not have the same number of users.
    """
    _check_users(logits, batch)
    return _BernoulliNLL.apply(logits, batch.items, batch.rows)


def sampled_bernoulli_nll(logits: Tensor, batch: Interactions, rows: Tensor, negatives: Tensor) -> Tensor:
    """Binary cross-entropy with the interactions and with sampled items, summed, the mean over the users of the batch.

    -(1/B) (sum_{(u, i) in batch} log sigmoid(logits_ui) + sum_{(u, j) sampled} log sigmoid(-logits_uj))

    Args:
        logits: (B, n_items).
        batch: the interactions of B users.
        rows, negatives: (m,) int64 each, users (0..B-1) and items of the sample.

    Raises:
        ValueError: if logits and batch do not have the same number of users.
    """
    _check_users(logits, batch)
    chosen = F.softplus(-widened(logits[batch.rows, batch.items])).sum()
    return (chosen + F.softplus(widened(logits[rows, negatives])).sum()) / logits.shape[0]


def sampled_squares(logits: Tensor, batch: Interactions, rows: Tensor, negatives: Tensor) -> Tensor:
    """Half the squared error of the interactions and of sampled items, summed, the mean over the users of the batch.

    (1/2B) (sum_{(u, i) in batch} (1 - logits_ui)^2 + sum_{(u, j) sampled} logits_uj^2); arguments and errors as of
        `sampled_bernoulli_nll`.
    """
    _check_users(logits, batch)
    chosen = (1 - widened(logits[batch.rows, batch.items])).square().sum()
    return (chosen + widened(logits[rows, negatives]).square().sum()) / (2 * logits.shape[0])


def _check_users(logits: Tensor, batch: Interactions) -> None:
    if logits.shape[0] != batch.size:
        raise ValueError(f"logits have {logits.shape[0]} rows, but the batch has {batch.size} users")


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, 1)), summed over the last dimension, the mean over the batch."""
    return 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(dim=1).mean()


class _SquaredNorm(torch.autograd.Function):
    """Autograd's own steps would write the squares and, backward, two more buffers of the size of x, which is that of
    whole tables in UltraGCN.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        flat = x.reshape(-1)
        return flat.dot(flat)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x * (2 * grads[0])


def squared_norm(x: Tensor) -> Tensor:
    """|x|^2, the sum of the squares of all numbers of a tensor: what L2 regularization adds to a loss."""
    return _SquaredNorm.apply(x)
