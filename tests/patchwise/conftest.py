"""A small checkpoint and volumes for the evaluation scripts, which run in this process: a second instead of ten."""

from __future__ import annotations

import logging
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch

from dataset.geometry import Orientation
from dataset.intensity import HUWindow
from dataset.phantom import make_phantom
from dataset.volume_io import Volume, write_nifti
from tests.helpers import ROOT
from vq_gan_3d.checkpointing import save_checkpoint
from vq_gan_3d.codec import CodecConfig
from vq_gan_3d.vqgan import VQGAN, LossConfig, OptimizerConfig

Script = Callable[..., "CompletedProcess[str]"]
TRAIN = ROOT / "patchwise_512x512x604/train"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A codec that was trained for a moment, so that its output shows the volume."""
    torch.manual_seed(0)
    codec = CodecConfig(widths=(8, 16, 32), encoder_blocks=(1, 1, 1), decoder_blocks=(1, 1, 1), embedding_dim=8)
    losses = LossConfig(discriminator_2d=False, discriminator_3d=False)
    module = VQGAN(codec, losses, OptimizerConfig(), HUWindow())
    generator = torch.Generator().manual_seed(0)
    volume = torch.from_numpy(make_phantom(7, (32, 48, 48)).hu)
    unit = module.window.to_unit(volume)[None, None]
    optimizer = torch.optim.Adam(module.codec.parameters(), 0.003)
    for _ in range(80):
        d, h, w = (int(torch.randint(0, n - 16 + 1, (), generator=generator)) for n in volume.shape)
        patch = unit[:, :, d : d + 16, h : h + 16, w : w + 16]
        result = module.codec(patch)
        optimizer.zero_grad()
        ((result.volume - patch).abs().mean() + result.codebook_loss).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("run") / "outputs/checkpoints/final.ckpt"
    path.parent.mkdir(parents=True)
    content: dict = {"state_dict": module.state_dict(), "current_model_state": module.state_dict()}
    module.on_save_checkpoint(content)
    save_checkpoint(path, content | {"resume_contract": {"dataset.patch_size": [16, 16, 16]}})
    return path


@pytest.fixture(scope="session")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two thoraces of different depth, stored in other orientations than ours."""
    folder = tmp_path_factory.mktemp("volumes")
    for seed, codes in ((1, ("R", "A", "S")), (2, ("P", "S", "L"))):
        phantom = make_phantom(seed, (18 + 4 * seed, 40, 36))
        affine = phantom.affine.copy()
        affine[:3, 3] += (1.25, -3.5, 100.0)
        write_nifti(folder / f"case_{seed}.nii.gz", Volume(phantom.hu, affine, orientation=Orientation(codes)))
    return folder


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Script:
    """``script(name, *arguments, check=exit code)``: the real script in ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(name: str, *arguments: object, check: int = 0) -> CompletedProcess[str]:
        threads, root = torch.get_num_threads(), logging.getLogger()
        handlers = root.handlers[:]
        torch.set_num_threads(1)
        path = TRAIN / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        capfd.readouterr()
        for handler in handlers:
            root.removeHandler(handler)
        try:
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(path), run_name="__main__")
        finally:
            root.handlers[:] = handlers
            torch.set_num_threads(threads)
        out, err = capfd.readouterr()
        code = ended.value.code
        assert code == check, f"exit {code}\n{out[-2000:]}\n{err[-4000:]}"
        return CompletedProcess([name], int(code or 0), out, err)

    return call


def unit_error(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference in HU."""
    return float(np.abs(a.astype(np.float64) - b).mean())


@pytest.fixture
def fake_python(tmp_path: Path) -> Path:
    """See `fake_python_in`."""
    return fake_python_in(tmp_path / "bin")


def fake_python_in(folder: Path) -> Path:
    """A Python that has all packages and two GPUs, and answers at once."""
    folder.mkdir()
    path = folder / "python"
    path.write_text("#!/bin/sh\necho 2\n")
    path.chmod(0o755)
    return path
