"""The report's charts, tables and pictures."""

import base64
import gzip
import io
import json
import math
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dataset.volume_io import read_nifti
from evaluation import report_sections
from evaluation.report_cases import _sampling
from evaluation.report_charts import Line, _ticks, line_chart
from evaluation.report_clinical import clinical_tables, lesion_table
from evaluation.report_collect import Found, Result, collect, mapping, number
from evaluation.report_pictures import MAX_VOXELS, data_uri, embedded_nifti, projection, radiographs
from evaluation.report_samplers import sampler_tables
from evaluation.report_tables import codec_table, estimate, generation_tables, plain
from evaluation.sampler_verdict import judge
from tests.evaluation.report_material import (
    BLOCK,
    HOSTILE,
    SPACING_MM,
    lopsided,
    write_codec_metrics,
    write_generation,
)
from tests.evaluation.test_sampler_verdict import row


@given(low=st.floats(-1e20, 1e20), span=st.floats(0, 1e20))
def test_ticks_enclose_any_range(low, span):
    high = low + span
    ticks = _ticks(low, high)
    slack = 1e-6 * max(abs(low), abs(high), 1e-300)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= 9
    assert ticks == sorted(set(ticks))


def test_a_chart_draws_large_values_high_and_skips_what_has_no_logarithm():
    svg = line_chart([Line("a", [(0, 1.0), (10, 100.0)]), Line(HOSTILE, [(0, 0.0), (5, 10.0)])], "x", "y", log_y=True)
    drawing = ElementTree.fromstring(svg[svg.index("<svg") :])
    (first, second) = (line.attrib["points"].split() for line in drawing.iter("polyline"))
    (x0, y0), (x1, y1) = (map(float, place.split(",")) for place in first)
    assert x0 < x1
    assert y0 > y1  # downwards on the page
    assert len(second) == 1
    _, middle = map(float, second[0].split(","))
    assert middle == pytest.approx((y0 + y1) / 2, abs=0.2)  # 10 lies half-way from 1 to 100
    assert HOSTILE not in svg
    assert line_chart([Line("a", [(0, 0.0)])], "x", "y", log_y=True) == ""
    assert line_chart([], "x", "y") == ""


def test_a_long_curve_keeps_its_mean_and_its_end():
    points = [(float(step), float(step % 2)) for step in range(8_000)]
    svg = line_chart([Line("a", points)], "x", "y")
    drawing = ElementTree.fromstring(svg[svg.index("<svg") :])
    (line,) = (line.attrib["points"].split() for line in drawing.iter("polyline"))
    assert len(line) <= 400
    heights = [float(place.split(",")[1]) for place in line]
    assert max(heights) - min(heights) < 1  # means of neighbours, no aliased zigzag
    assert float(line[-1].split(",")[0]) == pytest.approx(max(float(place.split(",")[0]) for place in line))


def test_estimates_and_numbers_show_what_is_known():
    assert estimate({"estimate": 1.234, "low": 1.0, "high": 2.0}, "{:.2f}") == "1.23 [1.00, 2.00]"
    assert estimate({"estimate": 1.234, "low": None, "high": 2.0}, "{:.2f}") == "1.23"
    assert estimate({"estimate": None}, "{:.2f}") == estimate("1", "{:.2f}") == plain("1", "{:.2f}") == "–"
    assert plain(True, "{:.2f}") == plain(math.inf, "{:.2f}") == "–"
    assert math.isnan(number(10**400))
    assert mapping({"a": {"b": 1}}, "a", "b") == mapping([], "a") == {}


def test_tables_hold_the_figures_of_the_files(tmp_path):
    result = Result("evaluation", tmp_path, json.loads(write_generation(tmp_path).read_text()))
    html = generation_tables(result)
    for text in ("4 held-out patients", "20.00 [19.00, 21.00]", "2.50 [1.50, 3.50]", "another patient", "missed", "–"):
        assert text in html
    for text in ("PSNR per slice", "bias, HU", "body volume", "drawn without looking passes"):
        assert text in html
    seen = json.loads(write_generation(tmp_path, split="training").read_text())
    assert "4 patients OF THE TRAINING" in generation_tables(Result("evaluation", tmp_path, seen))
    assert "model is told" not in html  # an evaluation that does not say it
    told = json.loads(write_generation(tmp_path, split="test", told=["radiograph"]).read_text())
    html = generation_tables(Result("evaluation", tmp_path, told))
    assert "4 patients of the test set; the model is told the X-ray alone;" in html
    told["settings"]["told"] += ["report", "label"]
    told["summary"]["bars"].append({"bar": "patients evaluated", "low": 4, "asked": 64, "passed": False})
    html = generation_tables(Result("evaluation", tmp_path, told))
    assert "told the patient&#x27;s own report and label" in html
    assert "<td>4</td><td>64</td><td>missed</td>" in html
    html = codec_table(Result("codec", tmp_path, json.loads(write_codec_metrics(tmp_path).read_text())))
    for text in ("31.25", "-1.0", "mean of 1", "50.0 %", "perplexity 100", "2000 HU"):
        assert text in html
    summary = {
        "cases": 30,
        "with_embolism": 12,
        "auroc": {"real": {"estimate": 0.875, "low": 0.75, "high": 1.0}},
        "delong": [{"first": "real", "second": "xray", "difference": {"estimate": 0.25}, "p_value": 0.0125}],
        "dice": {
            "scan": {"generated": {"body": {"estimate": 0.97}, "vessels": {"estimate": 0.4, "low": 0.3, "high": 1}}}
        },
        "lesions": {"survival": {"codec": {"all": {"lesions": 7, "survived": {"estimate": 0.5}, "kept": 0.25}}}},
        "conclusive": True,
    }
    html = clinical_tables(Result("clinical", tmp_path, {"summary": summary}))
    for text in (
        "12 with embolism",
        "0.875 [0.750, 1.000]",
        "the X-ray alone",
        "+0.250",
        "0.0125",
        "after the codec, all",
        "Dice with the segmentation of the scan",
        "<td>0.970</td><td>–</td><td>–</td><td>0.400 [0.300, 1.000]</td>",
    ):
        assert text in html
    assert "INCONCLUSIVE" not in html
    for verdict in ({"conclusive": False}, {"conclusive": "yes"}):
        html = clinical_tables(Result("clinical", tmp_path, {"summary": summary | verdict}))
        assert html.index("INCONCLUSIVE") < html.index("<table")
    lesions = {"survival": {"6-10 mm": {"lesions": 9, "patients": 4, "survived": {"estimate": 1 / 3}, "kept": 0.5}}}
    html = lesion_table(Result("lesions", tmp_path, lesions))
    assert "6-10 mm" in html
    assert "<td>33</td><td>50</td>" in html


