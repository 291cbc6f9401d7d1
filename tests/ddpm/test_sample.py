"""What `LatentDiffusion.sample` adds to samplers: codes stay in their range, and a classifier of codes may guide."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm.classifier.guide import load_guide
from ddpm.classifier.network import ClassifierConfig, PEClassifier
from ddpm.conditions import ConditionBatch, Conditions
from ddpm.generate import Generator
from ddpm.guidance import ClassifierGuidance
from ddpm.latent_dataset import condition_batch
from ddpm.network import LatentDiffusion, Sampling
from ddpm.samplers import SAMPLERS
from errors import ConfigurationError, InputError
from tests.ddpm.test_training import batch_of, fit, network
from tests.ddpm.tiny import tiny_codec
from vq_gan_3d.checkpointing import save_checkpoint
from vq_gan_3d.latents import LatentStatistics, unsquash
from vq_gan_3d.quantizer import squash

UNEVEN = LatentStatistics((0.3, -0.2, 0.0, 0.1), (0.5, 0.4, 0.3, 0.5))


def some(count: int) -> ConditionBatch:
    return condition_batch(batch_of(count))


def test_the_range_of_latents_is_that_of_codes() -> None:
    model = network(statistics=UNEVEN)
    low, high = model.latent_range
    torch.testing.assert_close(low.flatten(), torch.tensor([-2.6, -2.0, -1 / 0.3, -2.2]))
    torch.testing.assert_close(high.flatten(), torch.tensor([1.4, 3.0, 1 / 0.3, 1.8]))
    latent = model.scaler.to_latent(1000 * torch.randn(1, 4, 4, 4, 4))
    assert bool(((latent >= low) & (latent <= high)).all())


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "ddpm"])  # whose noise hides old errors
def test_few_steps_of_epsilon_get_over_errors_near_pure_noise(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exact regression of latents that are normal about ``truth``, but ε is a little wrong: at t = 1 148-fold."""
    model, spread = network(diffusion={"objective": "epsilon"}), 0.3
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(4, 4, 4, 4, 4, generator=generator).clamp(-1.5, 1.5)

    def nearly(x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        alpha, sigma = model.config.diffusion.alpha_sigma_like(t, x)
        gain = alpha * spread**2 / (alpha**2 * spread**2 + sigma**2)
        x0 = truth + gain * (x - alpha * truth)
        return (x - alpha * x0) / sigma + 0.1 * torch.randn(x.shape, generator=generator)

    monkeypatch.setattr(model, "forward", nearly)
    codes = model.sample(some(4), (4, 4, 4), Sampling(8, sampler), 0, range(4))
    error = (model.scaler.to_latent(codes) - truth).square().mean().sqrt()
    assert float(error) < 0.3  # that of exact samples; unbounded it is 0.36 with heun and above 0.5 with the others


# --- a classifier as a guide ------------------------------------------------------------------------------------------

BLIND = {"lifting": False, "cross_attention": False, "pooled": False}


def brightness(count: int, seed: int) -> dict[str, object]:
    """Codes of patients of whom nothing is known; the brighter the first two channels, the likelier an embolism."""
    generator = torch.Generator().manual_seed(seed)
    bright = 0.2 * torch.randn(count, 1, generator=generator)
    label = (torch.rand(count, generator=generator) < torch.sigmoid(10 * bright[:, 0])).long()
    signs = bright * torch.tensor([1.0, 1.0, -1.0, -1.0])  # (B, C)
    noise = 0.05 * torch.randn(count, 4, 4, 4, 4, generator=generator)
    return batch_of(count) | {"code": unsquash(0.1 + signs[..., None, None, None] + noise), "label": label}


def blind(statistics: LatentStatistics = UNEVEN) -> LatentDiffusion:
    return network(conditioner=BLIND, statistics=statistics, codec_hash=tiny_codec().content_hash).eval()


def test_the_guide_is_shown_squashed_codes() -> None:
    model, seen = blind(), []

    def classifier(code: Tensor) -> Tensor:
        seen.append(code.detach())
        return code.mean((1, 2, 3, 4))

    guide = ClassifierGuidance(classifier, torch.tensor([0, 1]), 1e-9)
    codes = model.sample(some(2), (4, 4, 4), Sampling(steps=4), 0, range(2), guide)
    assert len(seen) == 4
    assert all(float(code.abs().max()) <= 1 + 1e-6 for code in seen)
    torch.testing.assert_close(squash(codes), seen[-1].clamp(-0.9995, 0.9995), atol=1e-5, rtol=0)


def test_every_sample_of_a_patient_is_guided_to_his_label() -> None:
    generator = Generator(blind(), tiny_codec())
    options = {"steps": 3, "samples": 2}
    labels: list[Tensor] = []

    class Brightness(torch.nn.Module):
        def forward(self, code: Tensor) -> Tensor:
            labels.append(code)
            return code.mean((1, 2, 3, 4))

    plain = generator.generate(some(2), (16, 16, 16), **options)
    off = ClassifierGuidance(Brightness(), torch.tensor([0, 1]), 0.0)
    assert torch.equal(plain, generator.generate(some(2), (16, 16, 16), guide=off, **options))
    assert not labels
    results = []
    for first in (0, 1):
        guide = ClassifierGuidance(Brightness(), torch.tensor([first, 1]), 300.0)
        results.append(generator.generate(some(2), (16, 16, 16), guide=guide, **options))
    assert bool((results[0][0] - results[1][0]).flatten(1).any(dim=1).all())  # both samples of the first patient
    assert torch.equal(results[0][1], results[1][1])
    with pytest.raises(ConfigurationError, match=r"labels of shape \[3\] for 2 patients"):
        generator.generate(some(2), (16, 16, 16), guide=ClassifierGuidance(Brightness(), torch.zeros(3)), **options)


@pytest.mark.slow
def test_a_trained_classifier_moves_samples_to_the_label() -> None:
    """Both models see the same patients; the samples' own score says where guidance brought them."""
    torch.set_num_threads(1)
    model = blind(LatentStatistics((0.1,) * 4, (0.2,) * 4))
    losses = fit(model.train(), lambda step: brightness(8, step), 100)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    torch.manual_seed(0)
    classifier = PEClassifier(ClassifierConfig("latent", 4, (8,), ((1, 2, 2),), (1,), dropout=0.0))
    optimizer = torch.optim.Adam(classifier.parameters(), 0.01)
    for step in range(60):
        batch = brightness(32, 1000 + step)
        scores = classifier(squash(batch["code"]))
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(scores, batch["label"].float()).backward()
        optimizer.step()
    model.eval()
    classifier.eval().requires_grad_(False)

    def scores_of(guide: ClassifierGuidance | None) -> Tensor:
        return classifier(squash(model.sample(some(16), (4, 4, 4), Sampling(steps=10), 0, range(16), guide)))

    free = scores_of(None)
    for label, side in ((0, -1), (1, 1)):
        some_pull, pull = (
            scores_of(ClassifierGuidance(classifier, torch.full((16,), label), scale)) for scale in (30.0, 100.0)
        )
        assert bool((side * some_pull > side * free).all())
        assert bool((side * pull > side * some_pull).all())
        assert bool((side * pull > 0).all())


def test_classifiers_of_something_else_are_refused(tmp_path: Path) -> None:
    codec = tiny_codec()

    def saved(name: str, config: ClassifierConfig, codec_hash: str | None) -> Path:
        weights = {f"classifier.{key}": value for key, value in PEClassifier(config).state_dict().items()}
        content = {"kind": "pe_classifier", "classifier": config.as_dict(), "codec_hash": codec_hash}
        save_checkpoint(tmp_path / name, content | {"state_dict": weights})
        return tmp_path / name

    latent = ClassifierConfig("latent", 4, (8,), ((1, 2, 2),), (1,))
    with pytest.raises(InputError, match=r"a\.ckpt: judges a volume"):
        load_guide(saved("a.ckpt", ClassifierConfig(widths=(4,), strides=((2, 2, 2),), blocks=(1,)), None), codec)
    with pytest.raises(InputError, match=r"b\.ckpt: judges latents of codec 0123"):
        load_guide(saved("b.ckpt", latent, "0123"), codec)
    guide = load_guide(saved("c.ckpt", latent, codec.content_hash), codec)
    assert not any(parameter.requires_grad for parameter in guide.parameters())
