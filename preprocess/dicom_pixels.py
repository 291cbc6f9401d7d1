"""Stored pixels of one frame -> HU: transfer syntaxes, unused bits, modality LUT, padding.

Uncompressed frames are read at their offset; compressed ones go through pydicom's decoders, after the code stream's
own size was compared with the header's (a decoder allocates what the stream claims) and its end was found (libjpeg
returns half a picture without a word). Lossless JPEG and JPEG-LS go through SimpleITK, which is twice as fast, where
its rescaled values can be turned back exactly.

Reference: DICOM PS3.5 A.4 (encapsulation), PS3.3 C.7.5.1 (pixel padding); ISO 10918-1 and 15444-1 (markers).
"""

from __future__ import annotations

import struct
import warnings
from dataclasses import dataclass

import numpy as np
import pydicom
from pydicom.encaps import get_frame
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID

from dataset.volume_io import HU_FLOOR  # what is no image becomes this; so does anything below
from errors import InputError, one_line
from preprocess.dicom_deflated import inflated
from preprocess.dicom_elements import token
from preprocess.dicom_header import BIG_ENDIAN, DEFLATED, NATIVE, Pixels, Slice

# A padding value between these HU may be tissue or bone as well: only where it touches the border is it padding.
_TISSUE_HU = (-900.0, 3000.0)
_INT16 = np.iinfo(np.int16)
# pydicom calls a decoder of these by way of pylibjpeg, so that either package alone is not enough
_PACKAGES = {
    "1.2.840.10008.1.2.4.5": "pylibjpeg pylibjpeg-libjpeg",
    "1.2.840.10008.1.2.4.7": "pylibjpeg pylibjpeg-libjpeg",
    "1.2.840.10008.1.2.4.8": "pylibjpeg pylibjpeg-libjpeg",
    "1.2.840.10008.1.2.4.9": "pylibjpeg pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.20": "pylibjpeg pylibjpeg-openjpeg",
}
# JPEG lossless (process 14, any and first-order prediction), JPEG-LS lossless
_BY_SIMPLEITK = ("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.80")
_RLE = "1.2.840.10008.1.2.5"
# JPEG start-of-frame markers (SOF0-SOF15 without DHT, JPG, DAC) and that of JPEG-LS
_FRAME_MARKERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}


@dataclass
class PixelCounts:
    """What was changed on the way to int16 HU, in voxels; ``tissue_padding``: declared as padding, and left alone."""

    padded: int = 0
    rounded: int = 0
    clipped: int = 0
    tissue_padding: int = 0


def read_stored(image: Slice) -> np.ndarray:
    """The stored values of a frame, (rows, columns), signed or unsigned integers, unused bits removed.

    Raises:
        InputError: truncated, damaged, or no decoder is installed; the message names the file and the syntax.
    """
    try:
        pixels = image.pixels
        stored = _decoded(image) if pixels.is_encapsulated else _native(pixels, image.frame)
        return _without_unused_bits(stored, pixels)
    except InputError as error:
        raise InputError(one_line(f"{image.label}: {error}")) from error
    except OSError as error:
        raise InputError(f"{image.label}: cannot be read ({error.strerror})") from error


def to_hu(stored: np.ndarray, image: Slice, out: np.ndarray, counts: PixelCounts) -> None:
    """Apply slope and intercept of this very frame, put padding at the floor, and write int16 HU to ``out``.

    Args:
        stored: (rows, columns) from `read_stored`.
        image: its header; slope and intercept must be there.
        out: (rows, columns) int16.
        counts: is added to.
    """
    slope, intercept = image.slope, image.intercept
    assert slope is not None
    assert intercept is not None
    low, high = int(stored.min()), int(stored.max())
    hu_range = sorted((low * slope + intercept, high * slope + intercept))
    if slope == 1 and intercept.is_integer() and _INT16.min <= hu_range[0] and hu_range[1] <= _INT16.max:
        # the common case, in the width of the result; wrap-around cancels, since the sum fits (the intercept alone
        # need not: uint16 pixels may be biased by 33792)
        np.add(stored.astype(np.int16, copy=False), np.int64(intercept).astype(np.int16), out=out)
    else:
        hu = stored * np.float64(slope)
        hu += intercept
        whole = np.rint(hu)
        counts.rounded += int(np.count_nonzero(np.abs(whole - hu) > 1e-6))
        counts.clipped += int(np.count_nonzero(whole > _INT16.max))
        np.clip(whole, _INT16.min, _INT16.max, out=whole)
        out[...] = whole
    if image.padding is not None and image.padding[0] <= high and image.padding[1] >= low:
        mask = _padding_mask(stored, image, counts)
        counts.padded += int(np.count_nonzero(mask))
        out[mask] = HU_FLOOR
    if hu_range[0] < HU_FLOOR:
        below = out < HU_FLOOR
        counts.padded += int(np.count_nonzero(below))
        out[below] = HU_FLOOR


def _padding_mask(stored: np.ndarray, image: Slice, counts: PixelCounts) -> np.ndarray:
    assert image.padding is not None
    assert image.slope is not None
    assert image.intercept is not None
    mask = (stored >= image.padding[0]) & (stored <= image.padding[1])
    hu = [value * image.slope + image.intercept for value in image.padding]
    if max(hu) <= _TISSUE_HU[0] or min(hu) >= _TISSUE_HU[1]:
        return mask
    from scipy.ndimage import binary_propagation

    border = np.ones_like(mask)
    border[1:-1, 1:-1] = False
    outside = binary_propagation(border & mask, mask=mask)
    counts.tissue_padding += int(np.count_nonzero(mask & ~outside))
    return np.asarray(outside)


