"""Read ahead and write behind in threads of their own, with a bounded queue: memory stays bounded, errors come back."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

Item = TypeVar("Item")
_END = object()


def read_ahead(items: Iterator[Item], ahead: int = 1) -> Iterator[Item]:
    """The same items, made by a thread up to ``ahead`` before they are asked for; its exceptions are raised here."""
    ready: queue.Queue[Any] = queue.Queue(maxsize=ahead)
    stop = threading.Event()

    def put(entry: tuple[Any, BaseException | None]) -> bool:
        while not stop.is_set():
            try:
                ready.put(entry, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((_END, None))
        except BaseException as error:
            put((_END, error))

    thread = threading.Thread(target=produce, name="read ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        stop.set()
        thread.join()


class WriteBehind:
    """Calls a writer in a thread, in order; the queue holds ``behind`` items at most.

    An exception of the writer is raised by the next ``put`` or at the end of the ``with`` block, and nothing more is
    written after it.

    Args:
        write: called with the arguments of each ``put``.
        behind: items that may wait.
    """

    def __init__(self, write: Callable[..., object], behind: int = 1) -> None:
        self._write = write
        self._waiting: queue.Queue[Any] = queue.Queue(maxsize=behind)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="write behind", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def put(self, *arguments: Any) -> None:
        """Hand over; waits while the queue is full."""
        self._waiting.put(arguments)
        if self._error is not None:
            raise self._error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._waiting.put(_END)
        self._thread.join()
        if error is None and self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (arguments := self._waiting.get()) is not _END:
            if self._error is None:
                try:
                    self._write(*arguments)
                except BaseException as error:
                    self._error = error
