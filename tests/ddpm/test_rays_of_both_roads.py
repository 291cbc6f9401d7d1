"""Training and inference lift one file along the same rays, whatever its header says of its pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataset.body import isolate_body
from dataset.drr_render import Stand, fit_geometry
from dataset.phantom import affine_of
from dataset.prepared import PreparedVolume
from dataset.xray_drr import write_drr
from ddpm.bundle import Bundle
from ddpm.latent_dataset import LatentCase, LatentDataset, LatentSettings
from ddpm.patient import Patient, prepare_patient
from tests.dataset.test_ray_grid import SHAPE, SPACING, thorax
from tests.dataset.xray_factory import save_dicom
from tests.ddpm.tiny import tiny_codec
from tests.inference_model import moved_network
from vq_gan_3d.latent_files import write_latent
from vq_gan_3d.latents import LatentScaler, LatentStatistics
from vqgan_inference import load_xray


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle(moved_network(), tiny_codec(), {}, "")


def both_roads(bundle: Bundle, picture: Path) -> tuple[Patient, torch.Tensor, torch.Tensor]:
    """The patient as inference sees one, and picture and rays of a training sample whose volume lies at its place."""
    patient = prepare_patient(bundle, [load_xray(picture)])
    path, code = picture.with_suffix(".safetensors"), torch.zeros(4, *bundle.config.latent_dhw)
    latent = write_latent(path, code, bundle.codec, patient.affine, bundle.shape_dhw, source={"name": "a"})
    case = LatentCase(PreparedVolume("a", picture.with_suffix(".b2nd"), patient.affine), latent, ((picture,),))
    settings = LatentSettings(("frontal",), bundle.config.conditioner.xray_size)
    scaler = LatentScaler(LatentStatistics((0.0,) * 4, (0.5,) * 4))
    sample = LatentDataset([case], settings, scaler, training=True)[(0, 0)]
    assert sample["skipped"] == []
    return patient, sample["xray"], sample["ray_grid"]


@pytest.mark.parametrize(
    ("spacing", "scale"),
    [
        ("1.5", "pixel spacing of the file"),  # of 220 rows: 330 mm tall
        ("0.143", "the picture covers the field"),  # 31 mm, no chest
        ("9", "the picture covers the field"),  # 2 m
        (None, "the picture covers the field"),
    ],
)
def test_the_scale_of_a_radiograph_is_decided_once(
    bundle: Bundle, tmp_path: Path, spacing: str | None, scale: str, caplog: pytest.LogCaptureFixture
) -> None:
    told: dict[str, Any] = {} if spacing is None else {"ImagerPixelSpacing": [spacing, spacing]}
    patient, xray, rays = both_roads(bundle, save_dicom(tmp_path / "a.dcm", **told))
    assert patient.facts["xrays"][0]["scale"] == scale
    assert torch.equal(xray, patient.conditions.xray[0])
    assert torch.equal(rays, patient.conditions.ray_grid[0])
    assert bool((rays.abs() <= 1).all())  # the field is smaller than any chest: it lies in the picture
    told_so = [record for record in caplog.records if "no chest radiograph" in record.message]
    assert len(told_so) == (spacing in ("0.143", "9"))  # and not once for each epoch


def test_a_geometry_belongs_to_the_picture_it_was_rendered_with(bundle: Bundle, tmp_path: Path) -> None:
    affine = affine_of(SHAPE, SPACING)
    geometry, _ = fit_geometry(isolate_body(thorax(affine), affine), affine, Stand(columns=64), "frontal")
    integrals = np.random.default_rng(0).uniform(0, 4, geometry.shape).astype(np.float32)
    write_drr(tmp_path / "a.png", integrals, geometry, affine, SHAPE, {"source": "x"})
    patient, _, rays = both_roads(bundle, save_dicom(tmp_path / "a.dcm"))  # of that name, but a real one
    assert patient.facts["xrays"][0]["scale"] == "the picture covers the field"
    assert torch.equal(rays, patient.conditions.ray_grid[0])
