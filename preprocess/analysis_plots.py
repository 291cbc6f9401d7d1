"""The plots of the analysis page, each a PNG in memory."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from preprocess.analysis_contrast import ANGIOGRAPHIC, ANGIOGRAPHIC_HU, ENHANCED_HU, NONE, UNKNOWN, WEAK
from preprocess.analysis_summary import NOT_STATED
from preprocess.analysis_volume import HISTOGRAM_EDGES_HU, THICK_SLICES_MM

_INK, _QUIET, _BAR = "#222222", "#8a8f98", "#3b6ea5"
PHASE_COLOURS = {NONE: "#c2452d", WEAK: "#d99a2b", ANGIOGRAPHIC: "#2f8f5b", UNKNOWN: _QUIET}
_MOST_BARS = 10
_MOST_NAMES = 40


def plots(summary: dict[str, Any], records: dict[str, dict[str, Any]]) -> dict[str, bytes]:
    """PNG by title; of a data set with at least one volume."""
    rows = list(records.values())
    counts = summary["counts"]
    spacings = [row["spacing_dhw_mm"] for row in rows]
    drawn: dict[str, Callable[[Axes], None]] = {
        "Tube voltage": lambda axes: _bars(axes, counts["kvp"], "kVp"),
        "Reconstruction kernel": lambda axes: _bars(axes, counts["kernel"], "kernel"),
        "Manufacturer": lambda axes: _bars(axes, counts["manufacturer"], "manufacturer"),
        "Matrix": lambda axes: _bars(axes, counts["matrix"], "columns × rows"),
        "Slice thickness": lambda axes: _histogram(
            axes, [row["slice_thickness_mm"] for row in rows], "slice thickness, mm (header)", THICK_SLICES_MM
        ),
        "Slice spacing": lambda axes: _histogram(
            axes, [step[0] for step in spacings], "slice spacing, mm", THICK_SLICES_MM
        ),
        "Pixel spacing": lambda axes: _histogram(axes, [step[2] for step in spacings], "pixel spacing, mm"),
        "Depth": lambda axes: _histogram(axes, [row["shape_dhw"][0] for row in rows], "slices"),
        "Length along the body": lambda axes: _histogram(axes, [row["extent_dhw_mm"][0] for row in rows], "mm"),
    }
    pictures = {title: _png(draw, (3.4, 2.7)) for title, draw in drawn.items()}
    pictures["Hounsfield units"] = _png(lambda axes: _hounsfield(axes, rows), (9.6, 3.4))
    height = 1.6 + 0.22 * len(records) if len(records) <= _MOST_NAMES else 3.4
    pictures["Contrast of the central vessels"] = _png(lambda axes: _contrast(axes, records), (9.6, height))
    return pictures


def _png(draw: Callable[[Axes], None], size_inches: tuple[float, float]) -> bytes:
    # no pyplot: its figures live in a global list, and it looks for a display
    figure = Figure(figsize=size_inches, dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=_INK)
    draw(axes)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _nothing(axes: Axes, label: str) -> None:
    axes.text(0.5, 0.5, NOT_STATED, ha="center", va="center", color=_QUIET, transform=axes.transAxes)
    axes.set_xlabel(label, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])


def _bars(axes: Axes, counts: dict[str, int], label: str) -> None:
    shown = dict(list(counts.items())[:_MOST_BARS])
    if rest := sum(counts.values()) - sum(shown.values()):
        shown[f"{len(counts) - len(shown)} others"] = rest
    places = np.arange(len(shown))[::-1]
    colours = [_QUIET if name == NOT_STATED else _BAR for name in shown]
    bars = axes.barh(places, list(shown.values()), color=colours, height=0.7)
    axes.bar_label(bars, fontsize=8, padding=2)
    # a dollar sign would start a formula
    axes.set_yticks(places, [name.replace("$", r"\$") for name in shown])
    # one or two bars are as thin as those of three, and stand in the middle
    spare = max(0, 3 - len(shown)) / 2
    axes.set_ylim(-0.8 - spare, len(shown) - 0.2 + spare)
    axes.margins(x=0.12)
    axes.set_xlabel(f"volumes by {label}", fontsize=8)
    _whole_numbers(axes, "x")


def _histogram(axes: Axes, values: Sequence[float | None], label: str, limit: float | None = None) -> None:
    known = [value for value in values if value is not None]
    if not known:
        _nothing(axes, label)
        return
    low, high = min(known), max(known)
    pad = 0.05 * (high - low) or 0.5
    # an odd number, so that the only value of a uniform collection lies in the middle of its bar
    axes.hist(known, bins=min(30, max(8, len(known) // 4)) | 1, range=(low - pad, high + pad), color=_BAR)
    if limit is not None and low - pad < limit < high + pad:
        axes.axvline(limit, color=PHASE_COLOURS[NONE], lw=1, ls="--")
    missing = f", {len(values) - len(known)} {NOT_STATED}" if len(known) < len(values) else ""
    axes.set_xlabel(f"{label}{missing}", fontsize=8)
    axes.set_ylabel("volumes", fontsize=8)
    _whole_numbers(axes, "y")


def _whole_numbers(axes: Axes, which: str) -> None:
    axes.locator_params(axis=which, integer=True, nbins=6)  # type: ignore[arg-type]


def _hounsfield(axes: Axes, rows: list[dict[str, Any]]) -> None:
    edges = np.array(HISTOGRAM_EDGES_HU)
    middles = (edges[:-1] + edges[1:]) / 2
    shares = 100.0 * np.array([row["hu_histogram"] for row in rows])
    low, middle, high = np.percentile(shares, (10, 50, 90), axis=0)
    axes.fill_between(middles, low, high, color=_BAR, alpha=0.25, lw=0, label="10–90 % of volumes")
    axes.plot(middles, middle, color=_BAR, lw=1.3, label="median volume")
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"HU, bins of {edges[1] - edges[0]}; the outermost also hold what lies beyond", fontsize=8)
    axes.set_ylabel("% of voxels", fontsize=8)
    axes.legend(frameon=False, fontsize=8)


def _contrast(axes: Axes, records: dict[str, dict[str, Any]]) -> None:
    measured = sorted(
        ((name, row) for name, row in records.items() if row["blood_hu"] is not None),
        key=lambda item: (item[1]["blood_hu"], item[0]),
    )
    label = "HU of the brightest central vessel; without contrast: of homogeneous soft tissue"
    if not measured:
        _nothing(axes, label)
        return
    axes.axvline(ENHANCED_HU, color=_QUIET, lw=1, ls=":")
    axes.axvline(ANGIOGRAPHIC_HU, color=_QUIET, lw=1, ls="--")
    for limit, name in ((ENHANCED_HU, "enhanced"), (ANGIOGRAPHIC_HU, "angiographic")):
        text: dict[str, Any] = {
            "xytext": (3, -2),
            "textcoords": "offset points",
            "va": "top",
            "fontsize": 8,
            "color": _QUIET,
        }
        axes.annotate(f"{name} from {limit:g}", (limit, 1), xycoords=("data", "axes fraction"), **text)
    for phase, colour in PHASE_COLOURS.items():
        places = [place for place, (_, row) in enumerate(measured) if row["contrast_phase"] == phase]
        if places:
            values = [measured[place][1]["blood_hu"] for place in places]
            axes.plot(values, places, "o", ms=5, color=colour, label=f"{phase} ({len(places)})")
    if len(measured) <= _MOST_NAMES:
        names = [name.replace("$", r"\$") for name, _ in measured]
        axes.set_yticks(range(len(measured)), [name if len(name) <= 44 else f"…{name[-43:]}" for name in names])
        axes.grid(axis="y", color="#e6e8eb", lw=0.6)
    else:
        axes.set_ylabel("volumes, by HU", fontsize=8)
    axes.set_axisbelow(True)
    axes.set_xlim(left=0)
    axes.set_xlabel(label, fontsize=8)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
