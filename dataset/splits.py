"""Which patient is in which split: by hash, so that adding patients moves nobody.

One exception, which is logged: where the hash holds nobody out, a small cohort lends the patient of the lowest hash to
validation, and may have it back in training when others have come.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence

from errors import ConfigurationError

log = logging.getLogger(__name__)
TRAIN, VALIDATION, TEST = "train", "validation", "test"
# What a split column may say, in any case.
SPLIT_NAMES = {
    "train": TRAIN,
    "training": TRAIN,
    "validation": VALIDATION,
    "valid": VALIDATION,
    "val": VALIDATION,
    "test": TEST,
}


def hash_fraction(patient: str) -> float:
    """A number in [0, 1) that depends on the patient's name alone."""
    return int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big") / 2**64


def fold_of(patient: str, n_folds: int) -> int:
    """The fold in 0 … n_folds - 1 of a patient; independent of `hash_fraction`, so folds cut every split alike."""
    return int(hash_fraction(f"fold of {patient}") * n_folds)


def split_patients(
    patients: Iterable[str], validation_fraction: float, validation: Sequence[str] = ()
) -> tuple[set[str], set[str]]:
    """Split patients into training and validation; where the hash holds nobody out, the lowest one is lent.

    Args:
        patients: patient names; duplicates (several volumes of one patient) are one patient.
        validation_fraction: share of patients for validation, by hash.
        validation: names that are the validation set, instead of the hash.

    Returns:
        Training and validation patients, disjoint.

    Raises:
        ConfigurationError: a named patient does not exist, or a split is empty.
    """
    everyone = set(patients)
    if validation:
        held_out = set(validation)
        if unknown := sorted(held_out - everyone):
            raise ConfigurationError(f"dataset.validation names no volume of this folder: {', '.join(unknown)}")
    else:
        held_out = {patient for patient in everyone if hash_fraction(patient) < validation_fraction}
        if not held_out and validation_fraction > 0 and len(everyone) > 1:
            lent = min(everyone, key=hash_fraction)  # the one that the smallest fraction would take first
            log.warning(
                "the hash holds out none of %d patients: %s is lent to validation, more patients may send it back",
                len(everyone),
                lent,
            )
            held_out = {lent}
    training = everyone - held_out
    if not training or not held_out:
        empty = "validation" if training else "training"
        raise ConfigurationError(
            f"the {empty} split of {len(everyone)} patient(s) is empty: add patients, or change "
            "dataset.validation_fraction or dataset.validation"
        )
    return training, held_out


def assign_splits(
    given: Mapping[str, str | None],
    *,
    validation_fraction: float,
    test_fraction: float = 0.0,
    validation: Sequence[str] = (),
    n_folds: int | None = None,
    fold: int | None = None,
) -> dict[str, str]:
    """Put every patient into exactly one of train, validation and test.

    The test set is settled first: the column's, else the patients with the highest hashes. Of the others, validation
    is the fold where folds are asked for, else the column's, else the named ones, else those with the lowest hashes.
    So the test set is the same for every fold, and a patient's place depends on the patient alone, but for one that is
    lent to a validation set that would be empty (`split_patients`).

    Args:
        given: every patient, with the split that a table gives; None for all where it has no such column.
        validation_fraction: share of all patients, by hash.
        test_fraction: share of all patients, by hash.
        validation: names that are the validation set, instead of the hash.
        n_folds: folds of a cross-validation.
        fold: which of them, from 0, is the validation set.

    Returns:
        train, validation or test by patient.

    Raises:
        ConfigurationError: settings that contradict each other, or an empty split.
    """
    _check_plan(validation_fraction, test_fraction, n_folds, fold)
    in_column = {patient for patient, split in given.items() if split is not None}
    if in_column and len(in_column) < len(given):
        without = min(given.keys() - in_column)
        raise ConfigurationError(
            f"patient {without} has no split while others have one: fill the column or leave it out"
        )
    if validation and (in_column or n_folds):
        other = "dataset.n_folds" if n_folds else "a split column"
        raise ConfigurationError(f"dataset.validation and {other} both choose the validation set: use one of them")
    if in_column:
        test = {patient for patient in given if given[patient] == TEST}
    else:
        test = {patient for patient in given if hash_fraction(patient) >= 1 - test_fraction} - set(validation)
    rest = given.keys() - test
    if n_folds is not None:
        held_out = {patient for patient in rest if fold_of(patient, n_folds) == fold}
    elif in_column:
        held_out = {patient for patient in rest if given[patient] == VALIDATION}
    else:
        _, held_out = split_patients(rest, validation_fraction, validation)
    if not held_out or not rest - held_out:
        empty = "training" if held_out else "validation"
        how = f"fold {fold} of {n_folds}" if n_folds is not None else "the split column"
        raise ConfigurationError(f"the {empty} split of {len(given)} patient(s) is empty by {how}: add patients")
    return {
        patient: TEST if patient in test else VALIDATION if patient in held_out else TRAIN for patient in sorted(given)
    }


def _check_plan(validation_fraction: float, test_fraction: float, n_folds: int | None, fold: int | None) -> None:
    for key, share in (("validation_fraction", validation_fraction), ("test_fraction", test_fraction)):
        if not 0 <= share < 1:
            raise ConfigurationError(f"dataset.{key}={share}: a share of the patients is in [0, 1)")
    if validation_fraction + test_fraction >= 1:
        raise ConfigurationError("dataset.validation_fraction and dataset.test_fraction leave no patient for training")
    if (n_folds is None) != (fold is None):
        raise ConfigurationError("dataset.n_folds and dataset.fold belong together: set both or none")
    if n_folds is not None and fold is not None and not (n_folds >= 2 and 0 <= fold < n_folds):
        raise ConfigurationError(f"dataset.fold={fold} of dataset.n_folds={n_folds}: folds count from 0 to n_folds - 1")
