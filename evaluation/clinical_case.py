"""One held-out patient of the clinical evaluation: what is drawn of it, and what judges and rulers make of that.

The model is told the radiograph and nothing else. A label or a report of the patient, which some models are trained
with, would carry the diagnosis past the radiograph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from dataset.geometry import spacing_mm
from dataset.phantom import Phantom
from dataset.sources import PhantomSource, VolumeSource
from ddpm.classifier.judge import Judge
from ddpm.patient import joined
from errors import InputError
from evaluation.controls import with_xrays_of
from evaluation.held_out import HeldOut, Sampling
from evaluation.metrics.anatomy import Segmentation, dice, segment
from evaluation.metrics.frechet import PlaneFeatures
from evaluation.metrics.lesions import find_lesions

# Volumes that the classifier of volumes judges: the scan, the scan through the codec, the one generated from the
# patient's radiograph, and with the same noise from another patient's, which can know the answer only by chance.
VOLUMES = ("real", "codec", "generated", "shuffled")
# Of these the report gives distances to the real ones.
COMPARED = ("codec", "generated", "shuffled")
# Everything that contrast medium reaches, so that it can be what `evaluation.metrics.anatomy` calls vessels.
OPACIFIED = (
    "superior_vena_cava",
    "right_atrium",
    "right_ventricle",
    "pulmonary_artery",
    "pulmonary_vein",
    "left_atrium",
    "left_ventricle",
    "aorta",
)


@dataclass(frozen=True)
class Drawn:
    """Volumes of one patient on the grid of the scan.

    Attributes:
        volumes: (D, H, W) float32 HU inside the codec's window, by role of `VOLUMES`.
        affine: (4, 4).
    """

    volumes: dict[str, np.ndarray]
    affine: np.ndarray


def draw_case(held_out: HeldOut, number: int, other: int, sampling: Sampling) -> Drawn:
    """Scan, codec's reconstruction, and volumes from the own and from another's radiograph with the same noise.

    Args:
        held_out: model and patients, whole fields.
        number: of the patient.
        other: whose radiograph is the shuffled one.
        sampling: how.

    Raises:
        InputError: a patient cannot be read, or the model gives numbers that are not finite.
    """
    sample, stranger = held_out.cases[number], held_out.cases[other]
    for entry in (sample, stranger):
        for name, reason in entry["skipped"]:
            raise InputError(f"{name}: {reason}")
    codec = held_out.generator.codec
    padded = tuple(sample["hu"].shape[1:])  # to the codec's stride, at the far ends
    own = held_out.conditions(sample)
    shuffled = with_xrays_of(own, held_out.conditions(stranger))
    drawn = sampling.draw(held_out.generator, joined([own, shuffled]), padded, number)[:, 0]  # (2, D, H, W)
    through = codec.decode(sample["code"][None].to(held_out.generator.device))[0, 0].cpu().numpy()
    volumes = {
        "real": codec.window.to_hu(codec.window.to_unit(sample["hu"][0].numpy())),
        "codec": through,
        "generated": drawn[0],
        "shuffled": drawn[1],
    }
    d, h, w = held_out.cases.cases[number].latent.shape_dhw
    return Drawn({role: volumes[role][:d, :h, :w] for role in VOLUMES}, sample["affine"].numpy())


def frontal_picture(held_out: HeldOut, number: int) -> Path | None:
    """The first frontal radiograph of a patient, the one that the model is shown; None where there is none."""
    cases = held_out.cases
    views = zip(cases.settings.views, cases.cases[number].xrays, strict=True)
    return next((pictures[0] for view, pictures in views if view == "frontal" and pictures), None)


def phantom_of(source: VolumeSource, shape: tuple[int, ...]) -> Phantom | None:
    """The ground truth of a phantom; None for a patient, or where the phantom was resampled and its masks do not fit.

    Args:
        source: of the case.
        shape: voxels of the volume that is judged.
    """
    if not isinstance(source, PhantomSource) or tuple(source.size_dhw) != tuple(shape):
        return None
    return source.phantom()


def overlaps(drawn: Drawn, phantom: Phantom | None) -> dict[str, dict[str, float]]:
    """Dice of what is segmented in each volume with the phantom's known masks, else with the scan's segmentation.

    Returns:
        By role ``body``, ``lungs``, ``heart`` and ``vessels``. Of a phantom the scan's own row says how well the rules
        of `evaluation.metrics.anatomy` fit at all: their heart is more than the heart, and their vessels are without
        the descending aorta, which lies beside the spine.
    """
    found = {role: _masks(segment(hu, drawn.affine)) for role, hu in drawn.volumes.items()}
    if phantom is None:
        known = found.pop("real")
    else:
        known = {
            "body": phantom.body_mask,
            "lungs": phantom.mask("lungs"),
            "heart": phantom.mask("heart"),
            "vessels": reduce(np.logical_or, (phantom.mask(name) for name in OPACIFIED)),
        }
    return {role: {part: dice(mask, known[part]) for part, mask in masks.items()} for role, masks in found.items()}


def lesions_of(drawn: Drawn, phantom: Phantom) -> dict[str, Any]:
    """What is left of a phantom's emboli in each volume.

    Returns:
        ``painted_vox``: voxels of clot at this grid; and by role of `COMPARED` the emboli that the scan shows, as
        `evaluation.metrics.lesions.Lesion` in plain numbers.
    """
    blood, steps = phantom.mask("pulmonary_artery"), spacing_mm(drawn.affine)
    report: dict[str, Any] = {"painted_vox": int(phantom.emboli_mask.sum())}
    for role in COMPARED:
        lesions = find_lesions(drawn.volumes["real"], drawn.volumes[role], phantom.emboli_mask, blood, steps)
        report[role] = [vars(lesion) for lesion in lesions]
    return report


def case_record(
    held_out: HeldOut, number: int, drawn: Drawn, classifier: Judge, xray_classifier: Judge | None
) -> dict[str, Any]:
    """Everything about one patient in plain numbers, for `evaluation.clinical_summary.summarise`.

    Returns:
        ``label``, ``scores`` (log-odds by role, and "xray" where a classifier of radiographs was given and there is a
        frontal one), ``dice``, ``dice_with``, and of phantoms ``lesions``.

    Raises:
        InputError: the radiograph is damaged.
    """
    case = held_out.cases.cases[number]
    source = next(s for s in held_out.data.sources["validation"] if s.name == case.name)
    scores = {role: classifier.score_volume(hu) for role, hu in drawn.volumes.items()}
    if xray_classifier is not None and (picture := frontal_picture(held_out, number)) is not None:
        scores["xray"] = xray_classifier.score_picture(picture)
    phantom = phantom_of(source, drawn.volumes["real"].shape)
    record: dict[str, Any] = {
        "label": case.label,
        "scores": scores,
        "dice": overlaps(drawn, phantom),
        "dice_with": "scan" if phantom is None else "phantom",
    }
    return record if phantom is None else record | {"lesions": lesions_of(drawn, phantom)}


def features_of(drawn: Drawn, features: PlaneFeatures) -> dict[str, np.ndarray]:
    """Rows of features of the scan and of what is compared with it, by ``role_plane``, float32."""
    return {
        f"{role}_{plane}": rows for role in ("real", *COMPARED) for plane, rows in features(drawn.volumes[role]).items()
    }


def _masks(found: Segmentation) -> Mapping[str, np.ndarray]:
    return {"body": found.body, "lungs": found.lungs, "heart": found.heart, "vessels": found.vessels}
