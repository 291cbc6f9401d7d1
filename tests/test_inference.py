"""The public API: what a volume depends on, where it lies, and the files that hold it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dataset.drr import rendered_xray
from dataset.geometry import resampled_affine
from dataset.phantom import affine_of
from dataset.sources import PhantomSource, prepare
from dataset.volume_io import read_nifti
from ddpm.ctpa_volume import CTPAVolume
from ddpm.inference import Request, default_batch, draw, volume_of
from ddpm.network import Sampling
from ddpm.patient import prepare_patient
from errors import ConfigurationError, InputError, MemoryExhaustedError
from tests.dataset.xray_factory import radiograph, save_dicom, save_picture
from tests.inference_model import SPACING_MM, small_bundle
from tests.preprocess.dicom_factory import convert
from vqgan_inference import XRay2CTPA, load_xray

QUICK = {"steps": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> XRay2CTPA:
    torch.set_num_threads(1)
    return XRay2CTPA.load_checkpoint(small_bundle(tmp_path_factory.mktemp("bundle") / "final_model.ckpt"), "cpu")


@pytest.fixture(scope="module")
def xrays(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two radiographs: the second is the first one turned upside down."""
    folder = tmp_path_factory.mktemp("xrays")
    Image.fromarray(radiograph()[::-1].copy()).save(folder / "b.png")
    return [save_picture(folder / "a.png", "I;16"), folder / "b.png"]


@pytest.fixture(scope="module")
def several(model: XRay2CTPA, xrays: list[Path]) -> CTPAVolume:
    return model.generate(load_xray(xrays[0]), samples=3, **QUICK)


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


def test_t30_a_saved_volume_lies_where_it_says(several: CTPAVolume, tmp_path: Path) -> None:
    files = several.save_nifti(tmp_path / "p.nii.gz")
    names = ["p.nii.gz", "p_mean.nii.gz", "p_uncertainty.nii.gz", "p_sample_2.nii.gz", "p_sample_3.nii.gz"]
    assert [path.name for path in files] == names
    expected = [several.samples[0], several.mean, several.uncertainty_hu, *several.samples[1:]]
    for path, hu in zip(files, expected, strict=True):
        volume = read_nifti(path)
        assert np.array_equal(volume.hu, np.rint(hu))
        np.testing.assert_allclose(volume.affine, several.affine, atol=1e-4)
        image = nib.load(path)
        assert image.get_data_dtype() == np.int16
        assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
    # without a CT: the training cohort's field, centred
    assert several.spacing_mm == pytest.approx(SPACING_MM)
    np.testing.assert_allclose(several.affine @ [7.5, 7.5, 7.5, 1], [0, 0, 0, 1], atol=1e-9)
    before = {path: path.read_bytes() for path in files}
    several.save_nifti(tmp_path / "p.nii.gz")
    assert before == {path: path.read_bytes() for path in files}
    with pytest.raises(ConfigurationError, match=r"ends in \.nii"):
        several.save_nifti(tmp_path / "p.dcm")


@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(st.floats(-40000, 40000, width=32), min_size=8, max_size=8),
    spacing=st.tuples(*[st.floats(0.3, 12)] * 3),
)
def test_t31_rounding_and_clipping_are_counted(
    values: list[float], spacing: tuple[float, float, float], tmp_path_factory: pytest.TempPathFactory
) -> None:
    hu = np.array(values, np.float32).reshape(1, 2, 2, 2)
    volume = CTPAVolume(hu, affine_of((2, 2, 2), spacing), {})
    path = tmp_path_factory.mktemp("t31") / "a.nii"
    ((_, report),) = volume.save_nifti(path).items()
    whole = np.rint(hu[0].astype(np.float64))
    assert report.rounded == np.count_nonzero(whole != hu[0])
    assert report.clipped == np.count_nonzero(np.abs(whole + 0.5) > 32768)
    back = read_nifti(path)
    assert np.array_equal(back.hu, np.clip(whole, -32768, 32767))
    assert back.spacing_mm == pytest.approx(spacing, rel=1e-5)


