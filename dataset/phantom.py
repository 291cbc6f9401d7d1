"""The phantom cohort: procedural thoraces in HU with known ground truth, reproducible by seed.

The anatomy is a set of implicit functions in millimetres that depends on the seed alone; a size and a spacing only say
where it is sampled. Arrays are ``(D, H, W)``: inferior→superior, anterior→posterior, patient right→left.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.ndimage import gaussian_filter

from dataset.phantom_anatomy import Anatomy
from dataset.phantom_labels import GROUPS, LABELS
from dataset.phantom_patient import Patient, sample_patient
from dataset.phantom_render import Renderer
from dataset.phantom_shapes import Grid
from dataset.phantom_torso import Torso
from errors import ConfigurationError
from params import BASELINE_SIZE_DHW

__all__ = ["GROUPS", "LABELS", "Patient", "Phantom", "is_mirrored", "make_phantom", "sample_patient"]

HU_FLOOR, HU_CEILING = -1024, 3071
# Blocks of slices are rendered one by one (and two at a time): memory stays bounded and caches warm.
BLOCK_VOXELS = 600_000
# Coarser voxels than this are averaged from 3 samples per axis, as long as the fine grid stays small.
SUPERSAMPLE_ABOVE_MM = 5.0
SUPERSAMPLE_VOXELS = 500_000
THREADS = 2
_SITUS_STREAM = 0x51705  # apart from the streams of anatomy and noise


@dataclass(frozen=True)
class Phantom:
    """One thorax with its ground truth.

    Attributes:
        hu: (D, H, W) int16.
        affine: (4, 4) float64, maps the index (d, h, w, 1) to RAS+ millimetres; the volume's centre is the origin.
        labels: (D, H, W) uint8, ids of ``LABELS``.
        patient: what was sampled.
    """

    hu: np.ndarray
    affine: np.ndarray
    labels: np.ndarray
    patient: Patient

    @property
    def has_pe(self) -> bool:
        """Whether there are emboli (small ones may vanish from ``labels`` on a coarse grid)."""
        return self.patient.has_pe

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along (D, H, W)."""
        d, h, w = (float(step) for step in np.linalg.norm(self.affine[:3, :3], axis=0))
        return d, h, w

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel in millilitres."""
        return math.prod(self.spacing_mm) / 1000.0

    def mask(self, name: str) -> np.ndarray:
        """(D, H, W) bool of a class of ``LABELS`` or a group of ``GROUPS`` ("lungs", "bone", "heart", …).

        Raises:
            ConfigurationError: there is no such class.
        """
        names = GROUPS.get(name, (name,))
        if not all(part in LABELS for part in names):
            raise ConfigurationError(f"phantom has no class {name!r}: one of {', '.join([*LABELS, *GROUPS])}")
        return np.isin(self.labels, [LABELS[part] for part in names])

    def volume_ml(self, name: str) -> float:
        """Volume of a class or group in millilitres."""
        return float(self.mask(name).sum()) * self.voxel_ml

    @cached_property
    def body_mask(self) -> np.ndarray:
        """(D, H, W) bool: everything under the skin, the air in lungs and airways included."""
        return self.labels != LABELS["background"]

    @property
    def emboli_mask(self) -> np.ndarray:
        """(D, H, W) bool: clots."""
        return self.mask("embolus")


def make_phantom(
    seed: int,
    size_dhw: tuple[int, int, int] = BASELINE_SIZE_DHW,
    spacing_mm: tuple[float, float, float] | None = None,
    *,
    pe_prevalence: float = 0.5,
    mirrored: bool = False,
) -> Phantom:
    """Make one thorax.

    Args:
        seed: non-negative; the same seed is the same patient at any size, and the same bytes at the same size.
        size_dhw: voxels along (D, H, W).
        spacing_mm: voxel size along (D, H, W); None fits the whole thorax: 360–430 mm in plane, 280–340 mm in depth.
        pe_prevalence: probability that the patient has emboli.
        mirrored: situs inversus totalis: the same patient with right and left exchanged, on the same grid.

    Raises:
        ConfigurationError: a bad seed, size, spacing or prevalence.
    """
    size = _checked_size(size_dhw)
    patient = sample_patient(seed, pe_prevalence=pe_prevalence)
    anatomy = Anatomy(patient)
    spacing = _fitted_spacing(anatomy.torso, size) if spacing_mm is None else _checked_spacing(spacing_mm)
    centre = _centre_mm(anatomy.torso)

    factors = _supersampling(size, spacing)
    fine_spacing = (spacing[0] / factors[0], spacing[1] / factors[1], spacing[2] / factors[2])
    # a voxel is as wide as it is, and the kernel blurs it further
    edge = math.hypot(math.prod(fine_spacing) ** (1.0 / 3.0), patient.psf_mm)
    z, y, x = (
        ((np.arange(n * f) - (n * f - 1) / 2.0) * step + middle).astype(np.float32)
        for n, f, step, middle in zip(size, factors, fine_spacing, centre, strict=True)
    )
    renderer = Renderer(anatomy, y, x)
    hu = np.empty(size, dtype=np.int16)
    labels = np.empty(size, dtype=np.uint8)
    noise = _Noise(patient, spacing)

    def render(first: int, last: int) -> None:
        fine = renderer.render(Grid(z[first * factors[0] : last * factors[0]], y, x, fine_spacing, edge))
        values, gain = _block_mean(fine[0], factors), _block_mean(fine[2], factors)
        middle = tuple(slice(f // 2, None, f) for f in factors)
        labels[first:last] = fine[1][middle]
        for i in range(first, last):
            values[i - first] += noise.slice(i, size[1:]) * gain[i - first]
        np.rint(values, out=values)
        hu[first:last] = np.clip(values, HU_FLOOR, HU_CEILING)

    per_block = max(1, BLOCK_VOXELS // (size[1] * size[2] * math.prod(factors)))
    blocks = [(first, min(first + per_block, size[0])) for first in range(0, size[0], per_block)]
    if len(blocks) == 1:
        render(*blocks[0])
    else:
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(lambda block: render(*block), blocks):
                pass
    if mirrored:  # the grid is symmetric about the midline
        hu, labels = np.ascontiguousarray(hu[..., ::-1]), np.ascontiguousarray(labels[..., ::-1])
    return Phantom(hu, affine_of(size, spacing), labels, patient)


def is_mirrored(seed: int, share: float) -> bool:
    """Whether this patient is one of a share of mirrored ones, by lot.

    Anatomy tells right from left in nearly everybody, so a model can ignore the side that a radiograph shows. Patients
    with situs inversus in the cohort make it look.

    Raises:
        ConfigurationError: no share in [0, 1].
    """
    if not 0.0 <= share <= 1.0:
        raise ConfigurationError(f"mirrored_share={share}: give a share from 0 to 1")
    return float(np.random.default_rng((_SITUS_STREAM, seed)).random()) < share


def affine_of(size_dhw: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """(4, 4) float64 from (d, h, w, 1) to RAS+ mm: d runs to the head, h to the back (−A), w to the left (−R)."""
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2] = spacing_mm[0], -spacing_mm[1], -spacing_mm[2]
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(size_dhw) - 1) / 2.0)
    affine[3, 3] = 1.0
    return affine


def _checked_size(size_dhw: tuple[int, int, int]) -> tuple[int, int, int]:
    size = tuple(size_dhw)
    whole = all(isinstance(n, int | np.integer) and not isinstance(n, bool) for n in size)
    if len(size) != 3 or not whole or min(size) <= 0:
        raise ConfigurationError(f"phantom size {size_dhw!r} is not three positive integers [D, H, W]")
    return int(size[0]), int(size[1]), int(size[2])


def _checked_spacing(spacing_mm: tuple[float, float, float]) -> tuple[float, float, float]:
    spacing = tuple(float(step) for step in spacing_mm)
    if len(spacing) != 3 or not all(math.isfinite(step) and step > 0 for step in spacing):
        raise ConfigurationError(f"phantom spacing {spacing_mm!r} is not three positive numbers of mm [D, H, W]")
    return spacing[0], spacing[1], spacing[2]


def _fitted_spacing(torso: Torso, size: tuple[int, int, int]) -> tuple[float, float, float]:
    """Spacing that shows the whole thorax: a square field of view around the widest slice."""
    field_mm = float(np.clip(2.0 * torso.half_width_mm + 16.0, 360.0, 430.0))
    depth_mm = float(np.clip(300.0 * torso.scale[2] + 0.5 * abs(torso.dome_shift_mm), 280.0, 340.0))
    return depth_mm / size[0], field_mm / size[1], field_mm / size[2]


def _centre_mm(torso: Torso) -> tuple[float, float, float]:
    """(z, y, x) of the centre of every volume of this patient, in the anatomy's millimetres."""
    _, front, back = torso.axes("body", np.array(-20.0))
    low = torso.dome_left_mm - 62.0 * torso.scale[2]
    return 0.5 * (torso.apex_mm + low), 0.5 * float(back - front), 0.0


