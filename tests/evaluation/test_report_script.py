"""``evaluation/report.py`` from the command line, on runs that the real scripts made."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ddpm.tiny import ddpm_command
from tests.evaluation.report_material import write_codec_metrics, write_run
from tests.helpers import BASELINE, ROOT, assert_one_line_error, environment, run

REPORT = "evaluation/report.py"


def script(name, *arguments, cwd, check=0):
    """Run a script; 600 s allow for a loaded machine."""
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=600)
    assert result.returncode == check, f"exit {result.returncode}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder as the demo leaves it: a codec, a diffusion model on it, and the evaluations of both."""
    folder = tmp_path_factory.mktemp("demo")
    cache = f"dataset.cache_dir={folder / '.cache'}"
    run(BASELINE, "training.max_steps=4", f"output_dir={folder / 'codec'}", cache, "logger.every_n_steps=1", cwd=folder)
    script("evaluation/reconstruct.py", "--run", folder / "codec", cwd=folder)
    codec = folder / "codec" / "checkpoints" / "final.ckpt"
    overrides = ["training.max_steps=4", "dataset.n_patients=8", "dataset.validation_fraction=0.5"]
    sizes = ["dataset.size=[16,32,32]", "logger.every_n_steps=1", cache, f"output_dir={folder / 'ddpm'}"]
    command = ddpm_command(codec, *overrides, *sizes)
    result = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    flags = ("--run", folder / "ddpm", "--output", folder / "evaluation", "--steps", 2, "--seed", 3, "--pictures", 0)
    script("evaluation/xray_to_ct.py", *flags, cwd=folder)
    return folder


@pytest.mark.slow
def test_a_demo_folder_becomes_one_page(demo, tmp_path):
    before = sorted(path for path in demo.rglob("*") if path.is_file() and ".cache" not in path.parts)
    result = script(REPORT, "--run", demo, "--cases", 2, cwd=tmp_path)
    html = (demo / "report.html").read_text()
    assert str(demo / "report.html") in result.stdout
    records = json.loads((demo / "evaluation" / "report.json").read_text())
    names = records["settings"]["cases"][:2]
    for name in names:
        assert f"<h3>{name}</h3>" in html
    # the pictures are of the volumes that were scored: the same steps, seed and noise
    assert "2 steps of dpm_solver_pp_2m, guidance 1, seed 3" in html
    for name in names:
        article = html.split(f"<h3>{name}</h3>")[1].split("</article>")[0]
        scores = records["patients"][name]["scores"]
        for role, heading in (("right", "generated from the X-ray"), ("codec", "codec&#x27;s reconstruction")):
            row = re.search(rf'<th scope="row">{heading}</th><td>([^<]*)</td>', article)
            assert float(row[1]) == pytest.approx(scores[role]["psnr_body_db"], abs=0.02)
        assert article.count("<img") == 4 + 6
        assert "<polyline" in article
    for text in ("Codec: codec", "Diffusion: ddpm", "Samples of held-out patients", "linear regression on the X-ray"):
        assert text in html
    missing = html.split('id="missing"')[1].split("</section>")[0]
    for text in ("No codec training", "No diffusion training", "No table of", "No pictures"):
        assert text not in missing
    for text in ("No diversity of samples", "No evaluation of embolism", "No survival of emboli"):
        assert text in missing
    # it reads, and writes nothing but the page
    after = sorted(path for path in demo.rglob("*") if path.is_file() and ".cache" not in path.parts)
    assert set(after) - set(before) == {demo / "report.html"}
    # no path of this machine, outside the vendored viewer and its licence
    own = re.sub(r"<script>.*?</script>|<pre>.*?</pre>", "", html, flags=re.DOTALL)
    for secret in (str(demo), str(Path.home()), str(ROOT)):
        assert secret not in own


@pytest.mark.slow
def test_a_codec_run_alone_shows_truth_and_reconstruction(demo, tmp_path):
    output = tmp_path / "new" / "page.html"
    script(REPORT, "--run", demo / "codec", "--output", output, cwd=tmp_path)
    html = output.read_text()
    assert "No diffusion training" in html
    assert "train_ddpm.py" in html
    name = next(iter(json.loads((demo / "codec" / "sample_reconstructions" / "metrics.json").read_text())["volumes"]))
    assert f"<h3>{name}</h3>" in html
    assert "reconstructed" in html
    assert "generated from the X-ray" not in html


@pytest.mark.slow
def test_t06_a_damaged_checkpoint_leaves_the_rest_and_exits_4(demo, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(demo / "ddpm", copy / "ddpm")
    shutil.copytree(demo / "evaluation", copy / "evaluation")
    checkpoint = copy / "ddpm" / "checkpoints" / "final.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    result = script(REPORT, "--run", copy, cwd=tmp_path, check=4)
    assert "Traceback" not in result.stderr
    assert str(checkpoint) in result.stderr
    html = (copy / "report.html").read_text()
    assert "damaged parts are left out" in html
    assert str(tmp_path) not in html
    assert "another patient" in html
    assert 'id="viewer"' not in html


def test_bad_arguments_are_told_in_one_line(tmp_path):
    assert_one_line_error(script(REPORT, "--run", tmp_path / "none", cwd=tmp_path, check=3), "none", "--run")
    assert_one_line_error(script(REPORT, "--run", tmp_path, "--cases", -1, cwd=tmp_path, check=2), "--cases -1")
    assert_one_line_error(script(REPORT, "--run", tmp_path, cwd=tmp_path, check=3), str(tmp_path), "holds no training")


@pytest.mark.slow
def test_t05_an_unwritable_place_exits_6_and_keeps_the_old_page(tmp_path):
    write_run(tmp_path / "run")
    write_codec_metrics(tmp_path / "run" / "sample_reconstructions")
    (tmp_path / "file").write_text("in the way")
    flags = ("--run", tmp_path / "run", "--cases", 0, "--output")
    refused = script(REPORT, *flags, tmp_path / "file" / "report.html", cwd=tmp_path, check=6)
    assert_one_line_error(refused, str(tmp_path / "file"), "--output")
    script(REPORT, *flags, tmp_path / "report.html", cwd=tmp_path)
    page = (tmp_path / "report.html").read_bytes()
    assert b"31.25" in page
    (tmp_path / "report.html").chmod(0o640)
    script(REPORT, *flags, tmp_path / "report.html", cwd=tmp_path)  # again: the same page
    assert (tmp_path / "report.html").read_bytes() == page
