"""PatchGAN discriminators in 2D (slices of three planes) and 3D (Isola et al. 2016, https://arxiv.org/abs/1611.07004)."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vq_gan_3d.encoder_decoder import ChannelNorm


class Verdict(NamedTuple):
    """Output of a discriminator.

    Attributes:
        logits: (B, 1, ...), one for each overlapping patch; positive means real.
        features: activations of the inner layers, for feature matching.
    """

    logits: Tensor
    features: list[Tensor]


class PatchDiscriminator(nn.Module):
    """Strided convolutions that judge overlapping patches; local, with channel norm instead of batch statistics.

    Args:
        spatial_dims: 2 for slices (B, 1, H, W), 3 for volumes (B, 1, D, H, W).
        width: channels of the first layer, doubled at each further one up to eight times.
        layers: strided layers.
    """

    def __init__(self, spatial_dims: int, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        conv = nn.Conv2d if spatial_dims == 2 else nn.Conv3d
        widths = [1] + [width * 2 ** min(level, 3) for level in range(layers + 1)]
        # padding 2 of a 4-kernel keeps even slices of 16 voxels alive through all layers
        self.convs = nn.ModuleList(
            conv(before, after, 4, stride=2 if level < layers else 1, padding=2)
            for level, (before, after) in enumerate(pairwise(widths))
        )
        self.norms = nn.ModuleList(
            nn.Identity() if level == 0 else ChannelNorm(after) for level, after in enumerate(widths[1:])
        )
        self.head = conv(widths[-1], 1, 4, padding=2)
        layout = torch.channels_last if spatial_dims == 2 else torch.channels_last_3d
        self.to(memory_format=layout)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Verdict:
        """(B, 1, H, W) or (B, 1, D, H, W) -> verdicts on its patches."""
        features = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), 0.2)  # (B, C, ...)
            features.append(x)
        return Verdict(self.head(x), features)


def plane_slices(volume: Tensor, positions: Tensor) -> list[Tensor]:
    """Cut slices in the three planes at relative positions.

    Args:
        volume: (B, 1, D, H, W).
        positions: (3, K) in [0, 1): K slices of each plane, axial, coronal, sagittal; the same for every volume of a
            batch, so that the cut does not depend on how a batch is spread over processes.

    Returns:
        Axial (B*K, 1, H, W), coronal (B*K, 1, D, W) and sagittal (B*K, 1, D, H) slices.
    """
    planes = []
    for axis, relative in zip((2, 3, 4), positions, strict=True):
        index = (relative * volume.shape[axis]).long().to(volume.device)
        cut = volume.index_select(axis, index).movedim(axis, 1)  # (B, K, 1, h, w)
        planes.append(cut.flatten(0, 1))  # (B*K, 1, h, w)
    return planes
