"""NIfTI in and out: every lie of a header is refused (T24–T27), HU and geometry survive to the bit (T28–T31)."""

import gzip
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.geometry import Orientation, to_standard
from dataset.volume_io import Volume, read_header, read_nifti, to_int16_hu, write_nifti
from errors import InputError, StorageError

from .test_geometry import ALL_CODES, affines, shapes

AFFINE = np.array([[-0.7, 0, 0, 90], [0, -0.7, 0, 120], [0, 0, 2.5, -300], [0, 0, 0, 1.0]], dtype=np.float32)
REAL_CT = Path(__file__).parents[2].parent / "shared" / "data" / "fixtures" / "cip_ct64.nii.gz"


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


@pytest.fixture(params=["ct.nii", "ct.nii.gz"])
def path(request, tmp_path):
    return tmp_path / request.param


# ---------------------------------------------------------------- reading what is sound


@pytest.mark.parametrize("codes", ALL_CODES[::5], ids="".join)
def test_orientations_give_the_same_volume(codes, path):
    hu = small_hu()
    image = nib.Nifti1Image(hu, AFFINE)
    ornt = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(codes))
    nib.save(image.as_reoriented(ornt), path)
    volume = read_nifti(path)
    np.testing.assert_array_equal(volume.hu, hu.T)  # AFFINE is LPS
    assert volume.hu.dtype == np.int16
    np.testing.assert_allclose(volume.spacing_mm, (2.5, 0.7, 0.7), rtol=1e-6)
    assert volume.source == str(path)
    header = read_header(path)
    assert header.shape_dhw == volume.hu.shape
    assert header.spacing_mm == volume.spacing_mm
    np.testing.assert_array_equal(header.affine, volume.affine)

    write_nifti(path, volume)  # a result goes back onto the input's own grid
    again = nib.load(path)
    assert nib.aff2axcodes(again.affine) == codes
    np.testing.assert_array_equal(np.asanyarray(again.dataobj), np.asanyarray(image.as_reoriented(ornt).dataobj))
    np.testing.assert_allclose(again.affine, image.as_reoriented(ornt).affine, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["<i2", ">i2", "u1", "i1", "<u2", ">i4", "<f4", ">f8"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_types_byte_orders_and_versions(path, dtype, kind):
    array = (np.arange(120).reshape(4, 5, 6)).astype(dtype)
    order = ">" if dtype.startswith(">") else "<"
    image = kind(array, AFFINE, kind.header_class(endianness=order))
    image.set_data_dtype(array.dtype)
    image.header.set_sform(AFFINE, 1)
    stored(path, image.to_bytes())
    np.testing.assert_array_equal(read_nifti(path).hu, array.T)


def test_slope_and_intercept_are_applied_once(path):
    raw = np.arange(120, dtype=np.int16).reshape(4, 5, 6)
    stored(path, nifti_bytes(raw, slope=2.0, intercept=-1024.0))
    np.testing.assert_array_equal(read_nifti(path).hu, raw.T * 2 - 1024)
    stored(path, nifti_bytes(raw, slope=0.0, intercept=77.0))  # NIfTI: slope 0 means not scaled
    np.testing.assert_array_equal(read_nifti(path).hu, raw.T)


def test_reading_rounds_and_counts_clipping(path):
    array = np.zeros((2, 2, 2), np.float32)
    array.flat[:6] = [1.5, 2.5, -0.6, 40000, -40000, 32767.4]
    stored(path, nifti_bytes(array))
    volume = read_nifti(path)
    assert volume.hu.transpose(2, 1, 0).ravel().tolist() == [2, 2, -1, 32767, -32768, 32767, 0, 0]
    assert volume.clipped == 2


def test_four_dimensions_of_length_one_are_three(path):
    hu = small_hu()
    stored(path, nifti_bytes(hu[..., None]))
    np.testing.assert_array_equal(read_nifti(path).hu, hu.T)


def test_qform_serves_where_there_is_no_sform(path):
    image = nib.Nifti1Image(small_hu(), None)
    image.set_qform(AFFINE, 1)
    nib.save(image, path)
    np.testing.assert_allclose(read_nifti(path).affine[:3, 3], AFFINE[:3, 3], atol=1e-4)


def test_units_are_honoured(path):
    metres = AFFINE.copy()
    metres[:3] /= 1000
    stored(path, nifti_bytes(affine=metres, xyzt_units=1))
    np.testing.assert_allclose(read_nifti(path).spacing_mm, (2.5, 0.7, 0.7), rtol=1e-5)


def test_header_extensions_and_padding(path):
    image = nib.Nifti1Image(small_hu(), AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension(6, b"a comment" * 100))
    stored(path, image.to_bytes() + b"\0" * 100)
    np.testing.assert_array_equal(read_nifti(path).hu, small_hu().T)


# ---------------------------------------------------------------- refusing what is not

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
import json, resource, sys, time
from dataset.volume_io import read_nifti
from errors import InputError
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
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


def test_bad_files_are_refused_quickly_in_bounded_memory(tmp_path):
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


def test_mutated_files_raise_nothing_but_input_errors(tmp_path):
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


def test_read_header_refuses_too(tmp_path):
    path = stored(tmp_path / "lying.nii.gz", nifti_bytes(dim=[3, 4000, 4000, 60, 1, 1, 1, 1]))
    with pytest.raises(InputError, match=r"lying.nii.gz: the header claims"):
        read_header(path)


def test_the_limit_of_voxels_can_be_set(path):
    stored(path, nifti_bytes())
    with pytest.raises(InputError, match="at most 100"):
        read_nifti(path, max_voxels=100)
    assert read_nifti(path, max_voxels=120).hu.size == 120


# ---------------------------------------------------------------- writing


@given(shape=shapes, file_affine=affines(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_round_trip_is_exact(tmp_path_factory, shape, file_affine, data):
    path = tmp_path_factory.getbasetemp() / f"round_trip.nii{data.draw(st.sampled_from(['', '.gz']))}"
    hu = np.random.default_rng(data.draw(st.integers(0, 99))).integers(-32768, 32768, shape).astype(np.int16)
    standard, affine = to_standard(hu, file_affine)
    report = write_nifti(path, Volume(standard, affine, orientation=Orientation.of(file_affine)))
    assert (report.rounded, report.clipped) == (0, 0)
    volume = read_nifti(path)
    np.testing.assert_array_equal(volume.hu, standard)
    np.testing.assert_array_equal(volume.affine, affine)
    assert volume.hu.dtype == np.int16
    image = nib.load(path)  # and others see the same
    np.testing.assert_array_equal(np.asanyarray(image.dataobj), hu)
    np.testing.assert_array_equal(image.affine, file_affine)


def test_the_header_that_is_written(path):
    hu = small_hu((3, 4, 5))
    affine = np.array([[0, 0, -0.7, 9], [0, -0.7, 0, 12], [2.5, 0, 0, -30], [0, 0, 0, 1.0]])
    write_nifti(path, Volume(hu, affine))
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    header = nib.Nifti1Header(raw[:348], check=True)
    assert len(raw) == 352 + hu.nbytes
    assert header.get_data_dtype() == np.int16
    assert (float(header["scl_slope"]), float(header["scl_inter"])) == (1.0, 0.0)
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 1)
    assert header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(header.get_sform(), header.get_qform(), atol=1e-5)
    np.testing.assert_allclose(header.get_zooms(), (0.7, 0.7, 2.5), rtol=1e-6)
    assert nib.aff2axcodes(header.get_sform()) == ("L", "P", "S")

    before = path.read_bytes()
    write_nifti(path, Volume(hu, affine))
    assert path.read_bytes() == before  # the same volume, the same bytes

    sheared = affine.copy()
    sheared[1, 0] = 0.8  # a gantry tilt
    write_nifti(path, Volume(hu, sheared))
    assert int(nib.load(path).header["qform_code"]) == 0
    np.testing.assert_allclose(read_nifti(path).affine, sheared, atol=1e-6)


def test_writing_floats_counts_rounding_and_clipping(path):
    values = np.array([1.0, 1.5, -0.25, 1e6, -1e6, 40000.5, 0.0, 7.0], np.float32).reshape(2, 2, 2)
    report = write_nifti(path, Volume(values, np.diag([1.0, -1, -1, 1])[[2, 1, 0, 3]]))
    assert (report.rounded, report.clipped) == (3, 3)
    assert read_nifti(path).hu.ravel().tolist() == [1, 2, 0, 32767, -32768, 32767, 0, 7]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64, np.float16, np.float64])
def test_to_int16_of_every_type(dtype):
    values = np.array([0, 1, 200, 32767, 40000, 65500][: 3 if dtype == np.uint8 else 6]).astype(dtype)
    hu, rounded, clipped = to_int16_hu(values)
    assert hu.dtype == np.int16
    assert hu.tolist() == np.clip(values.astype(np.int64), -32768, 32767).tolist()
    assert rounded == 0
    assert clipped == int((values.astype(np.float64) > 32767).sum())


@pytest.mark.parametrize(
    ("volume", "reason"),
    [
        (Volume(np.full((2, 2, 2), np.nan), np.eye(4)), "NaN"),
        (Volume(np.zeros((2, 2), np.int16), np.eye(4)), "three non-empty"),
        (Volume(np.zeros((2, 2, 2), np.int16), np.zeros((4, 4))), "affine"),
        (Volume(np.zeros((2, 2, 2), complex), np.eye(4)), "dtype"),
        (Volume(np.zeros((1, 1, 40000), np.int16), np.eye(4)), "NIfTI-1"),
    ],
)
def test_what_is_no_volume_is_not_written(path, volume, reason):
    path.write_bytes(b"old")
    with pytest.raises(InputError, match=reason) as caught:
        write_nifti(path, volume)
    assert str(caught.value).startswith(str(path))
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == [path.name]


WRITE = """
import os, resource, signal, sys
import numpy as np
from dataset import volume_io
from errors import run_command
if sys.argv[2] == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
calls = 0
def killing(plane, whole=volume_io.to_int16_hu):
    global calls
    calls += 1
    if calls == 40 and sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(plane)
volume_io.to_int16_hu = killing
hu = np.random.default_rng(0).integers(-1000, 1000, (64, 100, 100)).astype(np.int16)
affine = np.diag([1.0, -1, -1, 1])[[2, 1, 0, 3]]
sys.exit(run_command(lambda: volume_io.write_nifti(sys.argv[1], volume_io.Volume(hu, affine)) and 0))
"""


@pytest.mark.parametrize(("way", "code"), [("kill", -9), ("full", 6)])
def test_a_write_cut_short_leaves_the_old_file(path, way, code):
    path.write_bytes(b"old")
    done = subprocess.run(
        [sys.executable, "-c", WRITE, str(path), way], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code, done.stderr
    assert path.read_bytes() == b"old"
    if way == "full":
        assert done.stderr.strip().splitlines() == [done.stderr.strip()]
        assert str(path) in done.stderr
        assert os.listdir(path.parent) == [path.name]


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="choose another folder"):
        write_nifti(tmp_path / "file" / "ct.nii.gz", Volume(small_hu(), np.diag([1.0, -1, -1, 1])[[2, 1, 0, 3]]))


# ---------------------------------------------------------------- a real CT


@pytest.mark.skipif(not REAL_CT.exists(), reason="shared/data is not here: no real CT to read")
def test_real_ct(tmp_path):
    volume = read_nifti(REAL_CT)
    image = nib.as_closest_canonical(nib.load(REAL_CT))  # RAS+
    np.testing.assert_array_equal(volume.hu, np.asanyarray(image.dataobj)[::-1, ::-1].transpose(2, 1, 0))
    assert volume.hu.shape == (79, 64, 64)
    assert read_header(REAL_CT).shape_dhw == volume.hu.shape
    body = volume.hu > -300
    centre_w = np.argwhere(body & (volume.hu < 300))[:, 2].mean()
    assert abs(centre_w - 31.5) < 8
    # the spine is posterior: dense bone has a larger H than the rest of the body
    bone_h, body_h = (np.argwhere(mask)[:, 1].mean() for mask in (volume.hu > 300, body))
    assert bone_h > body_h
    write_nifti(tmp_path / "again.nii.gz", volume)
    again = read_nifti(tmp_path / "again.nii.gz")
    np.testing.assert_array_equal(again.hu, volume.hu)
    np.testing.assert_array_equal(again.affine, volume.affine)
