"""Splits by patient: disjoint, stable, and refused where they cannot be made (T23)."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dataset.splits import hash_fraction, split_patients
from errors import ConfigurationError

names = st.sets(st.text("abcdef0123", min_size=1, max_size=6), min_size=2, max_size=30)


def split_or_skip(patients, fraction):
    try:
        return split_patients(patients, fraction)
    except ConfigurationError:
        assume(False)


@settings(deadline=None, max_examples=100)
@given(names, st.floats(0.01, 0.9))
def test_disjoint_and_complete(patients, fraction):
    training, held_out = split_or_skip(patients, fraction)
    assert training.isdisjoint(held_out)
    assert training | held_out == patients
    assert training
    assert held_out


@settings(deadline=None, max_examples=100)
@given(names, names, st.floats(0.05, 0.6))
def test_new_patients_move_nobody(patients, more, fraction):
    assume(any(hash_fraction(patient) < fraction for patient in patients))  # else one is held out for want of any
    training, held_out = split_or_skip(patients, fraction)
    later_training, later_held_out = split_patients(patients | more, fraction)
    assert training <= later_training
    assert held_out <= later_held_out


def test_several_volumes_of_one_patient_stay_together():
    training, held_out = split_patients(["a"] * 3 + [f"p{i}" for i in range(50)] + ["a"], 0.3)
    assert ("a" in training) != ("a" in held_out)
    assert len(training) + len(held_out) == 51


def test_order_does_not_matter_and_the_share_is_right():
    patients = [f"patient_{i}" for i in range(2000)]
    assert split_patients(patients, 0.15) == split_patients(reversed(patients), 0.15)
    assert len(split_patients(patients, 0.15)[1]) == pytest.approx(300, abs=60)
    # a larger share holds out more of the same
    assert split_patients(patients, 0.15)[1] < split_patients(patients, 0.3)[1]


def test_the_hash_never_changes():
    assert hash_fraction("phantom_00000") == 0.04420316375611504  # the split of every run so far depends on it
    assert all(0 <= hash_fraction(str(i)) < 1 for i in range(100))


def test_small_cohorts_still_hold_one_out():
    for n in range(2, 8):
        training, held_out = split_patients([f"x{i}" for i in range(n)], 1e-9)
        assert len(held_out) == 1
        assert len(training) == n - 1


def test_named_validation():
    training, held_out = split_patients(["a", "b", "c"], 0.9, ["b"])
    assert (training, held_out) == ({"a", "c"}, {"b"})
    with pytest.raises(ConfigurationError, match="x, y"):
        split_patients(["a", "b"], 0.5, ["y", "a", "x"])


@pytest.mark.parametrize(
    ("patients", "fraction", "named", "word"),
    [
        (["a"], 0.5, ["a"], "training"),
        (["a", "b"], 0.0, [], "validation"),
        (["a", "b"], 1.0, [], "training"),
        ([], 0.5, [], "split of 0"),
    ],
)
def test_empty_splits_are_refused(patients, fraction, named, word):
    with pytest.raises(ConfigurationError) as caught:
        split_patients(patients, fraction, named)
    assert word in str(caught.value)
    assert "dataset.validation" in str(caught.value)