def test_the_table_of_samplers_with_its_verdicts(tmp_path):
    rows = [row(10), row(250), row(10, sampler="heun"), row(0, 25.5, sampler="codec")]
    content = {"cases": 24, "features": "3-D, <the codec>", "split": "test", "rows": rows, "verdicts": judge(rows)}
    (tmp_path / "samplers.json").write_text(json.dumps(content))
    (tmp_path / "interrupted").mkdir()
    (tmp_path / "interrupted" / "samplers.json").write_text(json.dumps(content | {"verdicts": {}}))
    (result,) = collect([tmp_path]).results["samplers"]
    html = sampler_tables(result)
    for text in (
        "24 patients of the test set", "3-D, &lt;the codec&gt;", "ddim, 250", "the true codes, decoded", "25.50",
        "1 [0.9, 1.1]", "10 against 250", "<td>1.000</td><td>1.000 [1.000, 1.000]</td><td>as good</td>",
        "no verdict, no run of 250 steps",
    ):  # fmt: skip
        assert text in html, text
    assert sampler_tables(Result("", tmp_path, {"rows": [1, {}], "verdicts": {"a": 1, "b": {"candidates": [1, {}]}}}))


_KEYS = [
    *(
        "summary",
        "scores",
        "gains",
        "right",
        "psnr_db",
        "estimate",
        "bars",
        "bar",
        "auroc",
        "delong",
        "mean",
        "volumes",
    ),
    *("correlations", "mirror", "cone", "first", "survival", "lesions", "codec", "survived", "cases"),
]
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([HOSTILE, "estimate", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([HOSTILE, *_KEYS]), inner, max_size=5),
    max_leaves=25,
)


@settings(max_examples=60, deadline=None)
@given(content=st.dictionaries(st.sampled_from(["summary", "volumes", "mean", "survival", "settings"]), _JSON))
def test_t44_whatever_a_json_holds_makes_a_page_without_its_markup(content):
    result = Result(HOSTILE, None, content)
    found = Found(results={part: [result] for part in ("generation", "codec_metrics", "clinical", "lesions")})
    html = report_sections.write_report(found, 0, "cpu")
    assert "<img" not in html
    assert "onerror=alert(1)>" not in html
    _sampling(mapping(content, "settings"))


def test_a_small_volume_is_embedded_exactly(tmp_path):
    case = lopsided()
    content, shape = embedded_nifti(case.truth_hu, case.affine)
    path = tmp_path / "volume.nii.gz"
    path.write_bytes(content)
    volume = read_nifti(path)
    assert shape == volume.hu.shape == case.truth_hu.shape
    assert np.array_equal(volume.hu, case.truth_hu)
    assert np.allclose(volume.affine, case.affine)
    # axes of the file as the plain viewer takes them: W fastest, then H, then D, from byte 352
    raw = gzip.decompress(content)
    d, h, w = 20, 5, 30
    voxels = np.frombuffer(raw, dtype="<i2", offset=352)
    assert voxels[w + 40 * (h + 40 * d)] == case.truth_hu[d, h, w] == 350
    assert np.frombuffer(raw, dtype="<f4", count=1, offset=108)[0] == 352


def test_a_large_volume_is_made_smaller_in_the_same_field(tmp_path):
    hu = np.zeros((64, 200, 160), dtype=np.int16)
    hu[:, :, 80:] = 400
    affine = np.array([[0, 0, -2, 100], [0, -2, 0, 100], [4, 0, 0, -100], [0, 0, 0, 1]], dtype=np.float64)
    content, (d, h, w) = embedded_nifti(hu, affine)
    assert MAX_VOXELS * 0.9 < d * h * w <= MAX_VOXELS
    path = tmp_path / "volume.nii.gz"
    path.write_bytes(content)
    volume = read_nifti(path)
    assert np.allclose(np.multiply(volume.hu.shape, volume.spacing_mm), [64 * 4, 400, 320], rtol=1e-5)
    assert volume.hu[d // 2, h // 2, 2] == 0
    assert volume.hu[d // 2, h // 2, -3] == 400


def test_pictures_are_upright_and_radiological():
    case = lopsided()
    shown = projection(case.truth_hu, case.spacing_mm)
    body = np.argwhere(shown > shown.max() * 0.2).mean(0)
    block = np.argwhere(shown > shown.max() * 0.9).mean(0)
    assert block[0] < body[0]  # superior is up
    assert block[1] > body[1]  # the patient's left is on the right
    html = radiographs(case)
    assert html.count("<img") == 4
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7), dtype=np.uint8)
    encoded = base64.b64decode(data_uri(pixels).split(",")[1])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encoded)).convert("L")), pixels)
    assert case.spacing_mm == (SPACING_MM,) * 3
    assert case.truth_hu[BLOCK].min() == 350
