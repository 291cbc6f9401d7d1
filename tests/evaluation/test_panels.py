"""Panels: upright, unmirrored, in proportion, and with an error scale that means what it says."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset.volume_io import read_nifti
from errors import InputError, StorageError
from evaluation.panels import comparison_panel, panel_image

REAL_CT = Path(__file__).parents[2].parent / "shared" / "data" / "fixtures" / "cip_ct64.nii.gz"
TILE, GAP, TOP = 120, 6, 21  # of the layout: longest side, gap, heading


def tiles(image, shape_dhw, spacing_mm):
    """Cut a panel into its nine tiles, by the layout that the docstring promises: axial, coronal, sagittal rows."""
    extent = [n * mm for n, mm in zip(shape_dhw, spacing_mm, strict=True)]
    sides = [round(mm * TILE / max(extent)) for mm in extent]
    sizes = [(sides[1], sides[2]), (sides[0], sides[2]), (sides[0], sides[1])]
    column = max(width for _, width in sizes)
    top, rows = TOP, []
    for height, width in sizes:
        lefts = [c * (column + GAP) + (column - width) // 2 for c in range(3)]
        rows.append([image[top : top + height, left : left + width] for left in lefts])
        top += height + GAP
    return rows


def marked(shape_dhw, corner):
    """Air with a bright eighth in one corner: corner[a] says whether it lies at the end of axis a."""
    volume = np.full(shape_dhw, -1000, np.int16)
    volume[
        tuple(slice(n // 2, None) if end else slice(0, n // 2 + 1) for n, end in zip(shape_dhw, corner, strict=True))
    ] = 1000
    return volume


def bright_quarter(tile):
    """(lower half, right half) in which the tile is bright, by its centre of mass."""
    rows, columns = np.nonzero(tile.min(axis=2) > 200)
    return bool(rows.mean() > tile.shape[0] / 2), bool(columns.mean() > tile.shape[1] / 2)


@pytest.mark.parametrize("corner", [(d, h, w) for d in (0, 1) for h in (0, 1) for w in (0, 1)])
def test_directions(corner):
    superior, posterior, left = map(bool, corner)
    shape, spacing = (40, 40, 40), (1.0, 1.0, 1.0)
    volume = marked(shape, corner)
    image = panel_image(volume, volume, spacing, tile_px=TILE)
    (axial, _, _), (coronal, _, _), (sagittal, _, _) = tiles(image, shape, spacing)
    assert bright_quarter(axial) == (posterior, left)  # anterior up, patient's left on the right
    assert bright_quarter(coronal) == (not superior, left)  # superior up
    assert bright_quarter(sagittal) == (not superior, posterior)  # anterior on the left


def test_the_caption_of_an_error_can_be_read():
    """Its letters stand on black, whatever the error's colour: white where there is none."""
    flat = np.zeros((40, 40, 40))
    image = panel_image(flat, flat, (1.0, 1.0, 1.0), tile_px=TILE)
    tile = tiles(image, flat.shape, (1.0, 1.0, 1.0))[0][2].astype(int)
    yellow = np.argwhere((tile[..., 0] > 200) & (tile[..., 2] < 60))
    (top, left), (bottom, right) = yellow.min(0), yellow.max(0)
    plate = tile[top : bottom + 1, left : right + 1]
    assert (plate.min(axis=2) < 60).all()  # letters and black, nothing of the map
    assert (tile[bottom + 5 :].min(axis=2) > 200).all()


def test_proportions_are_those_in_mm():
    shape, spacing = (20, 50, 100), (5.0, 1.0, 1.0)  # 100 × 50 × 100 mm
    image = panel_image(np.zeros(shape), np.zeros(shape), spacing, tile_px=TILE)
    sizes = [row[0].shape[:2] for row in tiles(image, shape, spacing)]
    assert sizes == [(60, 120), (120, 120), (120, 60)]
    assert image.dtype == np.uint8
    assert image.shape == (TOP + 60 + 120 + 120 + 3 * GAP + 12 + 21, 3 * 120 + 2 * GAP, 3)


