"""The table that joins CTs with radiographs, labels and splits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dataset.pairs_keys import pseudonym
from dataset.pairs_table import read_pairs
from dataset.splits import hash_fraction
from dataset.volume_io import Volume, write_nifti
from errors import InputError, run_command
from preprocess import make_pairs as script
from preprocess.make_pairs import LEAST_HELD_OUT, splits_by_hash
from tests.helpers import assert_one_line_error

Command = Callable[..., "CompletedProcess[str]"]

NAMES = ("a", "b", "c", "site/d")


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """Four volumes, each with a file in place of a rendered radiograph and its geometry."""
    for name in NAMES:
        for folder in ("ct", "drr"):
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_nifti(tmp_path / f"ct/{name}.nii.gz", Volume(np.zeros((4, 4, 4), np.int16), np.eye(4)))
        for suffix in ("png", "json"):
            (tmp_path / f"drr/{name}_frontal.{suffix}").write_text(name)
    return tmp_path


@pytest.fixture
def make_pairs(cohort: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command inside the test process; the demo's tests run it in one of its own."""

    def call(*flags: str, check: int = 0) -> CompletedProcess[str]:
        monkeypatch.chdir(cohort)
        arguments = ["make_pairs", "--input", "ct", "--xrays", "drr", "--output", "out/pairs.csv", *flags]
        monkeypatch.setattr(sys, "argv", arguments)
        code = run_command(lambda: script.main(script.parse_arguments()))
        out, err = capsys.readouterr()
        assert code == check, err
        return CompletedProcess(arguments, code, out, err)

    return call


def test_every_volume_gets_its_radiograph_and_two_patients_are_held_out(cohort: Path, make_pairs: Command) -> None:
    result = make_pairs("--held-out-xrays", "new")
    assert "4 CTs of 4 patients (2 train, 2 validation, 0 test)" in result.stdout
    cases = read_pairs(cohort / "out/pairs.csv")
    assert {case.patient for case in cases} == {"a", "b", "c", "d"}  # without a sidecar the stem is the patient
    for case in cases:
        (xray,) = case.xrays
        assert Path(xray.read_text()).name == case.patient
        assert case.label is None
    held_out = {case.patient for case in cases if case.split == "validation"}
    links = {path.name for path in (cohort / "new").iterdir()}
    assert links == {f"{'site_' if name == 'd' else ''}{name}.{suffix}" for name in held_out for suffix in
                     ("png", "json")}  # fmt: skip
    assert all(path.is_symlink() and path.read_text() for path in (cohort / "new").iterdir())
    assert "/" not in (cohort / "out/pairs.csv").read_text().replace("../", "").replace("ct/", "").replace(
        "drr/", "").replace("site/", "")  # nothing absolute: the folder can move  # fmt: skip


def test_own_radiographs_labels_and_splits_overrule(cohort: Path, make_pairs: Command) -> None:
    (cohort / "own").mkdir()
    (cohort / "own/a.png").write_text("own a")
    (cohort / "own/patients.csv").write_text(
        "patient,xray,label,split\na,a.png,yes,Val\nb,,no,train\nc,,,val\nd,,,TEST\nz,,yes,train\n"
    )
    (cohort / "new").mkdir()
    (cohort / "new/stale.png").symlink_to("nowhere")
    result = make_pairs("--patients", "own/patients.csv", "--held-out-xrays", "new")
    assert "1 of 5 patients in patients.csv have no volume here" in result.stdout
    cases = {case.patient: case for case in read_pairs(cohort / "out/pairs.csv")}
    assert cases["a"].xrays[0].read_text() == "own a"
    assert [cases[name].label for name in "abcd"] == [True, False, None, None]
    assert [cases[name].split for name in "abcd"] == ["validation", "train", "validation", "test"]
    assert {path.name for path in (cohort / "new").iterdir()} == {"a.png", "c.png", "c.json"}


def test_patients_of_dicom_are_found_by_the_key(cohort: Path, make_pairs: Command) -> None:
    key = b"secret"
    (cohort / "ct.key").write_bytes(key)
    hashed = pseudonym(key, "patient", "Doe")
    (cohort / "ct/a.json").write_text(f'{{"format": 1, "patient": "{hashed}"}}')
    (cohort / "patients.csv").write_text("patient,label\nDoe,yes\nb,no\n")
    # a key beside the volumes is found, and who bears the name of a volume is not hashed
    for flags in (("--key", "ct.key"), ()):
        make_pairs("--patients", "patients.csv", *flags)
        cases = {case.patient: case for case in read_pairs(cohort / "out/pairs.csv")}
        assert cases[hashed].label is True
        assert cases["b"].label is False
        assert "Doe" not in (cohort / "out/pairs.csv").read_text()


def test_without_their_key_patients_of_dicom_are_not_guessed(cohort: Path, make_pairs: Command) -> None:
    (cohort / "ct/a.json").write_text(f'{{"format": 1, "patient": "{pseudonym(b"secret", "patient", "Doe")}"}}')
    (cohort / "patients.csv").write_text("patient,split\nDoe,test\n")
    result = make_pairs("--patients", "patients.csv", check=3)
    assert_one_line_error(result, "patients.csv", "none of its 1 patients has a volume", "--key")
    (cohort / "other.key").write_bytes(b"another")
    result = make_pairs("--patients", "patients.csv", "--key", "other.key", check=3)
    assert_one_line_error(result, "patients.csv", "none of its 1 patients", "another key")
    assert not (cohort / "out").exists()


