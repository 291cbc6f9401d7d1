"""DICOM radiographs: grey pipeline, orientation, and what is refused."""

from __future__ import annotations

import logging
import struct

import numpy as np
import pytest

from dataset.xray import load_xray, view_of
from dataset.xray_decode import decode_xray
from errors import InputError
from tests.dataset.xray_factory import (
    EIGHT_BIT_STEP,
    assert_same,
    eight_bit,
    luts,
    radiograph,
    save_dicom,
    save_picture,
)
from tests.helpers import REAL_DATA

REAL = REAL_DATA / "xray"
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason="the real radiographs of ../shared/data are not here")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The tensor of the 16-bit PNG."""
    path = save_picture(tmp_path_factory.mktemp("reference") / "a.png", "I;16")
    return load_xray(path, 96).image


@pytest.mark.parametrize("bits", [10, 12, 15, 16])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_t35_dicom_monochrome_1_and_2_are_the_same_tensor(photometric, bits, tmp_path, reference):
    pixels = radiograph() >> (16 - bits)
    if photometric == "MONOCHROME1":
        pixels = (2**bits - 1 - pixels).astype(np.uint16)
    path = save_dicom(tmp_path / "a.dcm", pixels, photometric=photometric, bits=bits)
    assert_same(path, reference, EIGHT_BIT_STEP if bits == 10 else 0.003)


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.90"])
def test_t35_compressed_dicom_is_the_same_tensor(syntax, tmp_path, reference):
    """RLE and JPEG 2000 lossless; lossy JPEG 2000 and JPEG-LS are among the real ones."""
    assert_same(save_dicom(tmp_path / "a.dcm", syntax=syntax), reference, 1e-6)


def test_t35_dicom_in_colour_and_with_rescale_is_the_same_tensor(tmp_path, reference):
    rgb = np.repeat(eight_bit()[..., None], 3, axis=2)
    path = save_dicom(tmp_path / "a.dcm", rgb, photometric="RGB", bits=8, SamplesPerPixel=3, PlanarConfiguration=0)
    assert_same(path, reference)
    assert_same(save_dicom(tmp_path / "b.dcm", bits=12, RescaleSlope="0.25", RescaleIntercept="-100"), reference, 0.003)


def test_t35_a_window_shows_what_it_says(tmp_path):
    """A window is applied as the standard has it: what is beyond is black or white."""
    path = save_dicom(tmp_path / "a.dcm", bits=12, WindowCenter="2000", WindowWidth="1000")
    stored = (radiograph() >> 4).astype(np.float64)
    expected = np.clip((stored - 1999.5) / 999 + 0.5, 0, 1)
    shown = decode_xray(path).pixels
    np.testing.assert_allclose((shown - shown.min()) / np.ptp(shown), expected, atol=1e-3)
    # the window comes before the inversion
    inverted = save_dicom(
        tmp_path / "b.dcm", photometric="MONOCHROME1", bits=12, WindowCenter="2000", WindowWidth="1000"
    )
    shown = decode_xray(inverted).pixels
    np.testing.assert_allclose((shown - shown.min()) / np.ptp(shown), 1 - expected, atol=1e-3)


def test_t35_a_window_over_everything_changes_nothing(tmp_path, reference):
    assert_same(save_dicom(tmp_path / "a.dcm", bits=12, WindowCenter="2048", WindowWidth="4096"), reference, 0.003)


def test_t35_voi_and_modality_luts_are_applied(tmp_path, reference):
    inverse = (4095 - np.arange(4096)) * 16
    stored = (4095 - (radiograph() >> 4)).astype(np.uint16)
    assert_same(save_dicom(tmp_path / "a.dcm", stored, bits=12, **luts("VOI", inverse)), reference, 0.003)
    assert_same(save_dicom(tmp_path / "b.dcm", stored, bits=12, **luts("Modality", inverse)), reference, 0.003)


def test_t35_an_unusable_window_is_ignored_and_said_so(tmp_path, reference, caplog):
    with caplog.at_level(logging.WARNING):
        for centre, width in (("2000", "0"), ("-9000", "10")):
            path = save_dicom(tmp_path / "a.dcm", bits=12, WindowCenter=centre, WindowWidth=width)
            assert_same(path, reference, 0.003)
    assert caplog.text.count("is ignored") == 2
    assert any("ignored" in note for note in load_xray(path).notes)


@pytest.mark.parametrize("position", ["PA", "AP", ""])
@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        (["L", "F"], lambda a: a), (["R", "F"], lambda a: a[:, ::-1]), (["L", "H"], lambda a: a[::-1]),
        (["R", "H"], lambda a: a[::-1, ::-1]), (["F", "L"], lambda a: a.T), (["H", "L"], lambda a: a[::-1].T),
        (["F", "R"], lambda a: a[:, ::-1].T), (["LF", "FR"], lambda a: a),
    ],
)  # fmt: skip
def test_t36_frontal_dicom_is_turned_upright(orientation, stored, position, tmp_path, reference):
    pixels = np.ascontiguousarray(stored(radiograph()))
    told = {"PatientOrientation": orientation, "ViewPosition": position}
    assert_same(save_dicom(tmp_path / "a.dcm", pixels, **told), reference, 1e-6)
    decoded = decode_xray(save_dicom(tmp_path / "b.dcm", pixels, **told, ImagerPixelSpacing=[0.2, 0.3]))
    assert decoded.view == "frontal"
    assert decoded.pixel_spacing_mm == ((0.3, 0.2) if orientation[0] in "HF" else (0.2, 0.3))


def test_pixels_that_are_not_square_keep_their_millimetres(tmp_path):
    """Every second row, twice as high: the chest must not become half as tall."""
    pixels = radiograph()
    even = pixels[: len(pixels) // 2 * 2]
    square = load_xray(save_dicom(tmp_path / "a.dcm", even, ImagerPixelSpacing=[0.2, 0.2]), 64)
    flat = even.reshape(-1, 2, even.shape[1]).mean(axis=1).astype(even.dtype)
    high = load_xray(save_dicom(tmp_path / "b.dcm", flat, ImagerPixelSpacing=[0.4, 0.2]), 64)
    assert float((high.image - square.image).abs().mean()) < 0.02
    assert high.pixel_spacing_mm == pytest.approx(square.pixel_spacing_mm, rel=0.05)


@pytest.mark.parametrize("position", ["LL", "RL", "LATERAL", ""])
@pytest.mark.parametrize(("orientation", "mirrored"), [(["P", "F"], False), (["A", "F"], True)])
def test_t36_lateral_dicom_has_the_chest_on_the_left(orientation, mirrored, position, tmp_path, reference):
    pixels = np.ascontiguousarray(radiograph()[:, ::-1] if mirrored else radiograph())
    path = save_dicom(tmp_path / "a.dcm", pixels, PatientOrientation=orientation, ViewPosition=position)
    assert_same(path, reference, 1e-6)
    assert load_xray(path).view == "lateral"


def test_t36_a_lateral_view_is_refused_where_a_frontal_one_is_needed(tmp_path):
    path = save_dicom(tmp_path / "a.dcm", ViewPosition="LL", PatientOrientation=["P", "F"])
    with pytest.raises(InputError, match=r"a\.dcm: a lateral radiograph, a frontal one is needed"):
        load_xray(path, view="frontal")
    assert load_xray(save_dicom(tmp_path / "b.dcm"), view="frontal").view == "frontal"


def test_t36_contradictions_are_refused(tmp_path):
    for position, orientation in (("PA", ["P", "F"]), ("LL", ["L", "F"]), ("PA", ["L", "P"])):
        path = save_dicom(tmp_path / "a.dcm", ViewPosition=position, PatientOrientation=orientation)
        with pytest.raises(InputError, match="disagree"):
            load_xray(path)


@pytest.mark.parametrize("position", ["LAO", "RAO", "lpo", "RLO"])
def test_t36_obliques_are_refused_by_name(position, tmp_path):
    for orientation in (["L", "F"], None):
        path = save_dicom(tmp_path / "a.dcm", ViewPosition=position, PatientOrientation=orientation)
        for read in (load_xray, view_of):
            with pytest.raises(InputError, match=rf"a\.dcm: an oblique radiograph \({position.upper()}\)"):
                read(path)


def test_dicom_without_orientation_is_taken_as_shown(tmp_path, reference):
    path = save_dicom(tmp_path / "a.dcm", PatientOrientation=None, ViewPosition=None)
    assert_same(path, reference, 1e-6)
    assert load_xray(path).view == "unknown"


def test_pixel_spacing_follows_the_scaling(tmp_path):
    path = save_dicom(tmp_path / "a.dcm", PixelSpacing=[0.4, 0.4], ImagerPixelSpacing=[0.44, 0.44])
    xray = load_xray(path, 110)
    row, column = xray.placement.scale
    assert row == pytest.approx(2, rel=0.02)
    assert xray.pixel_spacing_mm == pytest.approx((0.44 * row, 0.44 * column))
    assert load_xray(save_dicom(tmp_path / "b.dcm", PixelSpacing=[0, 0])).pixel_spacing_mm is None


def test_t37_dicom_that_is_no_radiograph_is_refused(tmp_path):
    for elements, word in (
        ({"Modality": "CT"}, "modality CT"),
        ({"NumberOfFrames": 3}, "3 frames"),
        ({"PixelData": None}, "no pixels"),
        ({"Rows": 60000, "Columns": 60000}, "60000×60000"),
        ({"Rows": 440}, "."),
        ({"PhotometricInterpretation": "NONSENSE"}, "."),
    ):
        with pytest.raises(InputError, match=rf"a\.dcm: .*{word}"):
            load_xray(save_dicom(tmp_path / "a.dcm", **elements))


def test_a_codestream_larger_than_announced_is_refused(tmp_path):
    path = save_dicom(tmp_path / "a.dcm", syntax="1.2.840.10008.1.2.4.90")
    data = bytearray(path.read_bytes())
    at = data.find(b"\xff\x4f\xff\x51") + 8
    data[at : at + 8] = struct.pack(">II", 50000, 50000)
    path.write_bytes(data)
    with pytest.raises(InputError, match="50000 rows and 50000 columns, 220 and 180 announced"):
        load_xray(path)


def test_t45_no_identity_leaves_a_dicom(tmp_path, caplog):
    with caplog.at_level(logging.DEBUG):
        xray = load_xray(save_dicom(tmp_path / "a.dcm", bits=12, WindowCenter="9", WindowWidth="0"))
        said = [repr(xray), caplog.text]
        for elements in ({"Modality": "CT"}, {"Rows": 7777}, {"PatientOrientation": ["P", "F"]}):
            with pytest.raises(InputError) as error:
                load_xray(save_dicom(tmp_path / "b.dcm", **elements))
            said.append(str(error.value))
    for word in ("anary", "CANARY", "1940", "4711"):
        assert word not in "".join(said)


@needs_real_data
def test_a_real_monochrome_1_radiograph_is_the_same_in_two_compressions():
    jpeg2000, jpeg_ls = (load_xray(REAL / "dicom" / name, 256) for name in ("RG1_J2KI.dcm", "RG1_JLSN"))
    assert jpeg2000.view == jpeg_ls.view == "frontal"
    assert jpeg2000.pixel_spacing_mm is None  # the file says 0.000
    assert float((jpeg2000.image - jpeg_ls.image).abs().mean()) < 0.005
    assert float(jpeg2000.image[0, 200:, 60:100].mean()) > float(jpeg2000.image[0, 40:70, 60:100].mean())
