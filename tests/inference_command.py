"""The inference command in the test process, with a small bundle; a module of tests names this one as its plugin."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from errors import run_command
from tests.inference_model import Run, small_bundle
from vqgan_inference import main, parse_arguments


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return small_bundle(tmp_path_factory.mktemp("bundle") / "final_model.ckpt")


@pytest.fixture
def run(bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """The command in this process, with two steps on the CPU."""

    def call(
        xray: Path, *options: str, check: int = 0, output: str = "out", checkpoint: Path = bundle
    ) -> subprocess.CompletedProcess[str]:
        argv = ["--checkpoint", str(checkpoint), "--xray", str(xray), "--output", str(tmp_path / output)]
        capfd.readouterr()
        code = run_command(lambda: main(parse_arguments([*argv, "--steps", "2", "--device", "cpu", *options])))
        out, err = capfd.readouterr()
        assert code == check, f"exit {code}\n{out}\n{err}"
        return subprocess.CompletedProcess(argv, code, out, err)

    return call
