"""Samplers: from noise to a sample along a grid of times, as pure functions.

Each takes ``denoise(x_t, t) -> x0 prediction`` (see `ddpm.guidance`), so none knows objective or guidance. Steps
are exact in α and σ, for any variance-preserving schedule and for rectified flow, first and last step included: where
α(1) = 0 nothing is divided by it, and the step to t = 0 returns the last prediction.

All randomness comes from a :class:`NoiseSource`, in which each sample has a generator of its own: sample 7 of seed 0 is
the same alone, in any batch and in any order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ddpm.diffusion import Diffusion
from ddpm.schedules import NoiseSchedule
from errors import ConfigurationError

_GRID_CELLS = 10_000  # of the table that inverts a schedule
Denoiser = Callable[[Tensor, Tensor], Tensor]  # x_t (B, C, ...), t (B,) -> x0 (B, C, ...)


class NoiseSource:
    """Standard normal numbers for a batch, a stream of its own for each sample.

    Drawn on the CPU by NumPy's counter-based Philox generator, keyed by (seed, index): the same on every device, in
    every batch and under every version of torch.

    Args:
        seed: of the whole run, not negative.
        indices: number of each sample in the run, not negative.
    """

    def __init__(self, seed: int, indices: Sequence[int]) -> None:
        if seed < 0 or min(indices, default=0) < 0:
            raise ConfigurationError(f"seed={seed}: seeds and sample numbers must not be negative")
        self._streams = [np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, i]))) for i in indices]

    def normal(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Next numbers of every stream.

        Args:
            shape: of one sample, (C, ...).
            device: where they shall lie.

        Returns:
            (B, C, ...) float32.
        """
        draws = [stream.standard_normal(tuple(shape), dtype=np.float32) for stream in self._streams]
        return torch.from_numpy(np.stack(draws)).to(device)  # (B, C, ...)


