"""Image metrics of a reconstructed CT, in 3D and on a stated range.

Volumes are unit tensors (D, H, W) or (C, D, H, W), float32 in [0, 1] by an `HUWindow`. Published figures mix PSNR per
volume, per slice and per display window, which differ by 4 to 5 dB; here each has a name. Sums are float64 over slabs
of slices, so 158 million voxels neither lose digits nor need a second copy of the volume.

The last two metrics exist only so that figures of the predecessor can be compared; neither says that a CT is right.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from dataset.intensity import HUWindow
from errors import ConfigurationError, InputError
from params import PE_WINDOW

SSIM_WINDOW_VOX = 11
SSIM_SIGMA_VOX = 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03
# Voxels handled at a time: the five filtered maps of an SSIM slab and their temporaries stay near 200 MB.
_SLAB_VOXELS = 1 << 20


def psnr(pred: torch.Tensor, target: torch.Tensor, data_range: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB over all voxels: 10 log10(range² / MSE); infinite for equal volumes.

    Args:
        pred: (D, H, W) or (C, D, H, W), in [0, 1].
        target: the same shape and range.
        data_range: width of the range in the tensors' unit; 1.0 is the whole HU window.

    Raises:
        InputError: the shapes differ or are empty.
    """
    pred, target = _pair(pred, target)
    total = sum(_square_sum(p, t) for p, t in _slabs(pred, target))
    return _decibel(total / pred.numel(), data_range)


def psnr_slice(pred: torch.Tensor, target: torch.Tensor, data_range: float = 1.0) -> float:
    """Mean over axial slices of the slice's own PSNR in dB, the convention of 2D papers; shapes as in `psnr`.

    By Jensen's inequality it is never below the volume's PSNR. It is infinite as soon as one slice is equal.
    """
    pred, target = _pair(pred, target)
    values = []
    for p, t in _slabs(pred, target):
        sums = (p - t).square_().flatten(1).sum(1, dtype=torch.float64)
        values += [_decibel(total / pred[0].numel(), data_range) for total in sums.tolist()]
    return sum(values) / len(values)


def contains(window: HUWindow, level_width_hu: tuple[float, float] = PE_WINDOW) -> bool:
    """Whether a reading window (level, width) lies inside the HU window of unit tensors; else it cannot be shown."""
    level, width = level_width_hu
    return window.min_hu <= level - width / 2 and level + width / 2 <= window.max_hu


def psnr_window(
    pred: torch.Tensor, target: torch.Tensor, window: HUWindow, level_width_hu: tuple[float, float] = PE_WINDOW
) -> float:
    """PSNR in dB after clipping both volumes to a reading window; the range is that window.

    Args:
        pred: (D, H, W) or (C, D, H, W), in [0, 1].
        target: the same shape and range.
        window: the HU window of the tensors.
        level_width_hu: (level, width); by default the pulmonary-embolism window (100, 700): [-250, 450] HU.

    Raises:
        ConfigurationError: the tensors' window does not contain the reading window, so it cannot be shown.
        InputError: as `psnr`.
    """
    pred, target = _pair(pred, target)
    level, width = level_width_hu
    low, high = level - width / 2, level + width / 2
    if not contains(window, level_width_hu):
        raise ConfigurationError(
            f"the reading window [{low}, {high}] HU is not inside the HU window [{window.min_hu}, {window.max_hu}]: "
            "widen the HU window"
        )
    low, high = (low - window.min_hu) / window.width_hu, (high - window.min_hu) / window.width_hu
    total = sum(_square_sum(p.clamp(low, high), t.clamp(low, high)) for p, t in _slabs(pred, target))
    return _decibel(total / pred.numel(), high - low)


def ssim_3d(pred: torch.Tensor, target: torch.Tensor, data_range: float = 1.0) -> float:
    """Structural similarity, 3D: Wang, Bovik, Sheikh, Simoncelli, IEEE TIP 13(4), 2004, eq. 13, in one more dimension.

    Gaussian window 11×11×11, sigma 1.5 voxels, K1 = 0.01, K2 = 0.03, population covariances, mean over positions where
    the window lies inside the volume, as in the authors' code and in skimage (torchmetrics pads by reflection and
    averages the padded border too). Streamed along depth and separable: beside the inputs it takes 200 MB for slices of
    512×512, whatever the depth. A volume thinner than 11 gets the largest odd window that fits its shortest axis, with
    the same sigma.

    Args:
        pred: (D, H, W) or (C, D, H, W), in [0, 1]; channels are averaged.
        target: the same shape and range.
        data_range: width of the range in the tensors' unit.

    Raises:
        InputError: as `psnr`.
    """
    shape = pred.shape
    _pair(pred, target)
    channels = (pred[None], target[None]) if len(shape) == 3 else (pred, target)
    values = [_ssim_channel(p, t, data_range) for p, t in zip(*channels, strict=True)]
    return sum(values) / len(values)


