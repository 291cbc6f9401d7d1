"""Results of single cases on disk: kept, made again, never unpickled."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from errors import ConfigurationError
from evaluation.records import claim, read_arrays, read_record, write_arrays, write_record
from tests.helpers import Canary


def test_records_survive_and_damaged_ones_are_made_again(tmp_path):
    output = tmp_path / "deep" / "results"
    claim(output, {"seed": 0, "cases": ["a"]})
    claim(output, {"seed": 0, "cases": ["a"]})
    with pytest.raises(ConfigurationError, match="another seed: give another --output"):
        claim(output, {"seed": 1, "cases": ["a"]})
    record = {"score": 1.5, "missing": math.nan, "lists": [{"x": math.inf}, 2], "name": "a"}
    write_record(output / "a.json", record)
    assert json.loads((output / "a.json").read_text())["missing"] is None
    back = read_record(output / "a.json")
    assert math.isnan(back.pop("missing"))
    assert math.isnan(back["lists"][0]["x"])
    assert back["score"] == 1.5
    (output / "a.json").write_text((output / "a.json").read_text()[:20])
    assert read_record(output / "a.json") is None
    assert read_record(output / "none.json") is None

    arrays = {"real": np.arange(6.0).reshape(2, 3), "codec": np.zeros((0, 3), np.float32)}
    write_arrays(output / "a.npz", arrays)
    found = read_arrays(output / "a.npz")
    assert all(np.array_equal(found[name], arrays[name]) for name in arrays)
    whole = (output / "a.npz").read_bytes()
    for part in range(0, len(whole), len(whole) // 16):
        (output / "a.npz").write_bytes(whole[:part])
        assert read_arrays(output / "a.npz") is None


def test_t38_arrays_in_a_results_folder_are_never_unpickled(tmp_path):
    np.savez(tmp_path / "a.npz", real=np.array([Canary(tmp_path / "sung")], dtype=object))
    assert read_arrays(tmp_path / "a.npz") is None
    assert not (tmp_path / "sung").exists()
