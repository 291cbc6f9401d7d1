"""The diffusion time as a vector: sinusoids of continuous t, then a small network."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

# Sinusoids of positions 0 … 1000 (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.5; Ho et al. 2020
# for diffusion steps): continuous t is stretched to that range, so that its frequencies are the proven ones.
TIME_SCALE = 1000.0
LONGEST_PERIOD = 10_000.0


def sinusoidal_features(t: Tensor, features: int) -> Tensor:
    """Sines and cosines of t at geometrically spaced frequencies.

    Args:
        t: (B,) in [0, 1].
        features: even number of them.

    Returns:
        (B, features) float32.
    """
    half = features // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
    phase = TIME_SCALE * t.float()[:, None] * torch.exp(-math.log(LONGEST_PERIOD) * exponent)  # (B, features / 2)
    return torch.cat([phase.sin(), phase.cos()], dim=1)  # (B, features)


class TimeEmbedding(nn.Module):
    """Sinusoids, linear, SiLU, linear.

    Args:
        channels: of the embedding.
        features: sinusoids and cosines together; even.
    """

    def __init__(self, channels: int, features: int = 128) -> None:
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(nn.Linear(features, channels), nn.SiLU(), nn.Linear(channels, channels))

    def forward(self, t: Tensor) -> Tensor:
        """Times (B,) in [0, 1] -> (B, channels)."""
        return self.mlp(sinusoidal_features(t, self.features))  # (B, channels)
