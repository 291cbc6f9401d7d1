"""The report's page: what it finds in a folder, and that nobody's text becomes markup."""

import base64
import gzip
import hashlib
import json
import math
import re
from html.parser import HTMLParser

import pytest

from errors import InputError
from evaluation import report_sections
from evaluation.report_cases import _sampling
from evaluation.report_collect import collect
from evaluation.report_page import _ASSETS, Volumes, page
from tests.evaluation.report_material import (
    HOSTILE,
    lopsided,
    write_codec_metrics,
    write_generation,
    write_run,
)


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


def test_settings_of_an_evaluation_are_followed_only_where_they_make_sense():
    known = {"steps": 7, "sampler": "ddim", "guidance": 2.0, "rescale": 0, "seed": 3}
    assert _sampling(known | {"model": "abc"}) == known
    for damage in ({"steps": "7"}, {"steps": 10**9}, {"sampler": 4}, {"guidance": math.nan}, {"seed": -1}):
        assert _sampling(known | damage) == {}


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
