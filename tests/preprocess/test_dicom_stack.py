from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from dataset.phantom import affine_of
from dataset.phantom_dicom import SeriesTags
from dataset.volume_io import HU_FLOOR, Volume
from errors import InputError
from preprocess.dicom_series import read_series
from preprocess.dicom_stack import THINNED
from tests.preprocess.dicom_factory import TAGS, datasets, frames_of, random_volume, series, write


def shifted(dataset: Dataset, axis: int, by_mm: float) -> None:
    position = [float(value) for value in dataset.ImagePositionPatient]
    position[axis] += by_mm
    dataset.ImagePositionPatient = [f"{value:.6g}" for value in position]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.tuples(*[st.integers(2, 6)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 5.0)] * 3),
    angles=st.tuples(*[st.floats(-0.4, 0.4)] * 3),
    seed=st.integers(0, 2**16),
)
def test_any_oblique_grid_comes_back_voxel_for_voxel(
    tmp_path: Path,
    size: tuple[int, int, int],
    spacing: tuple[float, float, float],
    angles: tuple[float, float, float],
    seed: int,
) -> None:
    affine = affine_of(size, spacing)
    for axis, angle in enumerate(angles):
        turn = np.eye(4)
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn[i, i] = turn[j, j] = math.cos(angle)
        turn[i, j], turn[j, i] = -math.sin(angle), math.sin(angle)
        affine = turn @ affine
    hu = np.random.default_rng(seed).integers(-1024, 3000, size).astype(np.int16)
    hu[0, 0, 0], hu[0, 0, 1] = -1000, 40  # air and soft tissue, without which it is no CT
    folder = tmp_path / f"{seed}{size}{spacing[0]}"
    slices = datasets(Volume(hu, affine))
    random.Random(seed).shuffle(slices)
    result = read_series(frames_of(write(folder, slices))).volume
    np.testing.assert_array_equal(result.hu, hu)
    np.testing.assert_allclose(result.affine, affine, atol=1e-7)


def test_t20_reversed_and_shuffled_files_give_the_identical_volume(tmp_path: Path) -> None:
    volume = random_volume()
    slices = datasets(volume)
    straight = read_series(frames_of(write(tmp_path / "a", slices)))
    backwards = read_series(frames_of(write(tmp_path / "b", reversed(slices))))
    random.Random(3).shuffle(slices)
    shuffled = read_series(frames_of(write(tmp_path / "c", slices, name="x{}")))
    for other in (backwards, shuffled):
        np.testing.assert_array_equal(other.volume.hu, straight.volume.hu)
        np.testing.assert_array_equal(other.volume.affine, straight.volume.affine)
    np.testing.assert_array_equal(straight.volume.hu, volume.hu)


def test_t15_missing_middle_slice_is_refused_with_its_gap(tmp_path: Path) -> None:
    paths = series(tmp_path, random_volume((8, 10, 8)))
    frames = frames_of(paths[:4] + paths[5:])
    message = r"about 1 slices are missing where slices are 2 mm apart: a gap of 4\.0 mm between IM0003\.dcm and IM0005"
    with pytest.raises(InputError, match=message):
        read_series(frames)


def test_t15_two_holes_are_both_named(tmp_path: Path) -> None:
    paths = series(tmp_path, random_volume((12, 10, 8)))
    frames = frames_of(paths[:3] + paths[4:7] + paths[9:])
    with pytest.raises(InputError, match=r"about 3 slices .*gap of 4\.0 mm .*; a gap of 6\.0 mm"):
        read_series(frames)


def test_t16_missing_ends_are_refused_where_the_header_tells(tmp_path: Path) -> None:
    paths = series(tmp_path, random_volume(), lambda dataset, index: setattr(dataset, "ImagesInAcquisition", "6"))
    assert read_series(frames_of(paths)).stack.notes == ()
    for kept in (paths[:-1], paths[1:]):
        with pytest.raises(InputError, match=r"6 images were acquired and instances \d to \d are here: the ends"):
            read_series(frames_of(kept))
        assert "ends of the stack" in read_series(frames_of(kept), allow_partial=True).stack.notes[0]


