"""The command line: folders of radiographs, what is there already, what is refused, and what nobody may find."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from dataset.volume_io import read_nifti
from tests.dataset.xray_factory import eight_bit, radiograph, save_dicom, save_picture
from tests.helpers import ROOT, assert_one_line_error, environment
from tests.inference_model import Run, contents, forged
from vqgan_inference import XRay2CTPA, load_xray

pytest_plugins = ["tests.inference_command"]


def test_a_file_gives_what_the_api_gives(run: Run, bundle: Path, tmp_path: Path) -> None:
    picture = save_picture(tmp_path / "patient.png", "I;16")
    result = run(picture, "--png", "--dicom", "--samples", "2", "--seed", "3")
    out = tmp_path / "out"
    names = {"patient.nii.gz", "patient_mean.nii.gz", "patient_uncertainty.nii.gz", "patient_sample_2.nii.gz",
             "patient_panel.png", "patient.provenance.json", "patient_dicom"}  # fmt: skip
    assert {path.name for path in out.iterdir()} == names
    assert len(list((out / "patient_dicom").iterdir())) == 16
    assert "synthetic, not for diagnosis" in result.stdout
    model = XRay2CTPA.load_checkpoint(bundle, "cpu")
    volume = model.generate(load_xray(picture), steps=2, samples=2, seed=3)
    assert np.array_equal(read_nifti(out / "patient.nii.gz").hu, volume.hu)
    record = json.loads((out / "patient.provenance.json").read_text())
    assert record["provenance"] == volume.provenance
    for entry, checksum in record["files"].items():
        assert hashlib.sha256((out / entry).read_bytes()).hexdigest() == checksum


def test_batches_and_order_do_not_show(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(np.rot90(radiograph(), number).copy()).save(folder / f"{number}.png")
    run(folder, "--samples", "2", output="one")
    run(folder, "--samples", "2", "--batch", "5", output="five")
    for number in range(3):
        one, five = (read_nifti(tmp_path / name / f"{number}.nii.gz").hu.astype(int) for name in ("one", "five"))
        assert (np.abs(one - five) <= 1).mean() > 0.98  # kernels may sum in another order, and FSQ rounds


def png_bomb(path: Path) -> Path:
    """A few bytes that claim 30000×30000 pixels."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1 << 20))))
    return path


def bad_radiographs(folder: Path) -> dict[str, str]:
    """Radiographs that cannot be used, and a word of why."""
    folder.mkdir(exist_ok=True)
    Image.fromarray(np.full((200, 160), 77, np.uint8)).save(folder / "constant.png")
    Image.fromarray(np.zeros((1, 1), np.uint8)).save(folder / "pixel.png")
    png_bomb(folder / "bomb.png")
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no picture")
    whole = save_picture(folder / "cut.png", "L")
    whole.write_bytes(whole.read_bytes()[:2000])
    save_dicom(folder / "lateral.dcm", ViewPosition="LL", PatientOrientation=["P", "F"])
    save_dicom(folder / "ct.dcm", Modality="CT")
    return {
        "constant.png": "constant", "pixel.png": "1×1", "bomb.png": "too many pixels", "empty.png": "empty",
        "text.jpg": "neither PNG", "cut.png": "damaged", "lateral.dcm": "lateral", "ct.dcm": "CT",
    }  # fmt: skip


