"""The report: what it finds in a folder, its charts, tables, pictures and page; nobody's text becomes markup."""

import base64
import gzip
import hashlib
import io
import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dataset.volume_io import read_nifti
from errors import InputError
from evaluation import report_sections
from evaluation.report_cases import _sampling
from evaluation.report_charts import Line, _ticks, line_chart
from evaluation.report_clinical import clinical_tables, lesion_table
from evaluation.report_collect import Found, Result, collect, mapping, number
from evaluation.report_page import _ASSETS, Volumes, page
from evaluation.report_pictures import MAX_VOXELS, data_uri, embedded_nifti, projection, radiographs
from evaluation.report_tables import codec_table, estimate, generation_tables, plain
from tests.evaluation.report_material import (
    BLOCK,
    SPACING_MM,
    lopsided,
    write_codec_metrics,
    write_generation,
    write_run,
)

HOSTILE = "<img src=x onerror=alert(1)>\"'&</script>"


class Markup(HTMLParser):
    """Tags, and every attribute by which a browser would load or run something."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.loads, self.handlers = set(), [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "poster", "data")]
        self.handlers += [name for name, _ in attrs if name.startswith("on") or name == "style"]


def write_report(found, cases=(), monkeypatch=None):
    """The page, with these patients in place of a run's."""
    if monkeypatch is not None:
        monkeypatch.setattr(report_sections, "cases_of", lambda *_: iter(cases))
    return report_sections.write_report(found, len(cases), "cpu")


def without_assets(html):
    """The page without the vendored viewer, whose comments name web pages."""
    return re.sub(r"<script>.*?</script>|<style>.*?</style>|<pre>.*?</pre>", "", html, flags=re.S)


def test_finds_runs_and_results_at_any_depth(tmp_path):
    write_run(tmp_path / "codec")
    write_run(tmp_path / "deep" / "ddpm", "diffusion")
    write_run(tmp_path / "pe", "classifier")
    write_codec_metrics(tmp_path / "codec" / "sample_reconstructions")
    write_generation(tmp_path / "evaluation")
    (tmp_path / "clinical").mkdir()
    clinical = {"settings": {}, "summary": {"auroc": {"real": {"estimate": 0.9}}}, "patients": {}}
    (tmp_path / "clinical" / "report.json").write_text(json.dumps(clinical))
    (tmp_path / "other" / "report.json").parent.mkdir()
    (tmp_path / "other" / "report.json").write_text("{}")
    found = collect([tmp_path])
    assert [(run.name, run.kind) for run in found.runs] == [
        ("codec", "codec"),
        ("deep/ddpm", "diffusion"),
        ("pe", "classifier"),
    ]
    assert {part: [one.name for one in results] for part, results in found.results.items()} == {
        "codec_metrics": ["codec/sample_reconstructions"],
        "generation": ["evaluation"],
        "clinical": ["clinical"],
    }
    assert found.damaged == []
    # what is no number is no point: a NaN, and a row that a kill cut short
    assert found.runs[0].curves["train"].columns["l1"] == [(10.0, 0.5), (30.0, 0.125)]


def test_results_inside_a_run_bring_the_run(tmp_path):
    write_run(tmp_path / "run", "diffusion")
    write_generation(tmp_path / "run" / "xray_to_ct")
    found = collect([tmp_path / "run" / "xray_to_ct"])
    assert [run.name for run in found.runs] == ["run"]
    assert len(found.results["generation"]) == 1
    # given twice, found once
    again = collect([tmp_path / "run", tmp_path / "run" / "xray_to_ct"])
    assert (len(again.runs), len(again.results["generation"])) == (1, 1)


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        collect([tmp_path / "none"])
    (tmp_path / "notes.json").write_text("{}")
    with pytest.raises(InputError, match="holds no training run"):
        collect([tmp_path])


def test_damaged_parts_are_named_and_the_rest_is_reported(tmp_path):
    write_run(tmp_path / "good")
    bad = write_run(tmp_path / "bad")
    (bad / "config.yaml").write_text("model: {code_channels: [4\n")
    (write_run(tmp_path / "log") / "logs" / "train.csv").write_bytes(b"step,l1\n\xff\xfe,1\n")
    metrics = write_codec_metrics(tmp_path / "metrics")
    metrics.write_text(metrics.read_text()[:40])
    found = collect([tmp_path])
    assert [run.name for run in found.runs] == ["good", "log"]
    assert len(found.damaged) == 3
    assert any("bad: config.yaml" in line for line in found.damaged)
    assert any("log/logs/train.csv" in line for line in found.damaged)
    assert any("metrics/metrics.json" in line for line in found.damaged)
    assert str(tmp_path) not in " ".join(found.damaged)
    assert "3 damaged parts" in write_report(found)


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
    html = codec_table(Result("codec", tmp_path, json.loads(write_codec_metrics(tmp_path).read_text())))
    for text in ("31.25", "-1.0", "mean of 1", "50.0 %", "perplexity 100", "2000 HU"):
        assert text in html
    summary = {
        "cases": 30,
        "with_embolism": 12,
        "auroc": {"real": {"estimate": 0.875, "low": 0.75, "high": 1.0}},
        "delong": [{"first": "real", "second": "xray", "difference": {"estimate": 0.25}, "p_value": 0.0125}],
        "lesions": {"survival": {"codec": {"all": {"lesions": 7, "survived": {"estimate": 0.5}, "kept": 0.25}}}},
    }
    html = clinical_tables(Result("clinical", tmp_path, {"summary": summary}))
    for text in (
        "12 with embolism",
        "0.875 [0.750, 1.000]",
        "the X-ray alone",
        "+0.250",
        "0.0125",
        "after the codec, all",
    ):
        assert text in html
    lesions = {"survival": {"6-10 mm": {"lesions": 9, "patients": 4, "survived": {"estimate": 1 / 3}, "kept": 0.5}}}
    html = lesion_table(Result("lesions", tmp_path, lesions))
    assert "6-10 mm" in html
    assert "<td>33</td><td>50</td>" in html


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