def test_t16_missing_first_slices_are_noted_where_the_header_is_silent(tmp_path: Path) -> None:
    paths = series(tmp_path, random_volume())
    assert "instances 3 to 6" in read_series(frames_of(paths[2:])).stack.notes[0]


@pytest.mark.parametrize(("thickness_mm", "noted"), [(2.0, True), (4.0, False), (None, False)])
@pytest.mark.parametrize("backwards", [False, True])
def test_t16_every_second_slice_is_noted(
    tmp_path: Path, thickness_mm: float | None, noted: bool, backwards: bool
) -> None:
    def change(dataset: Dataset, index: int) -> None:
        dataset.SliceThickness = thickness_mm
        if backwards:
            dataset.InstanceNumber = 12 - index

    paths = series(tmp_path, random_volume((12, 10, 8)), change)  # 2 mm apart
    assert read_series(frames_of(paths)).stack.notes == ()
    notes = read_series(frames_of(paths[::2])).stack.notes
    text = f"every 2. instance is here, 4.00 mm apart at a thickness of 2 mm: {THINNED}"
    assert notes == ((text,) if noted else ())


def test_a_spacing_of_no_ct_is_refused(tmp_path: Path) -> None:
    for index, spacing_mm in enumerate([(2, 700, 700), (2, 0.7, 0.007), (60, 0.7, 0.7), (0.03, 0.7, 0.7)]):
        paths = series(tmp_path / str(index), random_volume(spacing_mm=spacing_mm))
        with pytest.raises(InputError, match=r"IM0000\.dcm:? .*which is no CT's"):
            read_series(frames_of(paths))


def test_t17_duplicates_with_the_same_pixels_are_dropped_and_counted(tmp_path: Path) -> None:
    volume = random_volume()
    slices = datasets(volume)
    result = read_series(frames_of(write(tmp_path, [*slices, slices[2], slices[4]])))
    np.testing.assert_array_equal(result.volume.hu, volume.hu)
    assert result.stack.duplicates == 2
    assert result.stack.gap_mm == pytest.approx(2.0)


def test_t17_duplicates_with_other_pixels_are_refused(tmp_path: Path) -> None:
    slices = [*datasets(random_volume()), datasets(random_volume(seed=1))[2]]
    with pytest.raises(InputError, match=r"IM0002\.dcm and IM0006\.dcm lie at the same position .*different pixels"):
        read_series(frames_of(write(tmp_path, slices)))


@pytest.mark.parametrize(
    ("keyword", "value", "reason"),
    [
        ("PatientID", "somebody else", "different patients"),
        ("PixelSpacing", ["0.75", "0.6"], r"pixel spacing \(0\.75×0\.5 and 0\.75×0\.6 mm\)"),
        ("Rows", 5, r"differ in shape \(10×8 and 5×8 pixels\)"),
        ("ImageOrientationPatient", ["1", "0", "0", "0", "0.99995", "0.01"], "differ in orientation"),
        ("FrameOfReferenceUID", "1.2.3", "different frames of reference"),
        ("SeriesInstanceUID", "1.2.3", "different series"),
    ],
)
def test_t18_mixed_series_are_refused(tmp_path: Path, keyword: str, value: object, reason: str) -> None:
    paths = series(
        tmp_path, random_volume(), lambda dataset, index: setattr(dataset, keyword, value) if index == 3 else None
    )
    with pytest.raises(InputError, match=rf"IM0000\.dcm and IM0003\.dcm .*{reason}") as caught:
        read_series(frames_of(paths))
    assert "somebody" not in str(caught.value)


def test_varying_gaps_are_refused(tmp_path: Path) -> None:
    paths = series(tmp_path, random_volume(), lambda dataset, index: shifted(dataset, 2, 0.3 * index**2))
    with pytest.raises(InputError, match="not equally spaced"):
        read_series(frames_of(paths))


