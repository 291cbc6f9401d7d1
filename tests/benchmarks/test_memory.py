from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.memory import PeakMemory, peak_rss_of
from errors import ConfigurationError

MB = 1_000_000


def _fill(megabytes: int) -> Callable[[], object]:
    held = torch.ones(50 * MB, dtype=torch.uint8)  # belongs to the baseline

    def step() -> None:
        torch.ones(megabytes * MB, dtype=torch.uint8).add_(held[0])

    return step


needs_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")


@needs_linux
def test_peak_memory_sees_what_was_freed_again() -> None:
    torch.ones(300 * MB, dtype=torch.uint8)  # an earlier, higher peak that must not count
    step = _fill(200)
    with PeakMemory() as peak:
        step()
    assert peak.bytes == pytest.approx(200 * MB, rel=0.1)
    with PeakMemory() as peak:
        pass
    assert peak.bytes < 20 * MB


@needs_linux
def test_peak_in_a_fresh_process_leaves_out_the_preparation() -> None:
    assert peak_rss_of(_fill, 200) == pytest.approx(200 * MB, rel=0.1)


def test_without_proc_peak_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, text: str) -> int:
        raise FileNotFoundError(2, "No such file or directory", str(self))

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(ConfigurationError, match="Linux"), PeakMemory():
        pass
