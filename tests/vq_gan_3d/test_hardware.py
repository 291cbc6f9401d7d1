"""The ``hardware`` group, resolved against machines that we pretend to have."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from errors import ConfigurationError
from tests.helpers import ROOT
from vq_gan_3d import hardware
from vq_gan_3d.hardware import resolve_hardware


def config(**values):
    return OmegaConf.merge(OmegaConf.load(ROOT / "config/hardware/default.yaml"), values)


@pytest.fixture(params=[0, 1, 4])
def gpus(request, monkeypatch):
    return pretend(monkeypatch, request.param)


def pretend(monkeypatch, count, bf16=True):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)
    return count


def test_auto_takes_what_is_there(gpus):
    found = resolve_hardware(config())
    assert found.accelerator == ("cuda" if gpus else "cpu")
    assert found.devices == (list(range(gpus)) if gpus else 1)
    assert found.world_size == max(1, gpus)


def test_named_devices(monkeypatch):
    pretend(monkeypatch, 4)
    assert resolve_hardware(config(device="cpu")).accelerator == "cpu"
    assert resolve_hardware(config(device="cpu", processes=2)).world_size == 2
    assert resolve_hardware(config(device="cuda")).devices == [0, 1, 2, 3]
    assert resolve_hardware(config(device="cuda:2")).devices == [2]
    assert resolve_hardware(config(device=[0, 3])).devices == [0, 3]
    assert resolve_hardware(config(device=[0, 3], num_nodes=2)).world_size == 4


@pytest.mark.parametrize("device", ["cuda", "cuda:1", [0, 1]])
def test_missing_devices_are_named(monkeypatch, device):
    pretend(monkeypatch, 0 if device == "cuda" else 1)
    with pytest.raises(ConfigurationError) as caught:
        resolve_hardware(config(device=device))
    assert "hardware.device" in str(caught.value)
    assert "auto or cpu" in str(caught.value)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda:-1", "tpu", 1])
def test_unknown_devices_are_refused(monkeypatch, device):
    pretend(monkeypatch, 1)
    with pytest.raises(ConfigurationError, match="use auto, cpu, cuda, cuda:N or"):
        resolve_hardware(config(device=device))


@pytest.mark.parametrize(("value", "bf16"), [("bf16", True), ("off", False), (True, True), (False, False)])
def test_precision(value, bf16):
    found = resolve_hardware(config(device="cpu", mixed_precision=value))
    assert found.bf16 is bf16
    assert found.trainer_arguments()["precision"] == ("bf16-mixed" if bf16 else "32-true")


@pytest.mark.parametrize("able", [True, False])
def test_auto_precision_follows_the_machine(monkeypatch, able):
    monkeypatch.setattr(hardware, "_has_bf16", lambda accelerator: able)
    assert resolve_hardware(config(device="cpu")).bf16 is able


def test_unknown_precision_is_refused():
    with pytest.raises(ConfigurationError, match=r"hardware\.mixed_precision='fp16'"):
        resolve_hardware(config(device="cpu", mixed_precision="fp16"))


def test_strategy_only_where_several_train():
    assert resolve_hardware(config(device="cpu")).trainer_arguments()["strategy"] == "auto"
    several = resolve_hardware(config(device="cpu", processes=2))
    assert several.trainer_arguments()["strategy"] == "ddp"
    assert several.trainer_arguments(unused_parameters=True)["strategy"] == "ddp_find_unused_parameters_true"
    assert several.trainer_arguments()["devices"] == 2
