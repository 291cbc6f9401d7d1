"""What earlier conversions wrote and the present one would not is taken away, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dataset.pairs_keys import pseudonym
from dataset.phantom_dicom import SeriesTags
from preprocess import dicom_study
from preprocess.batch import BatchResult
from preprocess.dicom_retire import retire
from preprocess.dicom_study import NO_VOLUME
from tests.helpers import assert_one_line_error
from tests.preprocess.dicom_factory import TAGS, convert, random_volume, series

SIZE = (34, 10, 8)
WORSE = SeriesTags(TAGS.patient, series=2, kernel="LUNG")
KEY = b"a key of sixteen bytes"


def volumes(output: Path) -> set[str]:
    """Stems of the volumes; each has its sidecar, and no sidecar is alone."""
    found = {path.name.removesuffix(".nii.gz") for path in output.glob("*.nii.gz")}
    assert found == {path.stem for path in output.glob("*.json") if path.name != "dicom_report.json"}
    return found


def listed(output: Path) -> set[str]:
    records = json.loads((output / "dicom_report.json").read_text())["records"].values()
    return {Path(entry["path"]).name.split(".")[0] for record in records for entry in record["outputs"]}


@pytest.mark.parametrize("options", [(), ("--resume",)])
def test_a_better_series_takes_the_place_of_the_earlier_one(tmp_path: Path, options: tuple[str, ...]) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    series(source / "2", random_volume(SIZE, seed=1), tags=WORSE)
    assert "removed" not in convert(source, output).stdout
    before = volumes(output)
    series(source / "1", random_volume(SIZE))
    result = convert(source, output, *options)
    assert "1 volumes of earlier runs removed" in result.stdout
    assert volumes(output) == listed(output)
    assert len(volumes(output) - before) == len(volumes(output)) == 1


def test_rules_that_leave_no_volume_remove_the_earlier_one_and_no_other_file(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    series(source, random_volume(SIZE))
    convert(source, output)
    foreign = [output / name for name in ("ct.nii.gz", "0123456789ab_0123456789ab.b2nd", "0123456789ab.json")]
    for path in foreign:
        path.touch()
    assert_one_line_error(convert(source, output, "--min-slices", "40", check=3), "34 slices, fewer than 40")
    assert {path.name for path in output.iterdir()} == {"dicom_report.json", *(path.name for path in foreign)}


def test_volumes_of_other_inputs_stay(tmp_path: Path) -> None:
    output = tmp_path / "out"
    for number in range(2):
        series(tmp_path / str(number), random_volume(SIZE, seed=number), tags=SeriesTags(f"P{number}"))
        assert "removed" not in convert(tmp_path / str(number), output).stdout
    assert len(volumes(output)) == 2
    bad = series(tmp_path / "bad", random_volume((36, 10, 8), seed=2), tags=SeriesTags("P2"))
    bad[10].unlink()
    convert(tmp_path / "bad", output, check=3)
    assert len(volumes(output)) == 2


def test_where_it_cannot_be_told_nothing_is_removed_and_the_exit_code_is_4(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    for path in series(source / "2", random_volume(SIZE, seed=1), tags=WORSE):
        path.rename(source / path.name)  # a series that is gone later, or that another input held
    convert(source, output)
    (before,) = volumes(output)
    for path in source.glob("*.dcm"):
        path.unlink()
    series(source / "1", random_volume(SIZE))
    for _ in range(2):
        result = convert(source, output, "--resume", check=4)
        assert_one_line_error(result, str(output), "1 volumes of earlier runs were left", before)
        assert before in volumes(output)
        assert len(volumes(output)) == 2
    (output / f"{before}.json").unlink()
    assert_one_line_error(convert(source, output, check=4), "1 volumes of earlier runs were left", before)
    (output / f"{before}.nii.gz").unlink()
    convert(source, output)


@pytest.mark.parametrize(("reason", "removed"), [(f"study s: {NO_VOLUME}: …", 1), ("s: its process was killed", 0)])
def test_only_a_study_that_was_looked_through_loses_its_volume(tmp_path: Path, reason: str, removed: int) -> None:
    volume = tmp_path / f"0123456789ab_{pseudonym(KEY, 'series', '1.2.3')}.nii.gz"
    volume.touch()
    volume.with_name(volume.name.replace(".nii.gz", ".json")).write_text('{"study": "s"}')
    result = BatchResult({}, {"s": reason}, tmp_path / "report.json")
    retired = retire(tmp_path, result, {"s": {"1.2.3"}}, KEY)
    assert (retired.removed, volume.exists()) == (removed, not removed)
    assert retired.doubtful == (() if removed else (volume.name,))


def test_an_interrupted_run_leaves_a_sidecar_without_a_volume_at_worst(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    series(source / "2", random_volume(SIZE, seed=1), tags=WORSE)
    convert(source, output)
    before = volumes(output)
    series(source / "1", random_volume(SIZE))

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dicom_study, "write_nifti", killed)
        convert(source, output, "--resume", check=130)
    assert {path.name.removesuffix(".nii.gz") for path in output.glob("*.nii.gz")} == before
    assert len(list(output.glob("*_*.json"))) == 3  # both sidecars, and the report
    assert "1 volumes of earlier runs removed" in convert(source, output, "--resume").stdout
    assert volumes(output) == listed(output)
    assert volumes(output).isdisjoint(before)
