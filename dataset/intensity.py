"""The intensity contract: HU on disk, ``[0, 1]`` in tensors, one window, the same function there and back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np
import torch

from errors import ConfigurationError
from params import HU_MAX, HU_MIN

ArrayT = TypeVar("ArrayT", np.ndarray, torch.Tensor)


@dataclass(frozen=True)
class HUWindow:
    """A closed HU interval that maps to ``[0, 1]``.

    Args:
        min_hu: HU value of 0.0.
        max_hu: HU value of 1.0.
    """

    min_hu: float = HU_MIN
    max_hu: float = HU_MAX

    def __post_init__(self) -> None:
        if not self.max_hu > self.min_hu:
            raise ConfigurationError(f"HU window [{self.min_hu}, {self.max_hu}] is empty: set max_hu above min_hu")

    @property
    def width_hu(self) -> float:
        """Width of the window in HU: the data range of PSNR and SSIM."""
        return self.max_hu - self.min_hu

    def to_unit(self, volume_hu: ArrayT) -> ArrayT:
        """HU, any shape, any real dtype -> float32 in [0, 1]; values outside the window are clipped."""
        if isinstance(volume_hu, torch.Tensor):
            unit_copy = volume_hu.to(torch.float32, copy=True)  # then in place: no temporaries the size of a volume
            return unit_copy.sub_(self.min_hu).div_(self.width_hu).clamp_(0.0, 1.0)
        unit = np.subtract(volume_hu, self.min_hu, dtype=np.float32)
        unit /= np.float32(self.width_hu)
        return np.clip(unit, 0.0, 1.0, out=unit)

    def to_hu(self, unit: ArrayT) -> ArrayT:
        """[0, 1] (values outside are clipped), any shape -> float32 HU."""
        if isinstance(unit, torch.Tensor):
            return unit.float().clamp(0.0, 1.0).mul_(self.width_hu).add_(self.min_hu)
        hu = np.clip(np.asarray(unit, dtype=np.float32), 0.0, 1.0)
        hu *= np.float32(self.width_hu)
        hu += np.float32(self.min_hu)
        return hu

    def as_dict(self) -> dict[str, float]:
        """Plain numbers for a checkpoint."""
        return asdict(self)

    def require_same(self, other: HUWindow, *, ours: str, theirs: str) -> None:
        """Refuse to let two artefacts meet that were made with different windows."""
        if self != other:
            raise ConfigurationError(
                f"{theirs} was made with HU window [{other.min_hu}, {other.max_hu}], {ours} uses "
                f"[{self.min_hu}, {self.max_hu}]: use one window for both"
            )
