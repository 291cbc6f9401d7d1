"""A small model, two radiographs and three samples for tests of the public API, which name this as their plugin."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from ddpm.ctpa_volume import CTPAVolume
from tests.dataset.xray_factory import radiograph, save_picture
from tests.inference_model import QUICK, small_bundle
from vqgan_inference import XRay2CTPA, load_xray


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
