from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from pydicom.dataset import Dataset

from errors import ConfigurationError
from preprocess.dicom_header import Slice
from preprocess.dicom_rules import SeriesRules, has_contrast, load_rules, objections, preference
from tests.preprocess.dicom_factory import frames_of, random_volume, series

RULES = SeriesRules(min_slices=4)


@pytest.fixture
def frames(tmp_path: Path) -> list[Slice]:
    return frames_of(series(tmp_path, random_volume()))


def with_scan(frames: list[Slice], **changes: object) -> list[Slice]:
    return [replace(frame, scan=replace(frame.scan, **changes)) for frame in frames]  # type: ignore[arg-type]


def test_a_plain_chest_series_is_wanted(frames: list[Slice]) -> None:
    assert objections(frames, RULES) == []


@pytest.mark.parametrize(
    ("changes", "rules", "reason"),
    [
        ({"modality": "MR"}, RULES, "modality MR, not CT"),
        ({"text": "Thorax SWAPPED phases"}, RULES, "excluded by the word 'swapped'"),
        ({"text": "Scout_1"}, RULES, "excluded by the word 'scout'"),
        ({}, SeriesRules(min_slices=7), "6 slices, fewer than 7"),
        ({}, SeriesRules(min_slices=4, max_thickness_mm=1.5), "slices of 2 mm, thicker than 1.5 mm"),
        ({"contrast": "NONE"}, SeriesRules(min_slices=4, contrast="require"), "no contrast agent named"),
        ({}, SeriesRules(min_slices=4, contrast="exclude"), "a contrast agent is named"),
        ({"kernel": "LUNG"}, SeriesRules(min_slices=4, exclude_kernels=["lung"]), "kernel LUNG is excluded"),
    ],
)
def test_each_rule_has_its_reason(
    frames: list[Slice], changes: dict[str, object], rules: SeriesRules, reason: str
) -> None:
    assert objections(with_scan(frames, **changes), rules) == [reason]


def test_words_are_whole_words(frames: list[Slice]) -> None:
    assert objections(with_scan(frames, text="chest mipping doses dosed"), RULES) == []


@pytest.mark.parametrize(
    "text", ["low dose chest ct", "ctpa bolus tracking 1.0", "LOW-DOSE", "Bolus Tracking", "dose modulated"]
)
def test_words_of_ordinary_scans_exclude_nothing(frames: list[Slice], text: str) -> None:
    assert objections(with_scan(frames, text=text), RULES) == []


def test_a_dose_report_is_no_scan(frames: list[Slice]) -> None:
    assert objections(with_scan(frames, text="Dose Report"), RULES) == ["excluded by the word 'dose report'"]


def test_only_the_text_of_the_series_excludes_it(tmp_path: Path) -> None:
    def of_the_study(dataset: Dataset, index: int) -> None:
        dataset.StudyDescription = dataset.ProtocolName = "Lung perfusion, dose report, scout"
        dataset.ImageComments = "swapped"

    def of_the_series(dataset: Dataset, index: int) -> None:
        dataset.SeriesDescription = "Lung perfusion"

    assert objections(frames_of(series(tmp_path / "1", random_volume(), of_the_study)), RULES) == []
    (reason,) = objections(frames_of(series(tmp_path / "2", random_volume(), of_the_series)), RULES)
    assert reason == "excluded by the word 'perfusion'"


def test_coronal_series_is_not_axial(tmp_path: Path) -> None:
    def coronal(dataset: Dataset, index: int) -> None:
        dataset.ImageOrientationPatient = ["1", "0", "0", "0", "0", "-1"]

    (reason,) = objections(frames_of(series(tmp_path, random_volume(), coronal)), RULES)
    assert reason == "not axial (turned by 90°)"


def test_contrast_then_kernel_then_thin_slices_decide(frames: list[Slice]) -> None:
    best = frames
    thick = [replace(frame, thickness_mm=3.0) for frame in frames]
    sharp = with_scan(frames, kernel="B70f")
    native = with_scan(frames, contrast="")
    ranked = sorted([native, sharp, thick, best], key=lambda each: preference(each, RULES))
    assert ranked == [best, thick, sharp, native]
    assert preference(native, SeriesRules(contrast="any"))[0] == 0.0


@pytest.mark.parametrize(("text", "expected"), [("", None), ("NONE", False), ("w/o", False), ("Omnipaque 350", True)])
def test_what_counts_as_contrast(frames: list[Slice], text: str, expected: bool | None) -> None:
    assert has_contrast(with_scan(frames, contrast=text)[0]) is expected


def test_yaml_changes_defaults_and_the_command_line_changes_yaml(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text("min_slices: 10\nmax_thickness_mm: 2.5\nprefer_kernels: ['^Br4']\n")
    rules = load_rules(path, min_slices=12, contrast=None)
    assert (rules.min_slices, rules.max_thickness_mm, rules.contrast) == (12, 2.5, "prefer")
    assert rules.prefer_kernels == ["^Br4"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("min_slizes: 3", "min_slizes"),
        ("min_slices: many", "many"),
        ("contrast: perhaps", "perhaps"),
        ("prefer_kernels: ['(']", "no regular expression"),
        ("[1, 2", "rules.yaml"),
        ("- a", "rules.yaml"),
        ("a: !!python/object/apply:os.system ['true']", "rules.yaml"),
    ],
)
def test_bad_rules_are_a_configuration_error(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=r"rules\.yaml") as caught:
        load_rules(path)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_absent_rules_file_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="nowhere"):
        load_rules(tmp_path / "nowhere.yaml")
