"""Generation: deterministic by seed, the same in any batch, refused with another codec, and without Lightning."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ddpm.conditions import ConditionBatch
from ddpm.generate import Generator, load_ddpm
from ddpm.latent_dataset import condition_batch
from ddpm.network import LatentDiffusion
from errors import ConfigurationError, InputError
from tests.ddpm.test_training import batch_of, network
from tests.ddpm.tiny import saved_codec, tiny_codec
from tests.helpers import ROOT, environment
from vq_gan_3d.checkpointing import save_checkpoint
from vq_gan_3d.latents import LatentStatistics


def trained() -> LatentDiffusion:
    """Not trained, but with an output that is not zero."""
    model = network(
        codec_hash=tiny_codec().content_hash, statistics=LatentStatistics((0.0, 0.1, -0.1, 0.0), (0.5,) * 4)
    )
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
        )
    return model


def save(path: Path, model: LatentDiffusion) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {f"network.{name}": value for name, value in model.state_dict().items()}
    save_checkpoint(path, {"kind": "ddpm", "ddpm": model.config.as_dict(), "state_dict": state})


def conditions(count: int) -> ConditionBatch:
    return condition_batch(batch_of(count))


@pytest.fixture(scope="module")
def generator() -> Generator:
    torch.set_num_threads(1)
    return Generator(trained(), tiny_codec())


def part(batch: ConditionBatch, rows: list[int]) -> ConditionBatch:
    tensors = {name: value[rows] for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return replace(batch, **tensors, text=tuple(batch.text[row] for row in rows))


@pytest.mark.parametrize("sampler", ["ddpm", "dpm_solver_pp_2m"])
def test_a_sample_depends_on_its_seed_and_index_alone(generator: Generator, sampler: str):
    batch = conditions(3)
    options = {"steps": 3, "sampler": sampler, "guidance": 2.0, "rescale": 0.5, "samples": 2}
    whole = generator.generate(batch, (16, 16, 16), **options)
    assert whole.shape == (3, 2, 16, 16, 16)
    assert whole.dtype == torch.float32
    assert -1000 <= whole.min() < whole.max() <= 1000
    assert torch.equal(whole, generator.generate(batch, (16, 16, 16), **options))
    # alone and in another order; FSQ may round a value at the border of two bins to either side
    for row in (2, 0):
        alone = generator.generate(part(batch, [row]), (16, 16, 16), indices=[row], **options)[0]
        assert ((alone - whole[row]).abs() < 1.0).float().mean() > 0.98
    single = generator.generate(batch, (16, 16, 16), **(options | {"samples": 1}))
    assert ((single[:, 0] - whole[:, 0]).abs() < 1.0).float().mean() > 0.98
    assert (whole[:, 0] - whole[:, 1]).abs().mean() > 1
    other = generator.generate(batch, (16, 16, 16), seed=1, **options)
    assert (other - whole).abs().mean() > 1


def test_the_xray_and_guidance_change_the_volume(generator: Generator):
    batch = conditions(2)
    plain = generator.generate(batch, (16, 16, 16), steps=3)
    assert not torch.equal(plain, generator.generate(replace(batch, xray=1 - batch.xray), (16, 16, 16), steps=3))
    assert not torch.equal(plain, generator.generate(batch, (16, 16, 16), steps=3, guidance=3.0))


def test_volumes_are_cropped_to_their_own_size(generator: Generator):
    batch = conditions(1)
    whole = generator.generate(batch, (16, 16, 16), steps=2)
    assert torch.equal(generator.generate(batch, (14, 15, 13), steps=2), whole[..., :14, :15, :13])


def test_bad_requests_are_refused(generator: Generator):
    batch = conditions(2)
    with pytest.raises(InputError, match="rays on a grid"):
        generator.generate(batch, (32, 16, 16))
    with pytest.raises(ConfigurationError, match="magic"):
        generator.generate(batch, (16, 16, 16), sampler="magic")
    with pytest.raises(ConfigurationError, match="indices"):
        generator.generate(batch, (16, 16, 16), indices=[1])
    with pytest.raises(ConfigurationError, match="steps"):
        generator.generate(batch, (16, 16, 16), steps=0)


def test_checkpoints_load_with_their_codec_and_no_other(tmp_path: Path):
    path = tmp_path / "run/checkpoints/final.ckpt"
    model = trained()
    save(path, model)
    own, other = saved_codec(tmp_path), saved_codec(tmp_path, 1)
    with pytest.raises(InputError, match=r"codec\.ckpt: not there"):
        load_ddpm(path)
    with pytest.raises(InputError, match="latents of codec"):
        load_ddpm(path, other)
    with pytest.raises(InputError, match="no checkpoint of a diffusion model"):
        load_ddpm(own, own)
    loaded = load_ddpm(path, own)
    (tmp_path / "run/codec.ckpt").write_bytes(own.read_bytes())
    volumes = [g.generate(conditions(1), (16, 16, 16), steps=2) for g in (loaded, load_ddpm(path))]
    assert torch.equal(*volumes)
    assert not any(p.requires_grad for p in loaded.network.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.network.state_dict().values(),
                                                 strict=True))  # fmt: skip


def test_generation_needs_no_lightning(tmp_path: Path):
    code = "import sys, ddpm.generate; print(*sorted({n.partition('.')[0] for n in sys.modules}))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    loaded = set(result.stdout.split())
    assert "torch" in loaded
    assert loaded.isdisjoint({"pytorch_lightning", "lightning_fabric", "hydra", "torchvision", "torchmetrics", "monai"})
