"""Which radiographs of a patient serve for which view."""

from __future__ import annotations

from pathlib import Path

from dataset.pairs_case import CTCase
from dataset.prepared import PreparedVolume
from dataset.sources import PhantomSource, prepare
from ddpm.prepare import radiographs_of
from tests.dataset.xray_factory import save_dicom, save_picture


def volume(tmp_path: Path) -> PreparedVolume:
    return prepare(PhantomSource(0, (16, 32, 32)), None, tmp_path / "cache")


def test_own_radiographs_go_to_the_view_that_they_show(tmp_path: Path) -> None:
    frontal, lateral = (
        save_dicom(tmp_path / f"{view}.dcm", ViewPosition=view, PatientOrientation=None) for view in ("PA", "LL")
    )
    untold, side = save_picture(tmp_path / "a.png", "I;16"), save_picture(tmp_path / "side.png", "I;16")
    case = CTCase("a", "a", tmp_path / "a.nii.gz", xrays=(lateral, untold, frontal), laterals=(side,))
    assert radiographs_of(case, volume(tmp_path), ("frontal",), tmp_path) == ((untold, frontal),)
    both = radiographs_of(case, volume(tmp_path), ("frontal", "lateral"), tmp_path)
    assert both == ((untold, frontal), (lateral, side))


def test_without_own_ones_every_view_is_rendered(tmp_path: Path) -> None:
    case = CTCase("a", "a", tmp_path / "a.nii.gz")
    (frontal,), (lateral,) = radiographs_of(case, volume(tmp_path), ("frontal", "lateral"), tmp_path / "xrays")
    assert frontal.is_file()
    assert lateral.is_file()
    assert frontal.read_bytes() != lateral.read_bytes()
