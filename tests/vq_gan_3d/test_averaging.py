"""The averaged weights against an average taken by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tests.helpers import assert_same_state
from vq_gan_3d.callbacks import ExponentialMovingAverage

DECAY, EPOCHS, BATCHES = 0.3, 3, 4


class Walk(pl.LightningModule):
    """A weight that each batch moves by one (its gradient is -1), and a buffer that counts the batches."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.bad: set[int] = set()
        self.seen: list[tuple[float, int]] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1.0)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.steps += 1
        if int(self.steps) in self.bad:  # as `GuardedOptimizer` does with gradients that are not finite
            return
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(-self.weight)
        optimizer.step()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen.append((float(self.weight.detach()), int(self.steps)))


def fit(module: Walk, folder: Path) -> tuple[pl.Trainer, ExponentialMovingAverage]:
    average = ExponentialMovingAverage(DECAY)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=EPOCHS, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=[average], default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.zeros(BATCHES)), DataLoader(torch.zeros(1)))
    return trainer, average


def by_hand(weights: list[float]) -> list[float]:
    """The average after each step: the first weight, then ``d · average + (1 - d) · weight`` with a growing d."""
    averages = [weights[0]]
    for n, weight in enumerate(weights[1:], start=1):
        decay = min(DECAY, (1 + n) / (10 + n))
        averages.append(decay * averages[-1] + (1 - decay) * weight)
    return averages


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_validation_sees_the_average_and_training_keeps_the_raw_weights(tmp_path: Path) -> None:
    module = Walk()
    trainer, _ = fit(module, tmp_path)
    expected = by_hand([float(n) for n in range(1, EPOCHS * BATCHES + 1)])
    assert expected[-1] < EPOCHS * BATCHES - 0.3  # it lags
    ends = [BATCHES * epoch - 1 for epoch in range(1, EPOCHS + 1)]
    assert [weight for weight, _ in module.seen] == pytest.approx([expected[end] for end in ends], rel=1e-5)
    assert [steps for _, steps in module.seen] == [end + 1 for end in ends]
    assert float(module.weight) == EPOCHS * BATCHES  # Lightning's own callback leaves the average there
    content = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    assert float(content["state_dict"]["weight"]) == pytest.approx(expected[-1], rel=1e-5)
    assert float(content["current_model_state"]["weight"]) == EPOCHS * BATCHES


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_buffers_are_live_also_after_a_step_that_was_skipped(tmp_path: Path) -> None:
    """The averages are brought up to date by steps of the optimizer alone; the count of batches goes on without."""
    module = Walk()
    module.bad = {BATCHES, 2 * BATCHES, EPOCHS * BATCHES}
    trainer, _ = fit(module, tmp_path)
    assert [steps for _, steps in module.seen] == [BATCHES * epoch for epoch in range(1, EPOCHS + 1)]
    content = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    assert_same_state(content["state_dict"]["steps"], content["current_model_state"]["steps"])
    assert int(module.steps) == EPOCHS * BATCHES
