"""The benchmark of whole volumes: a row of each kind for each depth, in processes of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers import run


@pytest.mark.slow
def test_time_and_memory_of_each_depth(tmp_path: Path) -> None:
    report = tmp_path / "full.json"
    run("benchmarks/full_resolution.py", "--quick", "--json", str(report), cwd=tmp_path, tiny=False)
    rows = json.loads(report.read_text())["rows"]
    assert [row["what"].split(": ")[1] for row in rows] == 2 * ["time", "peak memory", "tiles"]
    assert [row["what"].split(" ")[0] for row in rows[::3]] == ["64×64×24", "64×64×48"]
    assert all(row["value"] > 0 for row in rows)
    assert 100 < rows[1]["value"] < 3000  # MB, libraries included
