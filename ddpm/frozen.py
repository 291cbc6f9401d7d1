"""Encoders that somebody else trained: read from a local folder, never trained, never part of a checkpoint."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from errors import ConfigurationError

_CHUNK_BYTES = 1 << 22


class FrozenIdentity(nn.Module):
    """Remembers in a checkpoint which file a frozen encoder came from, and refuses another one.

    Args:
        weights: the file.
        what: the encoder's name in the message.
    """

    identity: Tensor

    def __init__(self, weights: Path, what: str) -> None:
        super().__init__()
        self.weights, self.what = weights, what
        digest = hashlib.sha256()
        with open(weights, "rb") as handle:
            while chunk := handle.read(_CHUNK_BYTES):
                digest.update(chunk)
        self.register_buffer("identity", torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8).clone())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved = state_dict.get(prefix + "identity")
        if saved is not None and not torch.equal(saved.cpu(), self.identity.cpu()):
            raise ConfigurationError(
                f"{self.weights}: not the {self.what} that the model was trained with: give the file of that one"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)


def frozen_folder(path: str | Path, files: tuple[str, ...], setting: str) -> Path:
    """The folder of a frozen encoder.

    Args:
        path: of the folder.
        files: that must be in it.
        setting: which names the folder, for the message.

    Raises:
        ConfigurationError: it is not there, or a file is missing.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ConfigurationError(f"{folder}: no such folder: {setting} names the folder of a frozen encoder")
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise ConfigurationError(f"{folder}: holds no {', '.join(missing)}: copy the whole model there")
    return folder
