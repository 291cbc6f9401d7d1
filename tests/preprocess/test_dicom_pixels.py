from __future__ import annotations

import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.pixels.decoders import JPEGLSLosslessDecoder
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian

from dataset.volume_io import HU_FLOOR
from errors import InputError
from preprocess import dicom_pixels
from preprocess.dicom_header import NotDicomError, NotImageError, read_header
from preprocess.dicom_pixels import read_stored
from preprocess.dicom_rules import has_contrast
from preprocess.dicom_series import read_series
from tests.helpers import REAL_DATA
from tests.preprocess.dicom_factory import (
    compressed,
    datasets,
    enhanced,
    frames_of,
    random_volume,
    series,
    set_stored,
    stored_of,
    write,
)

REAL = REAL_DATA / "dicom"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data/dicom")


def hu_of(paths: list[Path]) -> np.ndarray:
    return read_series(frames_of(paths)).volume.hu


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_every_uncompressed_syntax_gives_the_same_volume(tmp_path: Path, syntax: str) -> None:
    volume = random_volume()

    def change(dataset: Dataset, index: int) -> None:
        dataset.file_meta.TransferSyntaxUID = syntax
        if syntax == ExplicitVRBigEndian:
            set_stored(dataset, stored_of(dataset), ">u2")

    np.testing.assert_array_equal(hu_of(series(tmp_path, volume, change)), volume.hu)


def test_rle_gives_the_same_volume(tmp_path: Path) -> None:
    volume = random_volume()
    np.testing.assert_array_equal(hu_of(write(tmp_path, map(compressed, datasets(volume)))), volume.hu)


@pytest.mark.parametrize("shuffle", [False, True])
def test_enhanced_multi_frame_gives_the_same_volume(tmp_path: Path, shuffle: bool) -> None:
    volume = random_volume()
    result = read_series(frames_of(write(tmp_path, [enhanced(volume, shuffle=shuffle)]))).volume
    np.testing.assert_array_equal(result.hu, volume.hu)
    np.testing.assert_allclose(result.affine, volume.affine, atol=1e-9)


@pytest.mark.parametrize(("agents", "expected"), [(["Iopamidol"], True), ([""], True), ([], None), (None, None)])
def test_enhanced_objects_name_contrast_in_a_sequence(
    tmp_path: Path, agents: list[str] | None, expected: bool | None
) -> None:
    dataset = enhanced(random_volume())
    if agents is not None:
        items = []
        for meaning in agents:
            items.append(Dataset())
            items[-1].CodeMeaning = meaning
        dataset.ContrastBolusAgentSequence = items
    assert has_contrast(frames_of(write(tmp_path, [dataset]))[0]) is expected


def test_overlay_bits_above_the_stored_ones_are_no_pixels(tmp_path: Path) -> None:
    volume = random_volume()

    def change(dataset: Dataset, index: int) -> None:
        dataset.BitsStored, dataset.HighBit = 12, 11
        set_stored(dataset, stored_of(dataset) | 0x4000)

    np.testing.assert_array_equal(hu_of(series(tmp_path, volume, change)), volume.hu)


def test_signed_twelve_bit_pixels_keep_their_sign(tmp_path: Path) -> None:
    volume = random_volume()
    volume.hu[:] = np.clip(volume.hu, -1024, 1000)

    def change(dataset: Dataset, index: int) -> None:
        dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 12, 11, 1
        dataset.RescaleIntercept = "0"
        set_stored(dataset, volume.hu[index].astype(np.int32) & 0x0FFF)

    np.testing.assert_array_equal(hu_of(series(tmp_path, volume, change)), volume.hu)


def test_t20_the_slope_of_every_slice_is_its_own(tmp_path: Path) -> None:
    volume = random_volume()
    volume.hu[:] &= ~7  # divisible by every slope below

    def change(dataset: Dataset, index: int) -> None:
        slope = (1, 2, 0.5)[index % 3]
        dataset.RescaleSlope = str(slope)
        set_stored(dataset, (volume.hu[index] + 1024) / slope)

    result = read_series(frames_of(series(tmp_path, volume, change)))
    np.testing.assert_array_equal(result.volume.hu, volume.hu)
    assert result.counts.rounded == 0


