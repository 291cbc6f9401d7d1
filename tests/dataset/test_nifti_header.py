"""Every lie of a NIfTI file is refused in one line, quickly and in bounded memory (T24–T27)."""

import gzip
import json
import os
import subprocess
import sys
import zlib

import nibabel as nib
import numpy as np
import pytest

from dataset.volume_io import read_header, read_nifti
from errors import InputError

AFFINE = np.array([[-0.7, 0, 0, 90], [0, -0.7, 0, 120], [0, 0, 2.5, -300], [0, 0, 0, 1.0]], dtype=np.float32)


def small_hu(shape=(4, 5, 6)):
    return np.random.default_rng(0).integers(-1024, 3000, shape).astype(np.int16)


def nifti_bytes(array=None, affine=AFFINE, kind=nib.Nifti1Image, slope=None, intercept=0.0, **fields):
    """A file as nibabel writes it, with raw header fields changed afterwards."""
    image = kind(small_hu() if array is None else array, affine)
    data = bytearray(image.to_bytes())
    header = kind.header_class(bytes(data[: kind.header_class.sizeof_hdr]), check=False)
    if slope is not None:
        fields |= {"scl_slope": slope, "scl_inter": intercept}
    for name, value in fields.items():
        header[name] = value
    data[: len(header.binaryblock)] = header.binaryblock
    return bytes(data)


def stored(path, data):
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


BAD_HEADERS = {
    "lying header": {"dim": [3, 400, 400, 400, 1, 1, 1, 1]},
    "claims terabytes": {"dim": [3, 32767, 32767, 32767, 1, 1, 1, 1]},
    "claims 900 million": {"dim": [3, 1000, 1000, 900, 1, 1, 1, 1]},
    "claims less than it holds": {"dim": [3, 2, 5, 2, 1, 1, 1, 1]},
    "zero dims": {"dim": [3, 4, 0, 6, 1, 1, 1, 1]},
    "negative dims": {"dim": [3, 4, -5, 6, 1, 1, 1, 1]},
    "2D": {"dim": [2, 4, 30, 1, 1, 1, 1, 1]},
    "4D": {"dim": [4, 4, 5, 3, 2, 1, 1, 1]},
    "no dims": {"dim": [0, 4, 5, 6, 1, 1, 1, 1]},
    "nine dims": {"dim": [9, 4, 5, 6, 1, 1, 1, 1]},
    "NaN slope": {"scl_slope": np.nan},
    "infinite intercept": {"scl_slope": 1, "scl_inter": np.inf},
    "overflowing slope": {"scl_slope": 3e38, "datatype": 16, "dim": [3, 2, 5, 6, 1, 1, 1, 1]},
    "NaN affine": {"srow_x": np.nan},
    "singular affine": {"srow_z": 0},
    "parallel affine": {"srow_x": [1, 0, 0, 0], "srow_y": [2, 0, 0, 0]},
    "huge spacing": {"srow_x": [1e20, 0, 0, 0]},
    "no orientation": {"sform_code": 0, "qform_code": 0},
    "bad quaternion": {"sform_code": 0, "qform_code": 1, "quatern_b": 30.0},
    "NaN quaternion": {"sform_code": 0, "qform_code": 1, "quatern_b": np.nan},
    "complex data": {"datatype": 32},
    "RGB data": {"datatype": 128},
    "unknown data": {"datatype": 4242},
    "no magic": {"magic": b"abc"},
    "a pair": {"magic": b"ni1"},
    "offset inside the header": {"vox_offset": 100},
    "NaN offset": {"vox_offset": np.nan},
    "offset behind the end": {"vox_offset": 1e9},
    "fractional offset": {"vox_offset": 352.5},
}


