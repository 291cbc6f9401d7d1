"""Export: averaged weights, adapters folded in, a model card that says what was measured, and nobody's name."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm.bundle import load_bundle
from ddpm.export_bundle import main, parse_arguments
from ddpm.lora import LoraConfig, inject_lora, lora_layers
from ddpm.lora_file import base_digest
from ddpm.network import LatentDiffusion
from ddpm.pretrained import load_network
from errors import run_command
from tests.ddpm.tiny import saved_codec, tiny_codec
from tests.helpers import assert_one_line_error
from tests.inference_model import moved_network
from vq_gan_3d.checkpointing import save_checkpoint

Export = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def export(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Export:
    """The command in this process, into ``out/final_model.ckpt``."""

    def call(checkpoint: Path, *options: str, check: int = 0) -> subprocess.CompletedProcess[str]:
        argv = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "out/final_model.ckpt"), *options]
        capfd.readouterr()
        code = run_command(lambda: main(parse_arguments(argv)))
        out, err = capfd.readouterr()
        assert code == check, f"exit {code}\n{out}\n{err}"
        return subprocess.CompletedProcess(argv, code, out, err)

    return call


def state_of(model: LatentDiffusion, factor: float = 1.0) -> dict[str, torch.Tensor]:
    state = {f"network.{name}": factor * value for name, value in model.state_dict().items()}
    return state | {"steps": torch.tensor(7)}


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """What a training leaves: raw weights beside the averaged ones, settings, and the codec's copy."""
    folder = tmp_path / "run"
    model = moved_network()
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "codec.ckpt").write_bytes(saved_codec(tmp_path).read_bytes())
    (folder / "config.yaml").write_text("dataset: {name: phantom, n_patients: 6, root_dir: /hospital/canary}\n")
    checkpoint = {
        "kind": "ddpm", "ddpm": model.config.as_dict(), "state_dict": state_of(model),
        "current_model_state": state_of(model, 2.0), "resume_contract": {"training.seed": 11},
    }  # fmt: skip
    save_checkpoint(folder / "checkpoints/final.ckpt", checkpoint)
    return folder


def test_the_averaged_weights_are_exported_with_the_runs_codec(export: Export, run_folder: Path) -> None:
    export(run_folder / "checkpoints/final.ckpt", "--data", "six phantoms")
    path = run_folder.parent / "out/final_model.ckpt"
    bundle = load_bundle(path)
    expected = moved_network().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in bundle.network.state_dict().items())
    assert bundle.codec.content_hash == tiny_codec().content_hash
    assert bundle.meta["training"] == {
        "steps": 7, "seed": 11, "dataset": "phantom", "phantoms": 6, "data": "six phantoms"
    }  # fmt: skip
    card = path.with_suffix(".md").read_text()
    for words in (bundle.checksum, "not for diagnosis", "16×16×16 voxels", "six phantoms", "4.00 ± 0.10 × 3.00 ± 0.20",
                  "Nothing was measured"):  # fmt: skip
        assert words in card
    for content in (path.read_bytes(), card.encode()):
        assert b"canary" not in content
        assert str(run_folder).encode() not in content


def test_adapters_are_folded_in(export: Export, run_folder: Path) -> None:
    base = run_folder / "checkpoints/final.ckpt"
    network = load_network(base)
    digest, config = base_digest(network), LoraConfig(rank=2)
    inject_lora(network.unet, config)
    for _, layer in lora_layers(network.unet):
        torch.nn.init.normal_(layer.b.weight, generator=torch.Generator().manual_seed(0))
    adapters = {f"network.{name}": p for name, p in network.named_parameters() if p.requires_grad}
    tuned = base.with_name("tuned.ckpt")
    save_checkpoint(tuned, {
        "kind": "ddpm", "ddpm": network.config.as_dict(), "state_dict": adapters | {"steps": torch.tensor(3)},
        "lora": {"config": config.as_dict(), "base": str(base), "base_digest": digest},
    })  # fmt: skip
    export(tuned)
    exported, plain = load_bundle(run_folder.parent / "out/final_model.ckpt").network, moved_network()
    expected = load_network(tuned).state_dict()
    assert exported.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(value, expected[name]) for name, value in exported.state_dict().items())
    assert not all(torch.equal(value, plain.state_dict()[name]) for name, value in exported.state_dict().items())


