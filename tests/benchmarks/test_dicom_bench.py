from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers import run


@pytest.mark.slow
def test_quick_run_writes_a_report_with_both_rates(tmp_path: Path) -> None:
    report = tmp_path / "dicom.json"
    run("benchmarks/dicom.py", "--quick", "--json", str(report), cwd=tmp_path, tiny=False)
    rows = json.loads(report.read_text())["rows"]
    ways = ["to memory", "to a store", "to .nii.gz", "to stores, two workers", "the same, two readers"]
    assert [row["what"].split(": ")[1] for row in rows] == ways
    assert all(row["unit"] == "slices/s" and row["value"] > 0 and row["reference"] > 0 for row in rows)
