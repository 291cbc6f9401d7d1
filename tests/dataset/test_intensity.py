"""HU to [0, 1] and back, by one function."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dataset.intensity import HUWindow
from errors import ConfigurationError
from params import HU_MAX, HU_MIN

volumes = hnp.arrays(np.int16, hnp.array_shapes(min_dims=1, max_dims=4, max_side=4))
windows = st.tuples(st.integers(-2000, 500), st.integers(1, 4000)).map(lambda w: HUWindow(w[0], w[0] + w[1]))


@settings(deadline=None, max_examples=80)
@given(volumes, windows)
def test_round_trip_is_clipping(hu, window):
    unit = window.to_unit(hu)
    assert unit.dtype == np.float32
    assert unit.shape == hu.shape
    assert unit.min() >= 0
    assert unit.max() <= 1
    back = window.to_hu(unit)
    np.testing.assert_array_equal(np.rint(back), np.clip(hu.astype(float), window.min_hu, window.max_hu))
    # tensors get the same values, and nothing is changed in place
    before = hu.copy()
    tensor = torch.from_numpy(hu)
    np.testing.assert_allclose(window.to_unit(tensor).numpy(), unit, atol=1e-7)
    np.testing.assert_allclose(window.to_hu(torch.from_numpy(unit)).numpy(), back, atol=1e-3)
    assert np.array_equal(hu, before)


def test_known_values():
    window = HUWindow()
    assert (window.min_hu, window.max_hu, window.width_hu) == (HU_MIN, HU_MAX, HU_MAX - HU_MIN) == (-1000, 1000, 2000)
    hu = np.array([-3000, -1000, -500, 0, 1000, 3000], np.int16)
    assert window.to_unit(hu).tolist() == [0, 0, 0.25, 0.5, 1, 1]
    assert window.to_hu(np.array([-0.5, 0, 0.25, 1, 2])).tolist() == [-1000, -1000, -500, 1000, 1000]
    assert window.to_hu(torch.tensor([-0.5, 0.25, 2])).tolist() == [-1000, -500, 1000]


def test_inputs_stay_untouched():
    window = HUWindow()
    for hu in (torch.tensor([-2000.0, 500.0]), np.array([-2000.0, 500.0], np.float32)):
        window.to_unit(hu)
        assert hu.tolist() == [-2000, 500]
    for unit in (torch.tensor([-1.0, 0.5]), np.array([-1.0, 0.5], np.float32)):
        window.to_hu(unit)
        assert unit.tolist() == [-1, 0.5]


def test_half_precision_goes_through_fp32():
    hu = HUWindow().to_hu(torch.tensor([0.5], dtype=torch.bfloat16))
    assert hu.dtype == torch.float32
    assert hu.item() == 0


@pytest.mark.parametrize(("low", "high"), [(0, 0), (100, -100), (float("nan"), 1000), (-1000, float("nan"))])
def test_empty_windows_are_refused(low, high):
    with pytest.raises(ConfigurationError, match="is empty"):
        HUWindow(low, high)


def test_windows_must_agree():
    HUWindow().require_same(HUWindow(-1000.0, 1000.0), ours="the run", theirs="codec.ckpt")
    with pytest.raises(ConfigurationError) as caught:
        HUWindow().require_same(HUWindow(-1000, 400), ours="the run", theirs="codec.ckpt")
    assert "codec.ckpt" in str(caught.value)
    assert "400" in str(caught.value)


def test_travels_as_plain_numbers():
    window = HUWindow(-900, 700)
    assert HUWindow(**window.as_dict()) == window
    assert all(isinstance(value, int | float) for value in window.as_dict().values())