def test_a_dicom_series_reads_back_the_same_and_says_what_it_is(several: CTPAVolume, tmp_path: Path) -> None:
    paths = several.save_dicom(tmp_path / "series")
    assert len(paths) == 16
    header = pydicom.dcmread(paths[0])
    assert list(header.ImageType) == ["DERIVED", "SECONDARY", "AXIAL"]
    for name in ("SeriesDescription", "StudyDescription", "ImageComments"):
        assert header[name].value == "SYNTHETIC, not for diagnosis"
    assert (str(header.PatientName), header.PatientID, header.PatientBirthDate) == ("SYNTHETIC", "SYNTHETIC", "")
    assert "KVP" in header
    assert header.KVP is None
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in paths]
    assert len({str(h.SOPInstanceUID) for h in headers}) == 16
    assert len({(str(h.SeriesInstanceUID), str(h.StudyInstanceUID)) for h in headers}) == 1
    # SimpleITK: the same voxels at the same places
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "series")))
    image = reader.Execute()
    assert np.array_equal(SimpleITK.GetArrayFromImage(image), several.hu)
    to_ras = np.diag([-1.0, -1.0, 1.0])
    for index in ((0, 0, 0), (15, 3, 7)):
        place = to_ras @ image.TransformIndexToPhysicalPoint(index[::-1])
        np.testing.assert_allclose(place, (several.affine @ [*index, 1])[:3], atol=1e-6)


def test_preprocessing_reads_the_series(several: CTPAVolume, tmp_path: Path) -> None:
    # nobody trained this model: without soft tissue preprocessing takes no volume for a CT
    several = replace(several, samples_hu=several.samples_hu.copy())
    several.samples_hu[:, :, 4:12, 4:12] = 40.0
    several.save_dicom(tmp_path / "series")
    convert(tmp_path / "series", tmp_path / "nifti", "--min-slices", "8", "--max-thickness", "20")
    (path,) = (tmp_path / "nifti").rglob("*.nii.gz")
    volume = read_nifti(path)
    assert np.array_equal(volume.hu, several.hu)
    np.testing.assert_allclose(volume.affine, several.affine, atol=1e-4)


def test_uids_follow_from_the_result_and_series_are_not_mixed(
    model: XRay2CTPA, several: CTPAVolume, xrays: list[Path], tmp_path: Path
) -> None:
    first = [path.read_bytes() for path in several.save_dicom(tmp_path / "a")]
    assert first == [path.read_bytes() for path in several.save_dicom(tmp_path / "b")]
    other = model.generate(load_xray(xrays[0]), seed=5, **QUICK)
    with pytest.raises(InputError, match="belongs to another result"):
        other.save_dicom(tmp_path / "a")
    assert first == [path.read_bytes() for path in sorted((tmp_path / "a").iterdir())]
    uids = {str(pydicom.dcmread(folder, stop_before_pixels=True).SeriesInstanceUID)
            for folder in (other.save_dicom(tmp_path / "c")[0], tmp_path / "a/IM0001.dcm")}  # fmt: skip
    assert len(uids) == 2
    deep = CTPAVolume(np.full((1, 2, 2, 2), -1500.0, np.float32), np.eye(4), {})
    with pytest.raises(InputError, match="-1500 HU cannot be stored"):
        deep.save_dicom(tmp_path / "d")


