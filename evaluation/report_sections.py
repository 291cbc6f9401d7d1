"""The sections of a report: figures that sum it up, patients, viewer, tables, curves, and what is missing."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from errors import ProjectError
from evaluation.report_cases import Chosen, ReportCase, cases_of, versions
from evaluation.report_clinical import clinical_tables, lesion_table
from evaluation.report_collect import Found, Result, mapping
from evaluation.report_curves import training_curves
from evaluation.report_page import TITLE, Volumes, page, viewer
from evaluation.report_pictures import histogram, planes, radiographs
from evaluation.report_samplers import sampler_tables
from evaluation.report_tables import (
    case_table,
    codec_table,
    estimate,
    generation_tables,
    plain,
    who,
)

_HOW = {
    "codec training": "python baseline_256x256x64/train/train_vqgan.py output_dir=DIR",
    "diffusion training": "python ddpm/train/train_ddpm.py pretrained_vqgan=DIR/checkpoints/final.ckpt output_dir=DIR2",
    "table of reconstructions": "python evaluation/reconstruct.py --run DIR",
    "table of generated volumes": "python evaluation/xray_to_ct.py --run DIR2",
    "diversity of samples": "python evaluation/xray_to_ct.py --run DIR2 --output DIR3 --samples 4",
    "comparison of samplers": "python evaluation/sampler_table.py --run DIR2",
    "evaluation of embolism": "python ddpm/classifier/train_classifier.py output_dir=DIR4, then "
    "python evaluation/clinical.py --run DIR2 --classifier DIR4/checkpoints/final.ckpt",
    "survival of emboli in the codec": "python evaluation/lesion_survival.py --checkpoint DIR/checkpoints/final.ckpt",
    "pictures": "finish the training (ckpt_path=last), so that checkpoints/final.ckpt is there",
}


def write_report(found: Found, count: int, device: str) -> str:
    """The HTML of everything that was found.

    Args:
        found: in the folder; ``damaged`` grows by what cannot be read now.
        count: patients with pictures.
        device: where volumes are drawn.
    """
    volumes, chosen = Volumes(), Chosen()
    articles = _articles(found, count, device, volumes, chosen)
    sections = [
        ("summary", "In short", _summary(found)),
        ("volumes", "Look into the volumes", viewer() if volumes.cases else ""),
        ("patients", "Held-out patients", _patients(articles, chosen)),
        ("results", "Results", _results(found)),
        ("training", "Training", training_curves(found)),
        ("missing", "Not in this report", _missing(found, bool(articles) or count == 0)),
        ("reading", "How to read it", _reading()),
    ]
    names = ", ".join(f"{run.kind} {run.name}" for run in found.runs) or "results without their training run"
    return page(TITLE, sections, volumes, f"X-ray2CTPA report: {names}. Made with {versions()}.")


def _articles(found: Found, count: int, device: str, volumes: Volumes, chosen: Chosen) -> list[str]:
    articles: list[str] = []
    if count == 0:
        return articles
    try:
        for case in cases_of(found, count, device, chosen):
            articles.append(_article(case, f"case{len(articles)}"))
            volumes.add(case.name, [("truth", case.truth_hu), *case.volumes.items()], case.affine)
            print(f"patient {case.name}", flush=True)
    except ProjectError as error:
        # the message may name folders of this machine: it goes to the terminal, not to the page
        found.damaged.append(f"pictures of patients: {error}")
    return articles


def _article(case: ReportCase, key: str) -> str:
    d, h, w = case.truth_hu.shape
    spacing = " × ".join(f"{mm:.3g}" for mm in reversed(case.spacing_mm))
    return (
        f"<article><h3>{escape(case.name)}</h3>"
        f'<p class="quiet">{w} × {h} × {d} voxels (W × H × D) of {spacing} mm</p>'
        f"{radiographs(case)}{planes(case, key)}{case_table(case.scores())}"
        f'<div class="histogram">{histogram(case)}</div></article>'
    )


def _patients(articles: list[str], chosen: Chosen) -> str:
    if not articles:
        return ""
    text = escape(chosen.sentence)
    if chosen.left_out:
        text += f" Left out, since they could not be read: {escape(', '.join(chosen.left_out))}."
    return f"<p>{text}</p>{''.join(articles)}"


def _summary(found: Found) -> str:
    tiles: list[str] = []
    restored, generated = found.results.get("codec_metrics", []), found.results.get("generation", [])
    for result in restored:
        mean, count = mapping(result.content, "mean"), len(mapping(result.content, "volumes"))
        text = f"PSNR 3D of {count} reconstructed held-out volumes"
        tiles.append(_tile(f"{plain(mean.get('psnr_db'), '{:.2f}')} dB", text, of=_whose(result, restored)))
    for result in generated:
        summary = mapping(result.content, "summary")
        patients = plain(summary.get("cases"), "{:.0f}")
        whom = f"{patients} {who(mapping(result.content, 'settings'))}"
        figures = {f"PSNR in the body, generated for {whom}": ("{:.2f}", "scores", "right")}
        for control, text in (
            ("shuffled", "gain of the own X-ray over another patient's"),
            ("mean", "gain over the mean of the training volumes"),
            ("linear", "gain over a linear regression on the X-ray"),
        ):
            if mapping(summary, "gains", control):
                figures[f"PSNR in the body: {text}"] = ("{:+.2f}", "gains", control)
        for text, (form, *place) in figures.items():
            figure, _, interval = estimate(mapping(summary, *place, "psnr_body_db"), form).partition(" ")
            interval = f"95 % interval {interval}" if interval else ""
            tiles.append(_tile(f"{figure} dB", text, interval, of=_whose(result, generated)))
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _whose(result: Result, beside: list[Result]) -> str:
    """The name of a result where there are several of its kind."""
    return result.name if len(beside) > 1 else ""


def _tile(figure: str, text: str, interval: str = "", of: str = "") -> str:
    below = "".join(f"<span>{escape(line)}</span>" for line in (interval, text, of) if line)
    return f'<div class="tile"><b>{escape(figure)}</b>{below}</div>'


def _results(found: Found) -> str:
    parts: list[tuple[str, Callable[..., str]]] = [
        ("generation", generation_tables),
        ("codec_metrics", codec_table),
        ("samplers", sampler_tables),
        ("clinical", clinical_tables),
        ("lesions", lesion_table),
    ]
    return "".join(build(result) for part, build in parts for result in found.results.get(part, ()))


def _missing(found: Found, pictures: bool) -> str:
    absent = {
        "codec training": not found.of_kind("codec"),
        "diffusion training": not found.of_kind("diffusion"),
        "table of reconstructions": not found.results.get("codec_metrics"),
        "table of generated volumes": not found.results.get("generation"),
        "diversity of samples": not any(
            mapping(result.content, "summary", "diversity") for result in found.results.get("generation", ())
        ),
        "comparison of samplers": not found.results.get("samplers"),
        "evaluation of embolism": not found.results.get("clinical"),
        "survival of emboli in the codec": not found.results.get("lesions"),
        "pictures": not pictures,
    }
    lines = [f"No {name}: <code>{escape(_HOW[name])}</code>" for name, missing in absent.items() if missing]
    lines += [
        f"{escape(result.name)} left out {len(failed)} patients that could not be read."
        for result in found.results.get("generation", ())
        if (failed := mapping(result.content, "failed"))
    ]
    if found.damaged:
        lines.append(f"{len(found.damaged)} damaged parts are left out; the command that made this report names them.")
    return f"<ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul>" if lines else ""


def _reading() -> str:
    return (
        "<p>PSNR and SSIM are 3D, on the HU window of the models; &ldquo;body&rdquo; counts the voxels inside the true "
        "body alone, since the air around it is easy. MAE is the mean absolute error. A DRR is a frontal parallel "
        "projection; its NCC is the normalised cross-correlation with that of the true volume. Intervals are 95 % "
        "percentile bootstrap intervals over patients. Chests look alike, so a figure means little by itself: what the "
        "X-ray contributes is the gain over another patient's X-ray.</p>"
        "<p>Pictures are radiological: the patient's right is on the left, anterior is up in axial planes, superior "
        "is up in the others. In error maps blue is too dark, red too dense; colours saturate at ±300 HU. "
        "Volumes in the viewer are int16 HU, made smaller where they are large.</p>"
    )