def test_a_volume_without_a_split_is_not_put_into_training(cohort: Path, make_pairs: Command) -> None:
    (cohort / "patients.csv").write_text("patient,split\na,test\nb,train\nc,validation\nD,test\n")  # meant: d
    result = make_pairs("--patients", "patients.csv", check=3)
    assert_one_line_error(result, "1 of 4 patients", "no split", "the first: d")
    assert not (cohort / "out").exists()


def test_a_damaged_sidecar_is_named(cohort: Path, make_pairs: Command) -> None:
    (cohort / "ct/a.json").write_text('{"format": 1, "pa')
    assert_one_line_error(make_pairs(check=3), "a.json", "no usable sidecar")


def test_lateral_pictures_are_joined_and_not_handed_out(cohort: Path, make_pairs: Command) -> None:
    for name in NAMES[1:]:
        (cohort / f"drr/{name}_lateral.png").write_text("lateral")
    make_pairs("--held-out-xrays", "new")
    cases = {case.patient: case for case in read_pairs(cohort / "out/pairs.csv")}
    names = {patient: [path.name for path in case.xrays] for patient, case in cases.items()}
    assert names["a"] == ["a_frontal.png"]
    assert names["d"] == ["d_frontal.png", "d_lateral.png"]
    assert all(path.read_text() != "lateral" for path in (cohort / "new").iterdir())


def test_a_share_can_be_kept_for_the_test(cohort: Path, make_pairs: Command) -> None:
    highest = sorted("abcd", key=hash_fraction)[-1]
    result = make_pairs("--test", str(1 - hash_fraction(highest)), "--held-out", "0.05")
    assert "1 train, 2 validation, 1 test" in result.stdout
    assert {case.patient for case in read_pairs(cohort / "out/pairs.csv") if case.split == "test"} == {highest}
    assert_one_line_error(make_pairs("--test", "0.9", check=2), "--held-out 0.2 --test 0.9")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("patient,name\na,b\n", ("patients.csv", "unknown column name")),
        ("patient,xray\na,gone.png\n", ("row 2", "gone.png is missing")),
        ("patient\na\na\n", ("row 3", "has a row already")),
        ("patient,split\n,train\n", ("row 2", "patient cell is empty")),
        ("patient,split\na,holdout\n", ("patients.csv", "row 2", "'holdout'")),
    ],
)
def test_bad_tables_are_told_by_row(cohort: Path, make_pairs: Command, table: str, words: tuple[str, ...]) -> None:
    (cohort / "patients.csv").write_text(table)
    assert_one_line_error(make_pairs("--patients", "patients.csv", check=3), *words)


def test_a_volume_without_a_radiograph_is_left_out(cohort: Path, make_pairs: Command) -> None:
    (cohort / "drr/a_frontal.png").unlink()
    result = make_pairs(check=4)
    assert "left out a: " in result.stderr
    assert "a_frontal.png" in result.stderr
    assert {case.patient for case in read_pairs(cohort / "out/pairs.csv")} == {"b", "c", "d"}
    for name in ("b", "c", "site/d"):
        (cohort / f"drr/{name}_frontal.png").unlink()
    assert_one_line_error(make_pairs(check=3), "no radiograph of any", "render_drr.py")


def test_too_few_patients_are_refused() -> None:
    with pytest.raises(InputError, match="3 are needed"):
        splits_by_hash(["a", "b", "b"], 0.2)


names = st.sets(st.text(min_size=1), min_size=3, max_size=40)


@given(names, st.floats(0.01, 0.99), st.floats(0, 0.5))
def test_both_sides_have_patients_and_order_does_not_matter(patients: set[str], validation: float, test: float) -> None:
    splits = splits_by_hash(sorted(patients), validation, test)
    assert splits == splits_by_hash(sorted(patients, reverse=True), validation, test)
    held_out = [patient for patient, split in splits.items() if split == "validation"]
    assert LEAST_HELD_OUT <= len(held_out) < len(patients)
    assert "train" in splits.values()


@given(names, names, st.floats(0.1, 0.5), st.floats(0, 0.4))
def test_new_patients_move_nobody(patients: set[str], more: set[str], validation: float, test: float) -> None:
    # but for those who fill up a share that few patients leave too small
    by_hash = [hash_fraction(patient) for patient in patients]
    assume(sum(fraction < validation for fraction in by_hash) >= LEAST_HELD_OUT)
    assume(any(validation <= fraction < 1 - test for fraction in by_hash))
    before, after = splits_by_hash(patients, validation, test), splits_by_hash(patients | more, validation, test)
    assert before.items() <= after.items()


def test_whoever_fills_up_a_small_share_is_told(caplog: pytest.LogCaptureFixture) -> None:
    splits_by_hash("abcd", 1e-9)
    [record] = caplog.records
    assert "4 patients are few" in record.message
    caplog.clear()
    splits_by_hash(map(str, range(200)), 0.2, 0.1)
    assert not caplog.records


def test_the_share_is_kept_in_a_large_cohort() -> None:
    splits = list(splits_by_hash(map(str, range(2000)), 0.2, 0.1).values())
    assert splits.count("validation") == pytest.approx(400, abs=60)
    assert splits.count("test") == pytest.approx(200, abs=45)
