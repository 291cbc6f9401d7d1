"""Analysis of a data set: contrast measured in the blood, figures with known answers, the page, one bad patient."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from dataset.phantom import Phantom, make_phantom
from dataset.store import write_store
from dataset.volume_io import Volume, read_nifti, write_nifti
from preprocess.analysis_contrast import central_contrast
from preprocess.analysis_page import render_page
from preprocess.analysis_summary import summarise_records
from preprocess.analysis_volume import HISTOGRAM_EDGES_HU, acquisition_of, analyse_volume, notes_of
from preprocess.dicom_sidecar import NO_PATIENT_NOTE
from preprocess.dicom_stack import ENDS_MISSING, THINNED
from tests.helpers import REAL_DATA, ROOT, assert_one_line_error, environment

BLOOD = (
    "right_atrium", "right_ventricle", "left_atrium", "left_ventricle", "pulmonary_artery", "pulmonary_vein", "aorta",
    "superior_vena_cava", "inferior_vena_cava",
)  # fmt: skip
SIDECAR = {
    "kvp": 100.0, "kernel": "Br40d", "manufacturer": "Siemens", "slice_thickness_mm": 1.0, "contrast": True,
    "PatientName": "DOE^JANE", "series": "0123456789ab",
}  # fmt: skip


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return make_phantom(3, (64, 96, 96))


def with_blood(phantom: Phantom, blood_hu: float) -> np.ndarray:
    """The phantom with blood of one density, its noise and edges kept; what blood perfuses follows."""
    hu = phantom.hu.copy()
    density = dict.fromkeys(BLOOD, blood_hu)
    if blood_hu < 100:
        density |= {"myocardium": 45, "spleen": 50, "liver": 60}
    for name, wanted_hu in density.items():
        inside = phantom.mask(name)
        if inside.any():
            hu[inside] += np.int16(wanted_hu - np.median(hu[inside]))
    return hu


@pytest.mark.parametrize(
    ("blood_hu", "phase"), [(40, "none"), (60, "none"), (150, "weak"), (260, "angiographic"), (450, "angiographic")]
)
def test_blood_is_measured_on_phantoms(phantom, blood_hu, phase):
    measured = central_contrast(with_blood(phantom, blood_hu), phantom.spacing_mm)
    assert measured.phase == phase
    if phase != "none":
        assert measured.blood_hu == pytest.approx(blood_hu, abs=25)
        assert measured.core_ml > 5
    else:
        assert measured.blood_hu < 90


def test_a_block_of_known_density_is_measured_exactly():
    hu = np.full((40, 60, 60), -1000, np.int16)
    hu[:, 5:55, 5:55] = 40  # a body without lungs: its middle is searched
    hu[10:30, 20:32, 24:36] = 321
    measured = central_contrast(hu, (3.0, 3.0, 3.0))
    assert (measured.phase, measured.blood_hu) == ("angiographic", 321.0)
    # the same block behind is a vertebra, and a small one is a calcium
    for place in ((slice(10, 30), slice(36, 40), slice(24, 36)), (slice(10, 13), slice(20, 23), slice(24, 27))):
        body = np.full((40, 60, 60), -1000, np.int16)
        body[:, 5:55, 5:55] = 40
        body[place] = 321
        assert central_contrast(body, (3.0, 3.0, 3.0)).phase == "none"


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 300, 300), (90, 40, 40)])
@pytest.mark.parametrize("value", [-1000, -500, 2000])
def test_volumes_without_a_chest_are_unknown(shape, value):
    measured = central_contrast(np.full(shape, value, np.int16), (1.0, 1.0, 1.0))
    assert (measured.phase, measured.blood_hu) == ("unknown", None)


REAL = {
    "ct_native/lidc_0001": ("angiographic", 399, 15),
    "ct_2mm/cmbcrc_MSB-01068": ("angiographic", 400, 20),
    "ct_2mm/nsclcradiogenomics_R01-001": ("weak", 190, 15),
    "fixtures/totalseg_pulmonary_ctacrop": ("angiographic", 458, 90),
    "ct_2mm/lidc_0314": ("none", 50, 25),
    "ct_2mm/covidctmd_cap001": ("none", 50, 25),
    "ct_2mm/covidctmd_P001": ("none", 50, 25),
    "ct_2mm/pyradiomics_lung1": ("none", 50, 25),
    "ct_2mm/tcga_DE-A4MA": ("none", 50, 25),
    "fixtures/cip_ct64": ("none", 50, 25),
}


@pytest.mark.parametrize("name", REAL)
def test_contrast_of_real_scans(name):
    path = REAL_DATA / f"{name}.nii.gz"
    if not path.is_file():
        pytest.skip("no real data in ../shared/data")
    volume = read_nifti(path)
    measured = central_contrast(volume.hu, volume.spacing_mm)
    phase, blood_hu, tolerance = REAL[name]
    assert measured.phase == phase
    assert measured.blood_hu == pytest.approx(blood_hu, abs=tolerance)


def write(path: Path, hu: np.ndarray, spacing=(2.0, 1.0, 1.0), sidecar: dict | None = None) -> Path:
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = spacing[0], -spacing[1], -spacing[2], 1.0
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".b2nd":
        write_store(path, Volume(hu, affine), {"sidecar": sidecar or {}})
    else:
        write_nifti(path, Volume(hu, affine))
        if sidecar is not None:
            path.with_name(path.name.removesuffix(".gz").removesuffix(".nii") + ".json").write_text(json.dumps(sidecar))
    return path


def test_a_record_has_known_figures(tmp_path):
    hu = np.full((4, 5, 10), -1000, np.int16)
    hu[0] = 40
    hu[1, 0] = -2000
    record = analyse_volume(str(write(tmp_path / "a.nii.gz", hu, (4.0, 1.0, 0.5))), None)
    assert record["shape_dhw"] == [4, 5, 10]
    assert record["spacing_dhw_mm"] == [4.0, 1.0, 0.5]
    assert record["extent_dhw_mm"] == [16.0, 5.0, 5.0]
    assert (record["hu_min"], record["hu_max"]) == (-2000, 40)
    histogram = dict(zip(HISTOGRAM_EDGES_HU[:-1], record["hu_histogram"], strict=True))
    assert {edge: share for edge, share in histogram.items() if share} == {-1100: 0.05, -1000: 0.7, 25: 0.25}
    assert (record["share_padding"], record["share_air"]) == (0.05, 0.75)
    assert (record["sidecar"], record["kvp"], record["kernel"]) == (False, None, None)
    assert "padding below -1500 HU" in record["flags"]
    assert "slices thicker or further apart than 3 mm" in record["flags"]


def test_a_volume_that_is_not_in_hu_is_flagged(tmp_path):
    hu = np.random.default_rng(0).integers(0, 256, (4, 5, 10)).astype(np.int16)
    assert any("not in HU" in flag for flag in analyse_volume(str(write(tmp_path / "a.nii", hu)), None)["flags"])


@pytest.mark.parametrize("ending", ["nii", "b2nd"])
def test_notes_of_the_conversion_are_flags_without_their_text(tmp_path, ending):
    notes = [f"CANARY^JANE: {ENDS_MISSING}", f"every 2. instance is here: {THINNED}", "CANARY", 7, NO_PATIENT_NOTE]
    hu = np.full((4, 5, 10), -1000, np.int16)
    path = write(tmp_path / f"a.{ending}", hu, sidecar={"format": 1, "notes": notes})
    flags = analyse_volume(str(path), None)["flags"]
    assert flags[-3:] == [ENDS_MISSING, THINNED, NO_PATIENT_NOTE]
    assert "CANARY" not in str(flags)
    assert [notes_of({"notes": bad}) for bad in (None, "x", 3, {}, [None])] == [[]] * 5


def test_header_and_blood_that_contradict_are_flagged(tmp_path, phantom):
    for name, blood_hu, noted, flag in (
        ("a", 40, True, "header notes contrast, blood has none"),
        ("b", 300, False, "header notes no contrast, blood has it"),
        ("c", 300, True, None),
    ):
        path = write(tmp_path / f"{name}.nii", with_blood(phantom, blood_hu), phantom.spacing_mm, {"contrast": noted})
        flags = [flag for flag in analyse_volume(str(path), None)["flags"] if "header" in flag]
        assert flags == ([flag] if flag else [])


def test_t45_only_white_listed_fields_are_taken_and_only_in_their_form():
    taken = acquisition_of(SIDECAR | {"kernel": "<script>alert(1)</script>" * 9, "kvp": "DOE", "contrast": "Omnipaque"})
    assert taken == {
        "kvp": None,
        "slice_thickness_mm": 1.0,
        "manufacturer": "Siemens",
        "kernel": "scriptalert1/scriptscriptalert1/",
        "contrast_noted": None,
    }
    for bad in (float("nan"), float("inf"), -120, 0, True, None, [120], {}):
        assert acquisition_of({"kvp": bad})["kvp"] is None


def record(**changes) -> dict:
    shares = [0.0] * (len(HISTOGRAM_EDGES_HU) - 1)
    shares[4] = 1.0
    return {
        "shape_dhw": [100, 512, 512], "spacing_dhw_mm": [1.0, 0.7, 0.7], "extent_dhw_mm": [100.0, 358.4, 358.4],
        "hu_min": -1024, "hu_max": 2000, "hu_histogram": shares, "share_padding": 0.0, "share_air": 0.5,
        "sidecar": True, "kvp": 120.0, "slice_thickness_mm": 1.25, "manufacturer": "GE", "kernel": "STANDARD",
        "contrast_noted": True, "contrast_phase": "angiographic", "blood_hu": 300.0, "blood_core_ml": 50.0, "flags": [],
        "outputs": [],
    } | changes  # fmt: skip


def test_a_summary_has_known_figures():
    records = {"a": record(), "b": record(shape_dhw=[300, 512, 512]), "c": record(kvp=100.0, blood_hu=None)}
    records["d"] = record(kvp=None, kernel=None, contrast_noted=None, flags=["no contrast"], contrast_phase="none")
    summary = summarise_records(records, {"e": "e: broken"})
    assert (summary["volumes"], summary["failed"]) == (4, {"e": "e: broken"})
    assert summary["counts"]["kvp"] == {"120": 2, "100": 1, "not stated": 1}
    assert summary["counts"]["matrix"] == {"512×512": 4}
    assert summary["counts"]["contrast_noted"] == {"yes": 3, "not stated": 1}
    assert summary["distributions"]["depth_vox"]["p50"] == 100
    assert summary["distributions"]["depth_vox"]["mean"] == 150
    assert summary["distributions"]["blood_hu"]["volumes"] == 3
    first = summary["most_common_combinations"][0]
    assert (first["volumes"], first["kvp"], first["kernel"], first["slice_spacing_mm"]) == (2, "120", "STANDARD", "1")
    assert summary["flags"] == {"no contrast": 1}
    assert sum(summary["hu_histogram"]["mean_share"]) == pytest.approx(1.0)
    assert json.loads(json.dumps(summary)) == summary


class Page(HTMLParser):
    """What a page shows and what it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_data(self, data):
        self.text += data


