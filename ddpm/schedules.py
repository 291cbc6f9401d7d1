"""Noise schedules: how much signal and how much noise x_t = α(t)·x0 + σ(t)·ε holds, for continuous t in [0, 1].

t = 0 is clean (σ = 0 exactly), t = 1 is noise. Everything is computed in float64, because α and σ meet in differences
of nearly equal numbers, and returned in the dtype of t. Schedules are frozen dataclasses without hidden state, so that
they travel in a checkpoint as plain numbers (:meth:`NoiseSchedule.as_dict`, :func:`schedule_from_dict`).

``shift`` multiplies the noise-to-signal ratio σ/α of every time. A larger latent holds more correlated cells, in which
the same noise hides less, so it needs more of it (Hoogeboom et al. 2023, https://arxiv.org/abs/2301.11093, section
3.1; Esser et al. 2024, https://arxiv.org/abs/2403.03206, equation 23, which is the same thing for rectified flow).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from errors import ConfigurationError

DDPM_STEPS = 1000
DDPM_BETA_FIRST, DDPM_BETA_LAST = 1e-4, 0.02  # Ho et al. 2020, https://arxiv.org/abs/2006.11239, section 4


@dataclass(frozen=True)
class NoiseSchedule(ABC):
    """α(t) and σ(t) of one noise process."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Name in :data:`SCHEDULES`."""

    @abstractmethod
    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ at float64 times."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of signal and noise.

        Args:
            t: any shape, in [0, 1].

        Returns:
            α(t) and σ(t), in the shape and dtype of t.
        """
        alpha, sigma = self._alpha_sigma(t.double())
        return alpha.to(t.dtype), sigma.to(t.dtype)

    def alpha(self, t: Tensor) -> Tensor:
        """Factor of the signal, in the shape and dtype of t."""
        return self.alpha_sigma(t)[0]

    def sigma(self, t: Tensor) -> Tensor:
        """Factor of the noise, in the shape and dtype of t."""
        return self.alpha_sigma(t)[1]

    def log_snr(self, t: Tensor) -> Tensor:
        """ln(α²/σ²), in the shape and dtype of t; +inf at t = 0, -inf where the schedule ends in pure noise."""
        alpha, sigma = self._alpha_sigma(t.double())
        return (2 * (alpha.log() - sigma.log())).to(t.dtype)

    @property
    def ends_in_pure_noise(self) -> bool:
        """Whether α(1) = 0 exactly."""
        return bool(self.alpha(torch.ones((), dtype=torch.float64)) == 0)

    def as_dict(self) -> dict[str, Any]:
        """Name and plain numbers for a checkpoint."""
        return {"name": self.name, **asdict(self)}


def _check_shift(shift: float) -> None:
    if not (math.isfinite(shift) and shift > 0):
        raise ConfigurationError(f"schedule shift={shift}: it multiplies noise over signal and must be above 0")


@dataclass(frozen=True)
class CosineSchedule(NoiseSchedule):
    """α = cos φ, σ = sin φ with an angle that grows in proportion to t (Nichol & Dhariwal 2021, equation 17).

    https://arxiv.org/abs/2102.09672. In place of their offset and clipped β, which are matters of discrete steps, the
    angle ends where ln SNR reaches ``log_snr_min`` (Salimans & Ho 2022, https://arxiv.org/abs/2202.00512, appendix).

    Attributes:
        shift: factor on σ/α.
        log_snr_min: ln(α²/σ²) at t = 1 before the shift; at -10, 0.7 % of the signal is left.
    """

    shift: float = 1.0
    log_snr_min: float = -10.0

    def __post_init__(self) -> None:
        _check_shift(self.shift)

    @property
    def name(self) -> str:
        """Name in :data:`SCHEDULES`."""
        return "cosine"

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = t * math.atan(math.exp(-self.log_snr_min / 2))
        alpha, sigma = angle.cos(), self.shift * angle.sin()
        norm = torch.hypot(alpha, sigma)
        return alpha / norm, sigma / norm


@cache
def _linear_log_alpha_bar() -> Tensor:
    """The ln ᾱ after 0, 1, …, 1000 of DDPM's steps, (1001,) float64."""
    betas = torch.linspace(DDPM_BETA_FIRST, DDPM_BETA_LAST, DDPM_STEPS, dtype=torch.float64)
    return torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-betas).cumsum(0)])


