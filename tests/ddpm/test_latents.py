"""Latents: a codec that stays frozen, codes that survive storing, statistics in one place, refusals in one line."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dataset.intensity import HUWindow
from errors import ConfigurationError, InputError
from tests.ddpm.tiny import saved_codec, tiny_codec
from vq_gan_3d.latent_files import open_latent, write_latent
from vq_gan_3d.latents import FrozenCodec, LatentScaler, LatentStatistics, unsquash
from vq_gan_3d.quantizer import squash

AFFINE = np.diag([-2.0, -3.0, 4.0, 1.0])


def volume(seed: int, shape: tuple[int, int, int] = (16, 16, 16)) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)


def test_a_frozen_codec_is_no_part_of_the_module_that_holds_it():
    codec = tiny_codec()
    before = {name: value.clone() for name, value in codec.codec.state_dict().items()}

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codec = codec
            self.own = nn.Linear(1, 1)

    holder = Holder().train()
    assert set(holder.state_dict()) == {"own.weight", "own.bias"}
    assert not codec.codec.training
    assert not any(module.training for module in codec.codec.modules())
    assert not any(p.requires_grad for p in codec.codec.parameters())
    assert not codec.encode(volume(0)).requires_grad
    assert copy.deepcopy(holder).codec is codec
    codec.decode(codec.encode(volume(0))[None])
    assert all(torch.equal(value, before[name]) for name, value in codec.codec.state_dict().items())


def test_the_hash_is_of_the_content(tmp_path: Path):
    codec = tiny_codec()
    assert FrozenCodec.load(saved_codec(tmp_path)).content_hash == codec.content_hash
    assert tiny_codec(1).content_hash != codec.content_hash
    assert tiny_codec(window=HUWindow(-1024, 1000)).content_hash != codec.content_hash
    codec.codec.decoder.head.bias.data[0] += 1e-6
    assert FrozenCodec(codec.codec, codec.window).content_hash != tiny_codec().content_hash


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-4, 4), min_size=1, max_size=20))
def test_unsquash_is_the_inverse(values: list[float]):
    z = torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(unsquash(squash(z)), z, rtol=1e-6, atol=1e-6)
    assert bool(unsquash(torch.tensor([-5.0, 1.0, 5.0])).isfinite().all())


def test_the_scaler_standardises_and_comes_back():
    code = (torch.randn(4, 8, 8, 8) * 1.5).clamp(-4, 4)  # far tails come back as the outermost code
    squashed = squash(code).flatten(1)
    statistics = LatentStatistics(tuple(squashed.mean(1).tolist()), tuple(squashed.std(1).tolist()))
    scaler = LatentScaler(statistics)
    latent = scaler.to_latent(code)
    assert latent.flatten(1).mean(1).abs().max() < 1e-5
    assert (latent.flatten(1).std(1) - 1).abs().max() < 1e-5
    torch.testing.assert_close(scaler.to_code(latent), code, rtol=1e-3, atol=1e-3)
    assert LatentStatistics.from_dict(statistics.as_dict()) == statistics
    assert set(scaler.state_dict()) == {"mean", "std"}
    assert not list(scaler.parameters())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_stored_latents_decode_to_the_same_volume(tmp_path: Path, dtype: str):
    codec = tiny_codec()
    hu = volume(1)
    code = codec.encode(hu)
    with torch.no_grad():
        whole = codec.codec.encode(codec.window.to_unit(torch.from_numpy(hu))[None, None])[0]
    torch.testing.assert_close(code, whole, rtol=1e-4, atol=1e-4)
    write_latent(tmp_path / "a.safetensors", code, codec, AFFINE, hu.shape, source={"name": "a"}, dtype=dtype)
    latent = open_latent(tmp_path / "a.safetensors").verify().require(codec)
    assert latent.shape == (4, 4, 4, 4)
    assert latent.shape_dhw == (16, 16, 16)
    assert np.array_equal(latent.affine, AFFINE)
    torch.testing.assert_close(latent.code(), code, rtol=1e-2 if dtype == "bfloat16" else 1e-3, atol=1e-3)
    quantize = codec.codec.quantizer
    same = (quantize(latent.code()[None]).indices == quantize(code[None]).indices).float().mean()
    assert same > (0.95 if dtype == "bfloat16" else 0.99)  # a value at the border of two bins may change sides
    assert torch.equal(latent.code((1, 0, 2), (2, 3, 2)), latent.code()[:, 1:3, 0:3, 2:4])


def test_statistics_are_those_of_all_cells(tmp_path: Path):
    codec = tiny_codec()
    files = []
    for number in range(3):
        hu = volume(number, (16, 16, 16 + 4 * number))
        path = tmp_path / f"{number}.safetensors"
        files.append(write_latent(path, codec.encode(hu), codec, AFFINE, hu.shape, source={"name": str(number)}))
    cells = torch.cat([squash(file.code().double()).flatten(1) for file in files], dim=1)
    statistics = LatentStatistics.of(files)
    torch.testing.assert_close(torch.tensor(statistics.mean).double(), cells.mean(1), rtol=1e-6, atol=1e-6)
    expected = cells.std(1, correction=0)
    torch.testing.assert_close(torch.tensor(statistics.std).double(), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(InputError, match="no latents"):
        LatentStatistics.of([])


def test_the_same_latent_is_the_same_file(tmp_path: Path):
    codec = tiny_codec()
    code = codec.encode(volume(2))
    for name in ("a", "b"):
        write_latent(tmp_path / name, code, codec, AFFINE, (16, 16, 16), source={"name": "x", "grid": None, "z": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_t06_t07_damaged_latents_are_refused(tmp_path: Path):
    codec = tiny_codec()
    path = tmp_path / "a.safetensors"
    write_latent(path, codec.encode(volume(3)), codec, AFFINE, (16, 16, 16), source={"name": "a"})
    sound = path.read_bytes()
    for sixteenth in range(16):
        path.write_bytes(sound[: len(sound) * sixteenth // 16])
        with pytest.raises(InputError, match=str(path)):
            open_latent(path).verify()
    for place in range(0, len(sound), 97):
        damaged = bytearray(sound)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(InputError) as caught:
            open_latent(path).verify().require(codec)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_latents_of_another_codec_or_window_are_refused(tmp_path: Path):
    codec = tiny_codec()
    path = tmp_path / "a.safetensors"
    latent = write_latent(path, codec.encode(volume(3)), codec, AFFINE, (16, 16, 16), source={"name": "a"})
    with pytest.raises(InputError, match="another codec"):
        latent.require(tiny_codec(1))
    with pytest.raises(InputError, match=r"window \[-1000.0, 1000.0\], the codec has \[-1024"):
        latent.require(tiny_codec(window=HUWindow(-1024, 1000)))
    with pytest.raises(ConfigurationError, match="float16 or bfloat16"):
        write_latent(path, latent.code(), codec, AFFINE, (16, 16, 16), source={}, dtype="float32")
    with pytest.raises(InputError, match="not finite"):
        write_latent(path, latent.code() * torch.nan, codec, AFFINE, (16, 16, 16), source={"name": "a"})
    assert open_latent(path).verify().meta == latent.meta  # as it was
