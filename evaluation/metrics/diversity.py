"""How different are the samples of one patient? MS-SSIM between them, in 3-D.

Multi-scale SSIM: Wang, Simoncelli and Bovik, Asilomar 2003, https://doi.org/10.1109/ACSSC.2003.1292216, with its
published exponents, in one more dimension: contrast and structure at every scale, luminance at the coarsest, volumes
halved by averaging between scales. 1 means that the samples are equal (a generator that ignores its noise); the value
for pairs of different real patients says what full diversity would be.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dataset.intensity import HUWindow
from errors import InputError
from evaluation.metrics.image import SSIM_K1, SSIM_K2, SSIM_SIGMA_VOX, SSIM_WINDOW_VOX

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
# The five filtered maps of a slab and their temporaries stay near 200 MB.
_SLAB_VOXELS = 1 << 20


@torch.no_grad()
def ms_ssim_3d(first: Tensor, second: Tensor) -> float:
    """Multi-scale SSIM of two volumes; streamed along depth, so memory does not grow with it.

    A scale is used while every axis has at least 11 voxels; the exponents of those that are used are scaled to sum 1
    (a volume of 32×64×64 has two). An axis shorter than 11 at the first scale gets the largest odd window that fits.

    Args:
        first: (D, H, W) in [0, 1].
        second: the same shape and range.

    Returns:
        In [0, 1]; negative contrast terms count as 0. NaN in a volume gives NaN.

    Raises:
        InputError: the shapes differ, or are not three-dimensional.
    """
    if first.shape != second.shape or first.ndim != 3 or 0 in first.shape:
        raise InputError(f"volumes {list(first.shape)} and {list(second.shape)}: two (D, H, W) on one grid are needed")
    scales = 1
    while scales < len(SCALE_WEIGHTS) and min(first.shape) // 2**scales >= SSIM_WINDOW_VOX:
        scales += 1
    weights = [weight / sum(SCALE_WEIGHTS[:scales]) for weight in SCALE_WEIGHTS[:scales]]
    a, b = first.float(), second.float()
    result = 1.0
    for scale, weight in enumerate(weights):
        similarity, contrast = _similarity(a, b)
        value = similarity if scale == scales - 1 else contrast
        if math.isnan(value):
            return math.nan
        result *= max(value, 0.0) ** weight
        if scale < scales - 1:
            a, b = (nn.functional.avg_pool3d(volume[None, None], 2)[0, 0] for volume in (a, b))
    return result


def sample_diversity(samples_hu: Sequence[np.ndarray], window: HUWindow) -> dict[str, float]:
    """Similarity and spread of several samples from one radiograph.

    Args:
        samples_hu: at least two volumes (D, H, W) HU.
        window: the HU window on which they are compared.

    Returns:
        ``ms_ssim`` mean over all pairs, and ``std_hu``, the root mean square over voxels of the standard deviation
        between samples (divisor n - 1).

    Raises:
        InputError: fewer than two samples, or shapes that differ.
    """
    if len(samples_hu) < 2:
        raise InputError(f"{len(samples_hu)} sample: diversity needs at least two")
    units = [window.to_unit(torch.from_numpy(np.ascontiguousarray(sample))) for sample in samples_hu]
    pairs = [ms_ssim_3d(a, b) for a, b in itertools.combinations(units, 2)]
    mean = torch.zeros_like(units[0])
    square = torch.zeros_like(units[0])
    for count, unit in enumerate(units, start=1):  # Welford's update: no stack of all samples
        step = unit - mean
        mean += step / count
        square += step * (unit - mean)
    spread = math.sqrt(float(square.mean(dtype=torch.float64)) / (len(units) - 1)) * window.width_hu
    return {"ms_ssim": sum(pairs) / len(pairs), "std_hu": spread}


def _similarity(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Mean of SSIM and of its contrast-structure term (Wang et al. 2004, eq. 13 and its second factor)."""
    depth, height, width = first.shape
    size = min(SSIM_WINDOW_VOX, depth, height, width)
    size -= 1 - size % 2
    line = torch.arange(size, device=first.device, dtype=torch.float32) - size // 2
    kernel = torch.exp(-(line**2) / (2 * SSIM_SIGMA_VOX**2))
    kernel /= kernel.sum()
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    slab = max(1, _SLAB_VOXELS // (height * width))
    positions = depth - size + 1
    totals = [0.0, 0.0]
    for start in range(0, positions, slab):
        stop = min(start + slab, positions) + size - 1
        # variances do not change with an offset; about the middle of the range E[x²] - E[x]² cancels fewer digits
        a, b = first[start:stop] - 0.5, second[start:stop] - 0.5
        maps = torch.stack([a, b, a * a, b * b, a * b])  # (5, d, H, W)
        for axis in (3, 2, 1):
            maps = _filter(maps, kernel, axis)
        mean_a, mean_b, square_a, square_b, product = maps
        contrast = 2 * (product - mean_a * mean_b) + c2
        contrast /= (square_a - mean_a**2) + (square_b - mean_b**2) + c2
        mean_a, mean_b = mean_a + 0.5, mean_b + 0.5
        luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
        totals[0] += float((luminance * contrast).sum(dtype=torch.float64))
        totals[1] += float(contrast.sum(dtype=torch.float64))
    count = positions * (height - size + 1) * (width - size + 1)
    return totals[0] / count, totals[1] / count


def _filter(maps: Tensor, kernel: Tensor, axis: int) -> Tensor:
    """Correlate one axis, valid region only; shifted sums are faster than a one-channel convolution on the CPU."""
    length = maps.shape[axis] - len(kernel) + 1
    result = maps.narrow(axis, 0, length) * kernel[0]
    for shift, weight in enumerate(kernel.tolist()[1:], start=1):
        result.add_(maps.narrow(axis, shift, length), alpha=weight)
    return result
