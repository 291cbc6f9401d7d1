"""The diffusion trainer: it learns, its codec stays frozen, and what it refuses it refuses in one line."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from dataset.from_config import plain_dict
from dataset.intensity import HUWindow
from ddpm.conditions import positions
from ddpm.ddpm import DDPM, ValidationConfig
from ddpm.latent_dataset import condition_batch, context_at
from ddpm.network import DDPMConfig, LatentDiffusion, Sampling
from ddpm.pretrained import load_network
from errors import ConfigurationError
from tests.ddpm.tiny import TINY_DDPM, saved_codec, tiny_codec
from tests.helpers import ROOT, assert_one_line_error
from tests.in_process import DDPM as SCRIPT
from tests.in_process import Train
from vq_gan_3d.checkpointing import load_checkpoint
from vq_gan_3d.latent_files import open_latent, write_latent
from vq_gan_3d.latents import LatentStatistics, codec_hash
from vq_gan_3d.optimization import OptimizerConfig


def options(codec: Path, *more: str) -> list[str]:
    return [*TINY_DDPM, f"pretrained_vqgan={codec}", *more]


def test_a_run_leaves_checkpoints_logs_panels_and_a_codec(tmp_path: Path, train: Train):
    codec = saved_codec(tmp_path)
    train(*options(codec, "training.max_steps=5", "logger.every_n_steps=1"), script=SCRIPT, tiny=False)
    out = tmp_path / "outputs"
    checkpoint = load_checkpoint(out / "checkpoints/final.ckpt")
    assert checkpoint["kind"] == "ddpm"
    assert (out / "checkpoints/best.ckpt").is_file()
    assert not [name for name in checkpoint["state_dict"] if "codec" in name]
    config = DDPMConfig.from_dict(checkpoint["ddpm"])
    assert config.codec_hash == tiny_codec().content_hash
    assert config.latent_dhw == (4, 4, 4)
    assert config.stride_dhw == (4, 4, 4)
    assert config.window == HUWindow()
    assert DDPMConfig.from_dict(config.as_dict()) == config
    network = load_network(out / "checkpoints/final.ckpt")
    assert torch.allclose(network.scaler.mean.flatten(), torch.tensor(config.statistics.mean))
    assert len(list((out / "validation_results").glob("step_0005_*.png"))) == 1  # one is held out
    with (out / "logs/validation.csv").open() as file:
        row = list(csv.DictReader(file))[-1]
    assert {"loss", "loss_without", "loss_t0", "loss_t1", "sample_psnr_db", "sample_mae_hu"} <= set(row)
    with (out / "logs/train.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    assert any(name.startswith("loss_t") for name in rows[0])
    # the codec that lies in the run's folder is the one that was given, bit for bit
    before, after = load_checkpoint(codec)["state_dict"], load_checkpoint(out / "codec.ckpt")["state_dict"]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["pretrained_vqgan=null"], 2, ["pretrained_vqgan is not set"]),
        (["pretrained_vqgan=no.ckpt"], 3, ["no.ckpt"]),
        (["dataset.hu_min=-1024"], 2, ["HU window"]),
        (["dataset.xray_augmentation.rotation_deg=90"], 2, ["rotation_deg", "45"]),
        (["+dataset.xray_augmentation.flip=1"], 2, ["flip", "no such effect"]),
        (["dataset.latents_dir=nowhere"], 2, ["nowhere", "encode_latents.py"]),
        (["dataset.patch_size=[6,8,8]"], 2, ["patch_size", "stride"]),
        (["validation.sampler=magic"], 2, ["magic"]),
        (["lora.enabled=true"], 2, ["pretrained_ddpm"]),
        (["model.diffusion.objective=guess"], 2, ["guess"]),
        (["model.conditioner.views=[oblique]"], 2, ["oblique"]),
    ],
)
def test_bad_settings_are_one_line(tmp_path: Path, train: Train, more: list[str], code: int, words: list[str]):
    result = train(*options(saved_codec(tmp_path), *more), script=SCRIPT, tiny=False, check=code)
    assert_one_line_error(result, *words)
    if "dataset.latents_dir=nowhere" not in more:  # told before anything is prepared
        assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.slow
def test_latents_of_another_codec_end_with_3(tmp_path: Path, train: Train):
    folder = tmp_path / "latents"
    folder.mkdir()
    own, other = saved_codec(tmp_path), tiny_codec(1)
    train(*options(own, "training.max_steps=1", "dataset.cache_dir=cached"), script=SCRIPT, tiny=False)
    for path in (tmp_path / "cached/latents").rglob("*.safetensors"):
        latent, name = open_latent(path), path.name[: len("phantom_00000")]
        write_latent(folder / f"{name}.safetensors", latent.code(), other, latent.affine, latent.shape_dhw,
                     source={"name": name})  # fmt: skip
    again = options(own, "dataset.cache_dir=cached", f"dataset.latents_dir={folder}", "overwrite=true")
    assert_one_line_error(train(*again, script=SCRIPT, tiny=False, check=3), "another codec", str(folder))
    assert (tmp_path / "outputs/checkpoints/final.ckpt").is_file()


EXPERIMENTS = [path.stem for path in (ROOT / "config/experiment").glob("*.yaml") if "/model: ddpm" in path.read_text()]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiments_compose_and_make_a_network(experiment: str):
    with initialize_config_dir(str(ROOT / "ddpm/config"), version_base="1.3"):
        config = compose("base_cfg", overrides=[f"experiment={experiment}"])
    model = plain_dict(config.model)
    cells = tuple(n // 4 for n in config.dataset.size)
    facts = FACTS | {"latent_dhw": cells}
    built = DDPMConfig.build(model["unet"], model["diffusion"], model["conditioner"], channels=4, **facts)
    assert LatentDiffusion(built).config.unet.level_shapes(cells)[0] == cells


def batch_of(count: int, seed: int = 0, extra: int = 0, views: int = 1) -> dict[str, object]:
    """Latents that follow from pictures: a patient's cells are as bright as his X-ray where it sees them."""
    generator = torch.Generator().manual_seed(seed)
    picture = torch.rand(count, views, 1, 4, 4, generator=generator).repeat_interleave(8, -1).repeat_interleave(8, -2)
    d = w = 4
    y, x = torch.meshgrid(torch.linspace(0.75, -0.75, d), torch.linspace(-0.75, 0.75, w), indexing="ij")
    grid = torch.stack([x, y], -1)[:, None].expand(d, 4, w, 2).expand(count, views, d, 4, w, 2)
    seen = picture[:, 0, :, ::8, ::8].flip(-2)[:, :, :, None].expand(count, 1, d, 4, w)  # (B, 1, d, h, w)
    batch: dict[str, object] = {
        "code": (2 * seen - 1).repeat(1, 4, 1, 1, 1),
        "xray": picture,
        "xray_present": torch.ones(count, views, dtype=torch.bool),
        "ray_grid": grid.clone(),
        "label": torch.arange(count) % 2,
        "text": ["" for _ in range(count)],
    }
    return batch | ({"extra": torch.zeros(count, extra, d, 4, w)} if extra else {})


