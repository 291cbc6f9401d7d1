"""Schedules, clipping and the settings of the optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from errors import ConfigurationError
from vq_gan_3d.optimization import GuardedOptimizer, OptimizerConfig, learning_rate_factor


def test_learning_rate_factors() -> None:
    constant, cosine = (OptimizerConfig(warmup_steps=10, lr_schedule=kind) for kind in ("constant", "cosine"))
    assert [learning_rate_factor(step, constant, 100) for step in (1, 5, 10, 100)] == pytest.approx([0.1, 0.5, 1, 1])
    assert learning_rate_factor(50, cosine, 100) == pytest.approx(0.525)
    assert learning_rate_factor(100, cosine, 100) == pytest.approx(0.05)
    rates = [learning_rate_factor(step, cosine, 100) for step in range(10, 101)]
    assert rates == sorted(rates, reverse=True)
    assert learning_rate_factor(1, OptimizerConfig(warmup_steps=0), 0) == 1


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"lr_schedule": "linear"}, "training.lr_schedule"),
        ({"gradient_clip_val": -1.0}, "training.gradient_clip_val=-1.0"),
        ({"gradient_clip_val": float("nan")}, "training.gradient_clip_val=nan"),
    ],
)
def test_bad_settings(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigurationError, match=key):
        OptimizerConfig(**values)


@pytest.mark.parametrize("clip", [0, None, 1.0, 100.0])
def test_no_limit_leaves_gradients_alone(clip: float | None) -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    guarded = GuardedOptimizer("one", torch.nn.Module(), torch.optim.SGD([weight], 1.0), 1, clip, 10)  # type: ignore[arg-type]
    assert float(guarded.step(1.0)) == 5
    scale = 0.2 if clip == 1 else 1
    assert weight.tolist() == pytest.approx([-3 * scale, -4 * scale], rel=1e-5)
