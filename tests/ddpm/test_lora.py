from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddpm.lora import (
    LoraConfig,
    adapter_state_dict,
    inject_lora,
    load_adapter_state_dict,
    lora_layers,
    lora_parameters,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from ddpm.lora_file import base_digest, load_adapter, save_adapter
from ddpm.unet import UNet3D
from errors import ConfigurationError, InputError
from tests.ddpm.tiny import TINY_UNET, awake_unet

LORA = LoraConfig(rank=4, alpha=8.0)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 2, 4, 8, 8, generator=generator), torch.rand(4, generator=generator)


def state_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def fine_tune(net: UNet3D, steps: int = 30) -> list[float]:
    """Fit another target; the optimizer gets everything, so that only freezing keeps weights from moving."""
    x, t = batch()
    target = torch.roll(x, 1, dims=1)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(steps):
        loss = (net(x, t) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_adapters_change_nothing_at_the_start() -> None:
    net = awake_unet()
    before = net(*batch())
    names = inject_lora(net, LORA)
    assert len(names) == 4 * 2 + 2 * 3  # both convolutions of four residual blocks, three layers of two attentions
    assert torch.equal(net(*batch()), before)


def test_only_adapters_move_and_the_loss_falls() -> None:
    net = awake_unet()
    names = inject_lora(net, LORA)
    before = state_of(net)
    losses = fine_tune(net)
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"{name}.{part}.weight" for name in names for part in ("a", "b")}
    assert len(moved) == 2 * len(names) == len(lora_parameters(net)) == 28
    assert losses[-1] < 0.7 * losses[0]
    assert all(parameter.grad is None for name, parameter in net.named_parameters() if name not in moved)


def test_adapters_are_few_numbers() -> None:
    net = awake_unet()
    total = sum(p.numel() for p in net.parameters())
    inject_lora(net, LoraConfig(rank=1))
    assert sum(p.numel() for p in lora_parameters(net)) < 0.1 * total


def test_merged_equals_unmerged_and_unmerging_restores_every_bit() -> None:
    net = awake_unet()
    inject_lora(net, LORA)
    fine_tune(net)
    before, beside = state_of(net), net(*batch())
    merge_lora(net)
    changed = [name for name, value in net.state_dict().items() if not torch.equal(value, before[name])]
    assert len(changed) == len(list(lora_layers(net)))
    torch.testing.assert_close(net(*batch()), beside, atol=1e-4, rtol=1e-4)
    merge_lora(net)  # twice is once
    unmerge_lora(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(net(*batch()), beside)


@pytest.mark.parametrize("merged", [False, True])
def test_removing_gives_the_model_back(merged: bool) -> None:
    net = awake_unet()
    before = state_of(net)
    inject_lora(net, LORA)
    fine_tune(net, 5)
    if merged:
        merge_lora(net)
    remove_lora(net)
    after = net.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_removing_can_keep_the_update() -> None:
    net = awake_unet()
    inject_lora(net, LORA)
    fine_tune(net, 5)
    adapted = net(*batch())
    remove_lora(net, keep_update=True)
    assert not list(lora_layers(net))
    torch.testing.assert_close(net(*batch()), adapted, atol=1e-4, rtol=1e-4)


def test_the_update_is_scaled_by_alpha_over_rank() -> None:
    layer = nn.Sequential(nn.Linear(3, 2, bias=False))
    inject_lora(layer, LoraConfig(rank=2, alpha=6.0, targets=("0",)))
    _, adapter = next(lora_layers(layer))
    with torch.no_grad():
        adapter.b.weight.fill_(1.0)
        x = torch.randn(5, 3)
        expected = adapter.base(x) + 3.0 * adapter.a(x).sum(1, keepdim=True)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_of_any_stride_merge(stride: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(3, 5, (1, 3, 3), stride=stride, padding=(0, 1, 1)))
    inject_lora(net, LoraConfig(rank=2, targets=("*",)))
    for parameter in lora_parameters(net):
        nn.init.normal_(parameter)
    x = torch.randn(2, 3, 4, 6, 6)
    beside = net(x)
    merge_lora(net)
    torch.testing.assert_close(net(x), beside, atol=1e-4, rtol=1e-4)


def test_a_saved_adapter_is_all_that_is_needed(tmp_path: Path) -> None:
    net, path = awake_unet(), tmp_path / "adapter.safetensors"
    base = state_of(net)
    inject_lora(net, LORA)
    fine_tune(net)
    adapted = net(*batch())
    merge_lora(net)  # what is saved does not depend on it
    save_adapter(path, net)
    with safe_open(path, "pt") as file:
        names = set(file.keys())
    assert names == {f"{name}.{part}" for name, _ in lora_layers(net) for part in ("a", "b")}
    other = UNet3D(TINY_UNET)
    other.load_state_dict(base)
    config = load_adapter(path, other)
    assert (config.rank, config.alpha) == (LORA.rank, LORA.alpha)
    assert torch.equal(other(*batch()), adapted)
    assert sum(p.requires_grad for p in other.parameters()) == 28


def test_the_digest_of_the_base_ignores_adapters() -> None:
    net = awake_unet()
    before = base_digest(net)
    inject_lora(net, LORA)
    fine_tune(net, 2)
    assert base_digest(net) == before
    merge_lora(net)
    assert base_digest(net) == before
    assert base_digest(awake_unet(seed=1)) != before


def saved(folder: Path) -> Path:
    net, path = awake_unet(), folder / "adapter.safetensors"
    inject_lora(net, LORA)
    fine_tune(net, 2)
    save_adapter(path, net)
    return path


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"adapter\.safetensors: the adapter belongs to another model"):
        load_adapter(saved(tmp_path), awake_unet(seed=1))