def test_the_picture_is_upright_and_marked(tmp_path: Path) -> None:
    """Dense in the patient's left, upper, anterior part: right, up, and above in the picture's planes."""
    hu = np.full((1, 20, 20, 20), -1000.0, np.float32)
    hu[0, 10:, :11, 10:] = 1000
    CTPAVolume(hu, affine_of((20, 20, 20), (4.0, 4.0, 4.0)), {}).save_png(tmp_path / "a.png")
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    assert pixels.shape[1] == 2 * 320 + 6
    planes = pixels[30 + 21 :, :320, 0]  # below the notice and the heading
    for number, (bright, dark) in enumerate((((80, 240), (240, 80)), ((80, 240), (240, 80)), ((80, 80), (240, 240)))):
        top = number * 326
        assert planes[top + bright[0], bright[1]] > 200
        assert planes[top + dark[0], dark[1]] < 80
    assert ((pixels[:30, :, 0] > 200) & (pixels[:30, :, 2] < 120)).any()  # the notice, in red


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


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "cuda:x", ""])
def test_a_device_that_is_not_there_is_refused(device: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="auto, cpu, cuda"):
        XRay2CTPA.load_checkpoint(tmp_path / "no.ckpt", device)


def test_t43_out_of_memory_halves_the_batch_with_the_same_output(
    model: XRay2CTPA, xrays: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    patients = [prepare_patient(model.bundle, [load_xray(path)]) for path in xrays]
    request = Request(Sampling(steps=2), samples=2)
    alone = np.stack(list(draw(model.bundle, patients, request, batch=1)))
    assert alone.shape == (2, 2, 16, 16, 16)
    network, seen = model.bundle.network, []
    real = network.sample

    def limited(batch, *rest):
        seen.append(len(batch.text))
        if len(batch.text) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(batch, *rest)

    monkeypatch.setattr(network, "sample", limited)
    halved = np.stack(list(draw(model.bundle, patients, request, batch=4)))
    assert np.array_equal(halved, alone)
    assert seen == [4, 2, 1, 1, 1, 1]
    assert "out of memory" in caplog.text
    monkeypatch.undo()
    together = np.stack(list(draw(model.bundle, patients, request, batch=4)))
    assert (np.abs(together - alone) < 1).mean() > 0.98  # kernels may sum in another order, and FSQ rounds

    def nothing(*_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(network, "sample", nothing)
    with pytest.raises(MemoryExhaustedError, match="no memory for one volume"):
        list(draw(model.bundle, patients, request))


def test_t43_a_device_without_room_for_the_model_is_told(
    model: XRay2CTPA, xrays: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small_bundle(tmp_path / "final_model.ckpt")

    def full(self, *_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(model.bundle.network), "to", full)
    with pytest.raises(MemoryExhaustedError, match="cpu: no memory for the model"):
        model.generate(load_xray(xrays[0]), device="cpu", **QUICK)
    with pytest.raises(MemoryExhaustedError, match="cpu: no memory for the model"):
        XRay2CTPA.load_checkpoint(path, "cpu")


def test_t43_the_decoder_takes_smaller_tiles_before_it_gives_up(
    model: XRay2CTPA, xrays: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    xray, codec = load_xray(xrays[0]), model.bundle.codec.codec
    free = model.generate(xray, **QUICK)
    real, sizes = codec.decode, []

    def limited(code: torch.Tensor) -> torch.Tensor:
        sizes.append(code.shape[2:].numel())
        if len(sizes) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(code)

    monkeypatch.setattr(codec, "decode", limited)
    assert np.abs(model.generate(xray, **QUICK).hu.astype(int) - free.hu).max() <= 1
    monkeypatch.setattr(codec, "decode", lambda code: limited(sizes.clear() or code))
    with pytest.raises(MemoryExhaustedError):
        model.generate(xray, **QUICK)


def test_as_many_are_drawn_together_as_memory_allows(model: XRay2CTPA, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, guided = (Request(Sampling(guidance=guidance)) for guidance in (1.0, 3.0))
    assert default_batch(model.bundle, plain) == 8
    large = replace(model.bundle.config, latent_dhw=(151, 128, 128))
    monkeypatch.setattr(model.bundle.network, "config", large)  # 151·128·128 cells of 16 channels, ten maps: 1.6 GB
    assert default_batch(model.bundle, plain) == 1
    monkeypatch.setattr(model.bundle.network, "config", replace(large, latent_dhw=(30, 64, 64)))  # 79 MB
    assert default_batch(model.bundle, plain) == 8
    assert default_batch(model.bundle, guided) == 6


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
