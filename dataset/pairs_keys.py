"""Which hashed name stands for which published identifier, for whoever holds the key of the conversion.

`preprocess/dicom_to_nifti.py` names volumes by keyed hashes of patient, study and series; the key stays with the
originals. With it, and only with it, a converted volume finds its row in the table of its collection again.
"""

from __future__ import annotations

import hmac
from pathlib import Path

from errors import ConfigurationError

_DIGITS = 12


def pseudonym(key: bytes, kind: str, value: str) -> str:
    """Twelve hex digits for a ``patient``, ``study`` or ``series``: HMAC-SHA256, as the conversion makes them."""
    return hmac.digest(key, f"{kind}\0{value}".encode("utf-8", "surrogateescape"), "sha256").hex()[:_DIGITS]


def read_key(path: Path | None, root: Path) -> bytes | None:
    """The key of a cohort; None where there is none, so that names are taken as they are.

    Args:
        path: the key file; None looks for ``ROOT.key`` beside the folder, where the conversion puts it.
        root: folder of converted volumes.

    Raises:
        ConfigurationError: the named file cannot be read.
    """
    beside = root.with_name(root.name + ".key")
    if path is None and not beside.is_file():
        return None
    try:
        return (path or beside).read_bytes().strip()
    except OSError as error:
        raise ConfigurationError(
            f"{path or beside}: the key cannot be read ({error.strerror}): set dataset.key or --key"
        ) from error