@pytest.mark.parametrize("intercept", [0, -1024, -33792, -40000])  # of uint16 pixels, int16 for 0
def test_t20_any_whole_intercept_gives_the_same_volume(tmp_path: Path, intercept: int) -> None:
    volume = random_volume()
    volume.hu[0, 0, 0], volume.hu[1, 0, 0] = -1024, 25535  # 65535 with an intercept of -40000

    def change(dataset: Dataset, index: int) -> None:
        dataset.RescaleIntercept, dataset.PixelRepresentation = str(intercept), int(intercept == 0)
        set_stored(dataset, volume.hu[index].astype(np.int32) - intercept)
        if index == 2 and intercept < -32768:
            set_stored(dataset, np.where(volume.hu[2] < 0, 0, volume.hu[2].astype(np.int32) - intercept))

    if intercept < -32768:  # stored 0 is beyond int16: by the wide way, and to the floor
        volume.hu[2][volume.hu[2] < 0] = HU_FLOOR
    np.testing.assert_array_equal(hu_of(series(tmp_path, volume, change)), volume.hu)


@pytest.mark.parametrize("keyword", ["RescaleSlope", "RescaleIntercept"])
def test_t20_absent_rescale_is_refused(tmp_path: Path, keyword: str) -> None:
    paths = series(tmp_path, random_volume(), lambda dataset, index: delattr(dataset, keyword) if index == 3 else None)
    with pytest.raises(InputError, match=r"IM0003\.dcm: has no rescale slope and intercept"):
        read_series(frames_of(paths))


def test_t20_lost_intercept_is_noticed_by_the_absence_of_air(tmp_path: Path) -> None:
    paths = series(tmp_path, random_volume(), lambda dataset, index: setattr(dataset, "RescaleIntercept", "0"))
    with pytest.raises(InputError, match="there is no air"):
        read_series(frames_of(paths))


def test_t20_an_intercept_that_was_applied_twice_is_noticed_by_the_absence_of_soft_tissue(tmp_path: Path) -> None:
    volume = random_volume()
    volume.hu[:] = np.where(volume.hu < 500, -1000, 40)  # air and soft tissue
    volume.hu[0, 0, :2] = 1100  # dense bone, which lands where soft tissue should be

    def change(dataset: Dataset, index: int) -> None:
        dataset.PixelRepresentation = 1
        set_stored(dataset, volume.hu[index], "<i2")  # HU already, and the intercept is still -1024

    with pytest.raises(InputError, match=r"IM0000\.dcm: .*no soft tissue"):
        read_series(frames_of(series(tmp_path / "twice", volume, change)))
    np.testing.assert_array_equal(hu_of(series(tmp_path / "once", volume)), volume.hu)


@pytest.mark.parametrize("declared", [True, False])
def test_t21_padding_minus_2000_goes_to_the_floor_and_is_counted(tmp_path: Path, declared: bool) -> None:
    volume = random_volume()

    def change(dataset: Dataset, index: int) -> None:
        dataset.PixelRepresentation = 1
        stored = stored_of(dataset).astype(np.int16)
        stored[:2] = -2000
        set_stored(dataset, stored, "<i2")
        if declared:
            dataset.PixelPaddingValue = -2000

    result = read_series(frames_of(series(tmp_path, volume, change)))
    assert (result.volume.hu[:, :2] == HU_FLOOR).all()
    np.testing.assert_array_equal(result.volume.hu[:, 2:], volume.hu[:, 2:])
    assert result.counts.padded == 6 * 2 * 8


def test_t21_padding_value_within_tissue_counts_only_at_the_border(tmp_path: Path) -> None:
    volume = random_volume()
    volume.hu[volume.hu == 0] = 1
    volume.hu[:, 0] = 0  # padding, at the border
    volume.hu[:, 5, 4] = 0  # water

    result = read_series(
        frames_of(series(tmp_path, volume, lambda dataset, index: setattr(dataset, "PixelPaddingValue", 1024)))
    )
    assert (result.volume.hu[:, 0] == HU_FLOOR).all()
    assert (result.volume.hu[:, 5, 4] == 0).all()
    assert (result.counts.padded, result.counts.tissue_padding) == (6 * 8, 6)


def test_t22_truncated_pixels_are_refused(tmp_path: Path) -> None:
    paths = series(tmp_path, random_volume())
    paths[-1].write_bytes(paths[-1].read_bytes()[:-7])
    with pytest.raises(InputError, match=r"IM0005\.dcm: the pixels are truncated, 153 of 160 bytes"):
        read_series(frames_of(paths))


def test_t22_truncated_header_is_refused(tmp_path: Path) -> None:
    (path,) = write(tmp_path, datasets(random_volume())[:1])
    whole = path.read_bytes()
    for cut in range(133, len(whole) - 180, 37):
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError, match="IM0000"):
            read_header(path)