def time_grid(steps: int, schedule: NoiseSchedule) -> Tensor:
    """Times of a sampling run: steps of equal size in σ/(α + σ), the time of rectified flow.

    Every schedule is rectified flow in other coordinates, so what makes a grid good is the data and not the schedule.
    On Gaussians of spread 0.1 to 1, ten DPM-Solver++ steps so placed err by 0.015, by 0.030 with even steps in the
    cosine's t and 0.067 in the linear schedule's t (2026-11-22). A ``shift`` moves the steps as it moves the schedule.

    Args:
        steps: number of steps, at least 1.
        schedule: whose times they are.

    Returns:
        (steps + 1,) float64 from 1 to 0.

    Raises:
        ConfigurationError: fewer than 1 step.
    """
    if steps < 1:
        raise ConfigurationError(f"steps={steps}: sampling takes at least 1 step")
    t = torch.linspace(0, 1, _GRID_CELLS + 1, dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(t)
    share = sigma / (getattr(schedule, "shift", 1.0) * alpha + sigma)  # rises from 0
    wanted = torch.linspace(float(share[-1]), 0, steps + 1, dtype=torch.float64)
    return torch.from_numpy(np.interp(wanted.numpy(), share.numpy(), t.numpy()))


@dataclass(frozen=True)
class _Level:
    """One time of the grid: t and its α, σ as Python floats."""

    t: float
    alpha: float
    sigma: float

    @property
    def noise_share(self) -> float:
        """σ / (α + σ): the time of rectified flow, to which any schedule can be brought by scaling x."""
        return self.sigma / (self.alpha + self.sigma)

    def epsilon(self, x: Tensor, x0: Tensor) -> Tensor:
        """The noise in x, (B, C, ...)."""
        return (x - self.alpha * x0) / self.sigma


def _levels(times: Tensor, diffusion: Diffusion) -> list[_Level]:
    times = times.double().cpu()
    alpha, sigma = diffusion.schedule.alpha_sigma(times)
    return [_Level(*values) for values in zip(times.tolist(), alpha.tolist(), sigma.tolist(), strict=True)]


def _steps(times: Tensor, diffusion: Diffusion) -> Iterator[tuple[_Level, _Level]]:
    return pairwise(_levels(times, diffusion))


def _predict(denoise: Denoiser, x: Tensor, level: _Level) -> Tensor:
    return denoise(x, x.new_full(x.shape[:1], level.t)).to(x.dtype)  # (B, C, ...)


def sample_ddpm(denoise: Denoiser, noise: Tensor, times: Tensor, diffusion: Diffusion, rng: NoiseSource) -> Tensor:
    """Ancestral sampling: x_s is drawn from q(x_s | x_t, x0) (Ho et al. 2020, equations 6 and 7, the smaller variance).

    https://arxiv.org/abs/2006.11239; for any pair of times as in Kingma et al. 2021, https://arxiv.org/abs/2107.00630,
    appendix A.4.

    Args:
        denoise: predicts x0.
        noise: (B, C, ...) standard normal, x at t = 1.
        times: (steps + 1,) falling, from :func:`time_grid`.
        diffusion: gives α and σ.
        rng: noise of each step, one stream for each sample.

    Returns:
        (B, C, ...).
    """
    x = noise
    for now, after in _steps(times, diffusion):
        x0 = _predict(denoise, x, now)
        ratio = now.alpha / after.alpha
        added = now.sigma**2 - (ratio * after.sigma) ** 2  # variance that the step from `after` to `now` adds
        x = (ratio * after.sigma**2 / now.sigma**2) * x + (after.alpha * added / now.sigma**2) * x0
        if after.sigma > 0:
            spread = after.sigma * max(added, 0.0) ** 0.5 / now.sigma
            x = x + spread * rng.normal(x.shape[1:], x.device).to(x.dtype)
    return x  # (B, C, ...)


def sample_ddim(denoise: Denoiser, noise: Tensor, times: Tensor, diffusion: Diffusion, rng: NoiseSource) -> Tensor:
    """Deterministic DDIM, η = 0 (Song et al. 2020, https://arxiv.org/abs/2010.02502, equation 12).

    Arguments and result as for :func:`sample_ddpm`; ``rng`` is not used.
    """
    x = noise
    for now, after in _steps(times, diffusion):
        x0 = _predict(denoise, x, now)
        x = after.alpha * x0 + after.sigma * now.epsilon(x, x0)
    return x  # (B, C, ...)


def sample_dpm_solver_pp_2m(
    denoise: Denoiser, noise: Tensor, times: Tensor, diffusion: Diffusion, rng: NoiseSource
) -> Tensor:
    """DPM-Solver++(2M): second order at one call a step (Lu et al. 2022, algorithm 2).

    https://arxiv.org/abs/2211.01095. The steps from pure noise and to t = 0, where ln(α/σ) is infinite, are of first
    order.

    Arguments and result as for :func:`sample_ddpm`; ``rng`` is not used.
    """
    x, before, x0_before = noise, None, None
    for now, after in _steps(times, diffusion):
        x0 = _predict(denoise, x, now)
        mean = x0
        if before is not None and x0_before is not None and before.alpha > 0 and after.sigma > 0:
            half_log_snr = [math.log(level.alpha / level.sigma) for level in (before, now, after)]
            ratio = (half_log_snr[1] - half_log_snr[0]) / (half_log_snr[2] - half_log_snr[1])
            mean = x0 + (x0 - x0_before) / (2 * ratio)
        # -α_s·(e^-h - 1) = α_s - α_t·σ_s/σ_t, which stays finite at both ends
        shrink = after.sigma / now.sigma
        x = shrink * x + (after.alpha - now.alpha * shrink) * mean
        before, x0_before = now, x0
    return x  # (B, C, ...)


def _sample_flow(denoise: Denoiser, noise: Tensor, times: Tensor, diffusion: Diffusion, second_order: bool) -> Tensor:
    """Integrate dz/dτ = ε - x0 for z = x / (α + σ) and τ = σ / (α + σ), which is rectified flow for any schedule."""
    x = noise
    for now, after in _steps(times, diffusion):
        x0 = _predict(denoise, x, now)
        velocity = now.epsilon(x, x0) - x0
        z, step = x / (now.alpha + now.sigma), after.noise_share - now.noise_share
        scale = after.alpha + after.sigma
        x = scale * (z + step * velocity)
        if second_order and after.sigma > 0:
            x0 = _predict(denoise, x, after)
            x = scale * (z + step / 2 * (velocity + after.epsilon(x, x0) - x0))
    return x  # (B, C, ...)


def sample_euler(denoise: Denoiser, noise: Tensor, times: Tensor, diffusion: Diffusion, rng: NoiseSource) -> Tensor:
    """Euler's method on the flow from noise to data (Liu et al. 2022, https://arxiv.org/abs/2209.03003, algorithm 1).

    In exact arithmetic the same as DDIM, whose steps are Euler's in these coordinates. Arguments and result as for
    :func:`sample_ddpm`; ``rng`` is not used.
    """
    return _sample_flow(denoise, noise, times, diffusion, second_order=False)


def sample_heun(denoise: Denoiser, noise: Tensor, times: Tensor, diffusion: Diffusion, rng: NoiseSource) -> Tensor:
    """Heun's method on the same flow: second order, two calls a step but one in the last (Karras et al. 2022).

    https://arxiv.org/abs/2206.00364, algorithm 1. Arguments and result as for :func:`sample_ddpm`; ``rng`` is not used.
    """
    return _sample_flow(denoise, noise, times, diffusion, second_order=True)


class Sampler(Protocol):
    """What all samplers look like."""

    def __call__(
        self, denoise: Denoiser, noise: Tensor, times: Tensor, diffusion: Diffusion, rng: NoiseSource
    ) -> Tensor:
        """Noise (B, C, ...) -> sample (B, C, ...)."""


SAMPLERS: dict[str, Sampler] = {
    "ddpm": sample_ddpm,
    "ddim": sample_ddim,
    "dpm_solver_pp_2m": sample_dpm_solver_pp_2m,
    "heun": sample_heun,
    "euler": sample_euler,
}


def sampler_by_name(name: str) -> Sampler:
    """A sampler of :data:`SAMPLERS`.

    Raises:
        ConfigurationError: there is none of that name.
    """
    if name not in SAMPLERS:
        raise ConfigurationError(f"sampler={name}: choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
