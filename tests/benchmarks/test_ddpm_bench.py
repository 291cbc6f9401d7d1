from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.ddpm import CASES, QUICK_CASES, conditional, monai_unet, our_conditional, our_unet
from tests.helpers import ROOT, environment


@pytest.mark.slow  # importing MONAI takes seconds
def test_both_sides_have_equal_parameters() -> None:
    for case in CASES:
        ours = sum(p.numel() for p in our_unet(case).parameters())
        assert 13e6 < ours < 15e6
        if (peer := monai_unet(case.channels)) is not None:
            assert sum(p.numel() for p in peer.parameters()) == pytest.approx(ours, rel=0.05)


@pytest.mark.slow
def test_the_shipped_model_meets_a_peer_of_equal_parameters_and_tokens() -> None:
    ours = our_conditional(CASES[0])
    assert sum(p.numel() for p in ours.unet.parameters()) > 20e6
    told = ours.config.unet
    assert all(told.lifted_channels)
    assert min(told.token_channels, told.vector_channels) > 0
    count = sum(p.numel() for p in ours.parameters())
    if (peer := monai_unet(CASES[0].channels, told.token_channels)) is not None:
        assert sum(p.numel() for p in peer.parameters()) == pytest.approx(count, rel=0.05)
    x = (contenders := conditional(QUICK_CASES[0], "cpu"))["ours"].x
    for contender in contenders.values():
        assert contender.training(x, torch.full((1,), 0.5)).shape == x.shape
        assert contender.sampling(x, torch.full((1,), 0.5)).shape == x.shape


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
        assert len(timed) == len(CASES) + 1
        assert sum("told of an X-ray" in row["what"] for row in timed) == 1
        for row in timed:
            assert row["value"] > 0
            if row["reference"] is not None:
                assert row["ratio"] == pytest.approx(row["reference"] / row["value"])
    assert torch.isfinite(torch.tensor([row["value"] for row in rows])).all()
