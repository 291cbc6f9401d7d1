"""Which patient is in which split: by hash, so that adding patients moves nobody."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from errors import ConfigurationError


def hash_fraction(patient: str) -> float:
    """A number in [0, 1) that depends on the patient's name alone."""
    return int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big") / 2**64


def split_patients(
    patients: Iterable[str], validation_fraction: float, validation: Sequence[str] = ()
) -> tuple[set[str], set[str]]:
    """Split patients into training and validation.

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
            held_out = {min(everyone, key=hash_fraction)}  # the one that the smallest fraction would take first
    training = everyone - held_out
    if not training or not held_out:
        empty = "validation" if training else "training"
        raise ConfigurationError(
            f"the {empty} split of {len(everyone)} patient(s) is empty: add patients, or change "
            "dataset.validation_fraction or dataset.validation"
        )
    return training, held_out
