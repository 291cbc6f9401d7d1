"""Splits by patient: disjoint, stable, and refused where they cannot be made."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dataset.splits import assign_splits, fold_of, hash_fraction, split_patients
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


def test_a_patient_who_is_lent_to_validation_is_named(caplog):
    patients = {f"x{i}" for i in range(5)}
    [lent] = split_patients(patients, 1e-9)[1]
    [record] = caplog.records
    assert lent in record.message
    assert "of 5 patients" in record.message
    caplog.clear()
    split_patients(patients, hash_fraction(lent) + 1e-6)  # now it is held out for its hash
    assert not caplog.records


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


fractions = st.floats(0.05, 0.4)
plans = st.one_of(
    st.fixed_dictionaries({"validation_fraction": fractions, "test_fraction": fractions}),
    st.integers(2, 6).flatmap(
        lambda n: st.fixed_dictionaries(
            {
                "validation_fraction": st.just(0.1),
                "test_fraction": fractions,
                "n_folds": st.just(n),
                "fold": st.integers(0, n - 1),
            }
        )
    ),
)


@settings(deadline=None, max_examples=80)
@given(names, names, plans)
def test_assigned_splits_are_disjoint_complete_and_stable_under_additions(patients, more, plan):
    # where the hash holds nobody out, a small cohort lends its lowest patient: the one place that may change
    rest = [p for p in patients if hash_fraction(p) < 1 - plan["test_fraction"]]
    assume("fold" in plan or any(hash_fraction(p) < plan["validation_fraction"] for p in rest))
    try:
        before = assign_splits(dict.fromkeys(patients), **plan)
    except ConfigurationError as error:
        assume("empty" not in str(error))
        raise
    assert before.keys() == patients
    assert set(before.values()) <= {"train", "validation", "test"}
    after = assign_splits(dict.fromkeys(patients | more), **plan)
    assert after.keys() == patients | more
    assert before.items() <= after.items()


def test_shares_of_assigned_splits():
    patients = dict.fromkeys(f"patient_{i}" for i in range(3000))
    split = assign_splits(patients, validation_fraction=0.2, test_fraction=0.1)
    assert sum(side == "test" for side in split.values()) == pytest.approx(300, abs=60)
    assert sum(side == "validation" for side in split.values()) == pytest.approx(600, abs=80)
    # a test set never changes what is held out for validation
    without = assign_splits(patients, validation_fraction=0.2)
    assert all(without[patient] == side for patient, side in split.items() if side != "test")


def test_folds_are_even_and_independent_of_the_test_hash():
    patients = [f"patient_{i}" for i in range(4000)]
    for chosen in (patients, [p for p in patients if hash_fraction(p) < 0.2]):
        counts = [sum(fold_of(p, 5) == fold for p in chosen) for fold in range(5)]
        assert sum(counts) == len(chosen)
        assert min(counts) > 0.15 * len(chosen)


def test_given_splits_are_kept_and_folds_leave_the_test_set_alone():
    given_splits = {f"p{i}": ("train", "validation", "test", "train")[i % 4] for i in range(40)}
    assert assign_splits(given_splits, validation_fraction=0.5, test_fraction=0.4) == given_splits
    folds = [assign_splits(given_splits, validation_fraction=0, n_folds=3, fold=fold) for fold in range(3)]
    for split in folds:
        assert {p for p in split if split[p] == "test"} == {p for p in given_splits if given_splits[p] == "test"}
    held_out = [{p for p in split if split[p] == "validation"} for split in folds]
    assert sum(map(len, held_out)) == len(set.union(*held_out)) == 30


def test_named_validation_patients_stay_out_of_the_test_set():
    patients = {f"p{i}": None for i in range(40)}
    last = max(patients, key=hash_fraction)
    split = assign_splits(patients, validation_fraction=0.1, test_fraction=0.3, validation=[last])
    assert [p for p in split if split[p] == "validation"] == [last]
    assert "test" in split.values()


@pytest.mark.parametrize(
    ("given_splits", "plan", "words"),
    [
        ({"a": "train", "b": None}, {}, ["patient b has no split"]),
        ({"a": "train", "b": "test"}, {}, ["validation split", "split column"]),
        ({"a": "validation", "b": "test"}, {}, ["training split", "split column"]),
        ({"a": "train", "b": "validation"}, {"validation": ["a"]}, ["dataset.validation", "split column"]),
        ({"a": None, "b": None}, {"validation": ["a"], "n_folds": 2, "fold": 0}, ["dataset.n_folds"]),
        ({"a": None, "b": None}, {"n_folds": 2}, ["dataset.fold"]),
        ({"a": None, "b": None}, {"fold": 0}, ["dataset.n_folds"]),
        ({"a": None, "b": None}, {"n_folds": 2, "fold": 2}, ["dataset.fold=2"]),
        ({"a": None, "b": None}, {"n_folds": 1, "fold": 0}, ["dataset.n_folds=1"]),
        ({"a": None, "b": None}, {"test_fraction": 1.5}, ["dataset.test_fraction=1.5"]),
        ({"a": None, "b": None}, {"test_fraction": -0.1}, ["dataset.test_fraction=-0.1"]),
        ({"a": None, "b": None}, {"validation_fraction": 0.6, "test_fraction": 0.5}, ["no patient for training"]),
        ({"a": None}, {}, ["empty"]),
        ({}, {}, ["empty"]),
        ({"a": None}, {"n_folds": 2, "fold": 0}, ["of 2", "empty"]),
    ],
)
def test_plans_that_cannot_be_made_are_refused(given_splits, plan, words):
    with pytest.raises(ConfigurationError) as caught:
        assign_splits(given_splits, **({"validation_fraction": 0.2} | plan))
    for word in words:
        assert word in str(caught.value)
