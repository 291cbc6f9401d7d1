"""Tables of results as HTML: means with their intervals, gains over controls, bars; text from files is escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from evaluation.metrics.columns import IMAGE_COLUMNS
from evaluation.report_collect import Result, mapping, number

SCORES = (
    ("psnr_body_db", "PSNR body, dB", "{:.2f}"),
    ("psnr_db", "PSNR, dB", "{:.2f}"),
    ("psnr_slice_db", "PSNR per slice, dB", "{:.2f}"),
    ("ssim", "SSIM", "{:.4f}"),
    ("mae_body_hu", "MAE body, HU", "{:.1f}"),
    ("mae_hu", "MAE, HU", "{:.1f}"),
    ("bias_hu", "bias, HU", "{:+.1f}"),
    ("drr_ncc", "NCC of DRR", "{:.4f}"),
    ("drr_ncc_body", "NCC of DRR, body", "{:.4f}"),
)
ROLES = {
    "right": "the patient's own X-ray",
    "right_mean": "mean of several samples",
    "shuffled": "another patient's X-ray",
    "unconditional": "no X-ray",
    "codec": "codec alone (from the CT itself)",
    "mean": "mean of the training volumes",
    "linear": "linear regression on the X-ray",
}
MEASURES = {
    "lung_ml": "lung volume",
    "body_ml": "body volume",
    "heart_ml": "heart volume",
    "heart_shadow_cm2": "heart shadow",
    "body_width_mm": "body width",
    "vessel_ml": "vessel volume",
}

_OTHER = {
    "mirror": {
        "ncc_mirrored": "chirality, from the mirrored X-ray: NCC with the mirrored volume",
        "ncc_same": "chirality, from the mirrored X-ray: NCC with the volume itself",
        "gain": "chirality: difference of the two; positive: the side follows the X-ray",
    },
    "cone": {
        "ncc": "NCC of the cone-beam DRR with the X-ray that was given",
        "ncc_shuffled": "the same of the volume from another patient's X-ray, with the patient's own",
    },
    "retrieval": {
        "nearest": "share whose own CT is the nearest of all that were evaluated",
        "nearest_shuffled": "the same of volumes from another patient's X-ray",
        "rank": "place of the own CT among all, by distance (1 is the nearest)",
    },
    "diversity": {"ms_ssim": "MS-SSIM between samples", "std_hu": "standard deviation between samples, HU"},
}


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    """A table that scrolls in its own box on a narrow screen.

    Args:
        head: headings, plain text.
        rows: cells as plain text; the first of each row is its heading.
        caption: plain text.
    """
    top = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="wide" tabindex="0"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def estimate(value: Any, form: str) -> str:
    """An estimate with its 95 % interval; a dash where there is none."""
    value = mapping(value)
    middle, low, high = (number(value.get(key)) for key in ("estimate", "low", "high"))
    if not math.isfinite(middle):
        return "–"
    if not (math.isfinite(low) and math.isfinite(high)):
        return form.format(middle)
    return f"{form.format(middle)} [{form.format(low)}, {form.format(high)}]"


def plain(value: Any, form: str) -> str:
    """A number, or a dash."""
    value = number(value)
    return form.format(value) if math.isfinite(value) else "–"


def case_table(scores: Mapping[str, Mapping[str, float]]) -> str:
    """Scores of one patient's volumes."""
    rows = [[role, *(plain(values.get(key), form) for key, _, form in SCORES)] for role, values in scores.items()]
    return table(["volume", *(heading for _, heading, _ in SCORES)], rows, "This patient, against the truth")


def codec_table(result: Result) -> str:
    """Metrics of reconstructions by volume, of ``evaluation/reconstruct.py``."""
    content = result.content
    volumes = mapping(content, "volumes")
    rows = {str(name): mapping(values) for name, values in list(volumes.items())[:200]}
    rows |= {f"mean of {len(volumes)}": mapping(content, "mean")}
    cells = [[name, *(plain(values.get(key), form) for key, _, form in IMAGE_COLUMNS)] for name, values in rows.items()]
    usage, perplexity = (
        plain(100 * number(content.get("code_usage")), "{:.1f}"),
        plain(content.get("code_perplexity"), "{:.0f}"),
    )
    caption = (
        f"Reconstruction of {'test' if content.get('split') == 'test' else 'held-out'} volumes ({result.name}), "
        f"range {plain(content.get('data_range_hu'), '{:.0f}')} HU; codes in use {usage} %, perplexity {perplexity}"
    )
    return table(["volume", *(heading for _, heading, _ in IMAGE_COLUMNS)], cells, caption)