def mae_hu(pred: torch.Tensor, target: torch.Tensor, window: HUWindow) -> float:
    """Mean absolute error in HU; shapes as in `psnr`."""
    pred, target = _pair(pred, target)
    total = sum(float((p - t).abs_().sum(dtype=torch.float64)) for p, t in _slabs(pred, target))
    return total / pred.numel() * window.width_hu


def bias_hu(pred: torch.Tensor, target: torch.Tensor, window: HUWindow) -> float:
    """Mean signed error prediction - target in HU: positive where the reconstruction is too dense."""
    pred, target = _pair(pred, target)
    total = sum(float((p - t).sum(dtype=torch.float64)) for p, t in _slabs(pred, target))
    return total / pred.numel() * window.width_hu


def pearson_correlation(pred: torch.Tensor, target: torch.Tensor) -> float:
    """Pearson correlation over all voxels: what the predecessor printed as "SSIM".

    Blind to any gain and offset, so a volume with wrong HU still scores 1. NaN if either volume is constant.
    """
    pred, target = _pair(pred, target)
    mean_p = sum(float(p.sum(dtype=torch.float64)) for p, _ in _slabs(pred, target)) / pred.numel()
    mean_t = sum(float(t.sum(dtype=torch.float64)) for _, t in _slabs(pred, target)) / pred.numel()
    variance_p = variance_t = covariance = 0.0
    for p, t in _slabs(pred, target):
        p64, t64 = p.double().sub_(mean_p), t.double().sub_(mean_t)
        covariance += float((p64 * t64).sum())
        variance_p += float(p64.square_().sum())
        variance_t += float(t64.square_().sum())
    # below this the variance is nothing but the rounding of the mean
    if min(variance_p, variance_t) <= 1e-24 * pred.numel():
        return math.nan
    return covariance / math.sqrt(variance_p * variance_t)


def psnr_minmax(pred: torch.Tensor, target: torch.Tensor) -> float:
    """PSNR in dB with each volume scaled to [0, 1] by its own minimum and maximum: the predecessor's convention.

    The scaling hides wrong HU (any gain and offset), and one bright voxel changes the figure. NaN if either volume is
    constant.
    """
    pred, target = _pair(pred, target)
    low_p, high_p = (float(value) for value in torch.aminmax(pred))
    low_t, high_t = (float(value) for value in torch.aminmax(target))
    if not (high_p > low_p and high_t > low_t):
        return math.nan
    total = 0.0
    for p, t in _slabs(pred, target):
        scaled_p = p.double().sub_(low_p).div_(high_p - low_p)
        scaled_t = t.double().sub_(low_t).div_(high_t - low_t)
        total += float(scaled_p.sub_(scaled_t).square_().sum())
    return _decibel(total / pred.numel(), 1.0)


def volume_metrics(pred_unit: torch.Tensor, target_unit: torch.Tensor, window: HUWindow) -> dict[str, float]:
    """All metrics of one volume under explicit names.

    Args:
        pred_unit: (D, H, W) or (C, D, H, W), in [0, 1].
        target_unit: the same shape and range.
        window: the HU window of both.

    Returns:
        ``psnr_db``, ``psnr_slice_db``, ``psnr_pe_window_db``, ``ssim``, ``mae_hu``, ``bias_hu``, and of the
        predecessor's conventions ``pearson_r``, ``psnr_minmax_db``. NaN in a prediction gives NaN;
        ``psnr_pe_window_db`` is NaN where ``window`` does not contain the pulmonary-embolism window.

    Raises:
        InputError: as `psnr`.
    """
    return {
        "psnr_db": psnr(pred_unit, target_unit),
        "psnr_slice_db": psnr_slice(pred_unit, target_unit),
        "psnr_pe_window_db": psnr_window(pred_unit, target_unit, window) if contains(window) else math.nan,
        "ssim": ssim_3d(pred_unit, target_unit),
        "mae_hu": mae_hu(pred_unit, target_unit, window),
        "bias_hu": bias_hu(pred_unit, target_unit, window),
        "pearson_r": pearson_correlation(pred_unit, target_unit),
        "psnr_minmax_db": psnr_minmax(pred_unit, target_unit),
    }