FACTS: dict[str, Any] = {
    "statistics": LatentStatistics((0.0,) * 4, (0.5,) * 4), "codec_hash": "x", "window": HUWindow(),
    "stride_dhw": (4, 4, 4), "latent_dhw": (4, 4, 4), "crop_dhw": None, "context_dhw": None,
    "spacing_mm": ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0)),
}  # fmt: skip


def network(**changes: object) -> LatentDiffusion:
    unet = {"widths": [16, 32], "strides": [[1, 1, 1], [2, 2, 2]], "blocks": [1, 1], "attention_levels": [1],
            "heads": 2, "embedding_channels": 32}  # fmt: skip
    conditioner: dict[str, object] = {
        "xray_size": 32, "widths": [8, 16], "lifted_channels": [8, 8], "token_channels": 16, "vector_channels": 16,
    }  # fmt: skip
    conditioner |= changes.pop("conditioner", {})  # type: ignore[arg-type]
    diffusion: dict[str, object] = changes.pop("diffusion", {})  # type: ignore[assignment]
    facts = FACTS | changes
    torch.manual_seed(0)
    return LatentDiffusion(DDPMConfig.build(unet, diffusion, conditioner, channels=4, **facts))


def fit(model: LatentDiffusion, batches: Callable[[int], dict[str, object]], steps: int) -> list[float]:
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for step in range(steps):
        batch = batches(step)
        latent = model.scaler.to_latent(batch["code"])
        t = model.config.diffusion.sample_times(len(latent))
        keep = model.conditioner.draw_keep(len(latent))
        loss = model.losses(latent, condition_batch(batch), torch.randn_like(latent), t, keep).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_it_learns_to_follow_the_xray():
    torch.set_num_threads(1)
    model = network()
    losses = fit(model, lambda step: batch_of(8, step), 150)
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    model.eval()
    held_out = batch_of(4, 10_000)
    codes = model.sample(condition_batch(held_out), (4, 4, 4), Sampling(steps=8), 0, range(4))
    truth = model.scaler.to_latent(held_out["code"])
    sampled = model.scaler.to_latent(codes)
    right = (sampled - truth).square().mean()
    shuffled = (sampled - truth.roll(1, 0)).square().mean()
    assert right < 0.5 * shuffled
    # left is left: the mirrored picture, which is as likely in this cohort, gives the mirrored patient
    turned = held_out | {"xray": held_out["xray"].flip(-1)}
    codes = model.sample(condition_batch(turned), (4, 4, 4), Sampling(steps=8), 0, range(4))
    mirrored = model.scaler.to_latent(codes)
    assert (mirrored - truth.flip(-1)).square().mean() < 0.5 * (mirrored - truth).square().mean()


