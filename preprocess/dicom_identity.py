"""Nothing of a patient's identity leaves: the key of hashed names, harmless labels for files in messages.

Folder names often are patients' names, so no message or report holds one; a file's own name is shown when it is
plainly technical (``IM0042.dcm``). Names of results are HMAC-SHA256 of UIDs under a secret key
(``dataset.pairs_keys.pseudonym``): an unkeyed hash of a seven-digit patient number is found by trying them all.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

from errors import ConfigurationError, InputError, StorageError

_MIN_KEY_BYTES = 16
# A file name may be shown when it is made of these words, short numbers and separators only.
_WORDS = {
    "a", "ct", "dc", "dcm", "dicom", "e", "file", "frame", "i", "im", "ima", "image", "img", "k", "s", "scan", "se",
    "series", "slice", "z",
}  # fmt: skip
_PARTS = re.compile(r"[A-Za-z]+|\d+|[^A-Za-z\d]+")
_LONGEST_NUMBER = 6
_UID_LIKE = re.compile(r"\d+(?:\.\d+){4,}")
_WITHHELD = "one file (name withheld)"


def safe_label(path: str, identifiers: Iterable[str] = (), instance: int | None = None) -> str:
    """What a message may call a file: its base name if that is plainly technical, else its instance number.

    Args:
        path: the file.
        identifiers: what the header says of the patient; a name that holds one of them is withheld.
        instance: InstanceNumber of the header.
    """
    name = os.path.basename(path)
    withheld = _WITHHELD if instance is None else f"instance {instance}"
    if not all(_is_technical(part) for part in _PARTS.findall(name)) or _UID_LIKE.search(name):
        return withheld
    lower = name.lower()
    return withheld if any(len(word) > 1 and word.lower() in lower for word in identifiers) else name


def _is_technical(part: str) -> bool:
    if part.isdecimal():
        return len(part) <= _LONGEST_NUMBER
    return part.lower() in _WORDS or set(part) <= set("._-() ")


def load_key(path: Path, output: Path) -> bytes:
    """The key for hashes; made (32 random bytes, for its owner's eyes) where there is none yet.

    Args:
        path: the key file, kept with the originals.
        output: folder of results; the key must not lie in it, since results are passed on.

    Raises:
        ConfigurationError: the key lies in the output folder.
        InputError: it is too short.
        StorageError: it cannot be made.
    """
    if path.resolve().is_relative_to(output.resolve()):
        raise ConfigurationError(f"{path}: the key lies in the folder of results: keep it apart, with the originals")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(secrets.token_hex(32).encode())
    except FileExistsError:
        pass
    except OSError as error:
        raise StorageError(f"{path}: the key cannot be written ({error.strerror}): set --key") from error
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise InputError(f"{path}: the key cannot be read ({error.strerror}): set --key") from error
    if len(key) < _MIN_KEY_BYTES:
        raise InputError(f"{path}: a key needs {_MIN_KEY_BYTES} bytes at least: choose another file")
    return key