@torch.no_grad()
def _ssim_channel(pred: torch.Tensor, target: torch.Tensor, data_range: float) -> float:
    """SSIM of one channel (D, H, W); the last filtered slices of a slab are carried on to the next."""
    depth, height, width = pred.shape
    size = min(SSIM_WINDOW_VOX, depth, height, width)
    size -= 1 - size % 2
    kernel = _gaussian(size)
    c1, c2 = (SSIM_K1 * data_range) ** 2, (SSIM_K2 * data_range) ** 2
    # Variances do not change with an offset; about the middle of the range E[x²] - E[x]² cancels fewer digits.
    centre = data_range / 2
    slices = max(1, _SLAB_VOXELS // (height * width))
    # the five maps of the slices that the window still needs, filtered in plane; one buffer, never reallocated
    buffer = pred.new_empty((5, size - 1 + slices, height - size + 1, width - size + 1), dtype=torch.float32)
    held = 0
    total = 0.0
    for p, t in zip(pred.split(slices), target.split(slices), strict=True):
        p, t = p.float() - centre, t.float() - centre
        for index, values in enumerate((p, t, p * p, t * t, p * t)):
            buffer[index, held : held + len(p)] = _filter(_filter(values, kernel, 2), kernel, 1)
        held += len(p)
        if held < size:
            continue
        mean_p, mean_t, square_p, square_t, product = (_filter(values[:held], kernel, 0) for values in buffer)
        buffer[:, : size - 1] = buffer[:, held - size + 1 : held].clone()
        held = size - 1
        variances = square_p.addcmul_(mean_p, mean_p, value=-1).add_(square_t.addcmul_(mean_t, mean_t, value=-1))
        covariance = product.addcmul_(mean_p, mean_t, value=-1)
        mean_p, mean_t = mean_p.add_(centre), mean_t.add_(centre)
        similarity = (2 * mean_p * mean_t).add_(c1).mul_(covariance.mul_(2).add_(c2))
        similarity.div_(mean_p.square_().add_(mean_t.square_()).add_(c1).mul_(variances.add_(c2)))
        total += float(similarity.sum(dtype=torch.float64))
    return total / ((depth - size + 1) * (height - size + 1) * (width - size + 1))


def _gaussian(size: int) -> list[float]:
    weights = [math.exp(-((i - size // 2) ** 2) / (2 * SSIM_SIGMA_VOX**2)) for i in range(size)]
    return [weight / sum(weights) for weight in weights]


def _filter(maps: torch.Tensor, kernel: list[float], axis: int) -> torch.Tensor:
    """Correlate one axis with ``kernel``, valid region only.

    As shifted sums: eight times faster than a one-channel convolution on the CPU, and never in TF32 on a GPU.
    """
    length = maps.shape[axis] - len(kernel) + 1
    result = maps.narrow(axis, 0, length) * kernel[0]
    for shift, weight in enumerate(kernel[1:], start=1):
        result.add_(maps.narrow(axis, shift, length), alpha=weight)
    return result


def _pair(pred: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Check a pair of volumes and make depth the first axis: (D, H, W) or (D, C, H, W), without gradient."""
    if pred.shape != target.shape or pred.ndim not in (3, 4) or 0 in pred.shape:
        raise InputError(
            f"prediction {list(pred.shape)} and target {list(target.shape)}: "
            "two volumes [D, H, W] or [C, D, H, W] on one grid are needed"
        )
    pred, target = pred.detach(), target.detach()
    return (pred, target) if pred.ndim == 3 else (pred.transpose(0, 1), target.transpose(0, 1))


def _slabs(pred: torch.Tensor, target: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Float32 slabs of slices, so that temporary memory does not grow with depth and fp16 inputs do not overflow."""
    slices = max(1, _SLAB_VOXELS // pred[0].numel())
    for p, t in zip(pred.split(slices), target.split(slices), strict=True):
        yield p.float(), t.float()


def _square_sum(pred: torch.Tensor, target: torch.Tensor) -> float:
    return float((pred - target).square_().sum(dtype=torch.float64))


def _decibel(mean_square: float, data_range: float) -> float:
    if mean_square == 0:
        return math.inf
    if mean_square == math.inf:
        return -math.inf
    return 10 * math.log10(data_range**2 / mean_square)