def test_positions_and_context_say_where_a_crop_is():
    whole = positions((8, 6, 4), (0, 0, 0), (8, 6, 4))
    part = positions((8, 6, 4), (2, 1, 0), (4, 3, 4))
    assert torch.equal(part, whole[:, 2:6, 1:4, 0:4])
    assert whole[0, 0, 0, 0] == -1 + 1 / 8
    assert whole[0, -1, 0, 0] == 1 - 1 / 8
    # a linear field down-sampled by block means is found again by trilinear sampling, but at its edges
    field = (whole * torch.tensor([1.0, 2.0, 3.0])[:, None, None, None]).sum(0, keepdim=True)
    context = torch.nn.functional.adaptive_avg_pool3d(field[None], (4, 3, 2))[0]
    found = context_at(context, (8, 6, 4), (2, 1, 1), (4, 3, 2))
    torch.testing.assert_close(found, field[:, 2:6, 1:4, 1:3], rtol=0, atol=1e-5)


def test_a_model_of_crops_is_told_where_they_are_or_refuses():
    model = network(crop_dhw=(4, 4, 4)).eval()
    with pytest.raises(ConfigurationError, match="a model of crops must be told where they are"):
        model.sample(condition_batch(batch_of(1)), (4, 4, 4), Sampling(steps=1), 0, [0])
    for parameter in model.parameters():  # its output starts at zero
        torch.nn.init.normal_(parameter, std=0.1)
    codes = []
    for start in ((0, 0, 0), (4, 0, 4)):
        place = positions((8, 4, 8), start, (4, 4, 4))[None]
        batch = condition_batch(batch_of(1) | {"extra": place})
        codes.append(model.sample(batch, (4, 4, 4), Sampling(steps=2), 0, [0]))
    assert not torch.equal(*codes)


@pytest.mark.slow
def test_crops_train_and_their_context_counts():
    torch.set_num_threads(1)
    model = network(context_dhw=(2, 2, 2), crop_dhw=(4, 4, 4))

    def batches(step: int) -> dict[str, object]:
        batch = batch_of(8, step, extra=7)
        brightness = torch.rand(8, 1, 1, 1, 1, generator=torch.Generator().manual_seed(step)) * 2 - 1
        batch["code"] = brightness.expand(8, 4, 4, 4, 4)
        batch["extra"] = torch.cat([torch.zeros(8, 3, 4, 4, 4), batch["code"]], dim=1)
        return batch

    losses = fit(model, batches, 200)
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    model.eval()
    batch = batches(999)
    first = model.sample(condition_batch(batch), (4, 4, 4), Sampling(steps=4), 0, range(8))
    batch["extra"] = -batch["extra"]
    second = model.sample(condition_batch(batch), (4, 4, 4), Sampling(steps=4), 0, range(8))
    assert (first - second).abs().mean() > 0.2


def test_the_module_trains_all_of_the_network_and_nothing_of_the_codec():
    codec = tiny_codec()
    module = DDPM(network(), codec, OptimizerConfig(), ValidationConfig())
    trained = {id(p) for group in module.configure_optimizers().param_groups for p in group["params"]}
    assert trained == {id(p) for p in module.network.parameters()}
    assert trained.isdisjoint({id(p) for p in codec.codec.parameters()})
    module.train()
    assert not codec.codec.training
    assert not [name for name in module.state_dict() if "codec" in name]


def test_the_codec_is_the_same_after_training_steps_and_a_validation(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
):
    """The live object: the copy in the run's folder is written before training."""
    modules: list[DDPM] = []
    real = DDPM.on_fit_start
    monkeypatch.setattr(DDPM, "on_fit_start", lambda self: (modules.append(self), real(self))[1])
    short = ["training.max_steps=3", "training.learning_rate=0.1", "training.warmup_steps=0"]
    train(*options(saved_codec(tmp_path), *short), script=SCRIPT, tiny=False)
    (module,) = modules
    assert int(module.steps) == 3
    assert (tmp_path / "outputs/logs/validation.csv").is_file()
    moved = load_checkpoint(tmp_path / "outputs/checkpoints/final.ckpt")["current_model_state"]
    fresh = LatentDiffusion(module.network.config).state_dict()
    assert not torch.equal(moved["network.unet.head.weight"], fresh["unet.head.weight"])  # it did train
    frozen = module.codec
    assert codec_hash(frozen.codec, frozen.window) == frozen.content_hash == tiny_codec().content_hash
    assert not any(p.requires_grad or p.grad is not None for p in frozen.codec.parameters())
    module.train()
    assert not frozen.codec.training