def test_t37_bad_radiographs_never_stop_the_rest(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    words = bad_radiographs(folder)
    start = time.perf_counter()
    result = run(folder, check=3)
    assert time.perf_counter() - start < 20
    assert_one_line_error(result, f"none of {len(words)} X-rays")
    save_picture(folder / "good.png", "L")
    result = run(folder, check=4)
    assert {name for name in contents(tmp_path / "out") if name.endswith(".gz")} == {"good.nii.gz"}
    left_out = [line for line in result.stderr.splitlines() if line.startswith("left out: ")]
    assert len(left_out) == len(words)
    for name, word in words.items():
        (line,) = [line for line in left_out if name in line]
        assert word in line
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", ["constant.png", "pixel.png", "bomb.png", "lateral.dcm"])
def test_t37_a_single_bad_radiograph_is_one_line(run: Run, tmp_path: Path, name: str) -> None:
    words = bad_radiographs(tmp_path / "x")
    assert_one_line_error(run(tmp_path / "x" / name, check=3), name, words[name])


def test_t35_the_same_radiograph_in_any_kind_of_file_gives_the_same_volume(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    save_picture(folder / "png8.png", "L")
    for mode in ("RGB", "RGBA", "P"):
        save_picture(folder / f"{mode}.png", mode)
    inverse = (65535 - radiograph()).astype(np.uint16)
    save_dicom(folder / "mono1.dcm", inverse, photometric="MONOCHROME1")
    save_dicom(folder / "mono2.dcm", radiograph())
    save_picture(folder / "png16.png", "I;16")
    run(folder)
    volumes = {path.name: read_nifti(path).hu for path in (tmp_path / "out").glob("*.nii.gz")}
    eight, sixteen = volumes["png8.nii.gz"], volumes["png16.nii.gz"]
    assert all(np.array_equal(volumes[f"{mode}.nii.gz"], eight) for mode in ("RGB", "RGBA", "P"))
    assert all((np.abs(volumes[f"mono{n}.nii.gz"].astype(int) - sixteen) <= 1).mean() > 0.98 for n in (1, 2))
    assert len(volumes) == 7


def test_t45_nothing_of_the_patient_reaches_any_output(run: Run, tmp_path: Path) -> None:
    """Canaries in every text of a DICOM header and in a PNG's own; the name of the file is the user's choice."""
    folder = tmp_path / "x"
    folder.mkdir()
    words = {"PatientName": "Canary^Blue", "PatientID": "CANARY-1", "PatientBirthDate": "19230917",
             "InstitutionName": "Canary Clinic", "ReferringPhysicianName": "Canary^Doctor",
             "SeriesDescription": "canary series", "StudyDescription": "canary study", "ImageComments": "canary note",
             "ViewPosition": "CANARY", "AccessionNumber": "canary77", "StudyDate": "19230918",
             "StationName": "canary-room", "BodyPartExamined": "CANARYCHEST"}  # fmt: skip
    save_dicom(folder / "a.dcm", PatientOrientation=["L", "F"], **words)
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "canary of a PNG")
    Image.fromarray(eight_bit()).save(folder / "b.png", pnginfo=info)
    result = run(folder, "--png", "--dicom", "--samples", "2")
    import gzip

    for name, content in [*contents(tmp_path / "out").items(), ("console", (result.stdout + result.stderr).encode())]:
        found = gzip.decompress(content) if name.endswith(".gz") else content
        for word in (b"canary", b"19230917", b"19230918"):
            assert word not in found.lower(), name
            assert word not in name.encode().lower()


def test_t40_hostile_names_stay_in_the_output_folder(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    picture = save_picture(tmp_path / "p.png", "L")
    for name in ("%2e%2e%2fescape.png", "$(touch run).png", "a b\nc.png", "-rf.png", "…ü.png", "x" * 200 + ".png"):
        shutil.copy(picture, folder / name)
    shutil.copy(picture, folder / "twin.png")
    save_picture(folder / "twin.jpg", "L")
    run(folder)
    inside = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if path.is_file()}
    assert inside == {"x", "out", "p.png"}
    volumes = list((tmp_path / "out").glob("*.nii.gz"))
    assert len(volumes) == 8
    assert not [path for path in volumes if set("/\n $%") & set(path.name)]


def test_t38_t39_the_command_refuses_hostile_bundles(run: Run, bundle: Path, tmp_path: Path) -> None:
    import pickle

    picture, canary = save_picture(tmp_path / "p.png", "L"), tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            return Path.touch, (canary,)

    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps(Evil()))
    assert_one_line_error(run(picture, checkpoint=tmp_path / "evil.ckpt", check=3), "evil.ckpt", "no inference bundle")
    hostile = forged(
        bundle, tmp_path / "hostile.ckpt", lambda meta: meta["codec"].update({"_target_": "os.system", "x": "true"})
    )
    assert_one_line_error(run(picture, checkpoint=hostile, check=2), "hostile.ckpt", "_target_=os.system")
    damaged = bytearray(bundle.read_bytes())
    damaged[-5] ^= 8
    (tmp_path / "damaged.ckpt").write_bytes(damaged)
    assert_one_line_error(run(picture, checkpoint=tmp_path / "damaged.ckpt", check=3), "damaged.ckpt", "copy it again")
    assert not canary.exists()
    assert not (tmp_path / "out").exists()


