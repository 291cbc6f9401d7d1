"""The real command inside the test process."""

from tests.in_process import train

__all__ = ["train"]
