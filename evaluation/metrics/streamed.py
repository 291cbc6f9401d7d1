"""Metrics of a volume that comes in pieces (slabs of a stream, tiles of a validation), without holding it.

Everything but SSIM is a function of sums, so that pieces which cover each voxel once give the figures of the whole
volume. SSIM looks through an 11³ window: its pieces overlap by ten voxels, so that each window position comes once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from dataset.intensity import HUWindow
from evaluation.metrics.image import SSIM_WINDOW_VOX, _decibel, contains, ssim_3d
from params import PE_WINDOW

# Names of all metrics, the same on every rank, whatever it has seen.
METRICS = (
    "bias_hu",
    "mae_hu",
    "pearson_r",
    "psnr_db",
    "psnr_minmax_db",
    "psnr_pe_window_db",
    "psnr_slice_db",
    "ssim",
)
_SSIM_SLICES = 32  # new ones in a piece of `SliceStream`: ten more are filtered again


class MetricSums:
    """The metrics of `volume_metrics`, accumulated in float64 over pieces of one volume.

    Args:
        depth: slices of the volume.
        window: the HU window of the unit tensors.
        level_width_hu: the reading window of ``psnr_pe_window_db``, which is NaN where ``window`` does not contain it.
    """

    def __init__(self, depth: int, window: HUWindow, level_width_hu: tuple[float, float] = PE_WINDOW) -> None:
        self.window = window
        self._has_pe_window = contains(window, level_width_hu)
        level, width = level_width_hu
        self._low, self._high = (
            (hu - window.min_hu) / window.width_hu for hu in (level - width / 2, level + width / 2)
        )
        self._slice_squares = torch.zeros(depth, dtype=torch.float64)
        self._slice_counts = torch.zeros(depth, dtype=torch.float64)
        # sums of p, t, p², t², p t, |p - t|, clipped (p - t)²
        self._sums = torch.zeros(7, dtype=torch.float64)
        self._range = [math.inf, -math.inf, math.inf, -math.inf]
        self._ssim = self._positions = 0.0

    @property
    def count(self) -> int:
        """Voxels seen."""
        return int(self._slice_counts.sum())

    def update(self, pred_unit: torch.Tensor, target_unit: torch.Tensor, first_slice: int = 0) -> None:
        """Add a piece.

        Args:
            pred_unit: (d, h, w) in [0, 1].
            target_unit: the same.
            first_slice: of the piece in the volume.
        """
        for index, (p, t) in enumerate(zip(pred_unit.detach(), target_unit.detach(), strict=True), first_slice):
            p, t = p.float(), t.float()
            error = p - t
            clipped = p.clamp(self._low, self._high) - t.clamp(self._low, self._high)
            parts = (p, t, p * p, t * t, p * t, error.abs(), clipped.square_(), error.square())
            values = [part.sum(dtype=torch.float64) for part in parts] + [*torch.aminmax(p), *torch.aminmax(t)]
            *sums, squares, low_p, high_p, low_t, high_t = torch.stack([v.double() for v in values]).tolist()
            self._sums += torch.tensor(sums, dtype=torch.float64)
            self._slice_squares[index] += squares
            self._slice_counts[index] += p.numel()
            low, high = self._range[::2], self._range[1::2]
            self._range[::2] = [_least(a, b) for a, b in zip(low, (low_p, low_t), strict=True)]
            self._range[1::2] = [-_least(-a, -b) for a, b in zip(high, (high_p, high_t), strict=True)]

    def update_ssim(self, pred_unit: torch.Tensor, target_unit: torch.Tensor) -> None:
        """Add the window positions that lie inside a piece (d, h, w); a thin one gets a smaller window."""
        size = min(SSIM_WINDOW_VOX, *pred_unit.shape)
        size -= 1 - size % 2
        positions = math.prod(length - size + 1 for length in pred_unit.shape)
        self._ssim += ssim_3d(pred_unit, target_unit) * positions
        self._positions += positions

    def result(self) -> dict[str, float]:
        """The metrics under the names of `volume_metrics`; ``ssim`` only if it was fed. Empty if nothing was seen."""
        n = self.count
        if n == 0:
            return {}
        sum_p, sum_t, square_p, square_t, product, absolute, clipped = self._sums.tolist()
        squares = float(self._slice_squares.sum())
        seen = self._slice_counts > 0
        per_slice = (self._slice_squares[seen] / self._slice_counts[seen]).tolist()
        result = {
            "psnr_db": _decibel(squares / n, 1.0),
            "psnr_slice_db": sum(_decibel(value, 1.0) for value in per_slice) / len(per_slice),
            "psnr_pe_window_db": _decibel(clipped / n, self._high - self._low) if self._has_pe_window else math.nan,
            "mae_hu": absolute / n * self.window.width_hu,
            "bias_hu": (sum_p - sum_t) / n * self.window.width_hu,
        }
        if self._positions:
            result["ssim"] = self._ssim / self._positions
        variance_p, variance_t = square_p - sum_p**2 / n, square_t - sum_t**2 / n
        low_p, high_p, low_t, high_t = self._range
        if min(variance_p, variance_t) <= 1e-12 * n or not (high_p > low_p and high_t > low_t):
            return result | {"pearson_r": math.nan, "psnr_minmax_db": math.nan}
        result["pearson_r"] = (product - sum_p * sum_t / n) / math.sqrt(variance_p * variance_t)
        # p' = a p - b, t' = c t - d: the sum of (p' - t')² from the sums above
        a, c = 1 / (high_p - low_p), 1 / (high_t - low_t)
        shift = a * low_p - c * low_t
        scaled = a * a * square_p + c * c * square_t - 2 * a * c * product - 2 * shift * (a * sum_p - c * sum_t)
        return result | {"psnr_minmax_db": _decibel(max(scaled / n + shift * shift, 0.0), 1.0)}


class SliceStream:
    """The metrics of `volume_metrics` from HU slices that come in order; memory does not grow with depth.

    Args:
        shape_dhw: of the volume.
        window: the HU window; what is beyond it is no error.
    """

    def __init__(self, shape_dhw: Sequence[int], window: HUWindow) -> None:
        self._window, self._depth = window, shape_dhw[0]
        self._sums = MetricSums(shape_dhw[0], window)
        size = min(SSIM_WINDOW_VOX, *shape_dhw)
        self._shared = size - 2 + size % 2  # slices that a window position and the next one have in common
        self._held: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        self._count = 0

    def update(self, prediction_hu: np.ndarray, target_hu: np.ndarray) -> None:
        """Add the next slices, (d, H, W) each, any real dtype."""
        pair = tuple(self._window.to_unit(torch.from_numpy(hu)) for hu in (prediction_hu, target_hu))
        self._sums.update(pair[0], pair[1], self._count)
        self._count += len(pair[0])
        for held, slices in zip(self._held, pair, strict=True):
            held += slices
        ready = len(self._held[0])
        if ready > self._shared and (ready >= self._shared + _SSIM_SLICES or self._count == self._depth):
            self._sums.update_ssim(*(torch.stack(held) for held in self._held))
            for held in self._held:
                del held[: ready - self._shared]

    def result(self) -> dict[str, float]:
        """The metrics under the names of `volume_metrics`."""
        return self._sums.result()


def grown(own: Sequence[tuple[int, int]], limits: Sequence[tuple[int, int]]) -> tuple[slice, ...]:
    """A piece for SSIM: its own voxels and, inside ``limits``, the half window around them."""
    reach = SSIM_WINDOW_VOX // 2
    return tuple(
        slice(max(low, first - reach), min(high, last + reach))
        for (first, last), (low, high) in zip(own, limits, strict=True)
    )


def _least(a: float, b: float) -> float:
    """The smaller one, NaN if either is."""
    return b if b < a or b != b else a
