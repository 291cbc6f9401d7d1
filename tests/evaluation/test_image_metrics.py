"""Image metrics: answers known by arithmetic, and two other implementations of SSIM as oracles."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from dataset.intensity import HUWindow
from errors import ConfigurationError, InputError
from evaluation.metrics import image
from evaluation.metrics.image import (
    bias_hu,
    mae_hu,
    pearson_correlation,
    psnr,
    psnr_minmax,
    psnr_slice,
    psnr_window,
    ssim_3d,
    volume_metrics,
)

WINDOW = HUWindow()


def pair(shape=(20, 24, 28), noise=0.05, seed=0):
    """A smooth volume with structure and a noisy, slightly darker copy, float32 in [0, 1]."""
    random = np.random.default_rng(seed)
    target = ndimage.gaussian_filter(random.random(shape), 2)
    target = (target - target.min()) / np.ptp(target)
    pred = np.clip(target * 0.95 + random.normal(0, noise, shape), 0, 1)
    return torch.tensor(pred, dtype=torch.float32), torch.tensor(target, dtype=torch.float32)


def ssim_direct(pred, target, size=11):
    """SSIM by the definition, in float64, with scipy's correlation."""
    offsets = np.arange(size) - size // 2
    weights = np.exp(-(offsets**2) / (2 * 1.5**2))
    kernel = weights[:, None, None] * weights[:, None] * weights
    kernel /= kernel.sum()
    inner = tuple(slice(size // 2, n - size // 2) for n in pred.shape)
    x, y = pred.double().numpy(), target.double().numpy()

    def mean(values):
        return ndimage.correlate(values, kernel, mode="constant")[inner]

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return float(((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())


# ---------------------------------------------------------------- answers known beforehand


def test_a_constant_offset():
    target = torch.full((12, 16, 16), 0.5)
    pred = target + 0.1  # 200 HU of 2000
    assert psnr(pred, target) == pytest.approx(20, abs=1e-4)
    assert psnr(pred, target, data_range=2.0) == pytest.approx(20 + 20 * math.log10(2), abs=1e-4)
    assert psnr_slice(pred, target) == pytest.approx(20, abs=1e-4)
    assert mae_hu(pred, target, WINDOW) == pytest.approx(200, abs=1e-3)
    assert bias_hu(pred, target, WINDOW) == pytest.approx(200, abs=1e-3)
    assert bias_hu(target, pred, WINDOW) == pytest.approx(-200, abs=1e-3)
    # the SSIM of two constants is its luminance term alone
    expected = (2 * 0.5 * 0.6 + 1e-4) / (0.25 + 0.36 + 1e-4)
    assert ssim_3d(pred, target) == pytest.approx(expected, abs=1e-5)


def test_equal_volumes():
    _, target = pair()
    metrics = volume_metrics(target, target, WINDOW)
    assert metrics["psnr_db"] == metrics["psnr_slice_db"] == metrics["psnr_pe_window_db"] == math.inf
    assert metrics["psnr_minmax_db"] == math.inf
    assert metrics["ssim"] == pytest.approx(1, abs=1e-7)
    assert metrics["pearson_r"] == pytest.approx(1, abs=1e-12)
    assert metrics["mae_hu"] == metrics["bias_hu"] == 0


def test_names():
    assert list(volume_metrics(*pair(), WINDOW)) == [
        "psnr_db",
        "psnr_slice_db",
        "psnr_pe_window_db",
        "ssim",
        "mae_hu",
        "bias_hu",
        "pearson_r",
        "psnr_minmax_db",
    ]


def test_slice_psnr_is_the_mean_of_slices():
    target = torch.zeros(2, 8, 8)
    pred = torch.stack((torch.full((8, 8), 0.1), torch.full((8, 8), 0.01)))
    assert psnr_slice(pred, target) == pytest.approx(30, abs=1e-4)
    assert psnr(pred, target) == pytest.approx(10 * math.log10(2 / (0.01 + 0.0001)), abs=1e-4)
    assert psnr_slice(pred[None], target[None]) == pytest.approx(30, abs=1e-4)


def test_pe_window():
    # 0 against 70 HU lies inside [-250, 450]: a tenth of the width. Air against bone saturates to the whole width.
    pred, target = (WINDOW.to_unit(torch.full((4, 4, 4), hu)) for hu in (70.0, 0.0))
    assert psnr_window(pred, target, WINDOW) == pytest.approx(20, abs=1e-3)
    pred, target = (WINDOW.to_unit(torch.full((4, 4, 4), hu)) for hu in (-1000.0, 1000.0))
    assert psnr_window(pred, target, WINDOW) == pytest.approx(0, abs=1e-3)
    pred, target = (WINDOW.to_unit(torch.full((4, 4, 4), hu)) for hu in (-1000.0, -300.0))
    assert psnr_window(pred, target, WINDOW) == math.inf
    # the figure is in HU: another HU window of the tensors does not change it
    wide = HUWindow(-1024, 3000)
    pred, target = (wide.to_unit(torch.full((4, 4, 4), hu)) for hu in (70.0, 0.0))
    assert psnr_window(pred, target, wide) == pytest.approx(20, abs=1e-3)
    with pytest.raises(ConfigurationError, match="reading window"):
        psnr_window(pred, target, HUWindow(-100, 400))


def test_what_the_predecessor_printed_hides_wrong_hu():
    _, target = pair()
    wrong = target * 0.5 + 0.3
    assert pearson_correlation(wrong, target) == pytest.approx(1, abs=1e-6)
    assert psnr_minmax(wrong, target) > 100
    assert psnr(wrong, target) < 25
    assert ssim_3d(wrong, target) < 0.95
    assert pearson_correlation(1 - target, target) == pytest.approx(-1, abs=1e-6)
    for flat, other in ((torch.full_like(target, 0.3), target), (target, torch.zeros_like(target))):
        assert math.isnan(pearson_correlation(flat, other))
        assert math.isnan(psnr_minmax(flat, other))


def test_pearson_and_minmax_by_numpy():
    pred, target = pair()
    x, y = pred.double().numpy(), target.double().numpy()
    assert pearson_correlation(pred, target) == pytest.approx(np.corrcoef(x.ravel(), y.ravel())[0, 1], abs=1e-9)
    x, y = ((v - v.min()) / np.ptp(v) for v in (x, y))
    assert psnr_minmax(pred, target) == pytest.approx(-10 * math.log10(((x - y) ** 2).mean()), abs=1e-6)


def test_sums_keep_their_digits():
    # a float32 sum of so many equal terms is off in the fourth digit
    target = torch.zeros(8, 512, 512)
    pred = torch.full_like(target, 0.1)
    assert mae_hu(pred, target, WINDOW) == pytest.approx(200, abs=1e-5)
    assert bias_hu(pred, target, WINDOW) == pytest.approx(200, abs=1e-5)


# ---------------------------------------------------------------- SSIM


@pytest.mark.parametrize("shape", [(11, 11, 11), (12, 20, 17), (31, 16, 16)])
def test_ssim_equals_the_definition(shape):
    pred, target = pair(shape)
    assert ssim_3d(pred, target) == pytest.approx(ssim_direct(pred, target), abs=2e-6)


@pytest.mark.parametrize("slices", [1, 3, 7, 10, 11, 50])
def test_ssim_streamed_equals_whole(slices, monkeypatch):
    pred, target = pair((25, 16, 18))
    whole = ssim_3d(pred, target)
    monkeypatch.setattr(image, "_SLAB_VOXELS", slices * 16 * 18)
    assert ssim_3d(pred, target) == pytest.approx(whole, abs=1e-7)


def test_ssim_agrees_with_torchmetrics():
    functional = pytest.importorskip("torchmetrics.functional.image")
    pred, target = pair((20, 32, 28))
    _, full = functional.structural_similarity_index_measure(
        pred[None, None], target[None, None], data_range=1.0, return_full_image=True
    )
    # torchmetrics pads by reflection and averages the border too; inside it is the same map
    assert ssim_3d(pred, target) == pytest.approx(float(full[..., 5:-5, 5:-5, 5:-5].mean()), abs=1e-4)


def test_ssim_agrees_with_skimage():
    metrics = pytest.importorskip("skimage.metrics")
    pred, target = pair((20, 32, 28))
    theirs = metrics.structural_similarity(
        pred.numpy(), target.numpy(), data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert ssim_3d(pred, target) == pytest.approx(theirs, abs=1e-5)


def test_ssim_of_a_flat_bright_region_does_not_cancel():
    # E[x²] - E[x]² in float32 near 1 would be all rounding
    pred = torch.full((16, 16, 16), 0.999) + torch.rand(16, 16, 16, generator=torch.Generator().manual_seed(0)) * 1e-3
    target = torch.full((16, 16, 16), 0.9995)
    assert ssim_3d(pred, target) == pytest.approx(ssim_direct(pred, target), abs=1e-4)


@pytest.mark.parametrize(("shape", "size"), [((4, 32, 32), 3), ((10, 16, 16), 9), ((1, 16, 16), 1), ((16, 16, 7), 7)])
def test_thin_volumes_get_a_smaller_window(shape, size):
    pred, target = pair(shape)
    assert ssim_3d(pred, target) == pytest.approx(ssim_direct(pred, target, size), abs=5e-6)


def test_channels_are_averaged():
    (pred_a, target), (pred_b, _) = pair(), pair(seed=1)
    both = ssim_3d(torch.stack((pred_a, pred_b)), torch.stack((target, target)))
    assert both == pytest.approx((ssim_3d(pred_a, target) + ssim_3d(pred_b, target)) / 2, abs=1e-9)
    one = volume_metrics(pred_a[None], target[None], WINDOW)
    assert one == pytest.approx(volume_metrics(pred_a, target, WINDOW))


@given(st.tuples(*[st.integers(1, 14)] * 3), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_bounds_and_symmetry(shape, seed):
    random = torch.Generator().manual_seed(seed)
    pred, target = torch.rand(shape, generator=random), torch.rand(shape, generator=random)
    assert -1 <= ssim_3d(pred, target) <= 1
    assert ssim_3d(pred, target) == pytest.approx(ssim_3d(target, pred), abs=1e-6)
    assert psnr_slice(pred, target) >= psnr(pred, target) - 1e-6
    assert abs(bias_hu(pred, target, WINDOW)) <= mae_hu(pred, target, WINDOW) + 1e-6


# ---------------------------------------------------------------- inputs


def test_half_precision_views_and_gradients_are_taken():
    pred, target = pair()
    reference = volume_metrics(pred, target, WINDOW)
    turned = (v.permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_() for v in (pred, target))
    assert volume_metrics(*turned, WINDOW) == pytest.approx(reference, abs=1e-5)
    half = volume_metrics(pred.half(), target.half(), WINDOW)
    assert half["psnr_db"] == pytest.approx(reference["psnr_db"], abs=0.01)


def test_nan_and_infinity_are_not_hidden():
    pred, target = pair()
    pred[3, 4, 5] = math.nan
    metrics = volume_metrics(pred, target, WINDOW)
    assert all(math.isnan(metrics[name]) for name in metrics), metrics
    pred[3, 4, 5] = math.inf
    assert psnr(pred, target) == -math.inf


@pytest.mark.parametrize("shapes", [((4, 4, 4), (4, 4, 5)), ((4, 4), (4, 4)), ((0, 4, 4), (0, 4, 4)), ((1,) * 5,) * 2])
def test_pairs_that_do_not_match(shapes):
    pred, target = (torch.zeros(shape) for shape in shapes)
    for metric in (psnr, psnr_slice, ssim_3d, pearson_correlation, psnr_minmax):
        with pytest.raises(InputError, match="one grid"):
            metric(pred, target)


MEMORY = """
import torch
from vq_gan_3d.memory import peak_rss_bytes
from evaluation.metrics.image import volume_metrics
from dataset.intensity import HUWindow
peak = lambda: peak_rss_bytes() / 2**20
torch.set_num_threads(1)
pred, target = torch.rand(150, 256, 256), torch.rand(150, 256, 256)
volume_metrics(pred[:50], target[:50], HUWindow())
before = peak()
volume_metrics(pred, target, HUWindow())
print(before, peak())
"""


def test_memory_does_not_grow_with_depth():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=120, check=True)
    before, after = map(float, done.stdout.split())
    assert after - before < 60, done.stdout  # five whole maps of 100 slices more would be 131 MB, and as much again
