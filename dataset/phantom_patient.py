"""Who lies in the scanner: the sampled parameters of one phantom patient and of the scan made of them."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np

from errors import ConfigurationError

# Relative to 100 kVp (iodine) and 120 kVp (calcium): both attenuate more at low energies.
IODINE_GAIN = {80.0: 1.3, 100.0: 1.0, 120.0: 0.82}
BONE_GAIN = {80.0: 1.25, 100.0: 1.1, 120.0: 1.0}
FAT_HU = {80.0: -112.0, 100.0: -105.0, 120.0: -98.0}

PA_RANGE_HU = (200.0, 450.0)


@dataclass(frozen=True)
class Patient:
    """Parameters of one patient and scan; plain numbers in mm, HU, kVp and degrees, the rest without unit.

    ``scale_*`` multiply a reference thorax (1.0: a man of average build); the left-right, anterior-posterior and
    inferior-superior directions are ``lateral``, ``ap`` and ``long``.
    """

    seed: int
    is_female: bool
    has_pe: bool
    # build
    scale_lateral: float
    scale_ap: float
    scale_long: float
    fat_mm: float  # thickness of the subcutaneous fat
    muscle_mm: float  # muscle on top of the reference chest wall
    breast_mm: float  # half-width of a breast; 0 for men
    breast_density: float  # glandular share, 0..1
    # chest
    inspiration: float  # 0 (end of expiration) .. 1 (deep): how low the diaphragm stands
    heart_scale: float
    rv_scale: float  # right ventricle, enlarged under a load of emboli
    heart_axis_deg: float  # positive: a steeper heart
    pa_diameter_mm: float
    aorta_diameter_mm: float
    lung_hu: float  # parenchyma half-way between front and back
    lung_gradient_hu: float  # how much denser the dependent (posterior) lung is than the anterior
    effusion_right_mm: float  # depth of pleural fluid at the back; 0: none
    effusion_left_mm: float
    # embolism: 0 when has_pe is False
    n_emboli: int
    clot_burden: float
    embolus_hu: float
    # contrast timing
    pa_hu: float
    vein_hu: float
    aorta_hu: float
    svc_hu: float
    ivc_hu: float
    # scanner
    kvp: float
    kernel_sharpness: float  # 0 smooth (soft tissue) .. 1 sharp (lung)
    noise_hu: float  # standard deviation in the body, in voxels of 2 mm

    @property
    def fat_hu(self) -> float:
        """Fat at this tube voltage, HU."""
        return FAT_HU[self.kvp]

    @property
    def bone_gain(self) -> float:
        """Factor on the HU of bone at this tube voltage; 1 at 120 kVp."""
        return BONE_GAIN[self.kvp]

    @property
    def psf_mm(self) -> float:
        """Full width of the reconstruction kernel's point spread, mm."""
        return 1.7 - 0.8 * self.kernel_sharpness


def checked_seed(seed: SupportsIndex) -> int:
    """The seed as a non-negative ``int``.

    Raises:
        ConfigurationError: it is negative or not an integer.
    """
    try:
        number = operator.index(seed)
    except TypeError as error:
        raise ConfigurationError(f"phantom seed {seed!r} is not an integer: use 0, 1, 2, …") from error
    if number < 0:
        raise ConfigurationError(f"phantom seed {number} is negative: use 0, 1, 2, …")
    return number


