"""How far apart two processors are: what a cache line takes from one to the other and back.

Two processors of a virtual machine may share a cache or lie on different chips, and that may change while it runs. It
decides what threads pay for reading what another one has written, and so belongs beside times of two threads.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

__all__ = ["handoff_ns"]

_MOST_LOOKS = 1 << 22  # for one answer; then there is nobody at the other end


def _place(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return context.make_array(signature.args[0])(context, builder, arguments[0]).data


@intrinsic
def _look(typing_context: Any, line: Any) -> Any:
    """The first number of an array, read anew from memory."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_place(context, builder, signature, arguments), "acquire", 8)

    return types.int64(line), emit


@intrinsic
def _tell(typing_context: Any, line: Any, number: Any) -> Any:
    """Write it, for the other one to see."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store_atomic(arguments[1], _place(context, builder, signature, arguments), "release", 8)
        return ir.Constant(ir.IntType(64), 0)

    return types.int64(line, types.int64), emit


@numba.njit(cache=True, nogil=True)
def _bounce(line: Any, rounds: int, answers: bool) -> bool:
    """Tell odd numbers and wait for the next even one, or the other way round; whether all were answered."""
    for i in range(rounds):
        if not answers:
            _tell(line, 2 * i + 1)
        wanted = 2 * i + 1 if answers else 2 * i + 2
        looks = 0
        while _look(line) != wanted:
            looks += 1
            if looks == _MOST_LOOKS:
                return False
        if answers:
            _tell(line, wanted + 1)
    return True


def handoff_ns(rounds: int = 100_000, repeats: int = 3) -> float | None:
    """Nanoseconds there and back, the least of some repeats; None where nobody answered in time: one processor, or busy
    ones.
    """
    found = []
    for _ in range(repeats):
        line = np.zeros(16, np.int64)
        _bounce(line, 0, True)  # compiled before it is timed
        other = threading.Thread(target=_bounce, args=(line, rounds, True))
        other.start()
        begin = time.perf_counter()
        answered = _bounce(line, rounds, False)
        seconds = time.perf_counter() - begin
        other.join()
        if answered:
            found.append(seconds / rounds * 1e9)
    return min(found, default=None)