def test_t22_truncated_rle_is_refused(tmp_path: Path) -> None:
    slices = [compressed(dataset) for dataset in datasets(random_volume())]
    slices[2].PixelData = slices[2].PixelData[:110] + slices[2].PixelData[-8:]
    with pytest.raises(InputError, match=r"IM0002\.dcm: .*(truncated|damaged)"):
        hu_of(write(tmp_path, slices))


@needs_real
@pytest.mark.parametrize("name", ["CT1_J2KR", "CT1_JLSL", "CT1_JLSN", "CT1_JPLL", "CT1_RLE", "CT2_J2KI"])
def test_real_compressed_slices_decode_as_pydicom_does(name: str) -> None:
    path = REAL / "transfer_syntaxes" / name
    np.testing.assert_array_equal(read_stored(read_header(path)[0]), dcmread(path).pixel_array)


@needs_real
@pytest.mark.parametrize("name", ["CT1_J2KR", "CT1_JLSL", "CT1_JPLL", "CT1_RLE"])
def test_t22_truncated_compressed_pixels_are_refused(tmp_path: Path, name: str) -> None:
    dataset = dcmread(REAL / "transfer_syntaxes" / name)
    value = dataset.PixelData
    dataset.PixelData = value[: len(value) // 2 // 2 * 2]
    # a writer that closes the fragment properly: only the code stream itself is short
    length = len(dataset.PixelData) - 16
    dataset.PixelData = dataset.PixelData[:12] + length.to_bytes(4, "little") + dataset.PixelData[16:]
    dataset.PixelData += b"\xfe\xff\xdd\xe0\0\0\0\0"
    (path,) = write(tmp_path, [dataset])
    with pytest.raises(InputError, match=r"(?i)IM0000.*(truncated|damaged)"):
        read_stored(read_header(path)[0])


@needs_real
def test_t22_compressed_picture_of_another_size_is_refused_before_decoding(tmp_path: Path) -> None:
    dataset = dcmread(REAL / "transfer_syntaxes" / "CT1_JPLL")
    start = dataset.PixelData.index(b"\xff\xc3")
    bomb = bytearray(dataset.PixelData)
    bomb[start + 5 : start + 9] = b"\xff\xff\xff\xff"  # 65535 × 65535
    dataset.PixelData = bytes(bomb)
    (path,) = write(tmp_path, [dataset])
    with pytest.raises(InputError, match="65535, 65535"):
        read_stored(read_header(path)[0])


@needs_real
def test_t22_missing_decoder_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(JPEGLSLosslessDecoder), "is_available", property(lambda decoder: False))
    frame = read_header(REAL / "transfer_syntaxes" / "CT1_JLSL")[0]
    with pytest.raises(InputError, match=r"no decoder for JPEG-LS Lossless.*`pip install pylibjpeg pylibjpeg-libjpeg`"):
        read_stored(frame)


def test_t22_unknown_syntax_is_named(tmp_path: Path) -> None:
    dataset = compressed(datasets(random_volume())[0])
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"  # MPEG2
    (path,) = write(tmp_path, [dataset])
    with pytest.raises(InputError, match=r"MPEG2.* is not supported"):
        read_stored(read_header(path)[0])


def test_t23_foreign_files_are_told_from_dicom(tmp_path: Path) -> None:
    for name, content in {"notes.txt": b"hello", "empty": b"", "IM0001": b"DICM" + bytes(200)}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(NotDicomError):
            read_header(tmp_path / name)
    report = datasets(random_volume())[0]
    del report.PixelData
    report.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"  # structured report
    (path,) = write(tmp_path, [report])
    with pytest.raises(NotImageError):
        read_header(path)


def test_t23_deflate_bomb_is_refused_in_bounded_memory(tmp_path: Path) -> None:
    dataset = datasets(random_volume())[0]
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    (path,) = write(tmp_path, [dataset])
    content = path.read_bytes()
    start = 132 + 12 + int.from_bytes(content[140:144], "little")
    engine = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = b"".join([*(engine.compress(bytes(1 << 20)) for _ in range(300)), engine.flush()])
    path.write_bytes(content[:start] + bomb)
    tracemalloc.start()
    with pytest.raises(InputError, match="deflate bomb"):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6


def test_header_that_claims_a_huge_image_is_refused(tmp_path: Path) -> None:
    dataset = datasets(random_volume())[0]
    dataset.Rows = dataset.Columns = 65535
    (path,) = write(tmp_path, [dataset])
    with pytest.raises(InputError, match="65535×65535"):
        read_header(path)


def test_pixels_are_never_read_for_a_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = series(tmp_path, random_volume())
    monkeypatch.setattr(dicom_pixels, "_native", None)
    assert len(frames_of(paths)) == 6
