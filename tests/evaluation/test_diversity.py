"""MS-SSIM between samples: against plain SSIM, against the product written out, streamed, and with known spreads."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from dataset.intensity import HUWindow
from errors import InputError
from evaluation.metrics import diversity
from evaluation.metrics.diversity import SCALE_WEIGHTS, ms_ssim_3d, sample_diversity
from evaluation.metrics.image import ssim_3d


def smooth(seed, shape=(24, 28, 32)):
    noise = torch.rand((1, 1, *shape), generator=torch.Generator().manual_seed(seed))
    return nn.functional.avg_pool3d(noise, 3, stride=1, padding=1)[0, 0]


def test_equal_volumes_score_one_and_it_is_symmetric():
    a, b = smooth(0), smooth(1)
    assert ms_ssim_3d(a, a) == pytest.approx(1.0, abs=1e-6)
    assert ms_ssim_3d(a, b) == pytest.approx(ms_ssim_3d(b, a), abs=1e-6)
    assert ms_ssim_3d(a, b) < 0.5


def test_a_volume_of_one_scale_has_plain_ssim():
    a, b = smooth(0, (12, 14, 16)), smooth(1, (12, 14, 16))
    b = 0.7 * a + 0.3 * b
    assert ms_ssim_3d(a, b) == pytest.approx(ssim_3d(a, b), abs=1e-5)


def test_two_scales_are_the_weighted_product():
    a = smooth(0)
    b = 0.8 * a + 0.2 * smooth(1)
    halved = [nn.functional.avg_pool3d(volume[None, None], 2)[0, 0] for volume in (a, b)]
    _, contrast = diversity._similarity(a, b)
    weights = np.array(SCALE_WEIGHTS[:2]) / sum(SCALE_WEIGHTS[:2])
    expected = contrast ** weights[0] * ssim_3d(*halved) ** weights[1]
    assert ms_ssim_3d(a, b) == pytest.approx(expected, abs=1e-5)


def test_the_exponents_are_the_published_ones():
    """Wang, Simoncelli and Bovik 2003, section 3.2, fine to coarse; printed with four digits they sum to 1.0001."""
    assert SCALE_WEIGHTS == (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    assert sum(SCALE_WEIGHTS) == pytest.approx(1.0001)


@pytest.mark.slow
def test_two_scales_agree_with_another_implementation():
    metrics = pytest.importorskip("monai.metrics")
    a = smooth(0)
    b = 0.8 * a + 0.2 * smooth(1)
    weights = [weight / sum(SCALE_WEIGHTS[:2]) for weight in SCALE_WEIGHTS[:2]]
    other = metrics.MultiScaleSSIMMetric(spatial_dims=3, kernel_size=11, kernel_sigma=1.5, weights=weights)
    assert ms_ssim_3d(a, b) == pytest.approx(float(other(a[None, None], b[None, None])), abs=1e-4)


def test_streaming_changes_nothing(monkeypatch):
    a, b = smooth(0), smooth(1)
    whole = ms_ssim_3d(a, b)
    monkeypatch.setattr(diversity, "_SLAB_VOXELS", 1)
    assert ms_ssim_3d(a, b) == pytest.approx(whole, abs=1e-6)


def test_more_noise_is_less_alike():
    a = smooth(0)
    scores = [ms_ssim_3d(a, (a + level * (smooth(1) - 0.5)).clamp(0, 1)) for level in (0.05, 0.2, 0.8)]
    assert scores == sorted(scores, reverse=True)


def test_nan_and_bad_shapes():
    a = smooth(0)
    assert math.isnan(ms_ssim_3d(a, a * math.nan))
    with pytest.raises(InputError, match="one grid"):
        ms_ssim_3d(a, a[1:])


def test_spread_between_samples_is_their_standard_deviation():
    rng = np.random.default_rng(0)
    samples = [rng.normal(0, 50, (12, 12, 12)).astype(np.float32) for _ in range(4)]
    found = sample_diversity(samples, HUWindow())
    assert found["std_hu"] == pytest.approx(np.sqrt(np.var(samples, axis=0, ddof=1).mean()), rel=1e-4)
    same = sample_diversity([samples[0]] * 3, HUWindow())
    assert same["ms_ssim"] == pytest.approx(1.0, abs=1e-5)
    assert same["std_hu"] == pytest.approx(0.0, abs=1e-3)


def test_one_sample_has_no_diversity():
    with pytest.raises(InputError, match="at least two"):
        sample_diversity([np.zeros((12, 12, 12))], HUWindow())