@dataclass(frozen=True)
class LinearSchedule(NoiseSchedule):
    """DDPM's 1000 linear β (Ho et al. 2020), with ln ᾱ interpolated linearly between its steps.

    After n steps t = n / 1000; those who count from zero (diffusers' ``timestep`` i) mean t = (i + 1) / 1000.
    """

    @property
    def name(self) -> str:
        """Name in :data:`SCHEDULES`."""
        return "linear"

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        table = _linear_log_alpha_bar().to(t.device)
        place = t.clamp(0, 1) * DDPM_STEPS
        left = place.floor().clamp(max=DDPM_STEPS - 1).long()
        log_alpha_bar = torch.lerp(table[left], table[left + 1], place - left)
        return (log_alpha_bar / 2).exp(), (-torch.expm1(log_alpha_bar)).sqrt()


@dataclass(frozen=True)
class ZeroTerminalSchedule(NoiseSchedule):
    """Another schedule, shifted and scaled so that α(1) = 0 and α(0) = 1: it ends in pure noise.

    Lin et al. 2023, https://arxiv.org/abs/2305.08891, algorithm 1: what is left of the signal at t = 1 tells the model
    the mean of each sample in training, and in sampling there is nothing to tell it.

    Attributes:
        base: the schedule to correct; it must preserve variance (α² + σ² = 1).
    """

    base: NoiseSchedule = field(default_factory=LinearSchedule)

    def __post_init__(self) -> None:
        if isinstance(self.base, FlowSchedule):
            raise ConfigurationError("schedule zero_terminal_snr: the flow schedule ends in pure noise as it is")

    @property
    def name(self) -> str:
        """Name in :data:`SCHEDULES`."""
        return "zero_terminal_snr"

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        last = self.base.alpha(torch.ones((), dtype=torch.float64, device=t.device))
        alpha = (self.base.alpha(t) - last) / (1 - last)
        return alpha, ((1 - alpha) * (1 + alpha)).sqrt()

    def as_dict(self) -> dict[str, Any]:
        """Name and plain numbers for a checkpoint."""
        return {"name": self.name, "base": self.base.as_dict()}


@dataclass(frozen=True)
class FlowSchedule(NoiseSchedule):
    """Straight lines from data to noise: α = 1 - t, σ = t (Liu et al. 2022, https://arxiv.org/abs/2209.03003).

    Attributes:
        shift: factor on σ/α; t is replaced by shift·t / (1 + (shift - 1)·t) (Esser et al. 2024, equation 23).
    """

    shift: float = 1.0

    def __post_init__(self) -> None:
        _check_shift(self.shift)

    @property
    def name(self) -> str:
        """Name in :data:`SCHEDULES`."""
        return "flow"

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self.shift * t / (1 + (self.shift - 1) * t)
        return 1 - sigma, sigma


SCHEDULES: dict[str, type[NoiseSchedule]] = {
    "cosine": CosineSchedule,
    "linear": LinearSchedule,
    "zero_terminal_snr": ZeroTerminalSchedule,
    "flow": FlowSchedule,
}


def build_schedule(name: str, shift: float = 1.0) -> NoiseSchedule:
    """A schedule by name: ``cosine``, ``linear``, ``zero_terminal_snr`` (of the linear one) or ``flow``.

    Args:
        name: key of :data:`SCHEDULES`.
        shift: factor on σ/α (``cosine`` and ``flow``).

    Raises:
        ConfigurationError: unknown name, or a shift that the schedule cannot take.
    """
    if name not in SCHEDULES:
        raise ConfigurationError(f"schedule={name}: choose one of {', '.join(SCHEDULES)}")
    schedule = SCHEDULES[name]()
    if "shift" in schedule.__dataclass_fields__:
        return replace(schedule, shift=shift)  # type: ignore[call-arg]  # only of those that have one
    if shift != 1:
        raise ConfigurationError(f"schedule={name} takes no shift, but shift={shift}: choose cosine or flow")
    return schedule


def schedule_from_dict(values: Mapping[str, Any]) -> NoiseSchedule:
    """Inverse of :meth:`NoiseSchedule.as_dict`.

    Raises:
        ConfigurationError: unknown name or setting.
    """
    settings = dict(values)
    name = settings.pop("name", None)
    if name not in SCHEDULES:
        raise ConfigurationError(f"schedule={name}: choose one of {', '.join(SCHEDULES)}")
    unknown = sorted(set(settings) - set(SCHEDULES[name].__dataclass_fields__))
    if unknown:
        raise ConfigurationError(f"schedule={name}: unknown setting(s) {', '.join(unknown)}")
    if "base" in settings:
        settings["base"] = schedule_from_dict(settings["base"])
    return SCHEDULES[name](**settings)
