"""Fine-tuning: adapters alone are trained and saved, the base stays, and a resumed run ends as an unbroken one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from dataset.from_config import plain_dict
from ddpm.network import DDPMConfig, LatentDiffusion
from ddpm.pretrained import load_network
from tests.ddpm.test_training import FACTS
from tests.ddpm.tiny import TINY_DDPM, saved_codec, tiny_codec
from tests.helpers import ROOT, assert_one_line_error, assert_same_state
from tests.in_process import DDPM, Train
from vq_gan_3d.checkpointing import load_checkpoint, save_checkpoint


@pytest.mark.slow
def test_adapters_alone_are_trained_and_saved(tmp_path: Path, train: Train):
    options = [*TINY_DDPM, f"pretrained_vqgan={saved_codec(tmp_path)}"]
    train(*options, "training.max_steps=4", "output_dir=base", script=DDPM, tiny=False)
    base = tmp_path / "base/checkpoints/final.ckpt"
    before = base.read_bytes()
    tune = [*options, f"pretrained_ddpm={base}", "lora.enabled=true", "lora.rank=2", "training.learning_rate=0.01"]
    train(*tune, "training.max_steps=5", "output_dir=tuned", script=DDPM, tiny=False)
    tuned = tmp_path / "tuned/checkpoints/final.ckpt"
    checkpoint = load_checkpoint(tuned)
    for key in ("state_dict", "current_model_state"):
        names = set(checkpoint[key]) - {"steps"}
        assert names
        assert all(name.endswith((".a.weight", ".b.weight")) for name in names)
    assert tuned.stat().st_size < base.stat().st_size
    assert base.read_bytes() == before
    # merged: other weights where an adapter sits, the same everywhere else
    first, second = load_network(base).state_dict(), load_network(tuned).state_dict()
    assert first.keys() == second.keys()
    adapted = {name.removeprefix("network.").removesuffix(".a.weight") + ".weight" for name in checkpoint["state_dict"]
               if name.endswith(".a.weight")}  # fmt: skip
    moved = {name for name in first if not torch.equal(first[name], second[name])}
    assert moved == adapted
    # in two parts
    train(*tune, "training.max_steps=2", "output_dir=parts", script=DDPM, tiny=False)
    train(*tune, "training.max_steps=5", "output_dir=parts", "ckpt_path=last", script=DDPM, tiny=False)
    parts = load_checkpoint(tmp_path / "parts/checkpoints/final.ckpt")
    for key in ("state_dict", "current_model_state", "optimizer_states"):
        assert_same_state(checkpoint[key], parts[key], key)


def base_checkpoint(folder: Path, **changes: Any) -> Path:
    """A base model that nobody trained, as `TINY_DDPM` shapes it."""
    settings = [setting.removeprefix("model.") for setting in TINY_DDPM if setting.startswith("model.")]
    with initialize_config_dir(str(ROOT / "config/model"), version_base="1.3"):
        model = plain_dict(compose("ddpm_small", overrides=settings))
    facts = FACTS | {"codec_hash": tiny_codec().content_hash} | changes
    config = DDPMConfig.build(model["unet"], model["diffusion"], model["conditioner"], channels=4, **facts)
    state = {f"network.{name}": value for name, value in LatentDiffusion(config).state_dict().items()}
    save_checkpoint(folder / "base.ckpt", {"kind": "ddpm", "ddpm": config.as_dict(), "state_dict": state})
    return folder / "base.ckpt"


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("model.conditioner.xray_size=64", "model.conditioner.xray_size=32"),
        ("model.conditioner.views=[frontal,lateral]", "model.conditioner.views=[frontal]"),
        ("model.conditioner.text=bytes", "model.conditioner.text=none"),
        ("model.conditioner.label=true", "model.conditioner.label=false"),
        ("model.conditioner.lifting=false", "model.conditioner.lifting=true"),
        ("model.diffusion.objective=x0", "model.diffusion.objective=v"),
        ("model.diffusion.schedule.name=flow", "model.diffusion.schedule.name=cosine"),
        ("model.unet.widths=[8,32]", "model.unet.widths=[8,16]"),
        ("dataset.patch_size=[8,8,8]", "trained on whole fields"),
        ("lora.targets=[*nothing*]", "lora.targets: no linear or Conv3d layer matches"),
        ("+lora.tragets=3", "tragets"),
    ],
)
def test_settings_that_adapters_would_drop_are_refused(tmp_path: Path, train: Train, override: str, wanted: str):
    tune = [*TINY_DDPM, f"pretrained_vqgan={saved_codec(tmp_path)}", "lora.enabled=true"]
    tune.append(f"pretrained_ddpm={base_checkpoint(tmp_path)}")
    result = train(*tune, override, script=DDPM, tiny=False, check=2)
    assert_one_line_error(result, wanted)


def test_targets_choose_the_layers(tmp_path: Path, train: Train):
    tune = [*TINY_DDPM, f"pretrained_vqgan={saved_codec(tmp_path)}", "lora.enabled=true", "training.max_steps=1"]
    base = base_checkpoint(tmp_path)
    train(*tune, f"pretrained_ddpm={base}", "lora.targets=[*query]", script=DDPM, tiny=False)
    names = set(load_checkpoint(tmp_path / "outputs/checkpoints/final.ckpt")["state_dict"]) - {"steps"}
    assert names
    assert all(".query." in name for name in names)
