"""The real command inside the test process."""

from tests.in_process import Train, signal_self, train

__all__ = ["Train", "signal_self", "train"]
