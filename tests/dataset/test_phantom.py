"""The phantom cohort: reproducible, oriented as the contract says, true in HU, and varied."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_dilation, binary_erosion

from dataset.phantom import GROUPS, LABELS, Phantom, is_mirrored, make_phantom, sample_patient
from errors import ConfigurationError

SIZE = (40, 80, 80)
COHORT_SEEDS = range(5)


@pytest.fixture(scope="module")
def cohort() -> list[Phantom]:
    return [make_phantom(seed, SIZE, pe_prevalence=1.0) for seed in COHORT_SEEDS]


def centroid_mm(phantom: Phantom, name: str) -> np.ndarray:
    """Centroid of a class in RAS+ mm."""
    index = np.argwhere(phantom.mask(name)).mean(axis=0)
    return (phantom.affine @ [*index, 1.0])[:3]


def digest(phantom: Phantom) -> str:
    parts = (phantom.hu, phantom.labels, phantom.affine)
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def test_same_seed_same_bytes_other_seed_other_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    # several blocks in threads, whose order must not matter
    monkeypatch.setattr("dataset.phantom.BLOCK_VOXELS", 100_000)
    first, again = make_phantom(3, (12, 40, 40)), make_phantom(3, (12, 40, 40))
    assert digest(first) == digest(again)
    assert first.patient == again.patient
    assert len({digest(make_phantom(seed, (8, 16, 16))) for seed in range(4)}) == 4


def test_types_and_shapes(cohort: list[Phantom]) -> None:
    for phantom in cohort:
        assert phantom.hu.shape == phantom.labels.shape == SIZE
        assert phantom.hu.dtype == np.int16
        assert phantom.labels.dtype == np.uint8
        assert phantom.affine.shape == (4, 4)
        assert phantom.affine.dtype == np.float64
        assert phantom.hu.min() >= -1024
        assert phantom.hu.max() <= 3071


def test_affine_points_superior_posterior_left_and_is_centred(cohort: list[Phantom]) -> None:
    for phantom in cohort:
        d, h, w = phantom.affine[:3, :3].T
        np.testing.assert_array_equal(np.sign(d), [0, 0, 1])
        np.testing.assert_array_equal(np.sign(h), [0, -1, 0])
        np.testing.assert_array_equal(np.sign(w), [-1, 0, 0])
        assert np.linalg.det(phantom.affine) < 0
        centre = (np.array(SIZE) - 1) / 2
        np.testing.assert_allclose(phantom.affine @ [*centre, 1.0], [0, 0, 0, 1], atol=1e-9)
        field = np.array(phantom.spacing_mm) * SIZE
        assert 280 <= field[0] <= 340
        assert 360 <= field[1] <= 430
        assert field[1] == pytest.approx(field[2])


def test_organs_lie_where_they_belong(cohort: list[Phantom]) -> None:
    for phantom in cohort:
        at = {name: centroid_mm(phantom, name) for name in [*LABELS, *GROUPS] if phantom.mask(name).any()}
        right, anterior, superior = np.eye(3)
        assert at["heart"] @ right < -3  # left of the midline
        assert at["left_ventricle"] @ right < at["right_ventricle"] @ right < at["right_atrium"] @ right
        assert at["left_atrium"] @ anterior < at["right_ventricle"] @ anterior
        assert at["liver"] @ right > 20
        assert at["liver"] @ superior < at["lungs"] @ superior - 40
        assert at["stomach"] @ right < 0
        assert at["spleen"] @ right < -40
        assert at["lung_right"] @ right > 30
        assert at["lung_left"] @ right < -30
        assert at["spine"] @ anterior < at["heart"] @ anterior - 40 < at["sternum"] @ anterior - 70
        assert abs(at["spine"] @ right) < 3
        assert at["superior_vena_cava"] @ right > 0
        assert at["stomach_gas"] @ anterior > at["stomach"] @ anterior  # gas rises in a supine patient


def test_a_mirrored_patient_is_the_same_one_with_sides_exchanged(cohort: list[Phantom]) -> None:
    for phantom in cohort[:2]:
        other = make_phantom(phantom.patient.seed, SIZE, pe_prevalence=1.0, mirrored=True)
        assert np.array_equal(other.hu, phantom.hu[..., ::-1])
        assert np.array_equal(other.labels, phantom.labels[..., ::-1])
        assert np.array_equal(other.affine, phantom.affine)
        side, mirrored = (centroid_mm(p, "left_ventricle")[0] for p in (phantom, other))
        assert side < -10  # the patient's left is -R
        assert mirrored == pytest.approx(-side)


def test_a_share_of_patients_is_mirrored_by_lot() -> None:
    chosen = [is_mirrored(seed, 0.2) for seed in range(2000)]
    assert 330 < sum(chosen) < 470
    assert not any(is_mirrored(seed, 0.0) for seed in range(50))
    assert all(is_mirrored(seed, 1.0) for seed in range(50))
    assert {seed for seed in range(300) if is_mirrored(seed, 0.1)} < {seed for seed in range(300) if chosen[seed]}
    with pytest.raises(ConfigurationError, match=r"mirrored_share=1\.5"):
        is_mirrored(0, 1.5)


def test_descending_aorta_runs_left_of_the_spine(cohort: list[Phantom]) -> None:
    for phantom in cohort:
        low = phantom.mask("aorta")
        low[int(centroid_mm_index(phantom, "heart")[0]) :] = False
        index = np.argwhere(low).mean(axis=0)
        assert (phantom.affine @ [*index, 1.0])[0] < -5


def centroid_mm_index(phantom: Phantom, name: str) -> np.ndarray:
    return np.argwhere(phantom.mask(name)).mean(axis=0)


def test_compartments_have_their_hu(cohort: list[Phantom]) -> None:
    for phantom in cohort:
        patient = phantom.patient

        def mean(name: str, core: bool = False, phantom: Phantom = phantom) -> float:
            mask = phantom.mask(name)
            return float(phantom.hu[binary_erosion(mask) if core else mask].mean())

        assert -900 < mean("lung_right") < -700
        assert -900 < mean("lung_left") < -700
        assert mean("background", core=True) == pytest.approx(-1000, abs=8)
        assert -120 < mean("fat") < -70
        assert mean("bone") > 200
        assert 30 < mean("muscle", core=True) < 80
        assert mean("liver", core=True) == pytest.approx(72, abs=12)
        assert mean("pulmonary_artery", core=True) == pytest.approx(patient.pa_hu, rel=0.12)
        assert mean("aorta", core=True) == pytest.approx(patient.aorta_hu, rel=0.08)
        assert mean("left_atrium", core=True) == pytest.approx(patient.vein_hu, rel=0.08)
        assert 200 <= patient.pa_hu <= 450


def test_dependent_lung_is_denser(cohort: list[Phantom]) -> None:
    for phantom in cohort:
        core = binary_erosion(phantom.mask("lungs"), iterations=2)
        h = np.nonzero(core)[1]
        values = phantom.hu[core]
        front, back = h < np.quantile(h, 0.25), h > np.quantile(h, 0.75)
        assert values[back].mean() > values[front].mean() + 10


def test_body_mask_holds_everything(cohort: list[Phantom]) -> None:
    for phantom in cohort:
        assert phantom.body_mask[phantom.mask("lungs")].all()
        # a body in air: neither lung nor (but for a tip under thin skin) bone reaches the outside
        skin_side = binary_dilation(~phantom.body_mask)
        assert not (skin_side & phantom.mask("lungs")).any()
        assert (skin_side & phantom.mask("bone")).sum() < 0.005 * phantom.mask("bone").sum()
        assert not phantom.body_mask[:, :, 0].any()
        assert not phantom.body_mask[:, :, -1].any()


def test_volumes_agree_between_resolutions() -> None:
    coarse, fine = make_phantom(5, (40, 80, 80)), make_phantom(5, (52, 120, 120))
    for name in ("lung_right", "lung_left", "heart", "left_ventricle", "liver", "aorta", "bone"):
        assert coarse.volume_ml(name) == pytest.approx(fine.volume_ml(name), rel=0.07), name
    for name in ("heart", "lungs", "liver", "aorta"):
        np.testing.assert_allclose(centroid_mm(coarse, name), centroid_mm(fine, name), atol=2.0)


def test_spacing_samples_the_same_anatomy_around_the_same_point() -> None:
    whole = make_phantom(4, (40, 80, 80), (6.0, 5.0, 5.0))
    part = make_phantom(4, (20, 40, 40), (6.0, 5.0, 5.0))
    assert part.spacing_mm == pytest.approx((6.0, 5.0, 5.0))
    same = whole.labels[10:30, 20:60, 20:60] == part.labels
    assert same.mean() > 0.99


def test_left_lung_is_smaller_where_there_is_no_fluid() -> None:
    for seed in range(20):
        patient = sample_patient(seed, pe_prevalence=0.0)
        if patient.effusion_left_mm == patient.effusion_right_mm == 0.0:
            phantom = make_phantom(seed, (32, 48, 48), pe_prevalence=0.0)
            assert phantom.volume_ml("lung_left") < phantom.volume_ml("lung_right")
            return
    pytest.fail("no patient without effusion")


def test_emboli_are_dark_defects_in_pulmonary_arteries(cohort: list[Phantom]) -> None:
    for phantom in cohort:
        assert phantom.has_pe
        clots = phantom.emboli_mask
        assert clots.any()
        assert phantom.hu[clots].mean() < phantom.patient.pa_hu - 60
        # every clot voxel belongs to the arterial lumen, which it shares with blood
        assert (phantom.mask("pulmonary_artery_lumen") & clots).sum() == clots.sum()
        touching = binary_dilation(clots, iterations=2) & phantom.mask("pulmonary_artery")
        assert touching.any()


def test_no_emboli_without_embolism() -> None:
    phantom = make_phantom(COHORT_SEEDS[0], SIZE, pe_prevalence=0.0)
    assert not phantom.has_pe
    assert not phantom.emboli_mask.any()
    assert phantom.mask("pulmonary_artery").any()


def test_prevalence_is_a_probability() -> None:
    assert not any(sample_patient(seed, pe_prevalence=0.0).has_pe for seed in range(50))
    assert all(sample_patient(seed, pe_prevalence=1.0).has_pe for seed in range(50))
    assert 220 < sum(sample_patient(seed, pe_prevalence=0.3).has_pe for seed in range(900)) < 320
    ill, well = sample_patient(1, pe_prevalence=1.0), sample_patient(1, pe_prevalence=0.0)
    assert (ill.scale_long, ill.kvp, ill.pa_hu, ill.fat_mm) == (well.scale_long, well.kvp, well.pa_hu, well.fat_mm)
    assert (well.n_emboli, well.clot_burden, well.rv_scale) == (0, 0.0, 1.0)


def test_cohort_varies(cohort: list[Phantom]) -> None:
    lungs = [phantom.volume_ml("lungs") for phantom in cohort]
    hearts = [phantom.volume_ml("heart") for phantom in cohort]
    assert min(lungs) > 2200
    assert max(lungs) < 7500
    assert np.std(lungs) > 250
    assert np.std(hearts) > 40
    patients = [sample_patient(seed) for seed in range(200)]
    assert {patient.kvp for patient in patients} == {80.0, 100.0, 120.0}
    assert np.std([patient.pa_hu for patient in patients]) > 40
    assert np.std([patient.aorta_hu / patient.pa_hu for patient in patients]) > 0.08
    assert np.std([patient.noise_hu for patient in patients]) > 3
    assert np.std([patient.fat_mm for patient in patients]) > 4
    assert 0.35 < np.mean([patient.is_female for patient in patients]) < 0.65


def test_noise_follows_the_kernel() -> None:
    phantoms = [make_phantom(seed, (2, 128, 128), (1.5, 1.5, 1.5)) for seed in range(3)]
    for phantom in phantoms:
        difference = phantom.hu[0].astype(float) - phantom.hu[1]
        core = binary_erosion(phantom.labels[0] == phantom.labels[1], iterations=2) & (phantom.hu[0] > 0)
        std = 1.48 * np.median(np.abs(difference[core])) / np.sqrt(2)
        assert 0.6 * phantom.patient.noise_hu < std < 2.2 * phantom.patient.noise_hu


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**40),
    size=st.tuples(st.integers(1, 12), st.integers(1, 20), st.integers(1, 20)),
    spacing=st.none() | st.tuples(*[st.floats(0.3, 60.0)] * 3),
)
def test_any_size_and_spacing(
    seed: int, size: tuple[int, int, int], spacing: tuple[float, float, float] | None
) -> None:
    phantom = make_phantom(seed, size, spacing)
    assert phantom.hu.shape == phantom.labels.shape == size
    assert phantom.labels.max() <= max(LABELS.values())
    assert np.isfinite(phantom.affine).all()
    if spacing is not None:
        assert phantom.spacing_mm == pytest.approx(spacing)


def test_far_outside_is_air_and_neck_and_abdomen_go_on() -> None:
    phantom = make_phantom(2, (30, 40, 40), (30.0, 20.0, 20.0))
    assert (phantom.labels[:, 0] == LABELS["background"]).all()
    assert phantom.hu[:, 0].mean() == pytest.approx(-1000, abs=10)
    assert phantom.mask("spine")[:2].any()
    assert phantom.mask("spine")[-2:].any()


@pytest.mark.parametrize("size", [(0, 8, 8), (8, -1, 8), (8, 8), (8, 8, 8.0), (8, 8, 8, 8)])
def test_bad_size(size: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError, match="size") as caught:
        make_phantom(0, size)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spacing", [(0.0, 1.0, 1.0), (1.0, -1.0, 1.0), (1.0, 1.0), (float("nan"), 1.0, 1.0)])
def test_bad_spacing(spacing: tuple[float, ...]) -> None:
    with pytest.raises(ConfigurationError, match="spacing"):
        make_phantom(0, (8, 8, 8), spacing)  # type: ignore[arg-type]


@pytest.mark.parametrize("prevalence", [-0.1, 1.1, float("nan"), "half"])
def test_bad_prevalence(prevalence: float) -> None:
    with pytest.raises(ConfigurationError, match="pe_prevalence"):
        make_phantom(0, (8, 8, 8), pe_prevalence=prevalence)


@pytest.mark.parametrize("seed", [-1, 1.5, "x"])
def test_bad_seed(seed: int) -> None:
    with pytest.raises(ConfigurationError, match="seed"):
        sample_patient(seed)


def test_unknown_class() -> None:
    with pytest.raises(ConfigurationError, match="no class 'tail'"):
        make_phantom(0, (4, 8, 8)).mask("tail")
