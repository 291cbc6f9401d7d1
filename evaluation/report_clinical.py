"""Tables of pulmonary embolism: what a classifier tells from each kind of volume, and which emboli survive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evaluation.report_collect import Result, mapping, number
from evaluation.report_tables import estimate, plain, table

_ROLES = {
    "real": "the scan",
    "codec": "the scan after the codec",
    "generated": "generated from the own X-ray",
    "shuffled": "generated from another patient's X-ray",
    "xray": "the X-ray alone",
}
_PARTS = ("body", "lungs", "heart", "vessels")
_AGAINST = {"phantom": "the phantom's known masks", "scan": "the segmentation of the scan"}
_INCONCLUSIVE = (
    "INCONCLUSIVE: the classifier does not tell embolisms in the scans themselves, so its word on the other volumes "
    "means nothing."
)
_SURVIVAL = ("emboli", "patients", "survived, % [95 % interval]", "contrast kept, %")


def clinical_tables(result: Result) -> str:
    """AUROC, calibration and paired tests of ``evaluation/clinical.py``, and its emboli where they are known."""
    summary = mapping(result.content, "summary")
    cases, positive = (plain(summary.get(key), "{:.0f}") for key in ("cases", "with_embolism"))
    rows = []
    for role, area in mapping(summary, "auroc").items():
        calibration = mapping(summary, "calibration", role)
        brier = estimate(calibration.get("brier"), "{:.3f}")
        distance = plain(mapping(summary, "frechet", "by_role", role).get("frechet"), "{:.4g}")
        rows.append([_role(role), estimate(area, "{:.3f}"), brier, distance])
    features = mapping(summary, "frechet").get("features")
    name = f"Fréchet distance ({features})" if isinstance(features, str) else "Fréchet distance"
    # what does not say that it is conclusive is not
    parts = [] if summary.get("conclusive") is True else [f'<p class="warning">{_INCONCLUSIVE}</p>']
    parts += [
        table(
            ["what the classifier sees", "AUROC", "Brier score", name],
            rows,
            f"Pulmonary embolism, {result.name}: {cases} held-out patients, {positive} with embolism; [95 % interval]",
        )
    ]
    tests = summary.get("delong")
    compared = [
        [
            f"{_role(test.get('first'))} minus {_role(test.get('second'))}",
            estimate(test.get("difference"), "{:+.3f}"),
            plain(test.get("p_value"), "{:.3g}"),
        ]
        for test in (tests if isinstance(tests, list) else [])
        if isinstance(test, Mapping)
    ]
    if compared:
        caption = "Differences of AUROC on the same patients (DeLong, p not corrected for their number)"
        parts.append(table(["compared", "difference [95 % interval]", "p"], compared, caption))
    for reference, roles in mapping(summary, "dice").items():
        overlap = [
            [_role(role), *(estimate(mapping(parts_of).get(part), "{:.3f}") for part in _PARTS)]
            for role, parts_of in mapping(roles).items()
        ]
        against = _AGAINST.get(reference, str(reference))
        parts.append(table(["volume", *_PARTS], overlap, f"Dice with {against} [95 % interval]"))
    survival = mapping(summary, "lesions", "survival")
    lesions = [
        [f"{_role(role)}, {group}", *_lesion_cells(values)]
        for role, groups in survival.items()
        for group, values in mapping(groups).items()
    ]
    if lesions:
        parts.append(table(["volume, diameter", *_SURVIVAL], lesions, "Known emboli of phantoms"))
    return "".join(parts)


def lesion_table(result: Result) -> str:
    """Emboli that survive encoding and decoding, by size, of ``evaluation/lesion_survival.py``."""
    rows = [[str(group), *_lesion_cells(values)] for group, values in mapping(result.content, "survival").items()]
    return table(["diameter", *_SURVIVAL], rows, f"Planted emboli after encoding and decoding: {result.name}")


def _lesion_cells(values: Any) -> list[str]:
    group = mapping(values)
    share = {key: 100 * number(value) for key, value in mapping(group, "survived").items()}
    counts = [plain(group.get(key), "{:.0f}") for key in ("lesions", "patients")]
    return [*counts, estimate(share, "{:.0f}"), plain(100 * number(group.get("kept")), "{:.0f}")]


def _role(name: Any) -> str:
    return _ROLES.get(name, str(name)) if isinstance(name, str) else "–"
