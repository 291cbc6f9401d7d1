"""Whitening of the code by running moments: local in use, and no drift in training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vq_gan_3d.distributed import all_reduce_mean


def _moments(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (C,) and covariance (C, C) of vectors (N, C) over the global batch."""
    # Centred first: E[zzᵀ] - E[z]E[z]ᵀ loses a small spread far from 0 to rounding; that of pure air is indefinite.
    mean = all_reduce_mean(vectors.mean(0))
    centred = vectors - mean  # (N, C)
    return mean, all_reduce_mean(centred.T @ centred / len(vectors))


def _whitening(covariance: Tensor) -> Tensor:
    """Inverse Cholesky factor W (C, C): W covariance Wᵀ = 1. Floored, since a batch of pure air has no spread."""
    eye = torch.eye(len(covariance), device=covariance.device)
    floor = 1e-4 * covariance.diagonal().mean().clamp_min(1e-8)
    factor, _ = torch.linalg.cholesky_ex(covariance + floor * eye)
    return torch.linalg.solve_triangular(factor, eye, upper=False)


class _Whiten(torch.autograd.Function):
    """Forward with running moments, backward as if the batch's own moments had been used.

    The idea of Batch Renormalization (Ioffe 2017, https://arxiv.org/abs/1702.03275, equations 3-6) carried over to
    whitening: the gradient loses what shifts, scales or correlates channels as a whole, and with it the drift that
    pushes all codes to one side.
    """

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, mean: Tensor, whitening: Tensor, own: Tensor) -> Tensor:
        """Vectors (N, C), running mean (C,) and whitening (C, C), the batch's own standardised vectors (N, C)."""
        ctx.save_for_backward(whitening, own)
        return (vectors - mean) @ whitening.T  # (N, C)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """Project out the mean and the symmetric part of E[z gᵀ] over the global batch; rotations stay free."""
        (gradient,) = gradients
        whitening, own = ctx.saved_tensors
        packed = all_reduce_mean(torch.cat([gradient.mean(0)[None], own.T @ gradient / len(gradient)]))
        shift, cross = packed[0], packed[1:]
        projected = gradient - shift - own @ (0.5 * (cross + cross.T))
        return projected @ whitening, None, None, None


class CodeNorm(nn.Module):
    """Running whitening of the code channels: the quantizer always meets mean 0 and covariance 1.

    Codes can so start where the data is, the channels share the work, and the latents of the diffusion model come out
    standardised. The first training batch sets the moments; they are buffers, so a resumed run goes on with them. The
    forward pass uses running moments in training and in use alike, so the codec stays one local function (a patch of
    air is not stretched to variance 1).

    Args:
        channels: C.
        decay: limit of the decay of the running moments, which start as plain means; two patches in a batch may be all
            air, so it must be slow, or the codes jump from step to step.
    """

    mean: Tensor
    covariance: Tensor
    updates: Tensor

    def __init__(self, channels: int, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("covariance", torch.eye(channels))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def _follow(self, mean: Tensor, covariance: Tensor) -> None:
        rate = (1.0 / (self.updates + 1)).clamp_min(1 - self.decay)
        finite = mean.isfinite().all() & covariance.isfinite().all()  # a NaN batch must not outlive its step
        self.mean.copy_(torch.where(finite, self.mean.lerp(mean, rate), self.mean))
        self.covariance.copy_(torch.where(finite, self.covariance.lerp(covariance, rate), self.covariance))
        self.updates += finite

    def forward(self, code: Tensor) -> Tensor:
        """(B, C, D, H, W) of any float dtype -> the same shape, float32."""
        with torch.autocast(code.device.type, enabled=False):
            vectors = code.float().movedim(1, -1)  # (B, D, H, W, C)
            grid, vectors = vectors.shape, vectors.flatten(0, -2)  # (N, C)
            if self.training:
                with torch.no_grad():
                    mean, covariance = _moments(vectors)
                    self._follow(mean, covariance)
                    own = (vectors - mean) @ _whitening(covariance.lerp(self.covariance, 0.01)).T
                white = _Whiten.apply(vectors, self.mean.clone(), _whitening(self.covariance), own)
            else:
                white = (vectors - self.mean) @ _whitening(self.covariance).T
            return white.view(grid).movedim(-1, 1)  # (B, C, D, H, W)
