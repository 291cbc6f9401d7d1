"""Radiographs on demand: geometry and the cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

import dataset.drr
from dataset.drr import rendered_xray
from dataset.phantom import affine_of
from dataset.prepared import PreparedVolume
from dataset.projection import View, voxel_to_world
from dataset.sources import PhantomSource, prepare
from dataset.store import write_store
from dataset.volume_io import Volume
from dataset.xray import load_xray
from dataset.xray_drr import read_line_integrals, sidecar_of
from errors import InputError

VIEWS: tuple[View, ...] = ("frontal", "lateral")


def stored(path: Path, hu: np.ndarray, affine: np.ndarray) -> PreparedVolume:
    write_store(path, Volume(hu, affine), {})
    return PreparedVolume(path.stem, path, affine, cached=False)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> tuple[PhantomSource, PreparedVolume]:
    source = PhantomSource(3, (32, 48, 48))
    return source, prepare(source, (32, 48, 48), tmp_path_factory.mktemp("volumes"))


@pytest.mark.parametrize("view", VIEWS)
def test_a_dense_ball_lands_where_the_stored_geometry_says(view: View, tmp_path: Path) -> None:
    shape, spacing = (60, 50, 70), (3.0, 4.0, 4.0)
    affine = affine_of(shape, spacing)
    affine[:3, 3] += (25.0, -40.0, 300.0)
    at = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    body = np.where((np.abs(at[..., 1] - 25) < 20) & (np.abs(at[..., 2] - 35) < 28), 0, -1000).astype(np.int16)
    ball = (20, 30, 22)  # below the middle, behind it, to the right
    dense = body.copy()
    dense[(np.square((at - ball) * spacing).sum(-1)) < 15**2] = 2000
    pictures = [
        rendered_xray(stored(tmp_path / f"{name}.b2nd", hu, affine), view, tmp_path / "cache")
        for name, hu in (("plain", body), ("ball", dense))
    ]
    (plain, _), (shadow, info) = (read_line_integrals(picture) for picture in pictures)
    found = ndimage.center_of_mass(np.maximum(shadow - plain, 0))
    expected = info.geometry.project(voxel_to_world(np.array(ball), affine))
    assert np.allclose(found, expected, atol=0.5)
    assert shadow.shape[1] == 256
    middle = (shadow.shape[0] - 1) / 2, 127.5
    assert found[0] > middle[0], "the ball is low"
    assert (found[1] < middle[1]) == (view == "frontal"), "frontal: the right side on the left; lateral: back right"


def test_a_second_call_renders_nothing(
    phantom: tuple[PhantomSource, PreparedVolume], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, volume = phantom
    first = [rendered_xray(volume, view, tmp_path, columns=64) for view in VIEWS]
    kept = [(path.read_bytes(), path.stat().st_mtime_ns) for path in first]
    monkeypatch.setattr(dataset.drr, "render", lambda *arguments: pytest.fail("rendered"))
    assert [rendered_xray(volume, view, tmp_path, columns=64) for view in VIEWS] == first
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in first] == kept
    assert len(set(first)) == 2
    image = load_xray(first[0], 64, view="frontal")
    assert image.image.shape == (1, 64, 64)
    assert 0.05 < float(image.image.std()) < 0.5


def test_another_stand_affine_or_content_is_another_picture(
    phantom: tuple[PhantomSource, PreparedVolume], tmp_path: Path
) -> None:
    _, volume = phantom
    wide = volume.affine.copy()
    wide[:3, 2] *= 1.1
    other = PhantomSource(4, (32, 48, 48))
    pictures = [
        rendered_xray(volume, "frontal", tmp_path, columns=64),
        rendered_xray(volume, "frontal", tmp_path, columns=48),
        rendered_xray(replace(volume, affine=wide), "frontal", tmp_path, columns=64),
        rendered_xray(prepare(other, (32, 48, 48), tmp_path / "volumes"), "frontal", tmp_path, columns=64),
    ]
    assert len({path.name for path in pictures}) == 4
    assert len({path.read_bytes() for path in pictures}) == 4


def test_an_incomplete_or_damaged_picture_is_rendered_again(
    phantom: tuple[PhantomSource, PreparedVolume], tmp_path: Path
) -> None:
    _, volume = phantom
    picture = rendered_xray(volume, "frontal", tmp_path, columns=48)
    sound = picture.read_bytes(), sidecar_of(picture).read_bytes()
    for damage in (
        lambda: sidecar_of(picture).unlink(),  # killed between the two files
        lambda: sidecar_of(picture).write_bytes(sound[1][:200]),
        lambda: picture.unlink(),
    ):
        damage()
        assert rendered_xray(volume, "frontal", tmp_path, columns=48) == picture
        assert (picture.read_bytes(), sidecar_of(picture).read_bytes()) == sound


def test_what_cannot_be_projected_is_named(tmp_path: Path) -> None:
    air = stored(tmp_path / "air.b2nd", np.full((20, 30, 30), -1000, np.int16), affine_of((20, 30, 30), (8, 8, 8)))
    with pytest.raises(InputError, match=r"air\.b2nd: no body"):
        rendered_xray(air, "frontal", tmp_path / "cache")
    flat = stored(tmp_path / "flat.b2nd", np.zeros((2, 30, 30), np.int16), affine_of((2, 30, 30), (2, 8, 8)))
    with pytest.raises(InputError, match=r"flat\.b2nd.*too few slices"):
        rendered_xray(flat, "frontal", tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.png"))