def test_t06_truncated_adapters_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    content = path.read_bytes()
    for sixteenth in range(16):
        path.write_bytes(content[: len(content) * sixteenth // 16])
        net = awake_unet()
        with pytest.raises(InputError, match=r"adapter\.safetensors: "):
            load_adapter(path, net)
        assert not list(lora_layers(net))


def test_t07_flipped_bits_are_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path)
    content, net = path.read_bytes(), awake_unet()
    for place in (4, 100, len(content) // 2, len(content) - 1):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"adapter\.safetensors: "):
            load_adapter(path, net)
        assert not list(lora_layers(net))


def test_t38_a_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    canary = tmp_path / "executed"

    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return Path.touch, (canary,)

    path = tmp_path / "adapter.safetensors"
    torch.save({"a": Hostile()}, path)
    with pytest.raises(InputError, match=r"adapter\.safetensors: no readable safetensors file"):
        load_adapter(path, awake_unet())
    assert not canary.exists()


def test_other_safetensors_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(InputError, match=r"other\.safetensors: not a LoRA adapter"):
        load_adapter(path, awake_unet())
    with pytest.raises(InputError, match=r"missing\.safetensors"):
        load_adapter(tmp_path / "missing.safetensors", awake_unet())


def test_metadata_that_lie_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with safe_open(path, "pt") as file:
        about = file.metadata()
    for config in ("{}", '{"rank": 3}', '{"rank": "x"}', "[", '{"evil": 1}'):
        save_file(load_file(path), path, metadata={**about, "config": config})
        net = awake_unet()
        with pytest.raises(InputError, match="damaged adapter"):
            load_adapter(path, net)
        assert not list(lora_layers(net))


def test_wrong_settings_are_refused(tmp_path: Path) -> None:
    net = awake_unet()
    with pytest.raises(ConfigurationError, match="no adapters to save"):
        save_adapter(tmp_path / "x", net)
    with pytest.raises(ConfigurationError, match="matches 'attn'"):
        inject_lora(net, LoraConfig(targets=("*out", "attn")))
    assert all(p.requires_grad for p in net.parameters())
    with pytest.raises(ConfigurationError, match="rank=0"):
        LoraConfig(rank=0)
    with pytest.raises(ConfigurationError, match="rnk"):
        LoraConfig.from_dict({"rnk": 1})
    assert LoraConfig.from_dict(LORA.as_dict()) == LORA
    inject_lora(net, LORA)
    with pytest.raises(ConfigurationError, match="has adapters already"):
        inject_lora(net, LORA)
    state = adapter_state_dict(net)
    first = next(iter(state))
    with pytest.raises(ConfigurationError, match="1 tensor"):
        load_adapter_state_dict(net, {**state, first: torch.zeros(1)})
    merge_lora(net)
    with pytest.raises(ConfigurationError, match="merged"):
        load_adapter_state_dict(net, state)
