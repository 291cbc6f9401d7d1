"""Which radiographs of nested folders are whose: frontal, lateral, or a result of an earlier run."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddpm.xray_files import find_xrays
from errors import ConfigurationError, InputError


def pictures(folder: Path, *names: str) -> Path:
    """Files that count as radiographs by their suffix."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def found(source: Path, lateral: Path | None, output: Path) -> dict[str, list[str]]:
    """Paths below the source by name of the job."""
    jobs = find_xrays(source, lateral, output)
    return {job.name: [str(path.relative_to(source.parent)) for path in job.paths] for job in jobs}


@pytest.mark.parametrize("output", ["data", ".", "data/results", "results", "data/xrays/../results"])
def test_results_above_or_beside_the_radiographs_hide_none(
    tmp_path: Path, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "data/xrays", "a.png", "sub/b.dcm")
    expected = {"a": ["xrays/a.png"], "sub-b": ["xrays/sub/b.dcm"]}
    assert found(tmp_path / "data/xrays", None, Path(output)) == expected


@pytest.mark.parametrize("spelling", ["x/out", "x/sub/../out", "link/out"])
def test_results_of_earlier_runs_within_are_no_radiographs(tmp_path: Path, spelling: str) -> None:
    pictures(tmp_path / "x", "a.png", "sub/b.png", "out/a_panel.png", "out.png")
    (tmp_path / "link").symlink_to(tmp_path / "x")
    assert set(found(tmp_path / "x", None, tmp_path / spelling)) == {"a", "out", "sub-b"}


@pytest.mark.parametrize("lateral", ["x/lateral", "l", "x/sub/../lateral"])
def test_lateral_views_are_no_patients_of_their_own(tmp_path: Path, lateral: str) -> None:
    pictures(tmp_path / "x", "a.png", "sub/b.png")
    (folder := tmp_path / lateral).mkdir(parents=True)
    pictures(folder, "a.dcm", "sub/b.dcm", "sub/unknown.dcm")
    jobs = find_xrays(tmp_path / "x", folder, tmp_path / "out")
    assert {job.name: [path.resolve() for path in job.paths] for job in jobs} == {
        "a": [tmp_path / "x/a.png", folder.resolve() / "a.dcm"],
        "sub-b": [tmp_path / "x/sub/b.png", folder.resolve() / "sub/b.dcm"],
    }


def test_one_folder_for_two_purposes_is_refused(tmp_path: Path) -> None:
    x, lateral = pictures(tmp_path / "x", "a.png"), pictures(tmp_path / "l", "a.png")
    for arguments in ((x, None, x), (x, None, x / "../x"), (x, lateral, lateral)):
        with pytest.raises(ConfigurationError, match="holds the radiographs: choose another --output"):
            find_xrays(*arguments)
    with pytest.raises(ConfigurationError, match="holds the frontal radiographs"):
        find_xrays(x, tmp_path / "l/../x", tmp_path / "out")
    only = pictures(tmp_path / "y", "lateral/a.png")
    with pytest.raises(InputError, match="y: holds no PNG"):
        find_xrays(only, only / "lateral", tmp_path / "out")
