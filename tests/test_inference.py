"""The public API: what a volume depends on, and where it lies."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.drr import rendered_xray
from dataset.geometry import resampled_affine
from dataset.sources import PhantomSource, prepare
from ddpm.ctpa_volume import CTPAVolume
from ddpm.inference import Request, draw, volume_of
from ddpm.network import Sampling
from ddpm.patient import prepare_patient
from errors import ConfigurationError, InputError
from tests.dataset.xray_factory import radiograph, save_dicom, save_picture
from tests.inference_model import QUICK, SPACING_MM, small_bundle
from vqgan_inference import XRay2CTPA, load_xray

pytest_plugins = ["tests.inference_api"]


def test_the_same_arguments_give_the_same_volume_and_each_of_them_counts(model: XRay2CTPA, xrays: list[Path]) -> None:
    first, second = (load_xray(path) for path in xrays)
    volume = model.generate(first, steps=3)
    assert volume.hu.dtype == np.int16
    assert volume.hu.shape == (16, 16, 16)
    assert -1000 <= volume.hu.min() < volume.hu.max() <= 1000
    again = model.generate([first], steps=3)
    assert np.array_equal(volume.samples_hu, again.samples_hu)
    assert volume.provenance == again.provenance
    keys = {volume.key}
    for changed in (
        model.generate(second, steps=3),  # under the same noise
        model.generate(first, steps=3, seed=1),
        model.generate(first, steps=2),
        model.generate(first, steps=3, sampler="ddim"),
        model.generate(first, steps=3, guidance=3.0),
        model.generate(first, steps=3, guidance=3.0, rescale=0.7),
        model.generate(first, steps=3, precision="bf16"),
    ):
        assert not np.array_equal(changed.samples_hu, volume.samples_hu)
        assert changed.key not in keys
        keys.add(changed.key)


def test_generate_moves_the_model_where_it_is_told(
    model: XRay2CTPA, xrays: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    xray, moved = load_xray(xrays[0]), []
    expected = model.generate(xray, **QUICK)
    for part in (model.bundle.network, model.bundle.codec):
        real = part.to
        monkeypatch.setattr(part, "to", lambda device, real=real: moved.append(str(device)) or real(device))
    assert np.array_equal(model.generate(xray, device="cpu", **QUICK).samples_hu, expected.samples_hu)
    assert moved == ["cpu", "cpu"]
    with pytest.raises(ConfigurationError, match="cuda:99"):
        model.generate(xray, device="cuda:99", **QUICK)


def test_provenance_is_plain_and_names_nobody(several: CTPAVolume, xrays: list[Path]) -> None:
    text = json.dumps(several.provenance)
    assert json.loads(text) == several.provenance
    for word in (xrays[0].name, str(xrays[0].parent), "2026"):
        assert word not in text
    assert {"bundle", "seed", "steps", "sampler", "guidance", "versions", "xrays"} <= several.provenance.keys()


def test_several_samples_give_a_mean_and_a_spread(several: CTPAVolume, model: XRay2CTPA, xrays: list[Path]) -> None:
    assert len(several.samples) == 3
    np.testing.assert_allclose(several.mean, np.mean(several.samples, axis=0), atol=1e-3)
    np.testing.assert_allclose(several.uncertainty_hu, np.std(several.samples, axis=0, ddof=1), atol=1e-2)
    assert several.uncertainty_hu.max() > 1
    assert np.array_equal(several.hu, np.rint(several.samples[0]))
    single = model.generate(load_xray(xrays[0]), **QUICK)
    assert np.array_equal(single.samples[0], several.samples[0])  # a further sample changes no other
    with pytest.raises(ConfigurationError, match="one sample has no spread"):
        _ = single.uncertainty_hu


def test_spread_is_zero_where_samples_agree() -> None:
    samples = np.stack([np.full((2, 2, 2), 10.0), np.full((2, 2, 2), 14.0)]).astype(np.float32)
    samples[:, 0] = -1000
    volume = CTPAVolume(samples, np.eye(4), {})
    assert np.array_equal(volume.uncertainty_hu[0], np.zeros((2, 2)))
    np.testing.assert_allclose(volume.uncertainty_hu[1], np.sqrt(8), rtol=1e-6)
    assert np.array_equal(volume.mean[1], np.full((2, 2), 12.0))


def test_the_field_of_a_rendered_picture_is_that_of_its_ct(model: XRay2CTPA, tmp_path: Path) -> None:
    source = PhantomSource(3, (24, 32, 40))
    volume = prepare(source, (24, 32, 40), tmp_path)
    picture = rendered_xray(volume, "frontal", tmp_path / "pictures", columns=64)
    generated = model.generate(load_xray(picture), **QUICK)
    np.testing.assert_allclose(generated.affine, resampled_affine(volume.affine, (24, 32, 40), (16, 16, 16)))
    assert generated.provenance["xrays"][0]["scale"] == "rays of the rendered picture"
    # a DICOM file of that name is no rendered picture
    named = prepare_patient(model.bundle, [load_xray(save_dicom(picture.with_suffix(".dcm")))])
    assert named.facts["xrays"][0]["scale"] == "the picture covers the field"
    # without the geometry beside it, the same picture is any radiograph
    alone = tmp_path / "alone.png"
    alone.write_bytes(picture.read_bytes())
    plain = model.generate(load_xray(alone), **QUICK)
    assert plain.spacing_mm == pytest.approx(SPACING_MM)
    assert not np.array_equal(plain.hu, generated.hu)


@pytest.mark.parametrize(
    ("spacing", "scale"),
    [
        ("1.5", "pixel spacing of the file"),
        ("0.1", "the picture covers the field"),
        ("9", "the picture covers the field"),
    ],
)
def test_a_pixel_spacing_is_used_where_it_can_be_true(
    model: XRay2CTPA, tmp_path: Path, spacing: str, scale: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A picture of 220 rows is 330 mm tall, 22 mm (no chest) or 2 m."""
    told = save_dicom(tmp_path / "a.dcm", ImagerPixelSpacing=[spacing, spacing])
    patient = prepare_patient(model.bundle, [load_xray(told)])
    assert patient.facts["xrays"][0]["scale"] == scale
    assert ("no chest radiograph" in caplog.text) == (scale != "pixel spacing of the file")
    untold = prepare_patient(model.bundle, [load_xray(save_dicom(tmp_path / "b.dcm"))])
    same = torch.equal(patient.conditions.ray_grid, untold.conditions.ray_grid)
    assert same == (scale != "pixel spacing of the file")


