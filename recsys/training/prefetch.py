"""The next batches are made while the model trains on this one."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterator
from typing import Generic, TypeVar

__all__ = ["prefetch"]

T = TypeVar("T")


def prefetch(iterator: Iterator[T], depth: int = 2) -> Generator[T, None, None]:
    """The items of `iterator`, taken from it by a thread that is at most `depth` items ahead.

    It pays where the iterator spends its time outside Python's lock (torch's operations do). Items, their order and
    whatever the iterator draws from generators are the same as without; but while this is not exhausted, those
    generators are ahead. An error in the iterator is raised here, after the items before it. Once this has ended or was
    closed (an interrupted loop should see to it by `contextlib.closing`), the thread is gone and `iterator` is closed.

    Raises:
        ValueError: depth < 1.
    """
    if depth < 1:
        raise ValueError(f"depth: expected at least 1, got {depth}")
    producer = _Producer(iterator, depth)
    return producer.items()


class _Producer(Generic[T]):
    """What the two threads share: a buffer, whether the consumer has left, and how the producer has ended."""

    def __init__(self, iterator: Iterator[T], depth: int) -> None:
        self.iterator, self.depth = iterator, depth
        self.buffer: deque[T] = deque()
        self.changed = threading.Condition()
        self.left = self.ended = False
        self.error: BaseException | None = None

    def items(self) -> Generator[T, None, None]:
        # A daemon: even a second Ctrl-C, during the join, does not keep the program from ending.
        thread = threading.Thread(target=self.produce, name="prefetch", daemon=True)
        try:
            thread.start()
            while True:
                with self.changed:
                    while not self.buffer and not self.ended:
                        self.changed.wait()
                    if not self.buffer:
                        break
                    item = self.buffer.popleft()
                    self.changed.notify()
                yield item
            if self.error is not None:
                raise self.error
        finally:
            with self.changed:
                self.left = True
                self.changed.notify()
            if thread.ident is not None:
                thread.join()

    def produce(self) -> None:
        try:
            for item in self.iterator:
                with self.changed:
                    while len(self.buffer) >= self.depth and not self.left:
                        self.changed.wait()
                    if self.left:
                        break
                    self.buffer.append(item)
                    self.changed.notify()
            if isinstance(self.iterator, Generator):
                self.iterator.close()
        except BaseException as error:  # the consumer's to raise
            self.error = error
        with self.changed:
            self.ended = True
            self.changed.notify()