def test_rounded_positions_are_no_reason_to_refuse(tmp_path: Path) -> None:
    volume = random_volume((9, 10, 8), (0.625, 0.75, 0.5))

    def change(dataset: Dataset, index: int) -> None:
        position = dataset.ImagePositionPatient
        dataset.ImagePositionPatient = [position[0], position[1], f"{float(position[2]):.1f}"]

    result = read_series(frames_of(series(tmp_path, volume, change)))
    assert result.stack.gap_mm == pytest.approx(0.625, abs=0.02)
    assert 0 < result.stack.off_grid_mm <= 0.1


def test_slice_that_jumps_in_its_plane_is_refused(tmp_path: Path) -> None:
    paths = series(tmp_path, random_volume(), lambda dataset, index: shifted(dataset, 0, 3.0) if index == 2 else None)
    with pytest.raises(InputError, match="shifted in its plane"):
        read_series(frames_of(paths))


def test_localizer_in_the_series_is_left_out(tmp_path: Path) -> None:
    volume = random_volume()
    scout = datasets(random_volume((2, 30, 30)))[0]
    scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    result = read_series(frames_of(write(tmp_path, [*datasets(volume), scout])))
    assert result.localizers == 1
    np.testing.assert_array_equal(result.volume.hu, volume.hu)


def tilted(folder: Path, shear_mm: float) -> list[Path]:
    """A block at the same place of the patient in every slice, while slices drift along the columns."""
    hu = np.full((8, 32, 20), -1000, np.int16)
    volume = Volume(hu, affine_of(hu.shape, (3.0, 0.5, 0.5)))
    for index in range(8):
        first = 14 - round(index * shear_mm / 0.5)  # the window slides over a fixed block
        hu[index, first : first + 4, 5:9] = 150
    return series(folder, volume, lambda dataset, index: shifted(dataset, 1, shear_mm * index))


def test_t19_gantry_tilt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tilted by 18\.4°, slices are shifted by 1\.00 mm each: .*--resample-tilt"):
        read_series(frames_of(tilted(tmp_path, 1.0)))


@pytest.mark.parametrize("shear_mm", [0.5, 1.0, -0.5])
def test_t19_gantry_tilt_is_resampled_on_request_and_nothing_moves_in_the_world(
    tmp_path: Path, shear_mm: float
) -> None:
    result = read_series(frames_of(tilted(tmp_path, shear_mm)), resample_tilt=True)
    affine = result.volume.affine
    block = np.argwhere(result.volume.hu == 150)
    world = block @ affine[:3, :3].T + affine[:3, 3]
    # the block was drawn at rows 14-17 of slice 0 and columns 5-8; A is -row
    start = affine_of((8, 32, 20), (3.0, 0.5, 0.5))
    expected = np.array([[d, h, w] for d in range(8) for h in range(14, 18) for w in range(5, 9)])
    expected = expected @ start[:3, :3].T + start[:3, 3]
    np.testing.assert_allclose(sorted(map(tuple, world)), sorted(map(tuple, expected)), atol=1e-6)
    gram = affine[:3, :3].T @ affine[:3, :3]
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-9)
    assert abs(result.tilt_resampled_deg) == pytest.approx(math.degrees(math.atan(abs(shear_mm) / 3.0)))
    assert set(np.unique(result.volume.hu)) <= {HU_FLOOR, -1000, 150}


def test_t19_part_of_a_pixel_of_drift_stays_in_the_affine(tmp_path: Path) -> None:
    volume = random_volume((8, 10, 8))
    paths = series(tmp_path, volume, lambda dataset, index: shifted(dataset, 1, 0.03 * index))
    result = read_series(frames_of(paths))
    np.testing.assert_array_equal(result.volume.hu, volume.hu)
    assert result.volume.affine[1, 0] == pytest.approx(-0.03, abs=1e-5)


def test_single_position_is_no_volume(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two at least"):
        read_series(frames_of(series(tmp_path, random_volume((1, 10, 8)))))


def test_two_series_of_one_patient_keep_apart(tmp_path: Path) -> None:
    one = series(tmp_path / "1", random_volume())
    two = series(tmp_path / "2", random_volume(seed=1), tags=SeriesTags(TAGS.patient, series=2))
    uids = {frame.series_uid for frame in frames_of(one + two)}
    assert len(uids) == 2
