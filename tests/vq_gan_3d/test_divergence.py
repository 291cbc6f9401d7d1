"""T41: numbers that are not finite never reach the weights; if they stay, training ends with 5."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dataset.intensity import HUWindow
from tests.helpers import assert_one_line_error
from tests.vq_gan_3d.conftest import Train
from vq_gan_3d.checkpointing import load_checkpoint

EVERY = "training.checkpoint_every_n_steps=1"


@pytest.fixture
def nan_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], bool], float], None]:
    """Replace the data of chosen training batches (the first is 1)."""

    def arrange(chosen: Callable[[int], bool], value: float = float("nan")) -> None:
        original, seen = HUWindow.to_unit, []

        def to_unit(self: HUWindow, volume: Any) -> Any:
            unit = original(self, volume)
            if isinstance(volume, torch.Tensor) and volume.ndim == 5 and torch.is_grad_enabled():
                seen.append(1)
                if chosen(len(seen)):
                    unit[..., 3, 3] = value
            return unit

        monkeypatch.setattr(HUWindow, "to_unit", to_unit)

    return arrange


def assert_finite(state: Any, where: str = "checkpoint") -> int:
    if isinstance(state, torch.Tensor):
        assert bool(state.isfinite().all()), where
        return state.numel()
    if isinstance(state, dict):
        return sum(assert_finite(value, f"{where}[{key!r}]") for key, value in state.items())
    if isinstance(state, list | tuple):
        return sum(assert_finite(value, f"{where}[{index}]") for index, value in enumerate(state))
    return 0


def assert_finite_checkpoint(path: Path) -> dict[str, Any]:
    checkpoint = load_checkpoint(path)
    assert assert_finite(checkpoint) > 10_000
    return checkpoint


@pytest.mark.parametrize(
    ("step", "quantizer", "value"),  # before, and while, the discriminators take part
    [
        (4, "ema", float("nan")),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (1, "ema", float("nan")),
                (4, "ema", float("inf")),
                (4, "fsq", float("nan")),
                (4, "simvq", float("nan")),
            ]
        ),
    ],
)
def test_t41_one_bad_step_is_skipped(
    train: Train, tmp_path: Path, nan_in: Callable[..., None], value: float, quantizer: str, step: int
) -> None:
    nan_in(lambda call: call == step, value)
    result = train("training.max_steps=7", EVERY, f"model.quantizer={quantizer}")
    log = (tmp_path / "outputs/logs/training.log").read_text()
    for text in (result.stderr, log):
        assert f"step {step}: gradients of the generator are not finite, step skipped" in text
    checkpoint = assert_finite_checkpoint(tmp_path / "outputs/checkpoints/final.ckpt")
    assert int(checkpoint["current_model_state"]["steps"]) == 7
    # the optimizer made one step less than there were batches, and went on after it
    counts = {int(state["step"]) for state in checkpoint["optimizer_states"][0]["state"].values()}
    assert counts == {6}
    assert "codec.code_norm.covariance" in checkpoint["current_model_state"]


@pytest.mark.slow
def test_a_bad_batch_of_an_accumulated_step(train: Train, tmp_path: Path, nan_in: Callable[..., None]) -> None:
    nan_in(lambda call: call == 3)
    result = train("training.max_steps=8", "training.accumulate_grad_batches=2", "model.quantizer=ema")
    assert "step 4: gradients of the generator are not finite" in result.stderr
    assert_finite_checkpoint(tmp_path / "outputs/checkpoints/final.ckpt")


def test_t41_nan_that_stays_ends_the_run_with_a_finite_checkpoint(
    train: Train, tmp_path: Path, nan_in: Callable[..., None]
) -> None:
    nan_in(lambda call: call >= 3)
    result = train("training.max_steps=20", EVERY, "training.max_bad_steps=4", "model.quantizer=ema", check=5)
    assert_one_line_error(result, "4 consecutive steps up to 6", "outputs/checkpoints/last.ckpt", "ckpt_path=last")
    assert_finite_checkpoint(tmp_path / "outputs/checkpoints/last.ckpt")


def test_nan_from_the_start_promises_no_checkpoint(train: Train, tmp_path: Path, nan_in: Callable[..., None]) -> None:
    nan_in(lambda call: True)
    result = train("training.max_steps=20", "training.max_bad_steps=2", check=5)
    assert_one_line_error(result, "2 consecutive steps up to 2", "start again")
    assert "ckpt_path=last" not in result.stderr
    assert not list((tmp_path / "outputs/checkpoints").iterdir())
