"""Fréchet distance between two sets of volumes by the features of some network, in 2.5-D or 3-D.

d² = |μ1 - μ2|² + tr(C1 + C2 - 2 (C1 C2)^½), the 2-Wasserstein distance of two Gaussians (Dowson and Landau 1982,
https://doi.org/10.1016/0047-259X(82)90077-X; as "FID": Heusel et al. 2017, https://arxiv.org/abs/1706.08500).

The figure depends on the features, on the number of samples and on the regularisation: only distances made alike can be
compared, and a report names its features. With fewer samples than features the sample covariance is singular and its
eigenvalues are spread too wide, so covariances are shrunk towards a multiple of the identity by the oracle
approximating shrinkage (OAS) of Chen et al. 2010, https://doi.org/10.1109/TSP.2010.2053029, eq. 23; its weight falls as
1/n. What is left of the bias is the same for all sets of one size.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dataset.intensity import HUWindow
from errors import ConfigurationError, InputError

PLANES = ("axial", "coronal", "sagittal")
# slices (N, 1, S, S) in [0, 1] -> features (N, F)
SliceFeatures = Callable[[Tensor], Tensor]
# volume (D, H, W) HU -> for each of `PLANES` rows of features (N, F)
PlaneFeatures = Callable[[np.ndarray], Mapping[str, np.ndarray]]
# volumes (B, 1, D, H, W) in [0, 1] -> features (B, F)
VolumeFeatures = Callable[[Tensor], Tensor]
_MIN_SAMPLES = 2


@dataclass(frozen=True)
class Gaussian:
    """Mean (F,) and covariance (F, F), float64."""

    mean: np.ndarray
    covariance: np.ndarray


def fit_gaussian(features: np.ndarray, *, shrink: bool = True) -> Gaussian:
    """Mean and (shrunk) covariance of features (N, F).

    Args:
        features: one row a sample.
        shrink: by OAS (see above); without it the sample covariance, divisor N - 1.

    Raises:
        InputError: fewer than two samples, or features that are not finite.
    """
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or len(features) < _MIN_SAMPLES or not np.isfinite(features).all():
        raise InputError(f"features {list(features.shape)}: at least {_MIN_SAMPLES} rows of finite numbers are needed")
    count, size = features.shape
    mean = features.mean(axis=0)
    centred = features - mean
    if not shrink:
        return Gaussian(mean, centred.T @ centred / (count - 1))
    covariance = centred.T @ centred / count
    trace, trace_of_square = float(np.trace(covariance)), float((covariance**2).sum())
    numerator = (1 - 2 / size) * trace_of_square + trace**2
    denominator = (count + 1 - 2 / size) * (trace_of_square - trace**2 / size)
    weight = 1.0 if denominator <= 0 else min(1.0, numerator / denominator)
    return Gaussian(mean, (1 - weight) * covariance + weight * trace / size * np.eye(size))


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Squared Fréchet distance of two Gaussians, never negative.

    Raises:
        InputError: their features differ in number.
    """
    if first.mean.shape != second.mean.shape:
        raise InputError(f"features of {first.mean.size} and {second.mean.size} numbers: use one feature network")
    # tr (C1 C2)^½ through the symmetric C1^½ C2 C1^½, which has the same eigenvalues and needs no complex square root
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    shared = np.linalg.eigvalsh(root @ second.covariance @ root)
    cross = float(np.sqrt(np.clip(shared, 0, None)).sum())
    offset = first.mean - second.mean
    distance = float(offset @ offset) + float(np.trace(first.covariance) + np.trace(second.covariance)) - 2 * cross
    return max(0.0, distance)


def slices_of(volume_unit: Tensor, plane: str, count: int, size: int) -> Tensor:
    """Evenly spaced slices of one plane, resized to a square.

    Args:
        volume_unit: (D, H, W) in [0, 1].
        plane: one of `PLANES`.
        count: how many (all, if there are fewer), from the middle of each of ``count`` equal parts.
        size: of the square in pixels.

    Returns:
        (count, 1, size, size), superior up in coronal and sagittal planes.

    Raises:
        InputError: an unknown plane.
    """
    if plane not in PLANES:
        raise InputError(f"plane {plane!r}: one of {', '.join(PLANES)}")
    axis = PLANES.index(plane)
    length = volume_unit.shape[axis]
    count = min(count, length)
    index = ((torch.arange(count) + 0.5) * length / count).long().to(volume_unit.device)
    slices = volume_unit.index_select(axis, index).movedim(axis, 0)[:, None].float()
    if axis != 0:
        slices = slices.flip(2)
    return nn.functional.interpolate(slices, (size, size), mode="bilinear", antialias=True)


def features_of_slices(network: SliceFeatures, window: HUWindow, *, slices: int = 16, size: int = 224) -> PlaneFeatures:
    """Features of three planes by a 2D network.

    Args:
        network: of slices.
        window: which HU are shown to the network.
        slices: per volume and plane.
        size: of the square slices in pixels.
    """

    def features(hu: np.ndarray) -> dict[str, np.ndarray]:
        unit = _unit(hu, window)
        with torch.inference_mode():
            return {plane: _rows(network(slices_of(unit, plane, slices, size))) for plane in PLANES}

    return features


def planes_of_map(features: Tensor) -> dict[str, np.ndarray]:
    """Features of three planes from the feature map of a 3D network: mean and maximum over each slice of the map.

    Args:
        features: (C, d, h, w).

    Returns:
        For each plane float32 (slices, 2 C).
    """
    found = {}
    for axis, plane in enumerate(PLANES, start=1):
        slices = features.movedim(axis, 0).flatten(2)  # (slices, C, cells)
        found[plane] = _rows(torch.cat([slices.mean(2), slices.amax(2)], dim=1))
    return found