def bad_files(folder):
    """Every named bad file, of both kinds, written to ``folder``."""
    good = nifti_bytes()
    holed = np.zeros((4, 5, 6), np.float32)
    holed[1, 2, 3] = np.nan
    contents = {name: nifti_bytes(**fields) for name, fields in BAD_HEADERS.items() if "less" not in name}
    contents |= {
        # needs a remainder that is longer than padding can be
        "claims less than it holds": nifti_bytes(np.zeros((40, 40, 4), np.int16), dim=[3, 40, 40, 1, 1, 1, 1, 1]),
        "NaN voxels": nifti_bytes(holed),
        "infinite voxels": nifti_bytes(holed - np.inf),
        "truncated": good[:-1],
        "only a header": good[:352],
        "half a header": good[:200],
        "empty": b"",
        "not NIfTI": b"\x89PNG\r\n" * 200,
        "text": b"slice,hu\n1,2\n" * 100,
    }
    paths = []
    paths = [
        stored(folder / f"{name.replace(' ', '_')}.{ending}", data)
        for name, data in contents.items()
        for ending in ("nii", "nii.gz")
    ]
    packed = gzip.compress(good)
    noisy = gzip.compress(nifti_bytes(small_hu((40, 40, 40))))
    middle = len(noisy) // 2
    raw_gzip = {
        "truncated_gzip": packed[: len(packed) // 2],
        "no_trailer": packed[:-8],
        "bad_crc": packed[:-8] + bytes([packed[-8] ^ 1]) + packed[-7:],
        "bad_length": packed[:-4] + b"\1\2\3\4",
        "flipped_byte": noisy[:middle] + bytes([noisy[middle] ^ 0x10]) + noisy[middle + 1 :],
        "garbage_behind": packed + b"garbage" * 10,
        "gzip_header_only": packed[:10],
        "gzip_magic_only": b"\x1f\x8b",
        "bomb_behind": zipped_zeros(good, 2**30),
        "honest_bomb": zipped_zeros(nifti_bytes(dim=[3, 1000, 1000, 1000, 1, 1, 1, 1])[:352], 2 * 10**9),
    }
    for name, data in raw_gzip.items():
        (folder / f"{name}.nii.gz").write_bytes(data)
        paths.append(folder / f"{name}.nii.gz")
    (folder / "folder.nii").mkdir()
    os.mkfifo(folder / "pipe.nii")
    return [*paths, folder / "folder.nii", folder / "pipe.nii", folder / "missing.nii.gz"]


def zipped_zeros(front, count):
    """``front`` and then ``count`` zero bytes in gzip; one compressed MiB repeated, so that it is quick to make."""
    block = bytes(2**20)
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    parts = [compressor.compress(front + block), compressor.flush(zlib.Z_FULL_FLUSH)]
    # after a full flush the block compresses to the same bytes each time; the CRC at the end is never reached
    once = compressor.compress(block) + compressor.flush(zlib.Z_FULL_FLUSH)
    return b"".join(parts) + once * (count // len(block)) + b"\0" * 8


READ_ALL = """
import json, sys, time
from vq_gan_3d.memory import peak_rss_bytes
from dataset.volume_io import read_nifti
from errors import InputError
peak = lambda: peak_rss_bytes() / 2**20
rows = []
for path in json.load(sys.stdin):
    before, began = peak(), time.process_time()
    try:
        read_nifti(path)
        outcome = "read"
    except InputError as error:
        outcome = str(error)
    except BaseException as error:
        outcome = repr(error)
    rows.append([path, outcome, time.process_time() - began, peak() - before])
print(json.dumps(rows))
"""


def test_t24_t25_t26_t27_bad_files_are_refused_quickly_in_bounded_memory(tmp_path):
    paths = bad_files(tmp_path)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", READ_ALL],
        input=json.dumps(list(map(str, paths))),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == len(paths) > 80
    for path, outcome, seconds, megabytes in rows:
        assert outcome.startswith(path + ": "), outcome
        assert "\n" not in outcome
        assert outcome.count(path) == 1
        assert seconds < 1, (path, seconds)
        assert megabytes < 64, (path, megabytes)


def test_t44_mutated_files_raise_nothing_but_input_errors(tmp_path):
    good = nifti_bytes()
    packed = gzip.compress(good)
    random = np.random.default_rng(0)
    read, messages = 0, []
    for case in range(600):
        data = bytearray(packed if case % 3 == 0 else good)
        for _ in range(random.integers(1, 4)):
            data[random.integers(0, min(len(data), 352))] = random.integers(0, 256)
        path = tmp_path / "mutated.nii"
        path.write_bytes(data)
        try:
            volume = read_nifti(path)
            assert np.isfinite(volume.affine).all()
            read += 1
        except InputError as error:
            messages.append(str(error))
    assert read > 0
    assert read + len(messages) == 600
    assert all(message.startswith(f"{path}: ") and "\n" not in message for message in messages)


def test_t24_read_header_refuses_too(tmp_path):
    path = stored(tmp_path / "lying.nii.gz", nifti_bytes(dim=[3, 4000, 4000, 60, 1, 1, 1, 1]))
    with pytest.raises(InputError, match=r"lying.nii.gz: the header claims"):
        read_header(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a @ np.diag([1, 1, 2, 1]), r"voxels of \[0\.7, 0\.7, 2\.5\] and \[0\.7, 0\.7, 5\.0\]"),
        (lambda a: a @ np.diag([1.02, 1, 1, 1]), "0.714"),
        (lambda a: np.diag([-1, 1, 1, 1]) @ a, "turned by 180°"),
        (lambda a: np.array([[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ a, "turned by 90°"),
    ],
    ids=["spacing", "2 percent", "mirrored", "turned"],
)
def test_t26_a_sform_and_a_qform_that_disagree_are_refused(tmp_path, change, words):
    image = nib.Nifti1Image(small_hu(), AFFINE)
    image.set_qform(change(AFFINE), 1)
    image.header.set_sform(AFFINE, 1)
    path = stored(tmp_path / "ct.nii.gz", image.to_bytes())
    with pytest.raises(InputError, match=rf"ct\.nii\.gz: sform and qform disagree.*{words}"):
        read_nifti(path)
    image.header["qform_code"] = 0  # then it says nothing
    np.testing.assert_array_equal(read_nifti(stored(path, image.to_bytes())).hu, small_hu().T)


@pytest.mark.parametrize("shift_mm", [(0, 0, 1000), (0.8, 0, 0), (0, -0.8, 0)])
def test_t26_a_sform_and_a_qform_at_other_places_are_refused(tmp_path, shift_mm):
    elsewhere = AFFINE.copy()
    elsewhere[:3, 3] += shift_mm
    image = nib.Nifti1Image(small_hu(), AFFINE)
    image.set_qform(elsewhere, 1)
    image.header.set_sform(AFFINE, 1)
    path = stored(tmp_path / "ct.nii.gz", image.to_bytes())
    with pytest.raises(InputError, match=r"ct\.nii\.gz: sform and qform disagree \(corners up to (400\.0|1\.1) voxels"):
        read_header(path)
    image.set_qform(AFFINE + (elsewhere - AFFINE) / 1000, 1)  # rounding
    image.header.set_sform(AFFINE, 1)
    assert read_header(stored(path, image.to_bytes())).shape_dhw == (6, 5, 4)


def test_t26_a_sform_and_a_qform_are_compared_at_every_corner(tmp_path):
    image = nib.Nifti1Image(small_hu((300, 4, 4)), AFFINE)
    image.set_qform(AFFINE @ np.diag([1.005, 1, 1, 1]), 1)  # as voxels the same, 1.5 of them apart at the far end
    image.header.set_sform(AFFINE, 1)
    with pytest.raises(InputError, match=r"corners up to 1\.5 voxels apart"):
        read_header(stored(tmp_path / "ct.nii.gz", image.to_bytes()))


@pytest.mark.parametrize(("scale", "unit"), [(0.3, 1), (1, 3), (0.01, 2), (100, 2)])
def test_t26_a_spacing_of_no_ct_is_refused(tmp_path, scale, unit):
    """The first: numbers in mm that say they are metres, which made voxels of 0.2 m."""
    affine = AFFINE @ np.diag([scale, scale, scale, 1])
    path = stored(tmp_path / "ct.nii.gz", nifti_bytes(affine=affine, xyzt_units=unit))
    with pytest.raises(InputError, match=r"ct\.nii\.gz: voxel spacing .* mm is no CT's: check the affine and its unit"):
        read_header(path)


def test_a_sform_and_a_qform_may_differ_by_rounding(tmp_path):
    image = nib.Nifti1Image(small_hu(), AFFINE)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.005), -np.sin(0.005)], [np.sin(0.005), np.cos(0.005)]]
    image.set_qform(turn @ AFFINE @ np.diag([1.004, 1, 1, 1]), 1)
    image.header.set_sform(AFFINE, 1)
    np.testing.assert_allclose(read_header(stored(tmp_path / "ct.nii", image.to_bytes())).spacing_mm, (2.5, 0.7, 0.7))


def test_the_limit_of_voxels_can_be_set(tmp_path):
    path = stored(tmp_path / "ct.nii.gz", nifti_bytes())
    with pytest.raises(InputError, match="at most 100"):
        read_nifti(path, max_voxels=100)
    assert read_nifti(path, max_voxels=120).hu.size == 120
