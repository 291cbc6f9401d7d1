"""Any radiograph file to the same tensor, or one line that says why not."""

from __future__ import annotations

import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.memory import PeakMemory
from dataset.xray import load_xray
from dataset.xray_decode import MAX_PIXELS, decode_xray
from errors import ConfigurationError, InputError
from tests.dataset.xray_factory import assert_same, eight_bit, radiograph, save_dicom, save_picture
from tests.helpers import REAL_DATA, ROOT, environment

REAL = REAL_DATA / "xray"
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason="the real radiographs of ../shared/data are not here")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The tensor of the 16-bit PNG."""
    path = save_picture(tmp_path_factory.mktemp("reference") / "a.png", "I;16")
    return load_xray(path, 96).image


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P"])
def test_t35_png_of_any_mode_is_the_same_tensor(mode, tmp_path, reference):
    assert_same(save_picture(tmp_path / "a.png", mode), reference)


@pytest.mark.parametrize(("mode", "tolerance"), [("L", 0.06), ("RGB", 0.06), ("CMYK", 0.06)])
def test_t35_jpeg_of_any_mode_is_the_same_tensor(mode, tolerance, tmp_path, reference):
    path = save_picture(tmp_path / "a.jpg", mode, quality=98, subsampling=0)
    assert Image.open(path).mode == mode
    assert_same(path, reference, tolerance)


def test_t35_sixteen_bits_are_not_clipped(tmp_path):
    """Pillow's convert("L") makes everything above 255 white."""
    decoded = decode_xray(save_picture(tmp_path / "a.png", "I;16"))
    np.testing.assert_array_equal(decoded.pixels, radiograph().astype(np.float32))


def test_t35_twelve_bits_in_sixteen_are_the_same_tensor(tmp_path, reference):
    Image.fromarray(radiograph() >> 4).save(tmp_path / "a.png")
    assert_same(tmp_path / "a.png", reference, 0.002)


def test_t35_one_bit_is_read_as_black_and_white(tmp_path):
    image = load_xray(save_picture(tmp_path / "a.png", "1"), 220).image
    assert len(torch.unique((image > 0.5).float())) == 2


def test_t35_transparency_is_laid_over_black(tmp_path):
    alpha = np.full(eight_bit().shape, 255, np.uint8)
    alpha[:20] = 0
    Image.merge("LA", [Image.fromarray(eight_bit()), Image.fromarray(alpha)]).save(tmp_path / "a.png")
    pixels = decode_xray(tmp_path / "a.png").pixels
    assert (pixels[:20] == 0).all()
    np.testing.assert_array_equal(pixels[20:], eight_bit()[20:])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_t35_exif_rotation_is_undone(orientation, suffix, tmp_path, reference):
    # how a camera that was held that way stores the upright picture
    inverse = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.T, 6: lambda a: np.rot90(a), 7: lambda a: a[::-1, ::-1].T, 8: lambda a: np.rot90(a, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(inverse(eight_bit())))
    stored.save(tmp_path / f"a.{suffix}", exif=exif, **({"quality": 98} if suffix == "jpg" else {}))
    assert_same(tmp_path / f"a.{suffix}", reference, 0.06)


def test_t37_constant_tiny_and_foreign_files_are_refused(tmp_path):
    cases = {
        "constant.png": (np.full((200, 200), 7, np.uint8), "constant"),
        "almost.png": (np.pad(np.full((1, 1), 255, np.uint8), 99), "constant"),
        "tiny.png": (np.zeros((1, 1), np.uint8), "1×1"),
        "strip.png": (np.arange(2000, dtype=np.uint16)[None].repeat(8, 0), "2000×8"),
    }
    for name, (pixels, word) in cases.items():
        Image.fromarray(pixels).save(tmp_path / name)
        with pytest.raises(InputError, match=rf"{name}: .*{word}"):
            load_xray(tmp_path / name)
    with pytest.raises(InputError, match="constant"):
        load_xray(save_dicom(tmp_path / "a.dcm", np.full((64, 64), 99, np.uint16)))
    (tmp_path / "text.png").write_text("not a picture, but long enough to be looked at " * 9)
    with pytest.raises(InputError, match="neither PNG"):
        load_xray(tmp_path / "text.png")
    (tmp_path / "empty.png").touch()
    with pytest.raises(InputError, match="empty"):
        load_xray(tmp_path / "empty.png")
    for path, word in ((tmp_path / "gone.png", "No such file"), (tmp_path, "not a file")):
        with pytest.raises(InputError, match=word):
            load_xray(path)
    Image.fromarray(eight_bit()).save(tmp_path / "a.bmp")
    with pytest.raises(InputError, match="neither PNG"):
        load_xray(tmp_path / "a.bmp")


