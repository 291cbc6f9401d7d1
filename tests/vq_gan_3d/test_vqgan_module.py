"""The LightningModule in a real Trainer: which gradients flow, when, and how large."""

from __future__ import annotations

import logging

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch.utils.data import DataLoader

from dataset.intensity import HUWindow
from errors import ConfigurationError, DivergedError
from tests.vq_gan_3d.test_lpips import random_weights
from vq_gan_3d.codec import CodecConfig
from vq_gan_3d.optimization import GuardedOptimizer
from vq_gan_3d.vqgan import VQGAN, LossConfig, OptimizerConfig

TINY_CODEC = {"widths": (4, 4, 8), "encoder_blocks": (1, 1, 1), "decoder_blocks": (1, 1, 1), "embedding_dim": 8}
TINY_LOSSES = {"discriminator_width": 4, "discriminator_layers": 2, "discriminator_iter_start": 0}


def build(codec=None, losses=None, optimizer=None) -> VQGAN:
    torch.manual_seed(0)
    module = VQGAN(
        CodecConfig(**(TINY_CODEC | (codec or {}))),
        LossConfig(**(TINY_LOSSES | (losses or {}))),
        OptimizerConfig(**({"warmup_steps": 1} | (optimizer or {}))),
        HUWindow(),
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # blocks start as the identity; let every weight count
        for name, parameter in module.codec.named_parameters():
            if "conv_channels.weight" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def volumes(count, seed=0):
    """Smooth random volumes in HU, each a batch of one."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 4, 4, 4, generator=generator)
    unit = torch.nn.functional.interpolate(coarse, scale_factor=4, mode="trilinear")
    return [v[None] for v in HUWindow().to_hu(unit).round().to(torch.int16)]


class Recorder(Callback):
    """What every optimizer step is given, and what the log got."""

    def __init__(self, monkeypatch):
        self.gradients = {"generator": [], "discriminators": []}
        self.clipped = {"generator": [], "discriminators": []}
        self.rates, self.logged, self.batches = [], [], {"generator": [], "discriminators": []}
        step = GuardedOptimizer.step

        def recorded(guarded, rate):
            part = guarded.module.codec if guarded.name == "generator" else guarded.module.discriminators
            named = {n: p.grad.clone() for n, p in part.named_parameters() if p.grad is not None}
            self.gradients[guarded.name].append(named)
            self.batches[guarded.name].append(int(guarded.module.steps))
            self.rates.append(rate)
            return step(guarded, rate)

        monkeypatch.setattr(GuardedOptimizer, "step", recorded)

    def on_train_start(self, trainer, pl_module):
        for name, optimizer in zip(self.clipped, trainer.optimizers, strict=False):
            optimizer.register_step_pre_hook(lambda o, *_, name=name: self.clipped[name].append(norm_of(o)))

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.logged.append({key: float(value) for key, value in trainer.callback_metrics.items()})


def norm_of(optimizer):
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return float(torch.stack([g.norm() for g in gradients]).norm())


def fit(module, batches, monkeypatch, **options) -> Recorder:
    recorder = Recorder(monkeypatch)
    loader = DataLoader([{"hu": batch} for batch in batches], batch_size=None)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[recorder], **options,
    )  # fmt: skip
    trainer.fit(module, loader)
    monkeypatch.undo()
    return recorder


def difference(a, b):
    assert a.keys() == b.keys()
    top = sum((a[k] - b[k]).square().sum() for k in a).sqrt()
    return float(top / sum(a[k].square().sum() for k in a).sqrt())


def test_the_adversarial_term_reaches_the_generator_and_both_discriminators(monkeypatch):
    plain = {"adaptive_weight": False, "feature_matching_weight": 0.0}
    runs = {
        weight: fit(build(losses=plain | {"adversarial_weight": weight}), volumes(1), monkeypatch)
        for weight in (0.0, 1.0)
    }
    without, with_term = (runs[weight].gradients["generator"][0] for weight in (0.0, 1.0))
    codec = build().codec
    assert without.keys() == with_term.keys() == dict(codec.named_parameters()).keys()
    for name in (
        "decoder.head.weight",
        "decoder.stages.0.0.conv_space.weight",
        "encoder.downs.0.weight",
        "to_code.weight",
    ):
        assert (with_term[name] - without[name]).norm() > 1e-3 * without[name].norm(), name
    for run in runs.values():  # discriminators learn whatever the generator makes of them
        (gradients,) = run.gradients["discriminators"]
        assert gradients.keys() == dict(build().discriminators.named_parameters()).keys()
        for name in ("slices.convs.0.weight", "slices.head.weight", "volume.convs.0.weight", "volume.head.weight"):
            assert gradients[name].norm() > 0, name
    # what the generator's loss leaves in the discriminators is nothing: their gradient is that of their own loss
    a, b = (runs[weight].gradients["discriminators"][0] for weight in (0.0, 1.0))
    assert difference(a, b) < 1e-6


def test_the_generators_gradient_is_that_of_its_loss(monkeypatch):
    from vq_gan_3d.losses import adaptive_weight, feature_matching_loss, generator_loss

    (batch,) = volumes(1)
    found = fit(build(), [batch], monkeypatch).gradients["generator"][0]
    module = build()
    c = module.loss_config
    torch.manual_seed(0)  # seed 0, step 0
    positions = torch.rand(3, c.slices_per_plane)
    volume = module.window.to_unit(batch)
    output, _, codebook_loss = module.codec(volume)
    l1 = (output - volume).abs().mean()
    fake, real = module.judge(output, positions), module.judge(volume, positions)
    term = generator_loss(fake)
    loss = (
        l1
        + codebook_loss
        + 0.1 * adaptive_weight(l1, term, module.codec.decoder.head.weight) * term
        + feature_matching_loss(real, fake)
    )
    loss.backward()
    assert difference({n: p.grad for n, p in module.codec.named_parameters()}, found) < 1e-5


def test_discriminators_wait_for_their_batch(monkeypatch):
    module = build(losses={"discriminator_iter_start": 2})
    before = {key: value.clone() for key, value in module.discriminators.state_dict().items()}
    run = fit(module, volumes(2), monkeypatch)
    assert run.batches == {"generator": [1, 2], "discriminators": []}
    assert all(torch.equal(value, before[key]) for key, value in module.discriminators.state_dict().items())
    assert "train/generator" not in run.logged[-1]
    run = fit(module, volumes(3), monkeypatch)  # counted by the module itself, over both calls
    assert run.batches == {"generator": [3, 4, 5], "discriminators": [3, 4, 5]}
    assert any(not torch.equal(value, before[key]) for key, value in module.discriminators.state_dict().items())
    assert {"train/generator", "train/discriminator", "train/adaptive_weight"} <= run.logged[0].keys()


def test_batches_are_counted_not_optimizer_steps(monkeypatch):
    module = build(optimizer={"accumulate_grad_batches": 2})
    run = fit(module, volumes(6), monkeypatch)
    assert int(module.steps) == 6
    assert run.batches == {"generator": [2, 4, 6], "discriminators": [2, 4, 6]}


@pytest.mark.parametrize("lr_schedule", ["constant", "cosine"])
def test_accumulation_equals_the_larger_batch(monkeypatch, lr_schedule):
    """Exactly so once what looks at a batch as a whole stands still: the moments and the entropy of the code."""
    parts = volumes(4)
    wholes = [torch.cat(parts[:2]), torch.cat(parts[2:])]
    no_discriminators = {"discriminator_2d": False, "discriminator_3d": False}
    gradients = []
    for batches, accumulate in ((parts, 2), (wholes, 1)):
        module = build(
            {"entropy_weight": 0.0}, no_discriminators, {"accumulate_grad_batches": accumulate, "learning_rate": 0.0}
        )
        module.codec.code_norm.eval()
        gradients.append(fit(module, batches, monkeypatch).gradients["generator"])
    assert len(gradients[0]) == len(gradients[1]) == 2
    for a, b in zip(*gradients, strict=True):
        assert difference(a, b) < 1e-5
    assert difference(gradients[0][0], gradients[0][1]) > 1e-2


@pytest.mark.parametrize("clip", [0.01, 1e6])
def test_clipping(monkeypatch, clip):
    run = fit(build(optimizer={"gradient_clip_val": clip}), volumes(2), monkeypatch)
    for name in ("generator", "discriminators"):
        for norm, gradients, logged in zip(run.clipped[name], run.gradients[name], run.logged, strict=True):
            raw = float(torch.stack([g.norm() for g in gradients.values()]).norm())
            assert logged[f"train/gradient_norm_{name}"] == pytest.approx(raw, rel=1e-4)
            assert norm == pytest.approx(min(raw, clip), rel=1e-3)
            assert norm <= clip * (1 + 1e-5)
            assert raw > 0.01


def test_parameters_by_part_adds_up():
    module = build()
    counts = module.parameters_by_part()
    assert counts["generator"] == sum(p.numel() for p in module.codec.parameters())
    assert counts["generator"] == counts["encoder"] + counts["decoder"] + counts["code projections and quantizer"]
    assert counts["total"] == counts["generator"] + counts["discriminator (slices)"] + counts["discriminator (volume)"]
    assert counts["total"] == sum(p.numel() for p in module.parameters())
    optimizers = module.configure_optimizers()
    assert sum(p.numel() for o in optimizers for g in o.param_groups for p in g["params"]) == counts["total"]


OPTIONS = {
    "discriminator_2d": False,
    "discriminator_3d": False,
    "discriminator_width": 6,
    "discriminator_layers": 1,
    "discriminator_loss": "vanilla",
    "discriminator_iter_start": 1,
    "adversarial_weight": 0.7,
    "adaptive_weight": False,
    "feature_matching_weight": 0.0,
    "slices_per_plane": 1,
    "lpips_weight": 0.5,
}


def signature(monkeypatch, losses):
    run = fit(build(losses=losses), volumes(1), monkeypatch)
    parts = [run.gradients[name] for name in ("generator", "discriminators")]
    return [float(torch.stack([g.norm() for g in part[0].values()]).norm()) if part else 0.0 for part in parts]


def test_every_loss_option_changes_what_is_minimised(monkeypatch, tmp_path):
    assert OPTIONS.keys() == LossConfig.__dataclass_fields__.keys() - {"lpips_weights"}
    base = signature(monkeypatch, {})
    assert signature(monkeypatch, {}) == base  # reproducible, so any difference is the option's
    for option, value in OPTIONS.items():
        extra = {"lpips_weights": str(random_weights(tmp_path / "lpips.pt"))} if option == "lpips_weight" else {}
        changed = signature(monkeypatch, {option: value} | extra)
        assert max(abs(a - b) / max(a, b) for a, b in zip(changed, base, strict=True)) > 1e-3, option
        if option == "discriminator_loss":
            assert changed[0] == base[0]  # the generator's loss is the same under both


def test_lpips_weights_stay_out_of_the_module(tmp_path):
    path = random_weights(tmp_path / "lpips.pt")
    module = build(losses={"lpips_weight": 1.0, "lpips_weights": str(path)})
    assert module.state_dict().keys() == build().state_dict().keys()


@pytest.mark.parametrize("quantizer", ["ema", "simvq", "fsq"])
@pytest.mark.parametrize("discriminators", [pytest.param(True, marks=pytest.mark.slow), False])
def test_each_quantizer_trains(monkeypatch, quantizer, discriminators):
    losses = {"discriminator_2d": discriminators, "discriminator_3d": discriminators, "adversarial_weight": 0.01}
    module = build({"quantizer": quantizer}, losses, {"learning_rate": 3e-3})
    run = fit(module, volumes(2) * 15, monkeypatch)
    l1 = [logged["train/l1"] for logged in run.logged]
    assert sum(l1[-4:]) < 0.7 * sum(l1[:4])
    assert all(p.isfinite().all() for p in module.parameters())
    with torch.no_grad():
        indices = module.eval().codec(module.window.to_unit(torch.cat(volumes(2)))).indices
    assert len(indices.unique()) > 10


def test_steps_are_seeded_by_seed_and_step(monkeypatch):
    state = []
    for disturbance in (0, 1):
        module = build()
        torch.manual_seed(disturbance)
        fit(module, volumes(3), monkeypatch)
        state.append(module.state_dict())
    assert all(torch.equal(state[0][key], state[1][key]) for key in state[0])


def test_a_step_with_nan_gradients_is_skipped_and_many_end_training(monkeypatch):
    module = build(optimizer={"max_bad_steps": 3})
    good = volumes(1)
    fit(module, good, monkeypatch)
    before = {name: p.clone() for name, p in module.named_parameters()}
    monkeypatch.setattr(HUWindow, "to_unit", lambda self, hu: torch.full_like(hu, float("nan"), dtype=torch.float32))
    trainer_options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, **trainer_options)
    trainer.fit(module, DataLoader([{"hu": batch} for batch in good * 2], batch_size=None))
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, **trainer_options)
    loader = DataLoader([{"hu": batch} for batch in good * 5], batch_size=None)
    with pytest.raises(DivergedError, match="3 consecutive steps"):
        trainer.fit(module, loader)
    monkeypatch.undo()
    fit(module, good, monkeypatch)  # nothing of it is left in buffers
    assert all(value.isfinite().all() for value in module.state_dict().values())


@pytest.mark.parametrize("values", [{"discriminator_loss": "wgan"}, {"lpips_weight": 1.0}])
def test_bad_loss_settings(values):
    with pytest.raises(ConfigurationError, match=r"model\."):
        LossConfig(**values)
