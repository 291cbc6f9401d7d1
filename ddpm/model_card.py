"""What a bundle is, was made of, is worth and is for, in Markdown, written from its metadata alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ddpm.bundle import Bundle

_SCORES = (
    ("psnr_body_db", "PSNR in the body, dB", "{:.2f}"),
    ("psnr_db", "PSNR, dB", "{:.2f}"),
    ("psnr_slice_db", "PSNR per slice, dB", "{:.2f}"),
    ("ssim", "SSIM 3D", "{:.3f}"),
    ("mae_body_hu", "MAE in the body, HU", "{:.1f}"),
    ("bias_hu", "bias, HU", "{:+.1f}"),
    ("drr_ncc", "NCC of projections", "{:.3f}"),
)
_ROLES = {
    "right": "the patient's own X-ray",
    "right_mean": "the same, mean of several samples",
    "shuffled": "another patient's X-ray",
    "unconditional": "no X-ray",
    "mean": "mean of the training volumes",
    "linear": "linear regression from the X-ray",
    "codec": "the CT itself through the codec",
}


def model_card(bundle: Bundle) -> str:
    """The card of a bundle; the same text for the same bundle."""
    config, meta = bundle.config, bundle.meta
    told = config.conditioner
    d, h, w = bundle.shape_dhw
    mean, std = config.spacing_mm
    parameters = sum(p.numel() for p in bundle.network.parameters()) / 1e6
    codec = sum(p.numel() for p in bundle.codec.codec.parameters()) / 1e6
    window = bundle.codec.window
    takes = [f"{' and '.join(told.views)} X-ray of {told.xray_size}×{told.xray_size} pixels"]
    takes += ["report text"] if told.text != "none" else []
    takes += ["embolism label"] if told.label else []
    spacing = " × ".join(f"{step:.2f} ± {spread:.2f}" for step, spread in zip(mean, std, strict=True))
    lines = [
        "# X-ray2CTPA model card",
        "",
        "**Research only, not for diagnosis.** The model draws a chest CT that is plausible for an X-ray. What the "
        "X-ray does not show, emboli and small vessels among it, is invented. Volumes must never stand in for a scan.",
        "",
        "| | |",
        "|---|---|",
        f"| bundle (SHA-256) | `{bundle.checksum}` |",
        f"| takes | {', '.join(takes)} |",
        f"| gives | {w}×{h}×{d} voxels (W×H×D), HU from {window.min_hu:g} to {window.max_hu:g} |",
        f"| voxel spacing of the training volumes, mm [D, H, W] | {spacing} |",
        f"| diffusion model | {parameters:.2f} M parameters, latents of {len(config.statistics.mean)} channels on "
        f"{'×'.join(map(str, config.latent_dhw))} cells, objective {config.diffusion.objective} |",
        f"| codec (3D VQ-GAN) | {codec:.2f} M parameters, {bundle.codec.codec.config.quantizer}, "
        f"{bundle.codec.codec.config.n_codes} codes, content `{bundle.codec.content_hash[:16]}` |",
        f"| written with | {', '.join(f'{name} {version}' for name, version in sorted(meta['versions'].items()))} |",
        "",
        "## Data",
        "",
        *_data(meta["training"]),
        "",
        "## Measured",
        "",
        *_measured(meta["report"]),
        "",
        "## Limits",
        "",
        "The field of a real X-ray is the training cohort's, centred; nobody knows where the patient stood. X-rays "
        "unlike those of the training (children, portable films, rotation, metal) were not examined. A cohort that is "
        "not listed above was not trained on and not measured.",
    ]
    return "\n".join(lines) + "\n"


def _data(training: Mapping[str, Any]) -> list[str]:
    if not training:
        return ["Not recorded."]
    return ["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in sorted(training.items()))]


def _measured(report: Mapping[str, Any] | None) -> list[str]:
    """Scores with 95 % intervals, beside their controls."""
    if report is None:
        return ["Nothing was measured: export with `--report report.json` of `evaluation/xray_to_ct.py`."]
    sampling = report.get("sampling", {})
    who = {"training": "patients **of the training**", "test": "patients of the test set"}
    rows = [
        f"{report['cases']} {who.get(sampling.get('split'), 'held-out patients')}, mean [95 % interval]; a model that "
        "is to be believed beats the mean and the regression.",
        "",
        *_drawn(sampling),
        "| volume from | " + " | ".join(heading for _, heading, _ in _SCORES) + " |",
        "|---|" + "---|" * len(_SCORES),
    ]
    order = [*_ROLES, *(role for role in report["scores"] if role not in _ROLES)]  # JSON has forgotten it
    for role in (role for role in order if role in report["scores"]):
        scores = report["scores"][role]
        cells = (_interval(scores[key], form) if key in scores else "" for key, _, form in _SCORES)
        rows.append(f"| {_ROLES.get(role, role)} | {' | '.join(cells)} |")
    for bar in report.get("bars", ()):
        verdict = "passed" if bar["passed"] else "**missed**"
        asked, low = f"{'at least' if bar['asked'] else 'above'} {bar['asked']:g}", bar["low"]
        # a number of patients has no interval
        found = f"{low}" if isinstance(low, int) else f"lower end {_number(low, '{:.3f}')}"
        rows += ["", f"Bar: {bar['bar']} {asked}; {found}: {verdict}."]
    return rows


def _drawn(sampling: Mapping[str, Any]) -> list[str]:
    """How the volumes were drawn, as far as the report says it, and an empty line."""
    forms = {
        "steps": "{} steps",
        "sampler": "sampler {}",
        "guidance": "guidance {:g}",
        "rescale": "rescale {:g}",
        "samples": "{} sample(s) of each X-ray",
        "seed": "seed {}",
    }
    said = [form.format(sampling[name]) for name, form in forms.items() if name in sampling]
    if (told := sampling.get("told")) is not None:
        beside = " and ".join(name for name in told if name != "radiograph")
        said.append(f"beside every X-ray the model was told the patient's own {beside}" if beside else "X-ray alone")
    return [f"Volumes drawn with: {', '.join(said)}.", ""] if said else []


def _interval(value: Mapping[str, Any], form: str) -> str:
    estimate, low, high = (_number(value[key], form) for key in ("estimate", "low", "high"))
    return f"{estimate} [{low}, {high}]"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)  # JSON has no NaN


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
