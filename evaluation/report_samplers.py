"""Tables of samplers and numbers of steps, and whether 10 to 20 steps are as good as 250."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evaluation.report_collect import Result, mapping
from evaluation.report_tables import estimate, plain, table

_FIGURES = (
    ("psnr_body_db", "PSNR body, dB", "{:.2f}"),
    ("psnr_db", "PSNR, dB", "{:.2f}"),
    ("drr_ncc", "NCC of DRR", "{:.4f}"),
)


def sampler_tables(result: Result) -> str:
    """All rows of ``evaluation/sampler_table.py``, and its verdicts; a file may hold anything."""
    content = result.content
    rows = [_row(row) for row in _list(content.get("rows")) if isinstance(row, Mapping)]
    cases, test = plain(content.get("cases"), "{:.0f}"), content.get("split") == "test"
    parts = [
        table(
            ["sampler, steps", *(heading for _, heading, _ in _FIGURES), "Fréchet distance", "s a volume"],
            rows,
            f"Samplers ({result.name}): {cases} {'patients of the test set' if test else 'held-out patients'}; Fréchet "
            f"distance [95 % interval]: {content.get('features')}",
        )
    ]
    verdicts = [row for sampler, verdict in mapping(content, "verdicts").items() for row in _verdict(sampler, verdict)]
    head = ["sampler", "steps", "PSNR, ratio", "Fréchet distance, ratio [95 % interval]", "result"]
    caption = "Few steps against many of the same sampler: as good where both are within 5 %"
    return "".join([*parts, table(head, verdicts, caption) if verdicts else ""])


def _row(row: Mapping[str, Any]) -> list[str]:
    steps = plain(row.get("steps"), "{:.0f}")
    name = "the true codes, decoded" if row.get("sampler") == "codec" else f"{row.get('sampler')}, {steps}"
    distance = {"estimate": row.get("frechet"), "low": row.get("frechet_low"), "high": row.get("frechet_high")}
    figures = [plain(row.get(key), form) for key, _, form in _FIGURES]
    return [name, *figures, estimate(distance, "{:.4g}"), plain(row.get("seconds"), "{:.3g}")]


def _verdict(sampler: Any, verdict: Any) -> list[list[str]]:
    verdict = mapping(verdict)
    if "refused" in verdict:
        return [[str(sampler), "–", "–", "–", f"no verdict, {verdict['refused']}"]]
    many = plain(verdict.get("reference"), "{:.0f}")
    return [
        [
            str(sampler),
            f"{plain(one.get('steps'), '{:.0f}')} against {many}",
            plain(one.get("psnr_ratio"), "{:.3f}"),
            estimate(one.get("frechet_ratio"), "{:.3f}"),
            "as good" if one.get("passed") is True else "worse",
        ]
        for one in _list(verdict.get("candidates"))
        if isinstance(one, Mapping)
    ]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