def test_the_page_opens_without_a_network_and_escapes_what_it_shows():
    records = {"<img src=x onerror=alert(1)>": record(flags=["no contrast"], kernel="$\\frac{", contrast_phase="none")}
    summary = summarise_records(records, {"b": "b: <script>alert(1)</script>"})
    page = Page(render_page(summary, records))
    assert "script" not in page.tags
    assert page.tags.count("img") == 11
    assert all(address.startswith("data:image/png;base64,") for address in page.fetched)
    for address in page.fetched:
        assert base64.b64decode(address.partition(",")[2]).startswith(b"\x89PNG")
    assert "onerror=alert(1)" in page.text
    assert "<script>" in page.text


@pytest.mark.parametrize("count", [0, 60])
def test_the_page_of_none_and_of_many(count):
    records = {f"volume {i}": record(blood_hu=100.0 + i, shape_dhw=[50 + i, 512, 512]) for i in range(count)}
    page = Page(render_page(summarise_records(records, {}), records))
    assert f"{count} volumes" in page.text
    assert ("Nothing was flagged" in page.text) == (count > 0)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    script = ROOT / "preprocess" / "analyze_dataset.py"
    return subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_end_to_end_one_bad_patient_stops_nothing(tmp_path, phantom):
    data, output = tmp_path / "data", tmp_path / "analysis"
    write(data / "p1" / "a.nii.gz", with_blood(phantom, 300), phantom.spacing_mm, SIDECAR)
    write(
        data / "p2" / "a.b2nd", with_blood(phantom, 45), phantom.spacing_mm, SIDECAR | {"kvp": 120, "contrast": False}
    )
    bad = data / "p3.nii.gz"
    bad.write_bytes((data / "p1" / "a.nii.gz").read_bytes()[:5000])
    write(data / "p4.nii", with_blood(phantom, 150), phantom.spacing_mm).with_name("p4.json").write_text("{")
    result = run("--input", data, "--output", output)
    assert result.returncode == 4, result.stderr
    assert_one_line_error(result, "2 of 4 failed")
    assert "p3.nii.gz: truncated" in result.stderr
    assert "p4.json: no usable sidecar" in result.stderr
    summary = json.loads((output / "dataset_analysis.json").read_text())
    assert list(summary["by_volume"]) == ["p1/a.nii.gz", "p2/a.b2nd"]
    assert list(summary["failed"]) == ["p3.nii.gz", "p4.nii"]
    assert summary["counts"]["kvp"] == {"100": 1, "120": 1}
    assert summary["counts"]["contrast_phase"] == {"angiographic": 1, "none": 1}
    page = Page((output / "dataset_analysis.html").read_text())
    assert "p3.nii.gz" in page.text
    for path in output.iterdir():
        assert b"DOE" not in path.read_bytes()
    # the repaired sidecar is noticed, what was done is not done again, and one bad volume remains
    (data / "p4.json").write_text("{}")
    again = run("--input", data, "--output", output, "--resume")
    assert again.returncode == 4
    assert re.search(r"3 of 4 volumes analysed \(2 were done already\)", again.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prepare", "code", "word"),
    [("none", 2, "no such folder"), ("empty", 3, "holds no .nii"), ("bad", 3, "a.nii.gz")],
)
def test_end_to_end_refusals(tmp_path, prepare, code, word):
    data = tmp_path / "data"
    if prepare != "none":
        data.mkdir()
    if prepare == "bad":
        (data / "a.nii.gz").write_bytes(b"no NIfTI")
    result = run("--input", data, "--output", tmp_path / "out")
    assert result.returncode == code, result.stderr
    assert_one_line_error(result, word)