def _native(pixels: Pixels, frame: int) -> np.ndarray:
    kind = np.dtype(
        f"{'>' if pixels.syntax == BIG_ENDIAN else '<'}{'i' if pixels.is_signed else 'u'}{pixels.bits_allocated // 8}"
    )
    count = pixels.rows * pixels.columns
    begin = pixels.offset + frame * count * kind.itemsize
    if pixels.syntax == DEFLATED:
        data = inflated(pixels.path)[begin : begin + count * kind.itemsize]
    else:
        with open(pixels.path, "rb", buffering=0) as handle:
            handle.seek(begin)
            data = handle.read(count * kind.itemsize)
    if len(data) != count * kind.itemsize:
        raise InputError(f"the pixels are truncated, {len(data)} of {count * kind.itemsize} bytes: copy it again")
    return np.frombuffer(data, kind).reshape(pixels.rows, pixels.columns)


def _decoded(image: Slice) -> np.ndarray:
    pixels = image.pixels
    syntax = UID(pixels.syntax)
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        decoder = None
    if decoder is None or pixels.syntax in NATIVE:
        raise InputError(f"transfer syntax {token(syntax.name, 64)} is not supported: export it uncompressed")
    if not decoder.is_available:
        package = next((name for head, name in _PACKAGES.items() if pixels.syntax.startswith(head)), "pylibjpeg")
        raise InputError(f"no decoder for {token(syntax.name, 64)} is installed: `pip install {package}`")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they quote values of the header
            with open(pixels.path, "rb") as handle:
                handle.seek(pixels.offset)
                stream = get_frame(handle, image.frame, number_of_frames=pixels.frames)
            _check_stream(stream, pixels)
            array = _by_simpleitk(image)
            if array is None:
                dataset = pydicom.dcmread(pixels.path)
                # damaged RLE makes the Rust decoder panic, which no `except Exception` catches; pydicom's own is safe
                plugin = "pydicom" if pixels.syntax == _RLE else ""
                array, _ = decoder.as_array(dataset, index=image.frame, raw=True, decoding_plugin=plugin)
    except InputError:
        raise
    except Exception as error:
        # decoders answer damage with whatever their C code makes of it
        reason = f"{token(syntax.name, 64)} pixels cannot be decoded ({type(error).__name__})"
        raise InputError(f"{reason}: truncated or damaged, copy it again") from error
    if array.shape != (pixels.rows, pixels.columns) or array.dtype.kind not in "iu":
        raise InputError(f"decodes to {array.shape} {array.dtype}, not to {pixels.rows}×{pixels.columns} integers")
    return array


def _by_simpleitk(image: Slice) -> np.ndarray | None:
    """The stored values by SimpleITK's decoder, or None where it has none to give back exactly."""
    slope, intercept = image.slope, image.intercept
    pixels = image.pixels
    if pixels.syntax not in _BY_SIMPLEITK or pixels.frames != 1 or slope != 1 or not (intercept or 0.0).is_integer():
        return None
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)  # its warnings name files
    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(pixels.path)
    try:
        rescaled = SimpleITK.GetArrayFromImage(reader.Execute())
    except RuntimeError:
        return None
    if rescaled.dtype.kind not in "iu" or rescaled.size != pixels.rows * pixels.columns:
        return None
    stored = rescaled.reshape(pixels.rows, pixels.columns).astype(np.int32) - int(intercept or 0)
    bits = pixels.bits_stored
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if pixels.is_signed else (0, (1 << bits) - 1)
    if stored.min() < low or stored.max() > high:
        return None
    return stored.astype(f"{'i' if pixels.is_signed else 'u'}{pixels.bits_allocated // 8}")


def _check_stream(stream: bytes, pixels: Pixels) -> None:
    """The code stream ends, and has the header's size.

    Raises:
        InputError: it does not.
    """
    if pixels.syntax == _RLE:
        return
    if not stream.rstrip(b"\0\xff").endswith(b"\xff\xd9"):  # padded to even length by either byte
        raise InputError("the compressed pixels are truncated, their end marker is absent: copy it again")
    size = _stream_size(stream)
    if size != (pixels.rows, pixels.columns):
        raise InputError(f"the compressed picture is {size} pixels, the header says {pixels.rows}×{pixels.columns}")


def _stream_size(stream: bytes) -> tuple[int, int] | None:
    """(rows, columns) that a JPEG, JPEG-LS or JPEG 2000 code stream claims."""
    if (start := stream.find(b"\xff\x4f\xff\x51", 0, 4096)) >= 0:  # SOC and SIZ of JPEG 2000, perhaps in a JP2 box
        width, height, left, top = struct.unpack_from(">4I", stream, start + 8)
        return height - top, width - left
    position = 2
    while position + 9 <= len(stream) and stream[position] == 0xFF:
        marker = stream[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker in _FRAME_MARKERS:
            height, width = struct.unpack_from(">2H", stream, position + 5)
            return height, width
        (length,) = struct.unpack_from(">H", stream, position + 2)
        position += 2 + length
    return None


def _without_unused_bits(stored: np.ndarray, pixels: Pixels) -> np.ndarray:
    """Overlays may live in the bits beyond ``bits_stored``; what is left is extended by its sign."""
    width = stored.dtype.itemsize * 8
    if pixels.bits_stored >= width:
        return stored
    native = stored.astype(stored.dtype.newbyteorder("="), copy=False)
    # a decoder delivers values, not bits: only their sign may need care
    shift = width - pixels.bits_stored if pixels.is_encapsulated else width - 1 - pixels.high_bit
    kind = np.dtype(f"{'i' if pixels.is_signed else 'u'}{width // 8}")
    return (native.view(kind) << shift) >> (width - pixels.bits_stored)
