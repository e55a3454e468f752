"""One pass over a weight, its gradient and its optimizer state: what fused optimizers do.

With ``spans`` the gradient belongs to those elements alone and no other element is touched: the pass then costs what
the batch touched.

Every element is computed by itself: results do not depend on the number of threads.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from torch import Tensor

from sparsecore.backends.numba.jit import array, device_function, kernel, share_out, split, threads
from sparsecore.backends.numba.simd import (
    LANES,
    absolute,
    add,
    at,
    div,
    first_lanes,
    fma,
    greater,
    load,
    load_masked,
    lookup,
    mul,
    prefetch_far,
    splat,
    sqrt,
    store,
    store_masked,
    where,
)
from sparsecore.backends.numba.spans import LINE, MOST_LINES, SPANS_AHEAD, Spans, whole

__all__ = ["adagrad_", "adam_", "adam_parts", "adam_span", "flat", "prefetch_span", "sgd_", "splats"]

_FLOPS = 8
# Moments below are flushed to 0: arithmetic on subnormal numbers made a step up to 2.4 times slower.
_TINY = {np.dtype(kind): float(np.finfo(kind).tiny) for kind in (np.float32, np.float64)}


def adam_(
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    step: float,
    step_per_weight: Tensor | None = None,
    spans: Spans | None = None,
) -> None:
    """``torch.optim.Adam``'s rule (AdamW's if ``decoupled``), in place, ``step`` counting this one.

    With ``step_per_weight`` (of the values' shape and type) every element's bias is corrected by its own count, which
    is raised by one.
    """
    arrays = (flat(values), flat(grad), flat(exp_avg), flat(exp_avg_sq))
    parts = adam_parts(arrays[0].dtype, lr, betas, eps, weight_decay, decoupled, step, step_per_weight)
    if spans is None and step_per_weight is None:
        _adam(*arrays, parts[-1], _chunks(grad))
    else:
        _adam_at(*_spans(spans, grad), *arrays, *parts, _chunks(grad))


def adam_parts(
    dtype: np.dtype,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    step: float,
    step_per_weight: Tensor | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What kernels are told of a step besides arrays: the elements' counts, corrections by count, constants."""
    first, second = betas
    remain, decay = (1 - lr * weight_decay, 0.0) if decoupled else (1.0, weight_decay)
    corrections = (1 / (1 - first**step), 1 / (1 - second**step) ** 0.5)
    moments = (first, 1 - first, second, 1 - second, eps, -lr, remain, decay, _TINY[dtype], 0.0)
    constants = np.array(moments + corrections, dtype)
    if step_per_weight is None:
        return constants[:0], constants[:0], constants[:0], constants
    own = _corrections(first, second, 1 << int(step).bit_length(), dtype)
    return flat(step_per_weight), *own, constants


def sgd_(
    values: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    spans: Spans | None = None,
) -> None:
    """``torch.optim.SGD``'s rule, in place; without a buffer there is no momentum."""
    x = flat(values)
    constants = np.array([-lr, momentum, 1 - dampening, weight_decay, _TINY[x.dtype]], x.dtype)
    buffer = x[:0] if momentum_buffer is None else flat(momentum_buffer)
    _sgd(*_spans(spans, grad), x, flat(grad), buffer, constants, nesterov, _chunks(grad))


def adagrad_(
    values: Tensor,
    grad: Tensor,
    total: Tensor,
    *,
    lr: float,
    weight_decay: float,
    eps: float,
    spans: Spans | None = None,
) -> None:
    """``torch.optim.Adagrad``'s rule, in place, for a learning rate that has already decayed."""
    x = flat(values)
    tiny, precision = _TINY[x.dtype], float(np.finfo(x.dtype).eps)
    # Beside eps the root of a subnormal sum is nothing, unless eps is next to nothing itself.
    constants = np.array([-lr, weight_decay, eps, tiny if eps * precision >= tiny**0.5 else 0.0], x.dtype)
    _adagrad(*_spans(spans, grad), x, flat(grad), flat(total), constants, _chunks(grad))


def flat(tensor: Tensor) -> np.ndarray:
    """A tensor's memory, 1-D."""
    found = array(tensor)
    return found if found.ndim == 1 else found.reshape(-1)


def _spans(spans: Spans | None, grad: Tensor) -> Spans:
    return whole(grad.numel()) if spans is None else spans


def _chunks(grad: Tensor) -> int:
    return threads(_FLOPS * grad.numel())


@lru_cache(maxsize=8)
def _corrections(first: float, second: float, steps: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """What an element that has had t steps corrects its moments by in the next. The last holds from there on."""
    largest = max(first, second)
    until_one = int(np.log(np.finfo(dtype).eps / 4) / np.log(largest)) + 1 if largest else 1
    counts = np.arange(1, min(steps, until_one) + 1)
    return (1 / (1 - first**counts)).astype(dtype), (1 / np.sqrt(1 - second**counts)).astype(dtype)


@device_function
def _begin(n, n_chunks, chunk):
    """Where a chunk begins: at a multiple of 16."""
    return n if chunk == n_chunks else n // LANES * chunk // n_chunks * LANES


@device_function
def splats(constants):
    """The constants of a step, each in all lanes."""
    a, b, c = splat(at(constants, 0)), splat(at(constants, 1)), splat(at(constants, 2))
    d, e, f = splat(at(constants, 3)), splat(at(constants, 4)), splat(at(constants, 5))
    g, h, i = splat(at(constants, 6)), splat(at(constants, 7)), splat(at(constants, 8))
    return a, b, c, d, e, f, g, h, i, splat(at(constants, 9))


@device_function
def _adam_rule(x, g, m, v, c1, c2, constants):
    """Element, gradient and moments -> the new element and moments; c1 and c2 correct their bias."""
    keep_first, take_first, keep_second, take_second, eps, rate, remain, decay, tiny, zero = constants
    g = fma(decay, x, g)
    m = fma(take_first, g, mul(keep_first, m))
    v = fma(take_second, mul(g, g), mul(keep_second, v))
    m, v = where(greater(tiny, absolute(m)), zero, m), where(greater(tiny, v), zero, v)  # NaN stays NaN
    return fma(mul(rate, c1), div(m, fma(sqrt(v), c2, eps)), mul(remain, x)), m, v


@kernel
def _adam(values, grad, exp_avg, exp_avg_sq, constants, n_chunks, chunk):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    n = grad.shape[0]
    c = splats(constants)
    c1, c2 = splat(at(constants, 10)), splat(at(constants, 11))
    begin, last = _begin(n, n_chunks, chunk), _begin(n, n_chunks, chunk + 1)
    whole = last // LANES * LANES
    # Whole vectors are stored without a mask: a masked store costs twice the memory traffic.
    for i in range(begin, whole, LANES):
        x, m, v = load(values, i), load(exp_avg, i), load(exp_avg_sq, i)
        x, m, v = _adam_rule(x, load(grad, i), m, v, c1, c2, c)
        store(exp_avg, i, m)
        store(exp_avg_sq, i, v)
        store(values, i, x)
    if whole < last:
        mask = first_lanes(last - whole)
        x, m = load_masked(values, whole, mask), load_masked(exp_avg, whole, mask)
        v = load_masked(exp_avg_sq, whole, mask)
        x, m, v = _adam_rule(x, load_masked(grad, whole, mask), m, v, c1, c2, c)
        store_masked(exp_avg, whole, m, mask)
        store_masked(exp_avg_sq, whole, v, mask)
        store_masked(values, whole, x, mask)


@device_function
def adam_span(p, i, end, values, grad, exp_avg, exp_avg_sq, counts, first, second, constants, c):
    """Elements from p on, by ``grad[i:end]``; c are the constants as vectors."""
    c1, c2 = splat(at(constants, 10)), splat(at(constants, 11))
    counted = counts.shape[0] > 0
    one, longest = splat(values.dtype.type(1)), splat(values.dtype.type(first.shape[0] - 1))
    while i + LANES <= end:
        if counted:
            t = load(counts, p)
            store(counts, p, add(t, one))
            c1, c2 = lookup(first, t, longest), lookup(second, t, longest)
        x, m, v = load(values, p), load(exp_avg, p), load(exp_avg_sq, p)
        x, m, v = _adam_rule(x, load(grad, i), m, v, c1, c2, c)
        store(exp_avg, p, m)
        store(exp_avg_sq, p, v)
        store(values, p, x)
        i, p = i + LANES, p + LANES
    if i < end:
        mask = first_lanes(end - i)
        if counted:
            t = load_masked(counts, p, mask)
            store_masked(counts, p, add(t, one), mask)
            c1, c2 = lookup(first, t, longest), lookup(second, t, longest)
        x, m = load_masked(values, p, mask), load_masked(exp_avg, p, mask)
        v = load_masked(exp_avg_sq, p, mask)
        x, m, v = _adam_rule(x, load_masked(grad, i, mask), m, v, c1, c2, c)
        store_masked(exp_avg, p, m, mask)
        store_masked(exp_avg_sq, p, v, mask)
        store_masked(values, p, x, mask)


@device_function
def prefetch_span(values, exp_avg, exp_avg_sq, begin, last, line):
    """Ask for the elements begin .. last (at least one), a line being that many."""
    for k in range(begin, min(last, begin + MOST_LINES * line), line):
        prefetch_far(values, k)
        prefetch_far(exp_avg, k)
        prefetch_far(exp_avg_sq, k)
    prefetch_far(values, last)
    prefetch_far(exp_avg, last)
    prefetch_far(exp_avg_sq, last)


@kernel
def _adam_at(
    begins, offsets, values, grad, exp_avg, exp_avg_sq, counts, first, second, constants, n_chunks, chunk
):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    c = splats(constants)
    line, last = LINE // values.itemsize, split(offsets, n_chunks, chunk + 1)
    for u in range(split(offsets, n_chunks, chunk), last):
        if u + SPANS_AHEAD < last:
            ahead = at(begins, u + SPANS_AHEAD)
            stored = at(offsets, u + SPANS_AHEAD + 1) - at(offsets, u + SPANS_AHEAD)
            prefetch_span(values, exp_avg, exp_avg_sq, ahead, ahead + stored - 1, line)
        p, i, end = at(begins, u), at(offsets, u), at(offsets, u + 1)
        adam_span(p, i, end, values, grad, exp_avg, exp_avg_sq, counts, first, second, constants, c)


@kernel
def _sgd(begins, offsets, values, grad, buffer, constants, nesterov, n_chunks, chunk):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    heavy = buffer.shape[0] > 0
    rate, momentum = splat(at(constants, 0)), splat(at(constants, 1))
    take, decay = splat(at(constants, 2)), splat(at(constants, 3))
    tiny, zero = splat(at(constants, 4)), splat(values.dtype.type(0))
    line, last = LINE // values.itemsize, split(offsets, n_chunks, chunk + 1)
    for u in range(split(offsets, n_chunks, chunk), last):
        if u + SPANS_AHEAD < last:
            ahead = at(begins, u + SPANS_AHEAD)
            last_ahead = ahead + at(offsets, u + SPANS_AHEAD + 1) - at(offsets, u + SPANS_AHEAD) - 1
            for k in range(ahead, min(last_ahead, ahead + MOST_LINES * line), line):
                prefetch_far(values, k)
                prefetch_far(buffer, k)
            prefetch_far(values, last_ahead)
            prefetch_far(buffer, last_ahead)
        i, end = at(offsets, u), at(offsets, u + 1)
        p = at(begins, u)
        while i + LANES <= end:
            g = fma(decay, load(values, p), load(grad, i))
            if heavy:
                b = fma(momentum, load(buffer, p), mul(take, g))
                b = where(greater(tiny, absolute(b)), zero, b)
                g = fma(momentum, b, g) if nesterov else b
                store(buffer, p, b)
            store(values, p, fma(rate, g, load(values, p)))
            i, p = i + LANES, p + LANES
        if i < end:
            mask = first_lanes(end - i)
            x = load_masked(values, p, mask)
            g = fma(decay, x, load_masked(grad, i, mask))
            if heavy:
                b = fma(momentum, load_masked(buffer, p, mask), mul(take, g))
                b = where(greater(tiny, absolute(b)), zero, b)
                g = fma(momentum, b, g) if nesterov else b
                store_masked(buffer, p, b, mask)
            store_masked(values, p, fma(rate, g, x), mask)


@device_function
def _adagrad_rule(x, g, s, rate, decay, eps, tiny, zero):
    """Element, gradient and sum of squares -> the new element and sum."""
    g = fma(decay, x, g)
    s = fma(g, g, s)
    s = where(greater(tiny, s), zero, s)
    return fma(rate, div(g, add(sqrt(s), eps)), x), s


@kernel
def _adagrad(begins, offsets, values, grad, total, constants, n_chunks, chunk):
    if chunk < 0:
        return share_out(chunk, n_chunks)
    rate, decay, eps = splat(at(constants, 0)), splat(at(constants, 1)), splat(at(constants, 2))
    tiny, zero = splat(at(constants, 3)), splat(values.dtype.type(0))
    line, last = LINE // values.itemsize, split(offsets, n_chunks, chunk + 1)
    for u in range(split(offsets, n_chunks, chunk), last):
        if u + SPANS_AHEAD < last:
            ahead = at(begins, u + SPANS_AHEAD)
            last_ahead = ahead + at(offsets, u + SPANS_AHEAD + 1) - at(offsets, u + SPANS_AHEAD) - 1
            for k in range(ahead, min(last_ahead, ahead + MOST_LINES * line), line):
                prefetch_far(values, k)
                prefetch_far(total, k)
            prefetch_far(values, last_ahead)
            prefetch_far(total, last_ahead)
        i, end = at(offsets, u), at(offsets, u + 1)
        p = at(begins, u)
        while i + LANES <= end:
            x, s = _adagrad_rule(load(values, p), load(grad, i), load(total, p), rate, decay, eps, tiny, zero)
            store(total, p, s)
            store(values, p, x)
            i, p = i + LANES, p + LANES
        if i < end:
            mask = first_lanes(end - i)
            x, s = load_masked(values, p, mask), load_masked(total, p, mask)
            x, s = _adagrad_rule(x, load_masked(grad, i, mask), s, rate, decay, eps, tiny, zero)
            store_masked(total, p, s, mask)
            store_masked(values, p, x, mask)
