from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.ddpm import CASES, monai_unet, our_unet
from tests.helpers import ROOT, environment


@pytest.mark.slow  # importing MONAI takes seconds
def test_both_sides_have_equal_parameters() -> None:
    for case in CASES:
        ours = sum(p.numel() for p in our_unet(case).parameters())
        assert 13e6 < ours < 15e6
        if (peer := monai_unet(case.channels)) is not None:
            assert sum(p.numel() for p in peer.parameters()) == pytest.approx(ours, rel=0.05)


def test_both_cases_meet_the_same_grid() -> None:
    for case in CASES:
        assert our_unet(case).level_shapes(case.shape)[0] == (16, 32, 32)


@pytest.mark.slow
def test_the_quick_run_writes_the_rows_that_others_read(tmp_path: Path) -> None:
    report = tmp_path / "ddpm.json"
    subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "ddpm.py"), "--quick", "--json", str(report)],
        cwd=tmp_path,
        env=environment(),
        check=True,
        timeout=300,
    )
    rows = json.loads(report.read_text())["rows"]
    for start in ("sampling step", "training step"):
        timed = [row for row in rows if row["what"].startswith(start)]
        assert len(timed) == len(CASES)
        for row in timed:
            assert row["value"] > 0
            if row["reference"] is not None:
                assert row["ratio"] == pytest.approx(row["reference"] / row["value"])
    assert torch.isfinite(torch.tensor([row["value"] for row in rows])).all()