def middle(tile):
    return tile[tile.shape[0] // 2 + 8, tile.shape[1] // 2 + 8].astype(int)


@pytest.mark.parametrize(
    ("error_hu", "colour"),
    [(0, (247, 247, 247)), (300, (103, 0, 31)), (-300, (5, 48, 97)), (9999, (103, 0, 31)), (150, (214, 96, 77))],
)
def test_error_colours(error_hu, colour):
    shape, spacing = (30, 30, 30), (1.0, 1.0, 1.0)
    original = np.zeros(shape, np.int16)  # of int16 the difference must not wrap around
    image = panel_image(original, original + np.float32(error_hu), spacing, tile_px=TILE)
    for row in tiles(image, shape, spacing):
        assert middle(row[2]).tolist() == list(colour)


def test_int16_differences_do_not_wrap():
    shape, spacing = (30, 30, 30), (1.0, 1.0, 1.0)
    image = panel_image(np.full(shape, -30000, np.int16), np.full(shape, 30000, np.int16), spacing, tile_px=TILE)
    assert middle(tiles(image, shape, spacing)[0][2]).tolist() == [103, 0, 31]


def test_window_and_nan():
    shape, spacing = (30, 30, 30), (1.0, 1.0, 1.0)
    image = panel_image(np.full(shape, 100), np.full(shape, np.nan), spacing, window=(100, 700), tile_px=TILE)
    row = tiles(image, shape, spacing)[0]
    assert middle(row[0]).tolist() == [128, 128, 128]  # the level is the middle grey
    assert middle(row[1]).tolist() == [255, 0, 255]


def test_file_equals_image_and_is_deterministic(tmp_path):
    random = np.random.default_rng(0)
    volumes = [random.integers(-1000, 1000, (9, 10, 11)).astype(np.int16) for _ in range(2)]
    spacing = (2.0, 0.8, 0.8)
    path = tmp_path / "panel.png"
    comparison_panel(*volumes, spacing, path, titles=("CT", "VQ-GAN"))
    first = path.read_bytes()
    np.testing.assert_array_equal(np.asarray(Image.open(path)), panel_image(*volumes, spacing, titles=("CT", "VQ-GAN")))
    comparison_panel(*volumes, spacing, path, titles=("CT", "VQ-GAN"))
    assert path.read_bytes() == first


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 40, 40), (300, 2, 2)])
def test_odd_shapes(shape):
    assert panel_image(np.zeros(shape), np.zeros(shape), (1.0, 1.0, 1.0), tile_px=64).ndim == 3


@pytest.mark.parametrize(
    "change",
    [
        {"reconstruction_hu": np.zeros((4, 4, 5))},
        {"spacing_dhw_mm": (1, 1)},
        {"spacing_dhw_mm": (1, 0, 1)},
        {"spacing_dhw_mm": (1, np.nan, 1)},
        {"window": (0, 0)},
        {"error_range_hu": 0},
    ],
)
def test_what_cannot_be_drawn(change):
    volume = np.zeros((4, 4, 4))
    arguments = {"original_hu": volume, "reconstruction_hu": volume, "spacing_dhw_mm": (1, 1, 1)} | change
    with pytest.raises(InputError):
        panel_image(**arguments)


def test_unwritable(tmp_path):
    volume = np.zeros((4, 4, 4))
    with pytest.raises(StorageError, match=r"panel\.png"):
        comparison_panel(volume, volume, (1, 1, 1), tmp_path / "missing" / "panel.png")


def test_import_is_light():
    code = "import sys, evaluation.panels; print([m for m in ('torch', 'matplotlib', 'nibabel') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(not REAL_CT.exists(), reason="shared/data is not here: no real CT to draw")
def test_real_ct_is_upright():
    volume = read_nifti(REAL_CT)
    shape, spacing = volume.hu.shape, volume.spacing_mm
    image = panel_image(volume.hu, volume.hu, spacing, tile_px=TILE, window=(-400, 800))
    axial, coronal, _ = (row[0][..., 2] for row in tiles(image, shape, spacing))
    # abdomen below, so the lower quarter is brighter than the one with the lungs; the table lies at the back
    height = coronal.shape[0]
    centre = slice(coronal.shape[1] // 4, -coronal.shape[1] // 4)
    assert coronal[-height // 5 :, centre].mean() > coronal[height * 2 // 5 : height * 3 // 5, centre].mean()
    assert axial.shape[1] == pytest.approx(TILE * shape[2] * spacing[2] / (max(np.multiply(shape, spacing))), abs=1)
