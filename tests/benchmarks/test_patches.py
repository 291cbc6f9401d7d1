"""The patch benchmark: the same windows for all, a volume of any depth, and the rows that others read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.patches import mirrored, random_patches
from tests.helpers import ROOT, environment


@pytest.mark.parametrize("depth", [1, 3, 4, 7, 20])
def test_mirrored_runs_up_and_down(depth: int) -> None:
    hu = np.arange(4).reshape(4, 1, 1)
    up_and_down = [0, 1, 2, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1]
    assert mirrored(hu, depth)[:, 0, 0].tolist() == up_and_down[:depth]
    assert mirrored(hu[:1], depth).shape == (depth, 1, 1)


def test_streams_of_windows_agree_and_lie_inside() -> None:
    a, b = (random_patches((20, 30, 40), (5, 30, 7)) for _ in range(2))
    for _ in range(50):
        window = a()
        assert window == b()
        assert [part.stop - part.start for part in window] == [5, 30, 7]
        assert all(part.start >= 0 and part.stop <= n for part, n in zip(window, (20, 30, 40), strict=True))


@pytest.mark.slow
def test_the_script_writes_its_rows(tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    target = tmp_path / "rows.json"
    script = str(ROOT / "benchmarks" / "patches.py")
    subprocess.run(
        [sys.executable, script, "--quick", "--json", str(target)], cwd=tmp_path, env=environment(), check=True
    )
    rows = {row["what"]: row for row in json.loads(target.read_text())["rows"]}
    row = rows["patch: store over nii.gz"]
    assert row["ratio"] == pytest.approx(row["reference"] / row["value"])
    size = rows["size of the store"]
    assert size["ratio"] == pytest.approx(size["value"] / size["reference"])
    assert 0 < size["ratio"] < 1