def png_bomb(path, side):
    """A PNG of some kB that is ``side`` × ``side`` zeros."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(bytes(side + 1)) for _ in range(min(side, 4000))) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b""))
    return path


MEASURED = """
import sys, time
from vq_gan_3d.memory import peak_rss_bytes
from dataset.{module} import {function}
from errors import InputError
for path in sys.argv[1:]:
    before, start = peak_rss_bytes(), time.process_time()
    try:
        {function}(path); verdict = "read"
    except InputError as error:
        verdict = "refused: " + str(error)
    seconds, grown = time.process_time() - start, peak_rss_bytes() - before
    print(seconds, grown / 2**20, verdict, sep="|")
"""


def measured(module, function, *paths):
    """(seconds, MB grown, verdict) of each file, read in a process of its own."""
    code = MEASURED.format(module=module, function=function)
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, paths)], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    rows = [line.split("|", 2) for line in result.stdout.splitlines()]
    return [(float(seconds), float(megabytes), verdict) for seconds, megabytes, verdict in rows]


def test_t37_a_png_bomb_costs_nothing(tmp_path):
    bombs = [png_bomb(tmp_path / f"bomb_{side}.png", side) for side in (60000, 4900)]
    for path, (seconds, megabytes, verdict) in zip(bombs, measured("xray_decode", "decode_xray", *bombs), strict=True):
        assert path.stat().st_size < 400_000
        assert verdict.startswith("refused: ")
        assert path.name in verdict
        assert seconds < 2
        assert megabytes < 500


@pytest.mark.slow
def test_t37_the_largest_picture_that_is_read_stays_in_bounds(tmp_path):
    side = int(MAX_PIXELS**0.5)
    big = Image.fromarray(eight_bit()).convert("RGBA").resize((side, side), Image.Resampling.NEAREST)
    big.save(tmp_path / "big.png", compress_level=1)
    [(_, megabytes, verdict)] = measured("xray", "load_xray", tmp_path / "big.png")
    assert verdict == "read"
    assert megabytes < 500


def test_t44_damaged_files_give_one_line_each(tmp_path):
    """Seeded mutations of every kind of file: read or refused, quickly and without growing."""
    samples = {
        "a.png": save_picture(tmp_path / "a.png", "I;16").read_bytes(),
        "p.png": save_picture(tmp_path / "p.png", "P").read_bytes(),
        "a.jpg": save_picture(tmp_path / "a.jpg", "CMYK").read_bytes(),
        "a.dcm": save_dicom(tmp_path / "a.dcm", bits=12, WindowCenter="2048", WindowWidth="4096").read_bytes(),
        "j.dcm": save_dicom(tmp_path / "j.dcm", syntax="1.2.840.10008.1.2.4.90").read_bytes(),
        "r.dcm": save_dicom(tmp_path / "r.dcm", syntax="1.2.840.10008.1.2.5").read_bytes(),
    }
    rng = np.random.default_rng(0)
    lines = []
    with PeakMemory() as memory:
        for name, data in samples.items():
            for number in range(45):
                mutated = bytearray(data)
                if number % 3 == 0:
                    mutated = mutated[: rng.integers(1, len(data))]
                else:
                    # headers are where the harm is
                    end = len(data) if number % 3 == 1 else min(len(data), 1200)
                    for at in rng.integers(0, end, rng.integers(1, 12)):
                        mutated[at] = rng.integers(0, 256)
                (tmp_path / name).write_bytes(mutated)
                start = time.monotonic()
                try:
                    load_xray(tmp_path / name, 32)
                except InputError as error:
                    lines.append((name, str(error)))
                assert time.monotonic() - start < 2
    assert len(lines) > 80
    assert [line for name, line in lines if name not in line or "\n" in line] == []
    assert memory.bytes < 500e6


def test_bad_sizes_are_a_configuration_error(tmp_path):
    for size in (0, 5000):
        with pytest.raises(ConfigurationError, match=str(size)):
            load_xray(save_picture(tmp_path / "a.png", "L"), size)


@needs_real_data
def test_real_radiographs_are_read_upright():
    files = sorted((REAL / "frontal").glob("*.png"))
    assert len(files) == 33
    images = {path.name: load_xray(path, 128).image[0] for path in files}
    # the heart and the abdomen below it are brighter than the upper lungs
    for name, image in images.items():
        assert image[88:106, 44:84].mean() > image[40:70, 30:50].mean() + 0.1, name
    # the heart lies to the patient's left: the lower chest is brighter right of the middle than left of it
    sides = [float(image[60:84, 66:90].mean() - image[60:84, 38:62].mean()) for image in images.values()]
    assert np.mean(np.array(sides) > 0) > 0.65  # mirrored: less than 0.35
