"""The files that hold a volume: NIfTI, a DICOM series, a picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dataset.phantom import affine_of
from dataset.volume_io import read_nifti
from ddpm.ctpa_volume import CTPAVolume
from errors import ConfigurationError, InputError
from tests.inference_model import QUICK, SPACING_MM
from tests.preprocess.dicom_factory import convert
from vqgan_inference import XRay2CTPA, load_xray

pytest_plugins = ["tests.inference_api"]


def test_t30_a_saved_volume_lies_where_it_says(several: CTPAVolume, tmp_path: Path) -> None:
    files = several.save_nifti(tmp_path / "p.nii.gz")
    names = ["p.nii.gz", "p_mean.nii.gz", "p_uncertainty.nii.gz", "p_sample_2.nii.gz", "p_sample_3.nii.gz"]
    assert [path.name for path in files] == names
    expected = [several.samples[0], several.mean, several.uncertainty_hu, *several.samples[1:]]
    for path, hu in zip(files, expected, strict=True):
        volume = read_nifti(path)
        assert np.array_equal(volume.hu, np.rint(hu))
        np.testing.assert_allclose(volume.affine, several.affine, atol=1e-4)
        image = nib.load(path)
        assert image.get_data_dtype() == np.int16
        assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
    # without a CT: the training cohort's field, centred
    assert several.spacing_mm == pytest.approx(SPACING_MM)
    np.testing.assert_allclose(several.affine @ [7.5, 7.5, 7.5, 1], [0, 0, 0, 1], atol=1e-9)
    before = {path: path.read_bytes() for path in files}
    several.save_nifti(tmp_path / "p.nii.gz")
    assert before == {path: path.read_bytes() for path in files}
    with pytest.raises(ConfigurationError, match=r"ends in \.nii"):
        several.save_nifti(tmp_path / "p.dcm")


@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(st.floats(-40000, 40000, width=32), min_size=8, max_size=8),
    spacing=st.tuples(*[st.floats(0.3, 12)] * 3),
)
def test_t31_rounding_and_clipping_are_counted(
    values: list[float], spacing: tuple[float, float, float], tmp_path_factory: pytest.TempPathFactory
) -> None:
    hu = np.array(values, np.float32).reshape(1, 2, 2, 2)
    volume = CTPAVolume(hu, affine_of((2, 2, 2), spacing), {})
    path = tmp_path_factory.mktemp("t31") / "a.nii"
    ((_, report),) = volume.save_nifti(path).items()
    whole = np.rint(hu[0].astype(np.float64))
    assert report.rounded == np.count_nonzero(whole != hu[0])
    assert report.clipped == np.count_nonzero(np.abs(whole + 0.5) > 32768)
    back = read_nifti(path)
    assert np.array_equal(back.hu, np.clip(whole, -32768, 32767))
    assert back.spacing_mm == pytest.approx(spacing, rel=1e-5)


def test_a_dicom_series_reads_back_the_same_and_says_what_it_is(several: CTPAVolume, tmp_path: Path) -> None:
    paths = several.save_dicom(tmp_path / "series")
    assert len(paths) == 16
    header = pydicom.dcmread(paths[0])
    assert list(header.ImageType) == ["DERIVED", "SECONDARY", "AXIAL"]
    for name in ("SeriesDescription", "StudyDescription", "ImageComments"):
        assert header[name].value == "SYNTHETIC, not for diagnosis"
    assert (str(header.PatientName), header.PatientID, header.PatientBirthDate) == ("SYNTHETIC", "SYNTHETIC", "")
    assert "KVP" in header
    assert header.KVP is None
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in paths]
    assert len({str(h.SOPInstanceUID) for h in headers}) == 16
    assert len({(str(h.SeriesInstanceUID), str(h.StudyInstanceUID)) for h in headers}) == 1
    # SimpleITK: the same voxels at the same places
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "series")))
    image = reader.Execute()
    assert np.array_equal(SimpleITK.GetArrayFromImage(image), several.hu)
    to_ras = np.diag([-1.0, -1.0, 1.0])
    for index in ((0, 0, 0), (15, 3, 7)):
        place = to_ras @ image.TransformIndexToPhysicalPoint(index[::-1])
        np.testing.assert_allclose(place, (several.affine @ [*index, 1])[:3], atol=1e-6)


def test_preprocessing_reads_the_series(several: CTPAVolume, tmp_path: Path) -> None:
    # nobody trained this model: without soft tissue preprocessing takes no volume for a CT
    several = replace(several, samples_hu=several.samples_hu.copy())
    several.samples_hu[:, :, 4:12, 4:12] = 40.0
    several.save_dicom(tmp_path / "series")
    convert(tmp_path / "series", tmp_path / "nifti", "--min-slices", "8", "--max-thickness", "20")
    (path,) = (tmp_path / "nifti").rglob("*.nii.gz")
    volume = read_nifti(path)
    assert np.array_equal(volume.hu, several.hu)
    np.testing.assert_allclose(volume.affine, several.affine, atol=1e-4)


def test_uids_follow_from_the_result_and_series_are_not_mixed(
    model: XRay2CTPA, several: CTPAVolume, xrays: list[Path], tmp_path: Path
) -> None:
    first = [path.read_bytes() for path in several.save_dicom(tmp_path / "a")]
    assert first == [path.read_bytes() for path in several.save_dicom(tmp_path / "b")]
    other = model.generate(load_xray(xrays[0]), seed=5, **QUICK)
    with pytest.raises(InputError, match="belongs to another result"):
        other.save_dicom(tmp_path / "a")
    assert first == [path.read_bytes() for path in sorted((tmp_path / "a").iterdir())]
    uids = {str(pydicom.dcmread(folder, stop_before_pixels=True).SeriesInstanceUID)
            for folder in (other.save_dicom(tmp_path / "c")[0], tmp_path / "a/IM0001.dcm")}  # fmt: skip
    assert len(uids) == 2
    deep = CTPAVolume(np.full((1, 2, 2, 2), -1500.0, np.float32), np.eye(4), {})
    with pytest.raises(InputError, match="-1500 HU cannot be stored"):
        deep.save_dicom(tmp_path / "d")


def test_the_picture_is_upright_and_marked(tmp_path: Path) -> None:
    """Dense in the patient's left, upper, anterior part: right, up, and above in the picture's planes."""
    hu = np.full((1, 20, 20, 20), -1000.0, np.float32)
    hu[0, 10:, :11, 10:] = 1000
    CTPAVolume(hu, affine_of((20, 20, 20), (4.0, 4.0, 4.0)), {}).save_png(tmp_path / "a.png")
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    assert pixels.shape[1] == 2 * 320 + 6
    planes = pixels[30 + 21 :, :320, 0]  # below the notice and the heading
    for number, (bright, dark) in enumerate((((80, 240), (240, 80)), ((80, 240), (240, 80)), ((80, 80), (240, 240)))):
        top = number * 326
        assert planes[top + bright[0], bright[1]] > 200
        assert planes[top + dark[0], dark[1]] < 80
    assert ((pixels[:30, :, 0] > 200) & (pixels[:30, :, 2] < 120)).any()  # the notice, in red
