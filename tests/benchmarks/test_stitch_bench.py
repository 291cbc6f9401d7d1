"""The stitcher's benchmark: both sides stitch the same, and the rows that others read are there."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from benchmarks.stitch import identity, monai_stitch, random_volume, stitch
from tests.helpers import ROOT, environment


def test_ours_is_exact_and_leaves_its_input_alone() -> None:
    volume = random_volume((20, 18, 17))
    before = volume.copy()
    assert np.array_equal(stitch(volume, (8, 9, 10)), before)
    assert np.array_equal(volume, before)
    assert stitch(volume, (8, 9, 10)) is not volume


def test_the_model_reuses_its_output() -> None:
    import torch

    model, x = identity((2, 3, 4)), torch.rand(1, 1, 2, 3, 4)
    assert torch.equal(model(x), x)
    assert model(x).data_ptr() == model(x).data_ptr() != x.data_ptr()


@pytest.mark.slow
def test_the_script_writes_its_rows(tmp_path: Path) -> None:
    if find_spec("monai") is not None:
        volume = random_volume((20, 18, 17))
        before = volume.copy()
        np.testing.assert_allclose(monai_stitch(volume, (8, 9, 10)), before, atol=1e-3)
        assert np.array_equal(volume, before)
    target = tmp_path / "rows.json"
    script = str(ROOT / "benchmarks" / "stitch.py")
    subprocess.run(
        [sys.executable, script, "--quick", "--json", str(target)], cwd=tmp_path, env=environment(), check=True
    )
    rows = json.loads(target.read_text())["rows"]
    assert [row["what"] for row in rows][:2] == ["error", "time: MONAI over ours"]
    assert rows[0]["value"] == 0
    assert rows[-1]["what"].startswith("memory above the output")
    if find_spec("monai") is not None:
        assert rows[1]["ratio"] == pytest.approx(rows[1]["reference"] / rows[1]["value"])
