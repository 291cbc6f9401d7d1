"""Standardisation of the code channels by running moments: local in use, and no drift in training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vq_gan_3d.distributed import all_reduce_mean


def _per_channel(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _moments(code: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (C,) and covariance (C, C) of a code (B, C, D, H, W) over the global batch."""
    vectors = code.movedim(1, -1).flatten(0, -2)  # (N, C)
    packed = all_reduce_mean(torch.cat([vectors.mean(0)[None], vectors.T @ vectors / len(vectors)]))
    mean, second = packed[0], packed[1:]
    return mean, second - torch.outer(mean, mean)


class _Renormalise(torch.autograd.Function):
    """Forward with running moments, backward as if the batch's own moments had been used.

    Batch Renormalization, Ioffe 2017, https://arxiv.org/abs/1702.03275, equations 3-6: the gradient loses its
    components that shift or scale a whole channel, and with them the drift that pushes all codes to one side.
    """

    @staticmethod
    def forward(ctx: Any, code: Tensor, running: Tensor, batch: Tensor) -> Tensor:
        """(B, C, D, H, W), running and batch moments (2, C) as mean and standard deviation."""
        ctx.save_for_backward(code, running, batch)
        return (code - _per_channel(running[0])) / _per_channel(running[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of the code, orthogonal to shift and scale of each channel over the global batch."""
        (gradient,) = gradients
        code, running, batch = ctx.saved_tensors
        own = (code - _per_channel(batch[0])) / _per_channel(batch[1])  # the batch's own standardisation
        axes = (0, 2, 3, 4)
        shift, scale = all_reduce_mean(torch.stack([gradient.mean(axes), (gradient * own).mean(axes)]))
        projected = gradient - _per_channel(shift) - own * _per_channel(scale)
        return projected / _per_channel(running[1]), None, None


class CodeNorm(nn.Module):
    """Running standardisation of the code channels, so that the quantizer always meets mean 0 and variance 1.

    The forward pass uses running moments in training and in use alike, so the codec stays one local function (a patch
    of air is not stretched to variance 1).

    Args:
        channels: C.
        decay: decay of the running moments.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, channels: int, decay: float = 0.9) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))

    def _std(self) -> Tensor:
        return self.variance.clamp_min(1e-8).sqrt()

    @torch.no_grad()
    def start(self, code: Tensor) -> Tensor:
        """Take the moments of this code (B, C, D, H, W) as they are; returns its correlation matrix (C, C)."""
        mean, covariance = _moments(code.float())
        self.mean.copy_(mean)
        self.variance.copy_(covariance.diagonal())
        return covariance / torch.outer(self._std(), self._std())

    def forward(self, code: Tensor) -> Tensor:
        """(B, C, D, H, W) of any float dtype -> the same shape, float32."""
        with torch.autocast(code.device.type, enabled=False):
            code = code.float()
            if not self.training:
                return (code - _per_channel(self.mean)) / _per_channel(self._std())
            with torch.no_grad():
                mean, covariance = _moments(code)
                variance = covariance.diagonal()
                # a NaN batch must not outlive its step
                finite = mean.isfinite().all() & variance.isfinite().all()
                self.mean.copy_(torch.where(finite, self.mean.lerp(mean, 1 - self.decay), self.mean))
                self.variance.copy_(torch.where(finite, self.variance.lerp(variance, 1 - self.decay), self.variance))
                # a batch of pure air has no spread of its own: floor it, or the projection divides by zero
                std = torch.maximum(variance, 1e-2 * self.variance).clamp_min(1e-8).sqrt()
            running = torch.stack([self.mean, self._std()])
            return _Renormalise.apply(code, running, torch.stack([mean, std]))  # (B, C, D, H, W)
