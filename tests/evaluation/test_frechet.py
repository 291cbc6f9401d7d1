"""Fréchet distance: closed forms, an oracle, shrinkage, and slices the right way up."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg

from dataset.intensity import HUWindow
from errors import ConfigurationError, InputError
from evaluation.metrics.frechet import (
    PLANES,
    Gaussian,
    features_of_slices,
    fit_gaussian,
    frechet_3d,
    frechet_25d,
    frechet_distance,
    load_features,
    load_torchscript,
    planes_of_map,
    pooled_code,
    slices_of,
)
from tests.helpers import Canary

WINDOW = HUWindow()


def random_gaussian(seed, size=4):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(size, size))
    return Gaussian(rng.normal(size=size), root @ root.T)


def test_diagonal_gaussians_have_a_closed_form():
    a = Gaussian(np.array([0.0, 1.0, 2.0]), np.diag([1.0, 4.0, 9.0]))
    b = Gaussian(np.array([1.0, 1.0, 0.0]), np.diag([4.0, 4.0, 1.0]))
    # |Δμ|² = 1 + 0 + 4, Σ (σa - σb)² = 1 + 0 + 4
    assert frechet_distance(a, b) == pytest.approx(10.0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 6))
def test_distance_is_symmetric_zero_for_equal_and_equals_the_textbook_formula(first, second, size):
    a, b = random_gaussian(first, size), random_gaussian(second + 7, size)
    root = linalg.sqrtm(a.covariance @ b.covariance).real
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6, abs=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-6)


def test_gaussians_that_do_not_commute_have_a_closed_form():
    """In two dimensions tr (AB)^½ = (tr AB + 2 (det A det B)^½)^½, since the two roots of the eigenvalues add up."""
    a = Gaussian(np.array([1.0, 0.0]), np.array([[2.0, 1.0], [1.0, 1.0]]))
    b = Gaussian(np.array([0.0, 2.0]), np.array([[1.0, -0.5], [-0.5, 3.0]]))
    # tr A = 3, tr B = 4, tr AB = 2 - 0.5 - 0.5 + 3 = 4, det A = 1, det B = 2.75, |Δμ|² = 5
    assert frechet_distance(a, b) == pytest.approx(5 + 3 + 4 - 2 * np.sqrt(4 + 2 * np.sqrt(2.75)))


def test_samples_of_two_gaussians_come_near_their_distance():
    rng = np.random.default_rng(3)
    a, b = random_gaussian(0), random_gaussian(1)
    drawn = [fit_gaussian(rng.multivariate_normal(one.mean, one.covariance, 20_000)) for one in (a, b)]
    assert frechet_distance(*drawn) == pytest.approx(frechet_distance(a, b), rel=0.03)


def test_the_weight_of_shrinkage_is_that_of_the_paper():
    """Chen et al. 2010, eq. 23, by hand: S = diag(2, ½), p = 2, n = 16: tr S² = 4.25, tr² S = 6.25, ρ = 6.25 / 18."""
    rows = np.tile([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]], (4, 1))
    weight = 6.25 / (16 * (4.25 - 6.25 / 2))
    expected = np.diag([2 * (1 - weight) + 1.25 * weight, 0.5 * (1 - weight) + 1.25 * weight])
    np.testing.assert_allclose(fit_gaussian(rows).covariance, expected)


def test_shrinkage_is_invertible_with_few_samples_and_vanishes_with_many():
    rng = np.random.default_rng(0)
    scales = np.array([5.0, 2.0, 1.0, 0.5, 0.1])
    few = rng.normal(size=(4, 5)) * scales
    assert np.linalg.matrix_rank(fit_gaussian(few, shrink=False).covariance) == 3
    assert np.linalg.eigvalsh(fit_gaussian(few).covariance).min() > 0
    many = rng.normal(size=(20_000, 5)) * scales
    assert fit_gaussian(many).covariance == pytest.approx(np.cov(many.T), abs=0.02)


def test_shrinkage_lessens_the_bias_of_few_samples():
    rng = np.random.default_rng(2)
    draw = lambda: rng.normal(size=(12, 24))  # noqa: E731
    shrunk = [frechet_distance(fit_gaussian(draw()), fit_gaussian(draw())) for _ in range(20)]
    raw = [frechet_distance(fit_gaussian(draw(), shrink=False), fit_gaussian(draw(), shrink=False)) for _ in range(20)]
    assert np.mean(shrunk) < 0.5 * np.mean(raw)  # the truth is 0


@pytest.mark.parametrize("features", [np.zeros((1, 3)), np.zeros(4), np.array([[1.0, np.nan], [0.0, 1.0]])])
def test_features_that_make_no_gaussian_are_refused(features):
    with pytest.raises(InputError, match="finite"):
        fit_gaussian(features)


def test_different_numbers_of_features_are_refused():
    with pytest.raises(InputError, match="one feature network"):
        frechet_distance(random_gaussian(0, 3), random_gaussian(0, 4))


def test_slices_are_upright_and_spread():
    volume = torch.zeros(6, 4, 8)
    volume[5] = 1.0  # the top slice
    volume[:, 0] = 0.5
    coronal = slices_of(volume, "coronal", 4, 8)
    assert coronal.shape == (4, 1, 8, 8)
    assert coronal[2, 0, 0].min() == 1.0  # superior is the first row
    assert coronal[2, 0, -1].max() == 0.0
    axial = slices_of(volume, "axial", 3, 4)
    assert axial.shape == (3, 1, 4, 4)
    assert axial[2, 0, -1].min() == 1.0  # slices 1, 3, 5
    assert len(slices_of(volume, "sagittal", 99, 8)) == 8
    with pytest.raises(InputError, match="plane"):
        slices_of(volume, "oblique", 1, 4)


def moments(slices):
    """A stand-in for a network: a few numbers of each slice."""
    flat = slices.flatten(1)
    return torch.stack([flat.mean(1), flat.std(1), slices[..., :8, :].mean((1, 2, 3))], 1)


@pytest.fixture(scope="module")
def volumes():
    """Bodies of random size with a dense ball at the top, HU."""
    rng = np.random.default_rng(0)
    d, h, w = np.indices((16, 24, 24)) - np.array([7.5, 11.5, 11.5])[:, None, None, None]
    cohort = []
    for _ in range(12):
        body = (h / rng.uniform(6, 8)) ** 2 + (w / rng.uniform(8, 11)) ** 2 < 1
        ball = (d - 4) ** 2 + h**2 + w**2 < rng.uniform(2, 4) ** 2
        cohort.append(np.where(ball, 600.0, np.where(body, 40.0, -1000.0)).astype(np.float32))
    return cohort


def test_blur_and_wrong_intensities_are_further_than_other_patients(volumes):
    real, others = volumes[:6], volumes[6:]
    features = features_of_slices(moments, WINDOW, slices=4, size=24)
    near = frechet_25d(real, others, features)
    darker = [hu - 150 for hu in others]
    far = frechet_25d(real, darker, features)
    same = frechet_25d(real, real, features)
    assert same["frechet"] == pytest.approx(0.0, abs=1e-9)
    assert far["frechet"] > 3 * near["frechet"]
    parts = [far[f"frechet_{plane}"] for plane in ("axial", "coronal", "sagittal")]
    assert far["frechet"] == pytest.approx(np.mean(parts))


def test_features_of_a_codec_see_what_it_codes(volumes):
    torch.manual_seed(0)
    encode = torch.nn.Conv3d(1, 3, 4, stride=4)
    features = pooled_code(encode)
    assert features(torch.zeros(2, 1, 16, 24, 24)).shape == (2, 48)
    near = frechet_3d(volumes[:6], volumes[6:], features, WINDOW)
    far = frechet_3d(volumes[:6], [hu[::-1].copy() for hu in volumes[6:]], features, WINDOW)
    assert far > near > 0


def test_an_empty_set_is_refused(volumes):
    with pytest.raises(InputError, match="no volumes"):
        frechet_25d([], volumes, features_of_slices(moments, WINDOW))
    with pytest.raises(InputError, match="no volumes"):
        frechet_3d(volumes, [], pooled_code(torch.nn.Conv3d(1, 2, 4, stride=4)), WINDOW)


def test_features_from_a_torchscript_file(tmp_path, volumes):
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3, stride=2), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    torch.jit.trace(network, torch.zeros(2, 1, 24, 24)).save(str(tmp_path / "net.pt"))
    loaded = load_torchscript(tmp_path / "net.pt")
    slices = slices_of(WINDOW.to_unit(torch.from_numpy(volumes[0])), "axial", 3, 24)
    assert torch.equal(loaded(slices), network(slices))
    features = features_of_slices(loaded, WINDOW, slices=2, size=24)
    assert frechet_25d(volumes[:4], volumes[4:8], features)["frechet"] > 0


def test_features_from_an_installed_package(tmp_path, monkeypatch, volumes):
    (tmp_path / "slice_features.py").write_text(
        "import torch\n"
        "class Means(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        assert not self.training\n"
        "        return torch.stack([x.mean((1, 2, 3)), x.std((1, 2, 3))], 1)\n"
        "def with_argument(size):\n"
        "    return Means()\n"
        "def nothing():\n"
        "    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    name, network = load_features("slice_features:Means")
    assert name == "slice_features:Means"
    found = features_of_slices(network, WINDOW, slices=2, size=24)(volumes[0])
    assert {plane: rows.shape for plane, rows in found.items()} == dict.fromkeys(PLANES, (2, 2))
    for given_name, reason in {
        "no_such_package:Means": "No module named 'no_such_package'",
        "slice_features:Medians": "has no Medians",
        "slice_features:with_argument": "without arguments",
        "slice_features:nothing": "int, a network is needed",
    }.items():
        with pytest.raises(ConfigurationError, match=reason):
            load_features(given_name)
    with pytest.raises(InputError, match=r"none\.pt: not there"):
        load_features(str(tmp_path / "none.pt"))


def test_slices_of_a_feature_map_are_pooled_plane_by_plane():
    features = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5)
    found = planes_of_map(features)
    assert {plane: rows.shape for plane, rows in found.items()} == {
        "axial": (3, 4),
        "coronal": (4, 4),
        "sagittal": (5, 4),
    }
    means, maxima = found["sagittal"][:, :2], found["sagittal"][:, 2:]
    np.testing.assert_allclose(means, features.mean((1, 2)).T)
    np.testing.assert_allclose(maxima, features.amax((1, 2)).T)
    np.testing.assert_allclose(found["axial"][1], [*features[:, 1].mean((1, 2)), *features[:, 1].amax((1, 2))])


def test_t38_a_feature_file_that_is_no_torchscript_is_refused_and_never_unpickled(tmp_path):
    with pytest.raises(InputError, match="not there"):
        load_torchscript(tmp_path / "none.pt")
    (tmp_path / "bad.pt").write_bytes(b"no network")
    with pytest.raises(InputError, match=r"bad\.pt: no TorchScript"):
        load_torchscript(tmp_path / "bad.pt")
    torch.save({"weights": torch.zeros(2), "canary": Canary(tmp_path / "sung")}, tmp_path / "state.pt")
    with pytest.raises(InputError, match=r"state\.pt: no TorchScript"):
        load_torchscript(tmp_path / "state.pt")
    assert not (tmp_path / "sung").exists()
