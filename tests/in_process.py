"""The real command inside the test process: same entry, same Hydra, a second instead of ten."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType

import pytest
import torch

from errors import run_command
from tests.helpers import BASELINE, ROOT, TINY

DDPM = "ddpm/train/train_ddpm.py"

Train = Callable[..., "CompletedProcess[str]"]


def call_main(
    module: ModuleType, *flags: object, check: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> CompletedProcess[str]:
    """A script's ``main`` on its own command line; its exit code is ``check``."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, flags)])
    capsys.readouterr()
    code = run_command(lambda: module.main(module.parse_arguments()))
    out, err = capsys.readouterr()
    assert code == check, f"exit {code}\n{out[-2000:]}\n{err[-2000:]}"
    return CompletedProcess(sys.argv, code, out, err)


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Train]:
    """``train(*overrides, check=exit code)`` in ``tmp_path``, with a cache of its own."""
    from vq_gan_3d.command import run_training

    threads, root = torch.get_num_threads(), logging.getLogger()
    handlers, level, signals = root.handlers[:], root.level, (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.getsignal(number) for number in signals}
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    for name in ("XRAY2CTPA_RESUME", "HYDRA_FULL_ERROR"):  # set by the command; put back afterwards
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(
        *overrides: str, check: int | None = 0, script: str = BASELINE, tiny: bool = True
    ) -> CompletedProcess[str]:
        if script == DDPM:
            from ddpm.stage import train as run_real
        else:
            from vq_gan_3d.runner import train as run_real
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *(TINY if tiny else []), *overrides])
        capfd.readouterr()
        code = run_training((ROOT / script).parents[1] / "config", run_real)
        out, err = capfd.readouterr()
        if check is not None:
            assert code == check, f"exit {code}\n{out[-3000:]}\n{err[-6000:]}"
        return CompletedProcess(sys.argv, code, out, err)

    yield call
    for handler in root.handlers[:]:
        if handler not in handlers:
            root.removeHandler(handler)
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.raiseExceptions = True
    for number, handler_of in previous.items():
        signal.signal(number, handler_of)
    torch.set_num_threads(threads)


@pytest.fixture
def signal_self() -> Callable[[int], None]:
    """Send a signal to this process; Python runs the handler before the next line."""
    return lambda number: os.kill(os.getpid(), number)
