"""A codec that gives NaN or infinity is refused in one line: clipped and rounded, either looks like HU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.intensity import HUWindow
from dataset.prepared import PreparedVolume
from dataset.store import write_store
from dataset.volume_io import Volume
from errors import InputError
from evaluation.metrics.codebook import CodeUsage
from patchwise_512x512x604.evaluation_set import Model
from patchwise_512x512x604.patch_validation import validate_volume
from patchwise_512x512x604.utils.reconstruction import Mode, reconstruct_volume
from tests.helpers import assert_one_line_error
from tests.patchwise.conftest import Script
from tests.vq_gan_3d.test_codec import randomized, tiny_config
from vq_gan_3d.checkpointing import load_checkpoint, save_checkpoint
from vq_gan_3d.codec import VQCodec

TILE = (32, 32, 32)


def broken(part: str, value: float) -> VQCodec:
    """A codec with one bad weight in its encoder or at the end of its decoder."""
    codec = randomized(tiny_config()).eval()
    with torch.no_grad():
        if part == "encoder":
            codec.to_code.weight[0] = value
        else:
            list(codec.decoder.parameters())[-1][0] = value
    return codec


@pytest.mark.parametrize("mode", ["halo", "blend"])
@pytest.mark.parametrize(("part", "value"), [("encoder", np.nan), ("decoder", np.nan), ("decoder", np.inf)])
def test_neither_hu_nor_codes_are_made_of_it(mode: Mode, part: str, value: float) -> None:
    hu = np.zeros((36, 32, 32), np.int16)
    codec = broken(part, value)
    with torch.inference_mode():
        assert not bool(codec(torch.zeros(1, 1, 16, 16, 16)).volume.isfinite().all())
    for dtype in (np.int16, np.float32):
        with pytest.raises(InputError, match="not finite: take another checkpoint"):
            reconstruct_volume(codec, hu, HUWindow(), mode=mode, tile_dhw=TILE, dtype=dtype)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_patches_are_not_validated_with_it(tmp_path: Path, part: str) -> None:
    write_store(tmp_path / "a.b2nd", Volume(np.zeros((16, 16, 16), np.int16), np.eye(4)), {})
    volume = PreparedVolume("a", tmp_path / "a.b2nd", np.eye(4))
    model = Model(broken(part, np.nan), HUWindow())
    with pytest.raises(InputError, match="not finite"):
        validate_volume(model, volume, (16, 16, 16), None, CodeUsage(512), tmp_path)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_checkpoint_with_such_a_weight_is_refused_by_name(
    script: Script, checkpoint: Path, volumes: Path, tmp_path: Path, value: float
) -> None:
    content = load_checkpoint(checkpoint)
    content["state_dict"]["codec.to_code.weight"][0] = value
    save_checkpoint(tmp_path / "diverged.ckpt", content)
    result = script("compute_metrics", "--checkpoint", tmp_path / "diverged.ckpt", "--test_data", volumes, check=3)
    assert_one_line_error(result, "diverged.ckpt", "to_code.weight", "not finite")