def _supersampling(size: tuple[int, int, int], spacing: tuple[float, float, float]) -> tuple[int, int, int]:
    """Odd factors per axis, so that every voxel's centre is also a sample (which names its class)."""
    factors = [1, 1, 1]
    for axis in np.argsort(spacing)[::-1]:
        if spacing[axis] > SUPERSAMPLE_ABOVE_MM and 3 * math.prod(size) * math.prod(factors) <= SUPERSAMPLE_VOXELS:
            factors[axis] = 3
    return factors[0], factors[1], factors[2]


def _block_mean(fine: np.ndarray, factors: tuple[int, int, int]) -> np.ndarray:
    if factors == (1, 1, 1):
        return fine
    d, h, w = (n // f for n, f in zip(fine.shape, factors, strict=True))
    return np.asarray(fine.reshape(d, factors[0], h, factors[1], w, factors[2]).mean(axis=(1, 3, 5)))


class _Noise:
    """Correlated noise in voxel space, of unit gain in the body's outer layers; every slice has a stream of its own."""

    def __init__(self, patient: Patient, spacing_mm: tuple[float, float, float]) -> None:
        voxel = math.prod(spacing_mm) ** (1.0 / 3.0)
        # larger voxels collect more photons; reconstructions at large spacing average only part of that away
        self.std = patient.noise_hu * float(np.clip((2.0 / voxel) ** 0.75, 0.4, 1.3))
        self.seed = patient.seed
        sharp = patient.kernel_sharpness
        sigma_mm = 0.95 - 0.5 * sharp
        self.sigma = (sigma_mm / spacing_mm[1], sigma_mm / spacing_mm[2])
        # a sharp kernel lifts the high frequencies: what is left of the low ones is taken away
        self.undershoot = 0.75 * sharp
        probe = np.zeros((65, 65), dtype=np.float32)
        probe[32, 32] = 1.0
        self.norm = float(np.sqrt(np.square(self._filter(probe)).sum()))

    def _filter(self, white: np.ndarray) -> np.ndarray:
        fine = gaussian_filter(white, self.sigma, truncate=3.0, mode="wrap")
        broad = gaussian_filter(fine, (2.0 * self.sigma[0], 2.0 * self.sigma[1]), truncate=2.5, mode="wrap")
        return np.asarray(fine - np.float32(self.undershoot) * broad)

    def slice(self, index: int, shape: tuple[int, ...]) -> np.ndarray:
        """(H, W) float32 noise of one slice, HU."""
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, 2, index])))
        white = rng.standard_normal(shape, dtype=np.float32)
        return self._filter(white) * np.float32(self.std / max(self.norm, 1e-6))