def sample_patient(seed: int, *, pe_prevalence: float = 0.5) -> Patient:
    """Draw one patient.

    Everything but ``has_pe`` and what follows from it (emboli, right heart strain, effusions) depends on the seed
    alone, so that cohorts of different prevalence hold the same people.

    Args:
        seed: non-negative integer; the same seed gives the same patient.
        pe_prevalence: probability of pulmonary embolism, in [0, 1].

    Raises:
        ConfigurationError: a bad seed, or a prevalence outside [0, 1].
    """
    seed = checked_seed(seed)
    if not (isinstance(pe_prevalence, int | float | np.floating) and 0.0 <= pe_prevalence <= 1.0):
        raise ConfigurationError(f"pe_prevalence {pe_prevalence!r} is not in [0, 1]: it is a probability")
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 0])))

    def normal(limit: float = 2.0) -> float:
        return float(np.clip(rng.standard_normal(), -limit, limit))

    def uniform(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    # `random` < 1, so that a prevalence of 1 is everybody and 0 is nobody
    has_pe = bool(rng.random() < pe_prevalence)
    is_female = bool(rng.random() < 0.5)
    stature, girth = normal(), normal()
    small = 0.93 if is_female else 1.0
    scale_long = small * (1.0 + 0.045 * stature)
    scale_lateral = small * (1.0 + 0.025 * stature + 0.02 * girth + 0.015 * normal())
    scale_ap = small * (1.0 + 0.015 * stature + 0.03 * girth + 0.03 * normal())
    fat_mm = (17.0 if is_female else 12.0) * math.exp(0.45 * girth + 0.15 * normal())
    fat_mm = float(np.clip(fat_mm, 4.0, 38.0))
    muscle_mm = (1.0 if is_female else 5.0) + uniform(-3.0, 4.0)
    breast_mm = uniform(44.0, 62.0) if is_female else 0.0
    breast_density = float(rng.beta(2.0, 3.0))

    inspiration = float(rng.beta(2.2, 1.6))
    heart_scale = 1.0 + 0.06 * normal() + (0.14 if rng.random() < 0.12 else 0.0)
    heart_axis_deg = 7.0 * normal() + 8.0 * (inspiration - 0.5)
    burden, n_emboli = float(rng.beta(1.5, 1.8)), int(rng.integers(2, 9))
    pa_diameter_mm = small * (27.0 + 2.2 * normal()) + (4.0 * burden if has_pe else 0.0)
    aorta_diameter_mm = small * (31.0 + 2.8 * normal())
    lung_hu = uniform(-880.0, -825.0) + 35.0 * (0.5 - inspiration)
    effusions = []
    for _ in range(2):
        chance, depth = rng.random(), uniform(8.0, 38.0)
        effusions.append(depth if chance < (0.28 if has_pe else 0.14) else 0.0)

    kvp = float(rng.choice([80.0, 100.0, 120.0], p=[0.25, 0.5, 0.25]))
    pa_hu = float(np.clip(uniform(215.0, 400.0) * IODINE_GAIN[kvp], *PA_RANGE_HU))
    # 0: the bolus is in the right heart; 1: it has reached the aorta. An opacified PA is needed either way.
    timing = float(rng.beta(1.6, 1.6))
    vein_hu = pa_hu * (0.62 + 0.36 * timing)
    aorta_hu = pa_hu * (0.38 + 0.60 * timing)
    svc_hu = min(900.0, pa_hu * (2.1 - 1.2 * timing) * uniform(0.85, 1.1))
    sharpness = float(rng.beta(1.3, 1.3))
    noise_hu = uniform(6.0, 15.0) * (1.0 + 0.9 * sharpness) * (1.0 + 0.008 * fat_mm) * (1.2 if kvp < 90.0 else 1.0)
    embolus_hu = uniform(32.0, 78.0)
    gradient_hu = uniform(30.0, 90.0)
    ivc_hu = uniform(50.0, 120.0)
    return Patient(
        seed=seed,
        is_female=is_female,
        has_pe=has_pe,
        scale_lateral=scale_lateral,
        scale_ap=scale_ap,
        scale_long=scale_long,
        fat_mm=fat_mm,
        muscle_mm=muscle_mm,
        breast_mm=breast_mm,
        breast_density=breast_density,
        inspiration=inspiration,
        heart_scale=heart_scale,
        rv_scale=1.0 + 0.16 * burden if has_pe else 1.0,
        heart_axis_deg=heart_axis_deg,
        pa_diameter_mm=pa_diameter_mm,
        aorta_diameter_mm=aorta_diameter_mm,
        lung_hu=lung_hu,
        lung_gradient_hu=gradient_hu,
        effusion_right_mm=effusions[0],
        effusion_left_mm=effusions[1],
        n_emboli=n_emboli if has_pe else 0,
        clot_burden=burden if has_pe else 0.0,
        embolus_hu=embolus_hu if has_pe else 0.0,
        pa_hu=pa_hu,
        vein_hu=vein_hu,
        aorta_hu=aorta_hu,
        svc_hu=svc_hu,
        ivc_hu=ivc_hu,
        kvp=kvp,
        kernel_sharpness=sharpness,
        noise_hu=noise_hu,
    )
