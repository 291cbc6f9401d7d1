"""Settings of a network as a frozen dataclass that travels in checkpoints as plain containers."""

from __future__ import annotations

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
