"""Which series of a study becomes the volume: rules that can be configured, and reasons for those left out."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from errors import ConfigurationError, one_line
from preprocess.dicom_elements import token
from preprocess.dicom_header import Slice

CONTRAST_CHOICES = ("require", "prefer", "any", "exclude")
_NO_CONTRAST = re.compile(r"^(none|no|n|0|without.*|w/o.*|non[- ]?contrast|unenhanced|-+)$", re.IGNORECASE)


@dataclass
class SeriesRules:
    """The choice of series; every field can be set in a YAML file.

    Attributes:
        modality: of DICOM.
        max_oblique_deg: largest angle between the slices and the axial plane.
        min_slices: fewer are a scout, a slab or a fragment.
        max_thickness_mm: of slices, and of the distance between them.
        contrast: require, prefer, any or exclude a contrast agent in the header.
        exclude_words: a series is left out when its own description or image type holds one of them, in any case.
            Words that ordinary scans bear ("low dose", "bolus tracking") are none; monitoring slices lie at one
            position and are no stack.
        exclude_kernels: regular expressions; a series whose kernel matches one is left out.
        prefer_kernels: regular expressions, the best first; the default asks for soft tissue, then for a medium kernel.
        allow_partial: take a series although the header says that its ends are missing.
    """

    modality: str = "CT"
    max_oblique_deg: float = 25.0
    min_slices: int = 32
    max_thickness_mm: float = 5.0
    contrast: str = "prefer"
    exclude_words: list[str] = field(
        default_factory=lambda: [
            "localizer", "scout", "topogram", "surview", "scanogram", "swapped", "perfusion", "mip", "minip", "vrt",
            "dose report", "screen save", "smartprep", "premonitoring", "test bolus",
        ]
    )  # fmt: skip
    exclude_kernels: list[str] = field(default_factory=list)
    prefer_kernels: list[str] = field(
        default_factory=lambda: [
            r"^(STANDARD|STND|STD\+?|SOFT)$", r"^[BIDH][rfv]?[2-3]\d", r"^[BIDH][rfv]?4[0-4]", r"^FC0\d|^FC1[0-9]",
            r"^(A|B|SB|IMR1)$", r"^(C|DETAIL|CHST)$",
        ]
    )  # fmt: skip
    allow_partial: bool = False

    def __post_init__(self) -> None:
        if self.contrast not in CONTRAST_CHOICES:
            raise ConfigurationError(f"contrast {self.contrast!r}: one of {', '.join(CONTRAST_CHOICES)}")
        for pattern in (*self.prefer_kernels, *self.exclude_kernels):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigurationError(f"kernel pattern {pattern!r} is no regular expression: {error}") from error


def load_rules(path: Path | None, **changes: Any) -> SeriesRules:
    """The defaults, changed by a YAML file, changed by ``changes`` (None: not given).

    Raises:
        ConfigurationError: no such file, an unknown key, or a value of the wrong kind.
    """
    schema = OmegaConf.structured(SeriesRules)
    try:
        given = OmegaConf.load(path) if path is not None else OmegaConf.create({})
        merged = OmegaConf.merge(schema, given, {key: value for key, value in changes.items() if value is not None})
        rules = OmegaConf.to_object(merged)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: the rules cannot be read ({one_line(error)})") from error
    except OmegaConfBaseException as error:
        first = str(error).splitlines()[0]
        raise ConfigurationError(f"{path or 'rules'}: {first}: known keys are {', '.join(schema)}") from error
    except ConfigurationError as error:
        raise ConfigurationError(f"{path or 'rules'}: {error}") from error
    except Exception as error:  # a YAML parser has a family of errors of its own
        raise ConfigurationError(f"{path}: no YAML of rules ({one_line(error)})") from error
    assert isinstance(rules, SeriesRules)
    return rules


def has_contrast(frame: Slice) -> bool | None:
    """Whether the header names a contrast agent; None where it says nothing, not even that there was none."""
    return _NO_CONTRAST.match(frame.scan.contrast) is None if frame.scan.contrast else None


def objections(frames: Sequence[Slice], rules: SeriesRules) -> list[str]:
    """Why a series is not wanted; empty if it is. Only technical words are quoted."""
    first = frames[0]
    scan = first.scan
    if scan.modality != rules.modality:
        return [f"modality {token(scan.modality) or 'unknown'}, not {rules.modality}"]
    text = f"{scan.text} {' '.join(first.image_type)}".lower()
    hits = [word for word in rules.exclude_words if re.search(rf"(?<![a-z]){re.escape(word.lower())}(?![a-z])", text)]
    found = [f"excluded by the word {word!r}" for word in hits]
    if len(frames) < rules.min_slices:
        found.append(f"{len(frames)} slices, fewer than {rules.min_slices}")
    angle = _oblique_deg(first)
    if angle is not None and angle > rules.max_oblique_deg:
        found.append(f"not axial (turned by {angle:.0f}°)")
    thickness = first.thickness_mm
    if thickness is not None and thickness > rules.max_thickness_mm:
        found.append(f"slices of {thickness:g} mm, thicker than {rules.max_thickness_mm:g} mm")
    if rules.contrast == "require" and not has_contrast(first):
        found.append("no contrast agent named")
    if rules.contrast == "exclude" and has_contrast(first):
        found.append("a contrast agent is named")
    if any(re.search(pattern, scan.kernel, re.IGNORECASE) for pattern in rules.exclude_kernels):
        found.append(f"kernel {token(scan.kernel)} is excluded")
    return found


def preference(frames: Sequence[Slice], rules: SeriesRules) -> tuple[float, ...]:
    """A sort key of an acceptable series, the best first: contrast, kernel, thin slices, many slices."""
    first = frames[0]
    patterns = enumerate(rules.prefer_kernels)
    kernel = next((rank for rank, p in patterns if re.search(p, first.scan.kernel, re.IGNORECASE)), math.inf)
    without_contrast = rules.contrast == "prefer" and not has_contrast(first)
    thickness = first.thickness_mm if first.thickness_mm else math.inf
    return float(without_contrast), kernel, thickness, -len(frames)


def _oblique_deg(frame: Slice) -> float | None:
    if len(frame.orientation) != 6:
        return None
    normal = np.cross(frame.orientation[:3], frame.orientation[3:])
    length = float(np.linalg.norm(normal))
    return math.degrees(math.acos(min(1.0, abs(float(normal[2])) / length))) if length > 0 else None
