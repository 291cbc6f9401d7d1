"""The page of the analysis: one HTML file that needs no network."""

from __future__ import annotations

import base64
from html import escape
from typing import Any

from preprocess.analysis_plots import plots
from preprocess.analysis_summary import COMBINATION

_MOST_ROWS = 500
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; margin-bottom: 0; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; font-size: 0.9em; } th { text-align: left; font-weight: 600; }
th, td { padding: 0.2em 0.9em 0.2em 0; border-bottom: 1px solid #e6e8eb; vertical-align: top; }
td.number { text-align: right; } .plots { display: grid; grid-template-columns: repeat(3, 1fr); gap: 1em; }
figure { margin: 0; } figcaption { font-weight: 600; font-size: 0.9em; } img { width: 100%; height: auto; }
.wide { grid-column: 1 / -1; } .quiet { color: #666; } .scroll { overflow-x: auto; }
"""
_WIDE = ("Hounsfield units", "Contrast of the central vessels")
_HEADINGS = {
    "manufacturer": "manufacturer",
    "kernel": "kernel",
    "kvp": "kVp",
    "slice_thickness_mm": "thickness mm",
    "slice_spacing_mm": "spacing mm",
    "contrast_phase": "contrast",
    "volumes": "volumes",
}


def render_page(summary: dict[str, Any], records: dict[str, dict[str, Any]]) -> str:
    """The HTML of a summary and the records that it was made of."""
    parts = [_overview(summary)]
    if records:
        parts += ["<h2>Most common combinations</h2>", _combinations(summary), "<h2>Distributions</h2>"]
        parts += ['<div class="plots">', *(_figure(*item) for item in plots(summary, records).items()), "</div>"]
        parts += ["<h2>To look at before training</h2>", _flagged(summary)]
    if summary["failed"]:
        rows = [[name, reason] for name, reason in summary["failed"].items()]
        parts += ["<h2>Not readable</h2>", _table(["volume", "reason"], rows)]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>Data set analysis</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _overview(summary: dict[str, Any]) -> str:
    phases = ", ".join(f"{count} {phase}" for phase, count in summary["counts"]["contrast_phase"].items())
    failed = f", {len(summary['failed'])} not readable" if summary["failed"] else ""
    contrast = f"<br>Contrast, measured in the blood: {escape(phases)}." if phases else ""
    return f'<h1>Data set analysis</h1>\n<p class="quiet">{summary["volumes"]} volumes{failed}.{contrast}</p>'


def _combinations(summary: dict[str, Any]) -> str:
    keys = [*COMBINATION, "volumes"]
    rows = [[combination[key] for key in keys] for combination in summary["most_common_combinations"]]
    return _table([_HEADINGS[key] for key in keys], rows)


def _flagged(summary: dict[str, Any]) -> str:
    flagged = {name: record for name, record in summary["by_volume"].items() if record["flags"]}
    if not flagged:
        return "<p>Nothing was flagged.</p>"
    counts = "; ".join(f"{count} × {escape(flag)}" for flag, count in summary["flags"].items())
    rows = [
        [name, "" if record["blood_hu"] is None else round(record["blood_hu"]), "; ".join(record["flags"])]
        for name, record in list(flagged.items())[:_MOST_ROWS]
    ]
    more = f"<p>{len(flagged) - len(rows)} more in dataset_analysis.json.</p>" if len(flagged) > len(rows) else ""
    return f"<p>{counts}</p>\n{_table(['volume', 'blood HU', 'why'], rows)}{more}"


def _table(headings: list[str], rows: list[list[Any]]) -> str:
    def cell(value: Any) -> str:
        kind = ' class="number"' if isinstance(value, int) else ""
        return f"<td{kind}>{escape(str(value))}</td>"

    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "\n".join(f"<tr>{''.join(cell(value) for value in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>\n{body}\n</table></div>'


def _figure(title: str, png: bytes) -> str:
    wide = ' class="wide"' if title in _WIDE else ""
    picture = base64.b64encode(png).decode()
    return (
        f"<figure{wide}><figcaption>{escape(title)}</figcaption>"
        f'<img alt="{escape(title)}" src="data:image/png;base64,{picture}"></figure>'
    )
