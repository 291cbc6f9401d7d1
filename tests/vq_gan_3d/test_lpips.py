"""LPIPS from a local file: random weights in the form of the published ones."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from errors import ConfigurationError, InputError
from vq_gan_3d.lpips import LPIPS, VGG16_BLOCKS
from vq_gan_3d.vqgan import LossConfig


def random_weights(path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for level, block in enumerate(VGG16_BLOCKS):
        for index, before, after in block:
            scale = (2 / (9 * before)) ** 0.5
            tensors[f"features.{index}.weight"] = scale * torch.randn(after, before, 3, 3, generator=generator)
            tensors[f"features.{index}.bias"] = torch.zeros(after)
        tensors[f"lin{level}.model.1.weight"] = torch.rand(1, block[-1][2], 1, 1, generator=generator)
    torch.save(tensors, path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return random_weights(tmp_path_factory.mktemp("lpips") / "lpips.pt")


def test_layers_are_those_of_vgg16():
    indices = [index for block in VGG16_BLOCKS for index, _, _ in block]
    assert indices == [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    assert [block[-1][2] for block in VGG16_BLOCKS] == [64, 128, 256, 512, 512]


def test_distance(weights):
    lpips = LPIPS(weights)
    assert not any(p.requires_grad for p in lpips.parameters())
    torch.manual_seed(0)
    a, b = torch.rand(2, 1, 16, 16), torch.rand(2, 1, 16, 16, requires_grad=True)
    assert float(lpips(a, a)) == 0
    distance = lpips(a, b)
    assert distance.shape == ()
    assert float(distance.detach()) > 0
    distance.backward()
    assert b.grad.isfinite().all()
    assert b.grad.abs().max() > 0
    with torch.no_grad():
        near, far = lpips(a, a + 0.01 * (b - a)), lpips(a, a + 0.5 * (b - a))
        assert 0 < float(near) < float(far)
        torch.testing.assert_close(lpips(a, b), lpips(b, a))
        # a mean over the batch
        each = [lpips(a[i : i + 1], b[i : i + 1]) for i in range(2)]
        torch.testing.assert_close(lpips(a, b), torch.stack(each).mean())


def test_missing_file(tmp_path):
    with pytest.raises(InputError) as caught:
        LPIPS(tmp_path / "none.pt")
    assert "none.pt" in str(caught.value)
    assert "model.lpips_weight" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_weight_needs_a_file():
    with pytest.raises(ConfigurationError, match=r"model\.lpips_weights"):
        LossConfig(lpips_weight=0.5)


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_a_file_with_code_is_refused_and_not_run(tmp_path):
    canary = tmp_path / "canary"
    plain, zipped = tmp_path / "plain.pt", tmp_path / "zipped.pt"
    plain.write_bytes(pickle.dumps({"features.0.weight": Canary(canary)}))
    torch.save({"features.0.weight": Canary(canary)}, zipped)
    for path in (plain, zipped):
        with pytest.raises(InputError) as caught:
            LPIPS(path)
        assert path.name in str(caught.value)
        assert not canary.exists()
    pickle.loads(plain.read_bytes())
    assert canary.exists()  # the canary does sing


@pytest.mark.parametrize("damage", ["lacks a tensor", "no dictionary", "wrong shape", "noise", "empty", "cut"])
def test_unusable_files(tmp_path, damage):
    path = tmp_path / "weights.pt"
    if damage == "lacks a tensor":
        torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, path)
    elif damage == "no dictionary":
        torch.save(torch.zeros(3), path)
    elif damage == "wrong shape":
        torch.save({"features.0.weight": torch.zeros(64, 1, 3, 3), "features.0.bias": torch.zeros(64)}, path)
    elif damage == "noise":
        path.write_bytes(bytes(range(256)) * 10)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, path)
        path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(InputError) as caught:
        LPIPS(path)
    assert str(path) in str(caught.value)
    if damage in ("lacks a tensor", "no dictionary", "wrong shape"):
        assert "not usable as LPIPS weights" in str(caught.value)