def test_t36_a_lateral_view_is_no_frontal_one(model: XRay2CTPA, tmp_path: Path) -> None:
    lateral = load_xray(save_dicom(tmp_path / "l.dcm", ViewPosition="LL", PatientOrientation=["P", "F"]))
    with pytest.raises(InputError, match=r"l\.dcm: a lateral radiograph, this model takes frontal"):
        model.generate(lateral)
    frontal = load_xray(save_picture(tmp_path / "f.png", "L"))
    with pytest.raises(InputError, match="a second unknown radiograph"):
        model.generate([frontal, frontal])
    with pytest.raises(ConfigurationError, match="no radiograph"):
        model.generate([])


def test_a_model_of_two_views_takes_them_in_any_order(tmp_path: Path) -> None:
    path = small_bundle(tmp_path / "two.ckpt", conditioner={"views": ["frontal", "lateral"], "lifted_channels": [8, 8]})
    model = XRay2CTPA.load_checkpoint(path, "cpu")
    frontal = load_xray(save_picture(tmp_path / "f.png", "L"))  # a PNG does not tell its view
    lateral = load_xray(
        save_dicom(tmp_path / "l.dcm", radiograph().T.copy(), ViewPosition="LL", PatientOrientation=["P", "F"])
    )
    both = model.generate([frontal, lateral], **QUICK)
    assert np.array_equal(both.hu, model.generate([lateral, frontal], **QUICK).hu)
    assert [entry["view"] for entry in both.provenance["xrays"]] == ["frontal", "lateral"]
    alone = model.generate(frontal, **QUICK)
    assert not np.array_equal(both.hu, alone.hu)


def test_text_and_label_count_where_the_model_takes_them_and_are_refused_elsewhere(
    model: XRay2CTPA, xrays: list[Path], tmp_path: Path
) -> None:
    xray = load_xray(xrays[0])
    with pytest.raises(ConfigurationError, match="trained without reports"):
        model.generate(xray, text="emboli")
    with pytest.raises(ConfigurationError, match="trained without labels"):
        model.generate(xray, label=1)
    told = XRay2CTPA.load_checkpoint(
        small_bundle(tmp_path / "told.ckpt", conditioner={"text": "bytes", "label": True}), "cpu"
    )
    plain = told.generate(xray, **QUICK)
    assert not np.array_equal(plain.hu, told.generate(xray, text="emboli", **QUICK).hu)
    assert not np.array_equal(plain.hu, told.generate(xray, label=1, **QUICK).hu)
    assert "emboli" not in json.dumps(told.generate(xray, text="emboli", **QUICK).provenance)
    with pytest.raises(ConfigurationError, match="label=2"):
        told.generate(xray, label=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps=0"),
        ({"samples": 0}, "samples=0"),
        ({"sampler": "magic"}, "magic"),
        ({"seed": -1}, "seed=-1"),
        ({"rescale": 2.0}, "rescale=2.0"),
        ({"guidance": float("nan")}, "guidance=nan"),
        ({"precision": "fp8"}, "precision=fp8"),
    ],
)
def test_settings_out_of_range_are_refused(
    model: XRay2CTPA, xrays: list[Path], options: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigurationError, match=words):
        model.generate(load_xray(xrays[0]), **options)


def test_numbers_that_are_not_finite_are_told(model: XRay2CTPA, xrays: list[Path], monkeypatch) -> None:
    network = model.bundle.network
    real = network.sample
    monkeypatch.setattr(network, "sample", lambda *arguments: real(*arguments) * torch.nan)
    with pytest.raises(InputError, match="not finite"):
        model.generate(load_xray(xrays[0]), **QUICK)


def test_a_patient_does_not_depend_on_who_else_is_drawn(model: XRay2CTPA, xrays: list[Path]) -> None:
    patients = [prepare_patient(model.bundle, [load_xray(path)]) for path in xrays]
    request = Request(Sampling(steps=2))
    forward = list(draw(model.bundle, patients, request))
    backward = list(draw(model.bundle, patients[::-1], request))
    assert np.array_equal(np.stack(forward), np.stack(backward[::-1]))
    passes: list[None] = []
    list(draw(model.bundle, patients[:1], replace(request, seed=1), on_step=lambda: passes.append(None)))
    assert len(passes) == 2
    volume = volume_of(model.bundle, request, patients[0], forward[0])
    assert volume.provenance == model.generate(load_xray(xrays[0]), **QUICK).provenance


def test_relative_names_survive_a_change_of_folder(
    model: XRay2CTPA, xrays: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(xrays[0].parent)
    xray = load_xray(xrays[0].name)
    monkeypatch.chdir(tmp_path)
    assert model.generate(xray, **QUICK).hu.any()
