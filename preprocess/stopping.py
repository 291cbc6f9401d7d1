"""SIGINT and SIGTERM in a command that keeps what is finished: both end it at once, each with its own exit code."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from errors import TerminatedError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether a signal came, and which was the first; made by `stoppable`."""

    def __init__(self) -> None:
        self.number = 0

    def listen(self) -> None:
        """Take both signals over, also where a shell started the command in the background and SIGINT is ignored.

        Lightning's handler, which takes the place of any before it, notes SIGTERM and nothing else: its loop of
        predictions never asks, and between processes the note is a collective, for which a lone one would wait.
        """
        for number in _SIGNALS:
            signal.signal(number, self._handle)

    def check(self) -> None:
        """Raise again what was caught by code that takes no exception seriously, such as a destructor.

        Raises:
            KeyboardInterrupt: a signal came.
        """
        if self.number:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number:  # schedulers repeat it; what is being put in order shall be
            return
        self.number = number
        # not TerminatedError: where the failure of one volume is told and the next one begun, it would be one of these
        raise KeyboardInterrupt


@contextmanager
def stoppable(kept: str) -> Iterator[Stop]:
    """Listen to both signals inside the block, and put the handlers back that were there.

    Args:
        kept: what remains and how it goes on, for the error's one line.

    Raises:
        TerminatedError: SIGTERM ended the block.
        KeyboardInterrupt: SIGINT did, also where Lightning made a SystemExit(1) of it.
    """
    stop = Stop()
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    stop.listen()
    try:
        yield stop
    except (KeyboardInterrupt, SystemExit) as error:
        if stop.number == signal.SIGTERM:
            raise TerminatedError(f"stopped by SIGTERM: {kept}") from error
        if stop.number == signal.SIGINT:
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
