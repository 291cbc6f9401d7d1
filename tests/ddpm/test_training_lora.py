"""Fine-tuning: adapters alone are trained and saved, the base stays, and a resumed run ends as an unbroken one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ddpm.pretrained import load_network
from tests.ddpm.tiny import TINY_DDPM, saved_codec
from tests.helpers import assert_one_line_error, assert_same_state
from tests.in_process import DDPM, Train
from vq_gan_3d.checkpointing import load_checkpoint


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
    other = train(*tune, "model.conditioner.xray_size=64", "output_dir=x", script=DDPM, tiny=False, check=2)
    assert_one_line_error(other, "model.conditioner.xray_size", "32")
