"""``preprocess/encode_latents.py``: whole folders, resumed, in several processes, with failures told."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dataset.geometry import resample_to_size
from dataset.store import write_store
from dataset.volume_io import Volume, to_int16_hu, write_nifti
from preprocess.encode_latents import over_processes
from tests.ddpm.tiny import saved_codec, tiny_codec
from tests.helpers import ROOT, assert_one_line_error, environment, kill, wait_for
from vq_gan_3d.latent_files import open_latent

AFFINE = np.array([[0.0, 0, -4, 30], [0, -4, 0, 30], [5, 0, 0, -40], [0, 0, 0, 1]])


def volume(seed: int, shape: tuple[int, int, int]) -> Volume:
    hu = np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)
    return Volume(hu, AFFINE, source=str(seed))


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "preprocess/encode_latents.py"), *map(str, arguments), "--device", "cpu"]


def run(*arguments: object, check: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(command(*arguments), capture_output=True, text=True, env=environment(), timeout=300)
    assert result.returncode == check, result.stdout[-2000:] + result.stderr[-4000:]
    return result


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    write_nifti(folder / "sub/a.nii.gz", volume(0, (14, 16, 20)))  # 14 is no multiple of the stride
    write_store(folder / "b.b2nd", volume(1, (16, 16, 16)), {})
    write_nifti(folder / "c.nii", volume(2, (16, 20, 16)))
    return folder


@pytest.mark.slow
def test_folders_of_nifti_and_stores_are_encoded_and_kept(tmp_path: Path, cohort: Path):
    checkpoint, out = saved_codec(tmp_path), tmp_path / "out"
    common = ("--input", cohort, "--output", out, "--checkpoint", checkpoint)
    result = run(*common)
    assert "3 latents" in result.stdout
    assert "3 of them new" in result.stdout
    codec = tiny_codec()
    latent = open_latent(out / "sub/a.safetensors").verify().require(codec)
    assert latent.shape == (4, 4, 4, 5)
    assert latent.shape_dhw == (14, 16, 20)
    np.testing.assert_allclose(latent.affine, AFFINE, atol=1e-4)
    torch.testing.assert_close(latent.code(), codec.encode(volume(0, (14, 16, 20)).hu), rtol=2e-3, atol=2e-3)
    before = {path: path.read_bytes() for path in out.rglob("*.safetensors")}
    damaged = out / "c.safetensors"
    damaged.write_bytes(before[damaged][:-9])
    assert "1 of them new" in run(*common).stdout  # resumed; what is damaged is made again
    assert {path: path.read_bytes() for path in out.rglob("*.safetensors")} == before
    # two processes: the same files to the byte
    run("--input", cohort, "--output", tmp_path / "two", "--checkpoint", checkpoint, "--devices", 2)
    for path, content in before.items():
        assert (tmp_path / "two" / path.relative_to(out)).read_bytes() == content


@pytest.mark.slow
def test_volumes_are_resampled_whole_and_bad_ones_told(tmp_path: Path, cohort: Path):
    out = tmp_path / "out"
    (cohort / "d.nii.gz").write_bytes(b"no volume")
    checkpoint = saved_codec(tmp_path)
    result = run("--input", cohort, "--output", out, "--checkpoint", checkpoint, "--size", "8x12x16", check=4)
    assert "d.nii.gz" in result.stderr
    assert "1 failed" in result.stdout
    latent = open_latent(out / "c.safetensors")
    assert latent.shape_dhw == (16, 12, 8)
    original = volume(2, (16, 20, 16))
    resampled, affine = resample_to_size(original.hu, original.affine, (16, 12, 8))
    hu, _, _ = to_int16_hu(resampled)
    torch.testing.assert_close(latent.code(), tiny_codec().encode(hu), rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(latent.affine, affine, atol=1e-4)
    only_bad = tmp_path / "bad"
    only_bad.mkdir()
    (only_bad / "d.nii.gz").write_bytes(b"no volume")
    run("--input", only_bad, "--output", out, "--checkpoint", checkpoint, check=3)


@pytest.mark.slow
def test_a_missing_folder_or_checkpoint_is_one_line(tmp_path: Path, cohort: Path):
    checkpoint = saved_codec(tmp_path)
    common = ("--output", tmp_path / "out", "--checkpoint")
    assert_one_line_error(run("--input", cohort, *common, tmp_path / "no.ckpt", check=3), "no.ckpt")
    assert_one_line_error(
        run("--input", tmp_path / "nothing", *common, checkpoint, check=2), "nothing", "no such folder"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "group", "devices"),
    [
        pytest.param(signal.SIGTERM, 143, False, 1, id="term"),
        pytest.param(signal.SIGINT, 130, False, 1, id="int"),
        pytest.param(signal.SIGTERM, 143, False, 2, id="term to the first of two"),
        pytest.param(signal.SIGINT, 130, True, 2, id="int to both of two"),
    ],
)
def test_t13_a_signal_ends_it_at_once_and_finished_latents_stay(
    tmp_path: Path, number: int, code: int, group: bool, devices: int
) -> None:
    folder, out, checkpoint, count = tmp_path / "in", tmp_path / "out", saved_codec(tmp_path), 150
    folder.mkdir()
    write_nifti(folder / "000.nii", volume(0, (24, 32, 32)))
    for other in range(1, count):
        shutil.copy(folder / "000.nii", folder / f"{other:03d}.nii")
    flags = ("--input", folder, "--output", out, "--checkpoint", checkpoint)
    process = subprocess.Popen(
        command(*flags, "--devices", devices),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for(out / "001.safetensors", process, timeout_s=600)
        (os.killpg if group else os.kill)(process.pid, number)
        told = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            kill(process)
    result = subprocess.CompletedProcess(process.args, process.returncode, *told)
    assert process.returncode == code, result.stderr[-3000:]
    assert_one_line_error(result, "SIGTERM: finished latents are kept" if code == 143 else "SIGINT")
    finished = sorted(out.glob("*.safetensors"))
    assert 0 < len(finished) < count
    for path in finished:
        open_latent(path).verify()
    if devices == 1:
        assert f"{count - len(finished)} of them new" in run(*flags).stdout


def test_counts_are_summed_where_the_processes_talk() -> None:
    """NCCL takes no tensor of the CPU, where Lightning's teardown has left the module."""
    where = []

    def reduce(counts: torch.Tensor, reduce_op: str) -> torch.Tensor:
        where.append((counts.device.type, counts.shape, reduce_op))
        return torch.tensor([3, 5])

    strategy = SimpleNamespace(root_device=torch.device("meta"), reduce=reduce)  # a device that is not the CPU
    assert over_processes(strategy, [1, 2]) == [3, 5]
    assert where == [("meta", (2,), "sum")]