def test_settings_of_an_evaluation_are_followed_only_where_they_make_sense():
    known = {"steps": 7, "sampler": "ddim", "guidance": 2.0, "rescale": 0, "seed": 3}
    assert _sampling(known | {"model": "abc"}) == known
    for damage in ({"steps": "7"}, {"steps": 10**9}, {"sampler": 4}, {"guidance": math.nan}, {"seed": -1}):
        assert _sampling(known | damage) == {}


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


def test_the_page_loads_nothing_and_runs_only_its_own_scripts(tmp_path, monkeypatch):
    write_run(tmp_path / "codec")
    write_generation(tmp_path / "evaluation")
    html = write_report(collect([tmp_path]), [lopsided(HOSTILE)], monkeypatch)
    markup = Markup(html)
    assert {"img", "svg", "canvas", "table"} <= markup.tags
    assert not markup.tags & {"link", "iframe", "object", "embed", "base", "form"}
    assert all(value.startswith(("data:image/webp;base64,", "#")) for value in markup.loads)
    assert markup.handlers == []
    assert not re.search(r"url\(|@import", re.search(r"<style>(.*?)</style>", html, flags=re.S)[1])
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)[1]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["connect-src"] == "data: blob:"
    scripts = re.findall(r"<script>(.*?)</script>", html, flags=re.S)
    assert len(scripts) == 2
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts]
    assert rules["script-src"].split() == hashes
    assert "unsafe" not in policy
    assert html.index("Content-Security-Policy") < html.index("<script")
    # the name stands there as text, three times: heading, viewer and none as markup
    assert HOSTILE not in html
    assert "&lt;img src=x onerror=alert(1)&gt;" in html
    data = json.loads(re.search(r'id="viewer-data">(.*?)</script>', html)[1])
    assert data["cases"][0]["name"] == HOSTILE
    assert [volume["shape"] for volume in data["cases"][0]["volumes"]] == [[40, 40, 40]] * 3
    for volume in data["cases"][0]["volumes"]:
        content = re.search(rf'id="{volume["id"]}">([^<]*)</script>', html)[1]
        assert gzip.decompress(base64.b64decode(content))


def test_assets_can_be_embedded_and_are_what_they_say():
    viewer = (_ASSETS / "niivue.umd.js").read_bytes()
    licence = (_ASSETS / "niivue.LICENSE").read_text()
    assert hashlib.sha256(viewer).hexdigest() in licence
    assert "Redistribution and use in source and binary forms" in licence
    for name in ("niivue.umd.js", "viewer.js", "report.css"):
        text = (_ASSETS / name).read_text().lower()
        assert "</script" not in text
        assert "<!--" not in text
    assert "</style" not in (_ASSETS / "report.css").read_text().lower()


def test_without_volumes_there_is_no_script_at_all():
    html = page("title", [("a", "A", "<p>text</p>"), ("b", "B", "")], Volumes(), "subtitle")
    assert "<script" not in html
    assert "script-src 'none'" in html
    assert 'id="b"' not in html


def test_what_was_never_made_is_said_with_its_command(tmp_path):
    write_codec_metrics(tmp_path / "run")
    html = write_report(collect([tmp_path]))
    for text in ("No diffusion training", "ddpm/train/train_ddpm.py", "No table of generated volumes", "xray_to_ct.py"):
        assert text in html
    for text in ("clinical.py", "lesion_survival.py", "--samples 4"):
        assert text in html
    assert "No table of reconstructions" not in html
    assert "31.25" in html


def test_several_results_of_a_kind_are_told_apart_in_short(tmp_path):
    write_generation(tmp_path / "first")
    html = write_report(collect([tmp_path]))
    assert "<span>first</span>" not in html
    write_generation(tmp_path / "second")
    html = write_report(collect([tmp_path]))
    tiles = html.split('<div class="tiles">')[1].split("</section>")[0]
    assert tiles.count("<span>first</span>") == tiles.count("<span>second</span>") == tiles.count('class="tile"') / 2


def test_t45_no_path_and_no_canary_of_a_file_is_on_the_page(tmp_path, monkeypatch):
    folder = tmp_path / "Canary^Folder" / "run"
    write_run(folder / "codec")
    write_run(folder / "ddpm", "diffusion")
    write_generation(folder / "evaluation", model=str(tmp_path / "Canary^Model"))
    write_codec_metrics(folder / "codec" / "sample_reconstructions")
    html = write_report(collect([folder]), [lopsided()], monkeypatch)
    text = without_assets(html)
    assert "left out 1 patients" in text
    assert "Canary" not in text
    assert str(tmp_path) not in text
    assert "secret" not in text
