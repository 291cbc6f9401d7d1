"""Augmentations between rendered and real radiographs: what detectors, stands and vendors change, and anatomy does not.

A DRR has no noise, is blurred by the voxels of its CT, has another tone curve and no collimation. Each effect here
covers one of these. None of them mirrors: a mirrored chest is another patient (situs inversus).

The same generator state gives the same picture; `augmentation_generator` keys it on (seed, epoch, index), so that a
resumed run repeats it bit by bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage

from errors import ConfigurationError


@dataclass(frozen=True)
class XRayAugmentation:
    """How strong each effect may be; 0 turns it off.

    Args:
        contrast: the factor is drawn from [1 / (1 + contrast), 1 + contrast], about the middle grey.
        brightness: greatest shift of all values, of the range 1.
        gamma: the exponent is drawn from [1 / (1 + gamma), 1 + gamma].
        blur: greatest sigma in thousandths of the picture's side.
        noise: greatest standard deviation of the noise where the detector sees least.
        border: greatest share of the side that collimation hides at each edge.
        rotation_deg: greatest angle either way.
        scale: the factor is drawn from [1 / (1 + scale), 1 + scale].
        shift: greatest shift along each axis, of the side.
    """

    contrast: float = 0.3
    brightness: float = 0.08
    gamma: float = 0.3
    blur: float = 4.0
    noise: float = 0.04
    border: float = 0.06
    rotation_deg: float = 5.0
    scale: float = 0.08
    shift: float = 0.04

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < np.inf:
                raise ConfigurationError(f"X-ray augmentation {name}={value}: give 0 (off) or more")
        if self.border >= 0.4 or self.rotation_deg > 45:
            raise ConfigurationError(
                f"X-ray augmentation border={self.border} (less than 0.4), "
                f"rotation_deg={self.rotation_deg} (at most 45)"
            )


def augmentation_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of one sample in one epoch."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, index])))


def augment_xray(
    image: torch.Tensor,
    rays: torch.Tensor,
    generator: np.random.Generator,
    settings: XRayAugmentation | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Change a radiograph as another stand, detector and vendor would have; who is seen where moves with it.

    Args:
        image: float32 (1, S, S) in [0, 1].
        rays: (…, 2), places (x, y) in the picture as `dataset.ray_grid.ray_grid` gives them.
        generator: all randomness comes from it, 13 numbers and then the noise.
        settings: strengths; the defaults without.

    Returns:
        New tensors of those shapes: the picture in [0, 1], and where each place of the old one is in it.
    """
    settings = settings or XRayAugmentation()
    u = generator.uniform(-1.0, 1.0, size=13)
    pixels = image[0].numpy().astype(np.float32)
    side = max(pixels.shape)
    angle_deg, factor = settings.rotation_deg * u[0], (1 + settings.scale) ** u[1]
    shift = (settings.shift * u[2], settings.shift * u[3])
    pixels = rotate_and_scale(pixels, angle_deg, factor, (shift[0] * side, shift[1] * side))
    pixels = blur(pixels, settings.blur * abs(u[4]) * side / 1000)
    pixels = change_gamma(pixels, (1 + settings.gamma) ** u[5])
    pixels = change_contrast(pixels, (1 + settings.contrast) ** u[6], settings.brightness * u[7])
    pixels = add_noise(pixels, settings.noise * abs(u[8]), generator)
    # most radiographs have a border at some edges, few at all
    pixels = add_borders(pixels, tuple(settings.border * max(0.0, draw) for draw in u[9:13]))
    return torch.from_numpy(np.ascontiguousarray(pixels))[None], move_rays(rays, angle_deg, factor, shift)


def move_rays(rays: torch.Tensor, angle_deg: float, factor: float, shift: tuple[float, float]) -> torch.Tensor:
    """Where `rotate_and_scale` of a square picture brings its places.

    Args:
        rays: (…, 2), (x, y) from -1 to 1 across the picture, y down.
        angle_deg: counter-clockwise.
        factor: above 1 magnifies.
        shift: (down, right), of the side.
    """
    angle = np.deg2rad(angle_deg)
    turn = factor * torch.tensor(
        [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]], dtype=rays.dtype
    )  # y runs down, so that a counter-clockwise turn looks like this
    return rays @ turn.T + 2 * torch.tensor([shift[1], shift[0]], dtype=rays.dtype)


def change_contrast(pixels: np.ndarray, factor: float, shift: float = 0.0) -> np.ndarray:
    """Stretch (factor > 1) or flatten about the middle grey 0.5 and shift; clipped to [0, 1]."""
    return np.clip((pixels - 0.5) * np.float32(factor) + np.float32(0.5 + shift), 0.0, 1.0)


def change_gamma(pixels: np.ndarray, exponent: float) -> np.ndarray:
    """Another tone curve: above 1 darkens the middle, below 1 brightens it; black and white stay."""
    return np.clip(pixels, 0.0, 1.0) ** np.float32(exponent)


def blur(pixels: np.ndarray, sigma_px: float) -> np.ndarray:
    """Focal spot, patient motion and scintillator: a Gaussian."""
    return ndimage.gaussian_filter(pixels, sigma_px, mode="nearest") if sigma_px > 0 else pixels


def add_noise(pixels: np.ndarray, std: float, generator: np.random.Generator) -> np.ndarray:
    """Quantum noise: ``std`` where the picture is white, since few photons pass there, and half of it in black."""
    noise = generator.standard_normal(pixels.shape, dtype=np.float32)
    return np.clip(pixels + noise * (np.float32(std) * (0.5 + 0.5 * pixels)), 0.0, 1.0)


def add_borders(pixels: np.ndarray, shares: tuple[float, float, float, float]) -> np.ndarray:
    """Black out these shares of the side at the (top, bottom, left, right) edge, as a collimator does."""
    pixels = pixels.copy()
    height, width = pixels.shape
    top, bottom = (round(share * height) for share in shares[:2])
    left, right = (round(share * width) for share in shares[2:])
    pixels[:top], pixels[height - bottom :], pixels[:, :left], pixels[:, width - right :] = 0, 0, 0, 0
    return pixels


def rotate_and_scale(
    pixels: np.ndarray, angle_deg: float, factor: float, shift_px: tuple[float, float] = (0.0, 0.0)
) -> np.ndarray:
    """Turn counter-clockwise, magnify and move (down, right) about the middle; what comes in is black."""
    angle = np.deg2rad(angle_deg)
    # from the new pixel to the old one; rows run down, so that a counter-clockwise turn looks like this
    back = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / factor
    middle = (np.array(pixels.shape) - 1) / 2
    offset = middle - back @ (middle + np.array(shift_px))
    moved = ndimage.affine_transform(pixels, back, offset, order=1, mode="constant", cval=0.0)
    return np.asarray(moved, dtype=np.float32)
