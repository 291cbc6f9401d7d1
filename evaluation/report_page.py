"""The page of a report: one HTML file that needs no network, allows none, and runs only the scripts that it was given.

Text from files is escaped. The Content-Security-Policy names the hash of each script and style sheet
(https://www.w3.org/TR/CSP3/), so that nothing else can run even if something slipped through, and forbids every
connection.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.report_pictures import WINDOWS, embedded_nifti

_ASSETS = Path(__file__).parent / "viewer"
# Shown in 3D: opacified blood and bone, without the skin around them.
_SOLID_HU = (120.0, 600.0)
TITLE = "From one chest X-ray to a CT volume"
WARNING = (
    "Research only, not for diagnosis. Generated volumes are synthetic: they show what is likely for such an X-ray, "
    "not what is inside this patient."
)


@dataclass
class Volumes:
    """What the interactive viewer holds."""

    cases: list[dict[str, Any]] = field(default_factory=list)
    files: list[bytes] = field(default_factory=list)

    def add(self, name: str, volumes: Sequence[tuple[str, np.ndarray]], affine: np.ndarray) -> None:
        """Embed the volumes (label, HU (D, H, W)) of a patient, the truth first."""
        entries = []
        for label, hu in volumes:
            content, shape = embedded_nifti(hu, affine)
            entries.append({"label": label, "id": f"volume-{len(self.files)}", "shape": list(shape)})
            self.files.append(content)
        self.cases.append({"name": name, "volumes": entries})


def page(title: str, sections: Sequence[tuple[str, str, str]], volumes: Volumes, subtitle: str) -> str:
    """The whole file.

    Args:
        title: plain text.
        sections: (identity, heading, HTML), those with empty HTML are left out.
        volumes: of the viewer; without any there is no viewer and no script.
        subtitle: plain text.
    """
    style = (_ASSETS / "report.css").read_text(encoding="utf-8")
    scripts = [(_ASSETS / name).read_text(encoding="utf-8") for name in ("niivue.umd.js", "viewer.js")]
    if not volumes.cases:
        scripts = []
    shown = [section for section in sections if section[2]]
    links = " ".join(f'<a href="#{identity}">{escape(heading)}</a>' for identity, heading, _ in shown)
    body = "".join(
        f'<section id="{identity}"><h2>{escape(heading)}</h2>{content}</section>'
        for identity, heading, content in shown
    )
    embedded = "".join(
        f'<script type="text/plain" id="volume-{number}">{base64.b64encode(content).decode()}</script>'
        for number, content in enumerate(volumes.files)
    )
    code = "".join(f"<script>{script}</script>" for script in scripts)
    data = f'<script type="application/json" id="viewer-data">{_json(_viewer_data(volumes))}</script>'
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts, style)}">'
        '<meta name="referrer" content="no-referrer">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
        f'<header><h1>{escape(title)}</h1><p class="quiet">{escape(subtitle)}</p>'
        f'<p class="warning">{escape(WARNING)}</p><nav>{links}</nav></header><main>{body}</main>'
        f"<footer>{_licence() if scripts else ''}</footer>"
        f"{data + embedded + code if scripts else ''}</body></html>\n"
    )


def viewer() -> str:
    """The elements that ``viewer.js`` brings to life."""
    rows = "".join(
        f'<label for="place-{axis}">{name}</label><input type="range" id="place-{axis}" min="0" max="0" value="0">'
        f'<output id="shown-{axis}" for="place-{axis}"></output>'
        for axis, name in (("d", "axial"), ("h", "coronal"), ("w", "sagittal"))
    )
    return (
        "<p>The truth, and the chosen volume beside it. Radiological display: the patient's right is on the left. "
        "Click or drag in a picture, or move the sliders; both sides follow.</p>"
        '<div id="viewer"><div class="controls"><label>patient <select id="case"></select></label>'
        '<label>beside the truth <select id="other"></select></label><span id="presets" role="group" '
        'aria-label="window"></span><label><input type="checkbox" id="solid"> 3D (contrast and bone)</label></div>'
        '<div class="panes"><div class="pane"><canvas id="pane-truth" aria-label="truth"></canvas></div>'
        '<div class="pane"><canvas id="pane-other" aria-label="chosen volume"></canvas></div></div>'
        f'<div class="sliders">{rows}</div><p class="quiet" id="viewer-note"></p>'
        "<noscript><p>The viewer needs JavaScript; the pictures below do not.</p></noscript></div>"
    )


def _viewer_data(volumes: Volumes) -> dict[str, Any]:
    windows = [
        {"name": name, "level": level, "width": width, "range": [level - width / 2, level + width / 2]}
        for name, (level, width) in WINDOWS.items()
    ]
    return {"cases": volumes.cases, "windows": windows, "solid": list(_SOLID_HU)}


def _json(value: Any) -> str:
    """JSON that cannot end the element it stands in."""
    return json.dumps(value).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _policy(scripts: Sequence[str], style: str) -> str:
    """Nothing but these scripts, this style and embedded pictures; `data:` and `blob:` reach no network."""
    hashes = " ".join(map(_hash, scripts)) or "'none'"
    return (
        f"default-src 'none'; script-src {hashes}; style-src {_hash(style)}; img-src data: blob:; "
        "connect-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _licence() -> str:
    text = (_ASSETS / "niivue.LICENSE").read_text(encoding="utf-8")
    return (
        '<p class="quiet">The viewer is NiiVue (BSD 2-Clause), embedded unchanged.</p>'
        f"<details><summary>Licences of the viewer</summary><pre>{escape(text)}</pre></details>"
    )
