"""The benchmark of the road from X-ray to volume runs, and writes the rows that others read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT, environment


@pytest.mark.slow
def test_the_quick_run_writes_the_rows_that_others_read(tmp_path: Path) -> None:
    report = tmp_path / "inference.json"
    command = [sys.executable, str(ROOT / "benchmarks/inference.py"), "--quick", "--json", str(report)]
    subprocess.run(command, cwd=tmp_path, env=environment(), check=True, timeout=600, capture_output=True)
    content = json.loads(report.read_text())
    assert {"machine", "date", "versions", "rows"} <= set(content)
    rows = {row["what"]: row for row in content["rows"]}
    assert all(what.startswith("X-ray to volume") for what in rows)
    known = {": 10 steps": "s", ": 20 steps": "s", "decoder": "%", "peak memory": "GB", "torch": "s"}
    for words, unit in known.items():
        found = [row for what, row in rows.items() if words in what]
        assert found
        assert all(row["unit"] == unit for row in found)
        if unit != "%" and words != "torch":  # a share and a difference of two timings may be lost in a busy machine
            assert all(row["value"] > 0 for row in found)
    (share,) = [row["value"] for what, row in rows.items() if "decoder" in what]
    assert share < 100