def test_wrong_folders_and_options_are_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "file").write_text("x")
    picture = save_picture(tmp_path / "p.png", "L")
    assert_one_line_error(run(tmp_path / "missing.png", check=3), "missing.png", "not there")
    assert_one_line_error(run(tmp_path / "none", check=3), "none", "holds no PNG")
    assert_one_line_error(run(tmp_path, output=".", check=2), "holds the radiographs")
    assert_one_line_error(run(picture, output="file/deeper", check=6), "file/deeper")
    assert_one_line_error(run(picture, "--sampler", "magic", check=2), "magic")
    assert_one_line_error(run(picture, "--batch", "0", check=2), "--batch 0")
    assert_one_line_error(run(picture, "--device", "cuda:77", check=2), "cuda:77")
    assert_one_line_error(run(picture, "--lateral", str(tmp_path / "none"), check=2), "files only, or folders only")
    assert_one_line_error(run(picture, "--lateral", str(tmp_path / "no.png"), check=3), "no.png")
    assert_one_line_error(run(picture, checkpoint=tmp_path / "no.ckpt", check=3), "no.ckpt")


THREE_LINES = """
import sys
from vqgan_inference import XRay2CTPA, load_xray
model = XRay2CTPA.load_checkpoint(sys.argv[1])
xray = load_xray(sys.argv[2])
ctpa_volume = model.generate(xray, steps=2)
ctpa_volume.save_nifti("a.nii")
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_three_lines_from_any_folder_load_no_training_framework(bundle: Path, tmp_path: Path) -> None:
    """A fresh process in another folder gives the same volume, and imports what it needs and no more."""
    picture, elsewhere = save_picture(tmp_path / "patient_xray.png", "I;16"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = [sys.executable, "-c", THREE_LINES, os.path.relpath(bundle, elsewhere), "../patient_xray.png"]
    result = subprocess.run(code, cwd=elsewhere, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    loaded = set(result.stdout.split())
    assert "torch" in loaded
    assert loaded.isdisjoint({
        "pytorch_lightning", "lightning_fabric", "torchmetrics", "torchvision", "hydra", "omegaconf", "matplotlib",
        "tensorboard", "pandas", "blosc2", "monai", "SimpleITK",
    })  # fmt: skip
    here = XRay2CTPA.load_checkpoint(bundle).generate(load_xray(picture), steps=2)
    assert np.array_equal(read_nifti(elsewhere / "a.nii").hu, here.hu)


def test_help_explains_itself_without_torch() -> None:
    code = "import sys; sys.argv[1:] = ['--help']\ntry:\n  import vqgan_inference as v; v.parse_arguments()\n" \
           "except SystemExit: print('torch' in sys.modules)"  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert result.stdout.endswith("False\n")
    assert "not for diagnosis" in result.stdout
    for option in ("--checkpoint", "--xray", "--output", "--steps", "--seed", "--guidance", "--samples", "--dicom"):
        assert option in result.stdout
