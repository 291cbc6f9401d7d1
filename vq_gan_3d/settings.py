"""Settings of a network as a frozen dataclass that travels in checkpoints as plain containers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self

from errors import ConfigurationError


@dataclass(frozen=True)
class Settings:
    """Base of all such dataclasses.

    Attributes:
        subject: what is set, for messages.
    """

    subject: ClassVar[str]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from plain containers (lists become tuples); unknown keys are refused by name.

        Raises:
            ConfigurationError: an unknown key, or values that do not fit each other.
        """
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ConfigurationError(f"unknown {cls.subject} setting(s): {', '.join(unknown)}")
        return cls(**{key: _to_tuple(value) for key, value in values.items()})

    def as_dict(self) -> dict[str, Any]:
        """Plain containers for a checkpoint."""
        return asdict(self)


def _to_tuple(value: Any) -> Any:
    return tuple(_to_tuple(item) for item in value) if isinstance(value, list | tuple) else value


def require_whole(name: str, value: Any, least: int) -> None:
    """Refuse what is no whole number of at least ``least``, by its name on the command line.

    Raises:
        ConfigurationError: it is none.
    """
    if type(value) is not int or value < least:  # True is an int
        raise ConfigurationError(f"{name}={value}: give a whole number of at least {least}")


def require_number(name: str, value: Any, limit: float = math.inf) -> None:
    """Refuse what is no number in [0, ``limit``), by its name on the command line.

    Raises:
        ConfigurationError: it is none.
    """
    if type(value) not in (int, float) or not 0 <= value < limit:
        raise ConfigurationError(
            f"{name}={value}: give a number of at least 0{f' and below {limit:g}' if limit < math.inf else ''}"
        )


def require_switch(name: str, value: Any) -> None:
    """Refuse what is neither true nor false: ``off`` is a word, and every word counts as true.

    Raises:
        ConfigurationError: it is neither.
    """
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name}={value}: give true or false")
