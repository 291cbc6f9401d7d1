"""Run the real entry scripts in processes of their own, on the smallest data that goes all the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
REAL_DATA = ROOT.parent / "shared" / "data"
BASELINE = "baseline_256x256x64/train/train_vqgan.py"
PATCHWISE = "patchwise_512x512x604/train/train_vqgan_distributed.py"
# Five training volumes of 16×32×32 and a codec of 8 channels: a step takes milliseconds.
TINY = [
    "model=vq_gan_3d_small",
    "model.widths=[8,8,16]",
    "model.encoder_blocks=[1,1,1]",
    "model.decoder_blocks=[1,1,1]",
    "model.discriminator_width=4",
    "model.discriminator_layers=2",
    "model.discriminator_iter_start=2",
    "dataset.size=[16,32,32]",
    "dataset.n_patients=6",
    "training.num_workers=0",
    "training.warmup_steps=2",
    "hardware.device=cpu",
    "callbacks.progress_bar=false",
]


def environment(**extra: str) -> dict[str, str]:
    """The environment of a child: one thread, so that several tests can run side by side."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **extra}


def command(script: str, *overrides: str, tiny: bool = True) -> list[str]:
    """Command line of an entry script."""
    return [sys.executable, str(ROOT / script), *(TINY if tiny else []), *overrides]


def run(
    script: str, *overrides: str, cwd: Path, tiny: bool = True, check: int | None = 0, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Run an entry script to its end and check its exit code (None: any)."""
    result = subprocess.run(
        command(script, *overrides, tiny=tiny),
        cwd=cwd,
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=600,
    )
    if check is not None:
        assert result.returncode == check, f"exit {result.returncode}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    return result


def start(script: str, *overrides: str, cwd: Path, **extra: str) -> subprocess.Popen[str]:
    """Start an entry script in a process group of its own."""
    return subprocess.Popen(
        command(script, *overrides),
        cwd=cwd,
        env=environment(**extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(path: Path, process: subprocess.Popen[str], timeout_s: float = 120) -> None:
    """Wait until a file exists while the process lives."""
    end = time.monotonic() + timeout_s
    while not path.exists():
        if process.poll() is not None:
            raise AssertionError(f"ended with {process.returncode} before {path}: {process.communicate()[1][-3000:]}")
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL the whole group."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    """The last line on stderr, which must say it all."""
    return result.stderr.strip().splitlines()[-1]


def assert_one_line_error(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """The last line names the reason, and there is no traceback."""
    assert "Traceback" not in result.stderr, result.stderr[-3000:]
    line = last_line(result)
    assert line.startswith("error: ")
    for word in words:
        assert word in line, line


def assert_same_state(a: Any, b: Any, where: str = "checkpoint") -> None:
    """Every tensor and number equal, bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), f"{where}: {(a != b).sum()} of {a.numel()} differ"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_state(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_state(x, y, f"{where}[{index}]")
    else:
        assert a == b, where


STATE_KEYS = ("state_dict", "current_model_state", "averaging_state", "optimizer_states")


class Canary:
    """Sings when it is unpickled: makes the file of its path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return type(self.path).touch, (self.path,)