def generation_tables(result: Result) -> str:
    """All of the summary of ``evaluation/xray_to_ct.py``."""
    summary = mapping(result.content, "summary")
    patients, settings = plain(summary.get("cases"), "{:.0f}"), mapping(result.content, "settings")
    compared = [score for score in SCORES if score[0] != "bias_hu"]  # no volume has more of a signed error

    def rows_of(part: str, columns: Sequence[tuple[str, str, str]]) -> list[list[str]]:
        return [
            [ROLES.get(role, str(role)), *(estimate(mapping(values).get(key), form) for key, _, form in columns)]
            for role, values in mapping(summary, part).items()
        ]

    parts = [
        table(
            ["volume made from", *(heading for _, heading, _ in SCORES)],
            rows_of("scores", SCORES),
            f"{result.name}: {patients} {who(settings)}{_told(settings)}; mean [95 % bootstrap interval over patients]",
        ),
        table(
            ["over", *(heading for _, heading, _ in compared)],
            rows_of("gains", compared),
            "Paired gain of the patient's own X-ray; positive is better, also for errors",
        ),
    ]
    correlations = mapping(summary, "correlations")
    rows = [
        [ROLES.get(role, str(role)), *(estimate(mapping(values).get(key), "{:.3f}") for key in MEASURES)]
        for role, values in correlations.items()
    ]
    parts.append(table(["volume made from", *MEASURES.values()], rows, "Correlation (Pearson's r) with the truth"))
    parts.append(_other_figures(summary))
    parts.append(_bars(summary))
    return "".join(parts)


def who(settings: Mapping[str, Any]) -> str:
    """The patients of an evaluation of ``evaluation/xray_to_ct.py``."""
    named = {"training": "patients OF THE TRAINING, which the model has seen", "test": "patients of the test set"}
    return named.get(str(settings.get("split")), "held-out patients")


def _told(settings: Mapping[str, Any]) -> str:
    """What the model knew of each patient, as the rest of a sentence; empty where an evaluation does not say it."""
    told = settings.get("told")
    if not isinstance(told, list):
        return ""
    beside = [str(name) for name in told if name != "radiograph"]
    if beside:
        return f"; beside every X-ray the model is told the patient's own {' and '.join(beside)}"
    return "; the model is told the X-ray alone"


def _other_figures(summary: Mapping[str, Any]) -> str:
    chirality = mapping(summary, "chirality")
    share = 100 * number(chirality.get("share_right_way_round"))
    rows = [
        [
            "upright X-ray: NCC of the projection with the truth's minus with the truth's mirrored (a chest that is "
            "drawn without looking passes, too)",
            estimate(chirality, "{:.4f}"),
        ],
        ["upright X-ray: share above 0 (as above)", f"{plain(share, '{:.0f}')} %"],
    ]
    for part, names in _OTHER.items():
        rows += [
            [names.get(name, f"{part}: {name}"), estimate(value, "{:.4g}")]
            for name, value in mapping(summary, part).items()
        ]
    return table(["figure", "mean [95 % interval]"], rows, "Orientation, agreement with the given X-ray, diversity")


def _bars(summary: Mapping[str, Any]) -> str:
    bars = summary.get("bars")
    rows = [
        [
            str(bar.get("bar", "")),
            plain(bar.get("low"), "{:.0f}" if isinstance(bar.get("low"), int) else "{:.3f}"),
            plain(bar.get("asked"), "{:g}"),
            "passed" if bar.get("passed") is True else "missed",
        ]
        for bar in (bars if isinstance(bars, list) else [])
        if isinstance(bar, Mapping)
    ]
    return (
        table(["bar", "lower end of the interval, or number", "asked", "result"], rows, "The project's bars")
        if rows
        else ""
    )
