"""BiomedCLIP's image encoder: its errors, and where open_clip is installed its loading, on weights nobody trained."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddpm.biomedclip import BiomedCLIPEncoder
from ddpm.conditioner import Conditioner
from errors import ConfigurationError, InputError
from tests.ddpm.test_conditioner import CONFIG, LATENT, STRIDES, batch_of, outputs

needs_open_clip = pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="open_clip is not installed")
# The layout of the published open_clip_config.json, with the smallest image tower and a plain text tower.
SETTINGS = {
    "model_cfg": {
        "embed_dim": 24,
        "vision_cfg": {
            "timm_model_name": "vit_tiny_patch16_224",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 224,
        },
        "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A whole model of open_clip, both towers, saved as its authors publish it; the folder and the model."""
    from open_clip.model import CustomTextCLIP

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("biomedclip")
    clip = CustomTextCLIP(**SETTINGS["model_cfg"]).eval()
    (folder / "open_clip_config.json").write_text(json.dumps(SETTINGS))
    torch.save(clip.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder, clip


@needs_open_clip
def test_the_embedding_is_that_of_the_whole_model(model):
    folder, clip = model
    encoder = BiomedCLIPEncoder(str(folder))
    assert encoder.channels == (192 + 24,)
    xray = torch.rand(2, 1, 224, 224)
    mean, std = (torch.tensor(SETTINGS["preprocess_cfg"][key]).reshape(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = clip.encode_image((xray.expand(-1, 3, -1, -1) - mean) / std)
    (features,) = encoder(xray, torch.zeros(2, dtype=torch.int64))
    assert features.shape == (2, 216, 14, 14)
    torch.testing.assert_close(features[:, 192:].mean(dim=(2, 3)), expected, atol=1e-5, rtol=1e-4)
    assert encoder(torch.rand(1, 1, 96, 96), torch.zeros(1))[0].shape == (1, 216, 14, 14)


@needs_open_clip
def test_patches_keep_their_place(model):
    encoder = BiomedCLIPEncoder(str(model[0]))
    plain = torch.rand(1, 1, 224, 224)
    spot = plain.clone()
    spot[..., 208:, :16] = 1 - spot[..., 208:, :16]
    change = (encoder(spot, None)[0] - encoder(plain, None)[0])[0, :192].norm(dim=0)
    assert int(change.argmax()) == 13 * 14 + 0


@needs_open_clip
def test_it_conditions_trains_what_is_on_top_and_stays_frozen(model):
    torch.manual_seed(0)
    config = replace(CONFIG, image_encoder="biomedclip", image_encoder_path=str(model[0]))
    conditioner = Conditioner(config, STRIDES, LATENT)
    batch = batch_of()
    assert [x.shape[1] for x in conditioner(batch).lifted] == list(config.lifted_channels)
    assert not any("trunk" in name for name in conditioner.state_dict())
    tower = conditioner.encoder._tower[0]
    before = [p.clone() for p in tower.parameters()]
    head = nn.Linear(config.vector_channels, 1)
    optimizer = torch.optim.Adam([*conditioner.parameters(), *head.parameters()], 0.002)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(head(conditioner(batch).vector)[:, 0], torch.tensor([-1.0, 1.0]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]
    assert not conditioner.train().encoder._tower[0].training
    assert all(torch.equal(a, b) for a, b in zip(before, tower.parameters(), strict=True))
    swapped = conditioner(replace(batch, xray=batch.xray.flip(0)))
    for a, b in zip(outputs(conditioner(batch))[:-1], outputs(swapped)[:-1], strict=True):
        assert not torch.allclose(a, b)


@needs_open_clip
def test_t44_damaged_models_are_told_in_one_line(model, tmp_path):
    (tmp_path / "open_clip_config.json").write_text(json.dumps(SETTINGS))
    weights = (model[0] / "open_clip_pytorch_model.bin").read_bytes()
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError) as caught:
        BiomedCLIPEncoder(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_models_and_packages_are_told_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(ConfigurationError, match="image_encoder_path"):
        BiomedCLIPEncoder(None)
    with pytest.raises(ConfigurationError, match="no such folder"):
        BiomedCLIPEncoder(str(tmp_path / "nowhere"))
    (tmp_path / "open_clip_config.json").write_text(json.dumps(SETTINGS))
    with pytest.raises(ConfigurationError, match="holds neither"):
        BiomedCLIPEncoder(str(tmp_path))
    torch.save({}, tmp_path / "open_clip_pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.setitem(sys.modules, "open_clip.timm_model", None)
    with pytest.raises(ConfigurationError, match="pip install open_clip_torch"):
        BiomedCLIPEncoder(str(tmp_path))
