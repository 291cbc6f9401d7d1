"""Curves of training: which columns of a run's logs are drawn together."""

from __future__ import annotations

from html import escape

from evaluation.report_charts import Line, line_chart
from evaluation.report_collect import Found, TrainingRun

# For each kind of training: heading of a chart, log axis, y label, and lines (log, column, name).
_Chart = tuple[str, bool, str, tuple[tuple[str, str, str], ...]]
_CHARTS: dict[str, tuple[_Chart, ...]] = {
    "codec": (
        ("Reconstruction loss in training", True, "L1 on [0, 1]", (("train", "l1", "L1"),)),
        (
            "Adversarial terms in training",
            False,
            "loss",
            tuple(
                ("train", name, name.replace("_", " "))
                for name in ("generator", "discriminator", "feature_matching", "lpips")
            ),
        ),
        (
            "PSNR of held-out volumes",
            False,
            "dB",
            (
                ("validation", "psnr_db", "3D"),
                ("validation", "psnr_slice_db", "by slice"),
                ("validation", "psnr_pe_window_db", "PE window"),
            ),
        ),
        ("SSIM of held-out volumes", False, "SSIM 3D", (("validation", "ssim", "SSIM"),)),
        (
            "Error of held-out volumes",
            False,
            "HU",
            (("validation", "mae_hu", "MAE"), ("validation", "bias_hu", "bias")),
        ),
        ("Codes in use, held-out volumes", False, "perplexity", (("validation", "code_perplexity", "perplexity"),)),
    ),
    "diffusion": (
        (
            "Loss",
            True,
            "loss",
            (
                ("train", "loss", "training"),
                ("validation", "loss", "held out"),
                ("validation", "loss_without", "held out, without X-ray"),
            ),
        ),
        (
            "Loss by noise level in training",
            True,
            "loss",
            tuple(("train", f"loss_t{n}", f"quarter {n + 1}") for n in range(4)),
        ),
        (
            "Samples of held-out patients",
            False,
            "PSNR, dB",
            (
                ("validation", "sample_psnr_db", "own X-ray"),
                ("validation", "sample_psnr_db_shuffled", "another patient's"),
            ),
        ),
        ("Error of samples", False, "HU", (("validation", "sample_mae_hu", "MAE"),)),
    ),
    "classifier": (
        ("Loss", True, "loss", (("train", "loss", "training"), ("validation", "loss", "held out"))),
        ("AUROC of held-out patients", False, "AUROC", (("validation", "auroc", "AUROC"),)),
    ),
}


def training_curves(found: Found) -> str:
    """Charts of each run, by kind; columns that a log does not have are left out."""
    return "".join(_curves(run) for run in found.runs if run.kind in _CHARTS)


def _curves(run: TrainingRun) -> str:
    figures = []
    for heading, log_y, unit, lines in _CHARTS[run.kind]:
        shown = [
            Line(name, points)
            for table, column, name in lines
            if table in run.curves and (points := run.curves[table].columns.get(column))
        ]
        if svg := line_chart(shown, "step (batches)", unit, log_y=log_y):
            figures.append(f"<figure>{svg}<figcaption>{escape(heading)}</figcaption></figure>")
    title = f"<h3>{escape(run.kind.capitalize())}: {escape(run.name)}</h3>"
    return f'{title}<div class="charts">{"".join(figures)}</div>' if figures else ""
