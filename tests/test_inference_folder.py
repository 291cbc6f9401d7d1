"""Folders of radiographs and results: what goes on, what is replaced, and which reports and views belong to whom."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset.volume_io import read_nifti
from errors import ExitCode
from tests.dataset.xray_factory import eight_bit, radiograph, save_dicom, save_picture
from tests.helpers import assert_one_line_error
from tests.inference_model import Run, contents, small_bundle

pytest_plugins = ["tests.inference_command"]


def test_a_run_goes_on_where_it_stopped(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = tmp_path / "x", tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    for name, turn in (("a.png", 0), ("sub/b.png", 1), ("c.png", 2)):
        Image.fromarray(np.rot90(radiograph(), turn).copy()).save(folder / name)
    (folder / "notes.txt").write_text("not a radiograph")
    (folder / ".hidden.png").write_bytes(b"")
    run(folder, output="whole")
    expected = contents(tmp_path / "whole")
    assert {name for name in expected if name.endswith(".gz")} == {"a.nii.gz", "c.nii.gz", "sub-b.nii.gz"}

    from ddpm.ctpa_volume import CTPAVolume

    real, calls = CTPAVolume.save_nifti, []

    def killed(self, path):
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        return real(self, path)

    monkeypatch.setattr(CTPAVolume, "save_nifti", killed)
    run(folder, check=ExitCode.SIGINT)
    monkeypatch.setattr(CTPAVolume, "save_nifti", real)
    before = (out / "a.nii.gz").stat().st_mtime_ns
    result = run(folder)
    assert result.stdout.count("there already") == 1
    assert contents(out) == expected
    assert (out / "a.nii.gz").stat().st_mtime_ns == before
    # a damaged result is made again, and one that gains a picture
    (out / "c.nii.gz").write_bytes(b"damaged")
    assert run(folder).stdout.count("there already") == 2
    assert contents(out) == expected
    run(folder / "a.png", "--png")
    assert {name: content for name, content in contents(out).items() if "a_panel" not in name
            and "a.prov" not in name}.items() <= expected.items()  # fmt: skip
    assert (out / "a_panel.png").is_file()


def test_another_result_is_never_overwritten_in_silence(run: Run, tmp_path: Path) -> None:
    picture, out = save_picture(tmp_path / "p.png", "L"), tmp_path / "out"
    run(picture, "--samples", "2", "--dicom")
    before = contents(out)
    for options, word in ((["--seed", "1"], "seed"), (["--guidance", "2"], "guidance"), (["--steps", "3"], "steps")):
        options = ["--samples", "2", *options]
        assert_one_line_error(run(picture, *options, check=2), "of another", word, "--overwrite")
    assert contents(out) == before
    # another picture under the same name
    Image.fromarray(eight_bit()[::-1].copy()).save(picture)
    assert_one_line_error(run(picture, "--samples", "2", check=3), "p.nii.gz", "xrays", "--overwrite")
    assert contents(out) == before
    run(picture, "--seed", "1", "--dicom", "--overwrite")
    after = contents(out)
    assert "p_sample_2.nii.gz" not in after  # of the old result
    assert after["p.nii.gz"] != before["p.nii.gz"]
    assert len([name for name in after if name.startswith("p_dicom/")]) == 16
    # a file that this command did not make
    (tmp_path / "own").mkdir()
    (tmp_path / "own/p.nii.gz").write_bytes(b"somebody's CT")
    assert_one_line_error(run(picture, output="own", check=2), "p.nii.gz", "not made by this command")
    assert (tmp_path / "own/p.nii.gz").read_bytes() == b"somebody's CT"


def test_lateral_views_are_found_by_name(run: Run, tmp_path: Path) -> None:
    two = small_bundle(tmp_path / "two.ckpt", conditioner={"views": ["frontal", "lateral"]})
    for folder in ("f", "l"):
        (tmp_path / folder).mkdir()
    for name in ("a", "b"):
        save_picture(tmp_path / f"f/{name}.png", "L")
    save_dicom(tmp_path / "l/a.dcm", radiograph().T.copy(), ViewPosition="LL", PatientOrientation=["P", "F"])
    run(tmp_path / "f", "--lateral", str(tmp_path / "l"), checkpoint=two)
    a, b = (json.loads((tmp_path / f"out/{name}.provenance.json").read_text())["provenance"] for name in "ab")
    assert [entry["view"] for entry in a["xrays"]] == ["frontal", "lateral"]
    assert [entry["view"] for entry in b["xrays"]] == ["frontal"]
    assert not np.array_equal(*(read_nifti(tmp_path / f"out/{name}.nii.gz").hu for name in "ab"))


def test_reports_are_found_by_name_and_labels_count(run: Run, tmp_path: Path) -> None:
    told = small_bundle(tmp_path / "told.ckpt", conditioner={"text": "bytes", "label": True})
    for folder in ("x", "reports"):
        (tmp_path / folder).mkdir()
    for name in "ab":
        save_picture(tmp_path / f"x/{name}.png", "L")
    (tmp_path / "reports/a.txt").write_text("Filling defect in the right lower lobe artery.\n")
    reports = str(tmp_path / "reports")
    run(tmp_path / "x", "--report", reports, checkpoint=told)
    facts = {n: json.loads((tmp_path / f"out/{n}.provenance.json").read_text())["provenance"] for n in "ab"}
    expected = hashlib.sha256(b"Filling defect in the right lower lobe artery.").hexdigest()
    assert (facts["a"]["text_sha256"], facts["b"]["text_sha256"]) == (expected, None)
    a, b = (read_nifti(tmp_path / f"out/{n}.nii.gz").hu for n in "ab")
    assert not np.array_equal(a, b)  # one radiograph: the report makes the difference
    run(tmp_path / "x", "--report", reports, "--label", "1", checkpoint=told, output="pe")
    assert not np.array_equal(read_nifti(tmp_path / "pe/b.nii.gz").hu, b)
    assert_one_line_error(run(tmp_path / "x", "--report", reports, check=2, output="o"), "without reports")
    assert_one_line_error(run(tmp_path / "x", "--label", "1", check=2, output="o"), "without labels")
    (tmp_path / "reports/b.txt").write_bytes(b"\xff\xfe\x00")
    result = run(tmp_path / "x", "--report", reports, checkpoint=told, check=4)
    assert "b.txt: no report" in result.stderr


def test_t31_a_series_that_was_cut_short_goes_on(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ddpm.ctpa_dicom as series

    picture, out = save_picture(tmp_path / "p.png", "L"), tmp_path / "out"
    run(picture, "--dicom", output="whole")
    real, calls = series.dcmwrite, []

    def killed(target, *rest, **options):
        calls.append(target)
        if len(calls) == 3:
            with open(target, "wb") if isinstance(target, Path) else target as handle:
                handle.write(b"half a slice")
                raise KeyboardInterrupt
        return real(target, *rest, **options)

    monkeypatch.setattr(series, "dcmwrite", killed)
    run(picture, "--dicom", check=ExitCode.SIGINT)
    monkeypatch.setattr(series, "dcmwrite", real)
    assert sorted(path.name for path in (out / "p_dicom").iterdir()) == ["IM0001.dcm", "IM0002.dcm"]
    run(picture, "--dicom")
    assert contents(out) == contents(tmp_path / "whole")


def test_an_interrupted_result_leaves_nothing_to_its_successor(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ddpm.ctpa_volume import CTPAVolume

    folder, out = tmp_path / "x", tmp_path / "out"
    folder.mkdir()
    for name in ("p", "p_sample_3"):  # the second is called like a sample of the first
        save_picture(folder / f"{name}.png", "L")
    run(folder / "p_sample_3.png")
    kept = contents(out)
    real = CTPAVolume.save_dicom

    def killed(self, target):
        real(self, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(CTPAVolume, "save_dicom", killed)
    run(folder / "p.png", "--samples", "2", "--png", "--dicom", check=ExitCode.SIGINT)
    assert {"p_mean.nii.gz", "p_sample_2.nii.gz", "p_panel.png", "p_dicom/IM0016.dcm"} <= contents(out).keys()
    assert json.loads((out / "p.provenance.json").read_text())["files"] is None
    run(folder / "p.png", "--seed", "1", "--overwrite")
    after = contents(out)
    assert after.keys() - kept.keys() == {"p.nii.gz", "p.provenance.json"}
    assert kept.items() <= after.items()


def test_reports_and_views_that_fit_nobody_are_told(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = small_bundle(tmp_path / "told.ckpt", conditioner={"text": "bytes", "views": ["frontal", "lateral"]})
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("x", "reports", "lateral"):
        (tmp_path / folder).mkdir()
    for name in ("a", "b", "c"):
        save_picture(tmp_path / f"x/{name}.png", "L")
    (tmp_path / "reports/other.txt").write_text("No embolism.")
    save_picture(tmp_path / "lateral/other.png", "L")
    for option, folder in (("--report", "reports"), ("--lateral", "lateral")):
        refused = run(tmp_path / "x", option, str(tmp_path / folder), checkpoint=told, check=3)
        assert_one_line_error(refused, folder, "such as a")
    assert not (tmp_path / "out").exists()
    (tmp_path / "reports/a.TXT").write_bytes(b"\xef\xbb\xbfNo embolism.")
    (tmp_path / "reports/b.txt").write_text("No embolism.")
    result = run(tmp_path / "x", "--report", "~/reports", checkpoint=told)
    assert "3 X-ray(s), 2 of 3 with a report" in result.stdout
    facts = [json.loads((tmp_path / f"out/{n}.provenance.json").read_text())["provenance"] for n in "abc"]
    assert facts[0]["text_sha256"] == facts[1]["text_sha256"] != facts[2]["text_sha256"]  # whatever the editor
    save_picture(tmp_path / "lateral/b.png", "L")
    result = run(tmp_path / "x", "--lateral", "~/lateral", checkpoint=told, output="o")
    assert "1 of 3 with a lateral" in result.stdout


def test_what_a_model_was_trained_without_is_refused_before_anything_is_drawn(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ddpm.inference_run as inference

    for folder in ("x", "beside"):
        (tmp_path / folder).mkdir()
    for name in ("a", "b", "c"):
        save_picture(tmp_path / f"x/{name}.png", "L")
    (tmp_path / "beside/c.txt").write_text("No embolism.")
    save_picture(tmp_path / "beside/c.png", "L")
    monkeypatch.setattr(inference, "draw", lambda *_, **__: pytest.fail("drawn"))
    for options, words in (
        (["--report", str(tmp_path / "beside")], "without reports"),
        (["--label", "1"], "without labels"),
        (["--lateral", str(tmp_path / "beside")], "trained without"),
    ):
        assert_one_line_error(run(tmp_path / "x", "--batch", "1", *options, check=2), words)
    assert not (tmp_path / "out").exists()


def test_the_first_line_comes_before_the_model(run: Run, tmp_path: Path) -> None:
    """A bundle takes long to read, and one that cannot be read shows what came before."""
    (tmp_path / "damaged.ckpt").write_bytes(b"nothing")
    result = run(save_picture(tmp_path / "p.png", "L"), checkpoint=tmp_path / "damaged.ckpt", check=3)
    assert "1 X-ray(s): loading" in result.stdout
