"""Lesion survival: contrasts with known answers, blur that removes small clots first, and the script."""

import json
import subprocess
import sys

import numpy as np
import pytest
from scipy import ndimage

from errors import InputError
from evaluation.metrics.lesions import Lesion, find_lesions, survival
from evaluation.report_collect import collect
from tests.ddpm.tiny import saved_codec
from tests.helpers import ROOT, assert_one_line_error, environment

SPACING = (2.0, 2.0, 2.0)


def vessel(radii_vox=(3, 6)):
    """A wide vessel of 300 HU with round clots of 50 HU in a row: scan, clots, blood."""
    shape = (30, 30, 80)
    index = np.indices(shape)
    blood = (index[0] - 15) ** 2 + (index[1] - 15) ** 2 < 12**2
    clots = np.zeros(shape, bool)
    for radius, column in zip(radii_vox, (20, 55), strict=True):
        clots |= (index[0] - 15) ** 2 + (index[1] - 15) ** 2 + (index[2] - column) ** 2 <= radius**2
    hu = np.where(clots, 50.0, np.where(blood, 300.0, -850.0))
    return hu, clots, blood & ~clots


def size(lesion):
    return lesion.diameter_mm


def test_contrasts_and_sizes_are_those_that_were_painted():
    hu, clots, blood = vessel()
    small, large = sorted(find_lesions(hu, 0.3 * hu, clots, blood, SPACING), key=size)
    assert small.contrast_hu == pytest.approx(250.0)
    assert small.kept == pytest.approx(0.3)
    assert small.diameter_mm == pytest.approx(12.0, rel=0.1)
    assert large.diameter_mm == pytest.approx(24.0, rel=0.1)


def test_blur_takes_the_small_clot_first():
    hu, clots, blood = vessel((2, 6))
    hu = np.where(clots, 50.0, 300.0)  # blood all around: no lung blurs in
    kept = [find_lesions(hu, ndimage.gaussian_filter(hu, s), clots, blood, SPACING) for s in (0.5, 1.0, 1.5)]
    shares = [[one.kept for one in sorted(lesions, key=size)] for lesions in kept]
    assert shares[0][0] > shares[1][0] > shares[2][0]
    assert shares[2][0] < 0.5 < shares[2][1]


def test_what_the_scan_does_not_show_is_not_asked_for():
    hu, clots, blood = vessel()
    assert find_lesions(np.where(clots, 270.0, hu), hu, clots, blood, SPACING) == []
    assert find_lesions(hu, hu, clots, np.zeros_like(blood), SPACING) == []
    assert find_lesions(hu, hu, np.zeros_like(clots), blood, SPACING) == []
    with pytest.raises(InputError, match="one grid"):
        find_lesions(hu, hu[1:], clots, blood, SPACING)


def test_shares_by_size_and_over_patients():
    patients = {
        "a": [Lesion(5.0, 100.0, 49.0), Lesion(12.0, 100.0, 90.0)],
        "b": [Lesion(5.0, 100.0, 50.0), Lesion(20.0, 200.0, 200.0)],
        "c": [],
    }
    report = survival(patients)
    assert report["all"]["lesions"] == 4
    assert report["all"]["survived"]["estimate"] == 0.75
    assert report["0-6 mm"]["survived"] == {"estimate": 0.5, "low": 0.0, "high": 1.0}
    assert report["0-6 mm"]["patients"] == 2
    assert report["15 mm and more"]["kept"] == 1.0
    assert "6-10 mm" not in report


@pytest.mark.slow
def test_the_script_reports_and_refuses(tmp_path):
    def script(*arguments, check):
        command = [sys.executable, str(ROOT / "evaluation/lesion_survival.py"), *map(str, arguments)]
        result = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
        assert result.returncode == check, result.stderr[-3000:]
        return result

    codec, output = saved_codec(tmp_path), tmp_path / "deep" / "lesions.json"
    script("--checkpoint", codec, "--cases", 2, "--size", 64, 128, 128, "--output", output, check=0)
    report = json.loads(output.read_text())
    assert report["survival"]["all"]["lesions"] >= 2
    assert report["survival"]["all"]["survived"]["estimate"] < 0.5  # this codec was never trained
    (tmp_path / "checkpoints").mkdir()
    kept = codec.rename(tmp_path / "checkpoints" / "final.ckpt")
    script("--checkpoint", kept, "--cases", 1, "--size", 64, 128, 128, check=0)
    (found,) = collect([tmp_path]).results["lesions"]  # where the report looks for it
    assert found.content["cases"] == 1
    missing = script("--checkpoint", tmp_path / "none.ckpt", check=3)
    assert_one_line_error(missing, "none.ckpt")
