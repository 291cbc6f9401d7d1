from __future__ import annotations

import math

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

from ddpm.time_embedding import TimeEmbedding, sinusoidal_features


def test_features_equal_the_usual_ones_of_step_numbers() -> None:
    t = torch.tensor([0.0, 0.001, 0.5, 1.0])
    theirs = get_timestep_embedding(t * 1000, 32, flip_sin_to_cos=False, downscale_freq_shift=0)
    torch.testing.assert_close(sinusoidal_features(t, 32), theirs, atol=1e-4, rtol=0)


def test_first_frequency_is_one_radian_a_step() -> None:
    features = sinusoidal_features(torch.tensor([0.001]), 8)
    assert float(features[0, 0]) == pytest.approx(math.sin(1.0), abs=1e-6)
    assert float(features[0, 4]) == pytest.approx(math.cos(1.0), abs=1e-6)


def test_every_time_has_its_own_embedding() -> None:
    torch.manual_seed(0)
    embedded = TimeEmbedding(16)(torch.linspace(0, 1, 101)).detach()
    distances = torch.cdist(embedded, embedded) + torch.eye(101)
    assert embedded.shape == (101, 16)
    assert float(distances.min()) > 1e-3


def test_time_is_float32_whatever_the_precision_of_the_network() -> None:
    # bf16 has 8 bits: 0.999 and 1.0 must not fall together
    with torch.autocast("cpu", torch.bfloat16):
        near, last = sinusoidal_features(torch.tensor([0.999, 1.0]), 8)
    assert near.dtype == torch.float32
    assert not torch.equal(near, last)
