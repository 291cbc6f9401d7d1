from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness
from benchmarks.harness import Row

# --- report


def test_ratio_above_one_means_that_ours_is_better() -> None:
    assert Row.compared("step 64³", 2.0, "s", reference=8.0).ratio == 4.0
    assert Row.compared("patches", 30.0, "1/s", reference=10.0, better="higher").ratio == 3.0
    assert Row.compared("slower", 8.0, "s", reference=2.0).ratio == 0.25
    assert Row.compared("error", 0.0, "1", reference=1e-7).ratio is None


def test_report_has_the_agreed_keys_and_survives_json(tmp_path: Path) -> None:
    rows = [Row.compared("step 64³", 2.0, "s", reference=8.0), Row("parameters", 24e6, "1")]
    path = tmp_path / "new" / "report.json"
    harness.write_report(path, rows, packages=["pytest", "no-such-package"])
    report = json.loads(path.read_text(encoding="utf-8"))
    assert set(report) == {"command", "machine", "date", "versions", "rows"}
    assert [Row(**row) for row in report["rows"]] == rows
    assert set(report["rows"][0]) == {"what", "value", "unit", "reference", "ratio"}
    assert datetime.fromisoformat(report["date"]).tzinfo is not None
    assert report["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert "pytest" in report["versions"]
    assert "no-such-package" not in report["versions"]
    assert report["machine"]["cpu"]
    assert report["machine"]["cores"] >= 1
    assert report["machine"]["ram_gib"] > 0


def test_a_report_says_what_was_called_but_not_where_files_lie() -> None:
    called = ["/canary/benchmarks/seams.py", "--volume", "/canary/data/ct.nii.gz", "--data=../canary/ct_2mm/", "a=1"]
    assert harness.command_line(called) == "seams.py --volume ct.nii.gz --data=ct_2mm a=1"


def test_report_refuses_nan_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="JSON"):
        harness.write_report(path, [Row("step", math.nan, "s")])
    assert path.read_text() == "old"


def test_table_aligns_and_leaves_blank_what_was_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    harness.print_table([Row.compared("step 64³", 2.0, "s", 8.5), Row("parameters", 24_000_000, "1")])
    head, rule, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["what", "ours", "unit", "reference", "ratio"]
    assert set(rule) == {"-", " "}
    assert first.split() == ["step", "64³", "2", "s", "8.5", "4.25×"]
    assert second.split() == ["parameters", "24,000,000", "1"]


def test_shared_command_line() -> None:
    parser = harness.standard_parser("what it measures")
    assert vars(parser.parse_args([])) == {"quick": False, "json": None}
    assert vars(parser.parse_args(["--quick", "--json", "a.json"])) == {"quick": True, "json": Path("a.json")}


# --- time


def test_steps_are_interleaved_and_warm_ups_not_timed() -> None:
    calls: list[str] = []

    def step(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            calls.append(name)
            time.sleep(seconds)

        return run

    times = harness.time_interleaved({"A": step("A", 0.0), "B": step("B", 0.02)}, rounds=2, warmup=1)
    assert calls == ["A", "B"] * 3
    assert [len(seconds) for seconds in times.values()] == [2, 2]
    assert harness.medians(times)["B"] >= 0.02
    assert harness.medians({"A": [1.0, 9.0, 2.0]}) == {"A": 2.0}


# --- work


def test_counted_work_is_the_formula_and_the_model_stays_untouched() -> None:
    model = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.Conv3d(4, 4, 1))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first = 2 * 27 * 4 * 2  # forward and the weights' gradient; its input needs none
    second = 2 * 4 * 4 * 3
    assert harness.conv_mflop_per_voxel_step(model, 8) == pytest.approx((first + second) / 1e6)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_roof_is_the_work_of_a_plain_convolution(dtype: torch.dtype) -> None:
    gflop, steps = harness.conv_roof_steps(channels=16, size=8, dtype=dtype)
    assert steps.keys() == {"contiguous", "channels last"}
    for step in steps.values():
        counter = FlopCounterMode(display=False)
        with counter:
            step()
        assert counter.get_total_flops() / 1e9 == pytest.approx(gflop)