def report(model: str, codec: str) -> dict[str, Any]:
    def value(estimate: float | None) -> dict[str, Any]:
        return {"estimate": estimate, "low": estimate, "high": None, "n": 2}

    return {
        "settings": {"model": model, "codec": codec, "cases": ["CANARY"], "steps": 4, "sampler": "ddim",
                     "guidance": 1.0, "rescale": 0.0, "seed": 0, "samples": 2},
        "summary": {"cases": 2, "scores": {"right": {"psnr_body_db": value(21.57)}, "mean": {"mae_hu": value(3.0)}},
                    "gains": {}, "bars": [{"bar": "gain over mean", "low": None, "asked": 2.0, "passed": False}]},
        "patients": {"CANARY": {}},
        "failed": {},
    }  # fmt: skip


def test_the_card_tells_what_was_measured_and_names_no_patient(export: Export, run_folder: Path) -> None:
    checkpoint, path = run_folder / "checkpoints/final.ckpt", run_folder / "report.json"
    own = report(hashlib.sha256(checkpoint.read_bytes()).hexdigest(), tiny_codec().content_hash)
    path.write_text(json.dumps(own))
    export(checkpoint, "--report", str(path))
    target = run_folder.parent / "out/final_model.ckpt"
    card = target.with_suffix(".md").read_text()
    assert "| the patient's own X-ray | 21.57 [21.57, –] |" in card
    assert "2 held-out patients" in card
    assert "gain over mean at least 2; lower end –: **missed**" in card
    assert load_bundle(target).meta["report"]["sampling"]["steps"] == 4
    assert b"CANARY" not in target.read_bytes() + card.encode()
    before = target.read_bytes()
    path.write_text(json.dumps(report("0" * 64, tiny_codec().content_hash)))
    assert_one_line_error(export(checkpoint, "--report", str(path), check=3), "report.json", "of another model")
    guided = own | {"settings": own["settings"] | {"classifier": "0" * 64, "classifier_label": 1}}
    path.write_text(json.dumps(guided))
    assert_one_line_error(export(checkpoint, "--report", str(path), check=3), "report.json", "without --classifier")
    for text in ("{}", "[]", "not JSON", '{"settings": {}, "summary": 3}', "null"):
        path.write_text(text)
        assert_one_line_error(export(checkpoint, "--report", str(path), check=3), "report.json", "no report of")
    assert_one_line_error(export(checkpoint, "--report", "no.json", check=3), "no.json")
    assert target.read_bytes() == before


def test_what_cannot_be_exported_is_one_line(export: Export, run_folder: Path, tmp_path: Path) -> None:
    checkpoint = run_folder / "checkpoints/final.ckpt"
    assert_one_line_error(export(tmp_path / "no.ckpt", check=3), "no.ckpt")
    assert_one_line_error(export(run_folder / "codec.ckpt", check=3), "no checkpoint of a diffusion model")
    other = saved_codec(tmp_path, 1)
    assert_one_line_error(export(checkpoint, "--codec", str(other), check=3), "latents of codec")
    (run_folder / "codec.ckpt").unlink()
    assert_one_line_error(export(checkpoint, check=3), "codec.ckpt", "not there")
    (tmp_path / "file").write_text("x")
    result = export(checkpoint, "--codec", str(saved_codec(tmp_path)), "--output", str(tmp_path / "file/a"), check=6)
    assert_one_line_error(result, "file")
    assert not (tmp_path / "out").exists()
