"""How much is drawn at once, and where: memory that does not suffice, and devices that are not there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm.inference import Request, default_batch, draw
from ddpm.network import Sampling
from ddpm.patient import prepare_patient
from errors import ConfigurationError, MemoryExhaustedError
from tests.inference_model import QUICK, small_bundle
from vqgan_inference import XRay2CTPA, load_xray

pytest_plugins = ["tests.inference_api"]


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "cuda:x", ""])
def test_a_device_that_is_not_there_is_refused(device: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="auto, cpu, cuda"):
        XRay2CTPA.load_checkpoint(tmp_path / "no.ckpt", device)


def test_t43_out_of_memory_halves_the_batch_with_the_same_output(
    model: XRay2CTPA, xrays: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    patients = [prepare_patient(model.bundle, [load_xray(path)]) for path in xrays]
    request = Request(Sampling(steps=2), samples=2)
    alone = np.stack(list(draw(model.bundle, patients, request, batch=1)))
    assert alone.shape == (2, 2, 16, 16, 16)
    network, seen = model.bundle.network, []
    real = network.sample

    def limited(batch, *rest):
        seen.append(len(batch.text))
        if len(batch.text) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(batch, *rest)

    monkeypatch.setattr(network, "sample", limited)
    halved = np.stack(list(draw(model.bundle, patients, request, batch=4)))
    assert np.array_equal(halved, alone)
    assert seen == [4, 2, 1, 1, 1, 1]
    assert "out of memory" in caplog.text
    monkeypatch.undo()
    together = np.stack(list(draw(model.bundle, patients, request, batch=4)))
    assert (np.abs(together - alone) < 1).mean() > 0.98  # kernels may sum in another order, and FSQ rounds

    def nothing(*_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(network, "sample", nothing)
    with pytest.raises(MemoryExhaustedError, match="no memory for one volume"):
        list(draw(model.bundle, patients, request))


def test_t43_a_device_without_room_for_the_model_is_told(
    model: XRay2CTPA, xrays: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small_bundle(tmp_path / "final_model.ckpt")

    def full(self, *_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(model.bundle.network), "to", full)
    with pytest.raises(MemoryExhaustedError, match="cpu: no memory for the model"):
        model.generate(load_xray(xrays[0]), device="cpu", **QUICK)
    with pytest.raises(MemoryExhaustedError, match="cpu: no memory for the model"):
        XRay2CTPA.load_checkpoint(path, "cpu")


def test_t43_the_decoder_takes_smaller_tiles_before_it_gives_up(
    model: XRay2CTPA, xrays: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    xray, codec = load_xray(xrays[0]), model.bundle.codec.codec
    free = model.generate(xray, **QUICK)
    real, sizes = codec.decode, []

    def limited(code: torch.Tensor) -> torch.Tensor:
        sizes.append(code.shape[2:].numel())
        if len(sizes) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(code)

    monkeypatch.setattr(codec, "decode", limited)
    assert np.abs(model.generate(xray, **QUICK).hu.astype(int) - free.hu).max() <= 1
    monkeypatch.setattr(codec, "decode", lambda code: limited(sizes.clear() or code))
    with pytest.raises(MemoryExhaustedError):
        model.generate(xray, **QUICK)


def test_as_many_are_drawn_together_as_memory_allows(model: XRay2CTPA, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, guided = (Request(Sampling(guidance=guidance)) for guidance in (1.0, 3.0))
    assert default_batch(model.bundle, plain) == 8
    large = replace(model.bundle.config, latent_dhw=(151, 128, 128))
    monkeypatch.setattr(model.bundle.network, "config", large)  # 151·128·128 cells of 16 channels, ten maps: 1.6 GB
    assert default_batch(model.bundle, plain) == 1
    monkeypatch.setattr(model.bundle.network, "config", replace(large, latent_dhw=(30, 64, 64)))  # 79 MB
    assert default_batch(model.bundle, plain) == 8
    assert default_batch(model.bundle, guided) == 6