def frechet_25d(
    real: Iterable[np.ndarray], generated: Iterable[np.ndarray], features: PlaneFeatures
) -> dict[str, float]:
    """2.5-D Fréchet distance: one for the slices of each plane, and their mean, as MAISI reports it.

    Source: Guo et al. 2024, "MAISI: Medical AI for Synthetic Imaging", https://arxiv.org/abs/2409.11169. Volumes are
    taken one at a time, so memory does not grow with the cohort.

    Args:
        real: volumes (D, H, W) HU.
        generated: likewise; the sets need not be paired, but should be of one size.
        features: `features_of_slices` of a 2D network, or of the slices of a 3D network's `planes_of_map`.

    Returns:
        ``frechet_axial``, ``frechet_coronal``, ``frechet_sagittal`` and their mean ``frechet``.

    Raises:
        InputError: see `fit_gaussian`.
    """
    return frechet_of_planes([features(hu) for hu in real], [features(hu) for hu in generated])


def frechet_of_planes(
    real: Sequence[Mapping[str, np.ndarray]],
    generated: Sequence[Mapping[str, np.ndarray]],
    planes: Sequence[str] = PLANES,
) -> dict[str, float]:
    """As `frechet_25d`, of features that are already there, one entry a volume, under any names of ``planes``."""
    result = {}
    for plane in planes:
        first, second = (_gaussian([volume[plane] for volume in volumes]) for volumes in (real, generated))
        result[f"frechet_{plane}"] = frechet_distance(first, second)
    return {**result, "frechet": sum(result.values()) / len(planes)}


def frechet_3d(
    real: Iterable[np.ndarray], generated: Iterable[np.ndarray], features: VolumeFeatures, window: HUWindow
) -> float:
    """Fréchet distance by one feature vector a volume; arguments as `frechet_25d`."""
    rows = [[_rows(features(_unit(hu, window)[None, None])) for hu in volumes] for volumes in (real, generated)]
    first, second = (_gaussian(parts) for parts in rows)
    return frechet_distance(first, second)


def load_features(given: str, device: str = "cpu") -> tuple[str, SliceFeatures]:
    """A 2D feature network (N, 1, S, S) in [0, 1] -> (N, F) by a path or from an installed package.

    Both run code of their own: a TorchScript file inside the interpreter, a package when it is imported. Name only
    what you trust; nothing is downloaded here.

    Args:
        given: a TorchScript file, or ``package.module:name`` of a function or class that is called without arguments
            and gives the network.
        device: where to compute.

    Returns:
        Its name for a report, and the network.

    Raises:
        InputError: the file is missing or no TorchScript.
        ConfigurationError: no such package, or no such name in it, or what it gives cannot be called.
    """
    module, colon, name = given.partition(":")
    if not colon or Path(given).is_file():
        return f"TorchScript {Path(given).name}", load_torchscript(Path(given), device)
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, ValueError) as error:
        raise ConfigurationError(f"--features {given}: {error}: install the package, or give a file") from error
    except AttributeError as error:
        raise ConfigurationError(f"--features {given}: {module} has no {name}: give a name of it") from error
    try:
        network = make()
    except TypeError as error:
        raise ConfigurationError(f"--features {given}: {error}: give a function without arguments") from error
    if isinstance(network, nn.Module):
        network = network.requires_grad_(False).eval().to(device)
    if not callable(network):
        raise ConfigurationError(f"--features {given}: gives a {type(network).__name__}, a network is needed")
    return given, partial(_on_device, network, device)


def load_torchscript(path: Path, device: str = "cpu") -> SliceFeatures:
    """A TorchScript network (N, 1, S, S) -> (N, F) from a file.

    Raises:
        InputError: the file is missing or no TorchScript.
    """
    if not path.is_file():
        raise InputError(f"{path}: not there: --features wants a TorchScript file, or package.module:name")
    try:
        network = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"{path}: no TorchScript network ({type(error).__name__}): save it with torch.jit.save"
        ) from None
    return partial(_on_device, network, device)


def pooled_code(encode: Callable[[Tensor], Tensor], cells: tuple[int, int, int] = (2, 2, 2)) -> VolumeFeatures:
    """Features that every run has: the frozen codec's continuous code, mean and deviation in a few cells.

    They are of the model's own first stage, and a report must say so: they do not see what the codec does not code.

    Args:
        encode: (B, 1, D, H, W) in [0, 1] -> (B, C, d, h, w).
        cells: pooling grid; gives 2·C·cells features.
    """

    def features(volumes: Tensor) -> Tensor:
        code = encode(volumes).float()
        pool = nn.functional.adaptive_avg_pool3d
        mean = pool(code, cells)
        deviation = (pool(code.square(), cells) - mean.square()).clamp(min=0).sqrt()
        return torch.cat([mean.flatten(1), deviation.flatten(1)], dim=1)  # (B, 2 C cells)

    return features


def _gaussian(parts: list[np.ndarray]) -> Gaussian:
    if not parts:
        raise InputError("no volumes: a Fréchet distance needs at least two of each set")
    return fit_gaussian(np.concatenate(parts))


def _unit(hu: np.ndarray, window: HUWindow) -> Tensor:
    return window.to_unit(torch.from_numpy(np.ascontiguousarray(hu)))


def _on_device(network: SliceFeatures, device: str, slices: Tensor) -> Tensor:
    return network(slices.to(device))


def _rows(features: Tensor) -> np.ndarray:
    if features.ndim != 2:
        raise InputError(f"the feature network returned {list(features.shape)}: (N, F) is needed")
    return features.detach().float().cpu().numpy()
