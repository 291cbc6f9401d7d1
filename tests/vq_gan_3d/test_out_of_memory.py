"""T43 in training: no memory left, on a GPU or on the host, ends the run with exit 7 and a hint."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from errors import ExitCode, is_out_of_memory, run_command
from tests.helpers import assert_one_line_error
from tests.vq_gan_3d.conftest import Train
from vq_gan_3d.codec import VQCodec

OF_THE_CPU = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "17179869184 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(OF_THE_CPU), MemoryError()], ids=repr
)
def test_t43_exit_7(train: Train, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    forward, calls = VQCodec.forward, []

    def third_fails(self: VQCodec, volume: torch.Tensor) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise error
        return forward(self, volume)

    monkeypatch.setattr(VQCodec, "forward", third_fails)
    assert_one_line_error(
        train("training.max_steps=4", check=7), "out of memory at step 2", "hardware.checkpointing=true"
    )


def test_other_errors_are_something_else() -> None:
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError) as caught:  # what torch really says
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        OF_THE_CPU,
    ],
)
def test_t43_every_command_tells_it_in_one_line(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise RuntimeError(words)

    assert run_command(command) == ExitCode.OUT_OF_MEMORY
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory: ")
    with pytest.raises(RuntimeError):
        run_command(command, debug=True)


def test_a_bug_keeps_its_traceback() -> None:
    def command() -> None:
        raise ValueError("CUDA error: out of memory")  # said by something that is no such error

    with pytest.raises(ValueError, match="CUDA error"):
        run_command(command)
