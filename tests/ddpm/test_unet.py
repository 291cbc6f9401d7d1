from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddpm.conditions import Conditions
from ddpm.diffusion import OBJECTIVES, Diffusion
from ddpm.guidance import GuidedDenoiser
from ddpm.samplers import SAMPLERS, NoiseSource, time_grid
from ddpm.schedules import CosineSchedule, FlowSchedule
from ddpm.unet import UNet3D, UNetConfig
from errors import ConfigurationError, InputError
from tests.ddpm.tiny import TINY_UNET, awake_unet

ALL = replace(TINY_UNET, extra_channels=1, lifted_channels=(3, 4), token_channels=5, vector_channels=6)
SIZE = (4, 8, 8)


def conditions_for(config: UNetConfig, batch: int, size: tuple[int, int, int] = SIZE) -> Conditions:
    shapes = config.level_shapes(size)
    return Conditions(
        lifted=tuple(torch.randn(batch, c, *s) for c, s in zip(config.lifted_channels, shapes, strict=True)),
        tokens=torch.randn(batch, 7, config.token_channels),
        vector=torch.randn(batch, config.vector_channels),
        extra=torch.randn(batch, config.extra_channels, *size),
    )


def test_it_starts_at_zero() -> None:
    x, t = torch.randn(2, 2, *SIZE), torch.rand(2)
    assert not UNet3D(TINY_UNET)(x, t).any()


@given(
    size=st.tuples(*(st.integers(1, 9),) * 3), strides=st.sampled_from([((1, 2, 2), (2, 2, 2)), ((1, 1, 1), (1, 2, 2))])
)
@settings(max_examples=12, deadline=None)
def test_any_size_and_stride(size: tuple[int, int, int], strides: tuple[tuple[int, int, int], ...]) -> None:
    config = replace(ALL, strides=strides)
    x, t = torch.randn(2, 2, *size), torch.rand(2)
    with torch.no_grad():
        assert awake_unet(config)(x, t, conditions_for(config, 2, size)).shape == x.shape


def test_level_shapes_are_those_of_the_features() -> None:
    config = UNetConfig()
    assert config.level_shapes((16, 64, 64)) == ((16, 32, 32), (8, 16, 16), (4, 8, 8))
    assert config.level_shapes((15, 61, 64)) == ((16, 32, 32), (8, 16, 16), (4, 8, 8))
    net, seen = awake_unet(TINY_UNET), []
    for blocks in net.down_blocks:
        blocks[0].register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape[2:])))
    net(torch.randn(1, 2, 5, 7, 8), torch.rand(1))
    assert tuple(seen) == net.level_shapes((5, 7, 8))


def _changed(change: Callable[[Conditions], Conditions]) -> Tensor:
    net = awake_unet(ALL)
    x, t, conditions = torch.randn(2, 2, *SIZE), torch.tensor([0.3, 0.7]), conditions_for(ALL, 2)
    with torch.no_grad():
        return net(x, t, change(conditions)) - net(x, t, conditions)


@pytest.mark.parametrize("name", ["tokens", "vector", "extra", "lifted 0", "lifted 1"])
def test_every_condition_reaches_its_own_patient_only(name: str) -> None:
    def change(conditions: Conditions) -> Conditions:
        kind, _, level = name.partition(" ")
        values = getattr(conditions, kind)
        value = (values[int(level)] if level else values).clone()
        value[1] += torch.randn_like(value[1])
        if level:
            value = tuple(value if index == int(level) else other for index, other in enumerate(values))
        return replace(conditions, **{kind: value})

    difference = _changed(change)
    # bf16 never comes in here, so the other patient's result moves by rounding at most
    assert float(difference[0].abs().max()) < 1e-4
    assert float(difference[1].abs().max()) > 1e-2


def test_lifted_features_act_where_they_are() -> None:
    config = replace(TINY_UNET, attention_levels=(), lifted_channels=(3, 0))
    net, size = awake_unet(config), (4, 64, 64)
    shapes = config.level_shapes(size)
    plain = (torch.zeros(1, 3, *shapes[0]), torch.zeros(1, 0, *shapes[1]))
    marked = (plain[0].clone(), plain[1])
    marked[0][..., 2, 2] = 3.0
    x, t = torch.randn(1, 2, *size), torch.rand(1)
    with torch.no_grad():
        moved = (net(x, t, Conditions(lifted=marked)) - net(x, t, Conditions(lifted=plain))).abs()
    assert float(moved[..., 4:6, 4:6].max()) > 1e-2
    assert float(moved[..., 40:, 40:].max()) < 1e-5


def test_time_changes_the_output() -> None:
    net, x = awake_unet(TINY_UNET), torch.randn(1, 2, *SIZE)
    with torch.no_grad():
        assert float((net(x, torch.tensor([0.2])) - net(x, torch.tensor([0.8]))).abs().max()) > 1e-2


def test_attention_tells_places_apart() -> None:
    # Constant input without attention is alike far from the edges; with it every place is known.
    net = awake_unet(replace(TINY_UNET, strides=((1, 1, 1), (1, 1, 1))))
    x, t = torch.ones(1, 2, 3, 17, 17), torch.tensor([0.5])
    with torch.no_grad():
        row = net(x, t)[0, 0, 1, 8, 7:10]
    assert float((row - row[1]).abs()[[0, 2]].min()) > 1e-5


@pytest.mark.slow  # its first use imports a lot of torch
def test_checkpointing_gives_the_same_gradients() -> None:
    x, t, conditions = torch.randn(2, 2, *SIZE), torch.rand(2), conditions_for(ALL, 2)
    gradients = []
    for checkpointing in (False, True):
        net = awake_unet(replace(ALL, checkpointing=checkpointing))
        net(x, t, conditions).square().mean().backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None
        torch.testing.assert_close(plain, recomputed)
    net.set_checkpointing(False)
    assert not net.checkpointing


def test_every_parameter_is_trained() -> None:
    net = awake_unet(ALL)
    net(torch.randn(2, 2, *SIZE), torch.rand(2), conditions_for(ALL, 2)).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_bf16_stays_near_float32_and_channels_last() -> None:
    net, x, t = awake_unet(ALL), torch.randn(2, 2, *SIZE), torch.rand(2)
    conditions = conditions_for(ALL, 2)
    with torch.no_grad():
        exact = net(x, t, conditions)
        with torch.autocast("cpu", torch.bfloat16):
            rough = net(x, t, conditions)
    assert rough.dtype == torch.bfloat16
    assert float((rough - exact).norm() / exact.norm()) < 0.03
    assert exact.is_contiguous(memory_format=torch.channels_last_3d)


def test_settings_travel_as_plain_numbers() -> None:
    assert UNetConfig.from_dict(ALL.as_dict()) == ALL
    as_lists = {key: [*value] if isinstance(value, tuple) else value for key, value in ALL.as_dict().items()}
    assert UNetConfig.from_dict(as_lists) == ALL


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"widths": (16,)}, "one entry for each level"),
        ({"strides": ((1, 2, 2), (2, 0, 2))}, "no stride"),
        ({"lifted_channels": (1,)}, "1 entries for 2 levels"),
        ({"attention_levels": (2,)}, "no level 2"),
        ({"heads": 5}, "heads=5 does not divide the 32 channels of level 1"),
        ({"attention_levels": (), "token_channels": 4}, "token_channels needs a level"),
    ],
)
def test_wrong_settings_are_refused(settings_: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        replace(TINY_UNET, **settings_)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="wdiths"):
        UNetConfig.from_dict({"wdiths": (1,)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": None}, "tokens has 0 channels: 5 are expected"),
        ({"vector": torch.zeros(2, 9)}, "vector has 9 channels: 6"),
        ({"extra": None}, "extra has 0"),
        ({"lifted": None}, "level 0"),
        ({"lifted": (torch.zeros(2, 3, 4, 4, 4),)}, "for 1 levels: 2 are expected"),
        ({"lifted": (torch.zeros(2, 3, 4, 4, 4), torch.zeros(2, 4, 1, 1, 1))}, r"level 1 are \[4, 1, 1, 1\]"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(change: dict[str, object], words: str) -> None:
    conditions = replace(conditions_for(ALL, 2), **change)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=words):
        awake_unet(ALL)(torch.zeros(2, 2, *SIZE), torch.rand(2), conditions)


@pytest.mark.parametrize("kind", ["tokens", "vector", "extra", "lifted"])
def test_conditions_that_nobody_asked_for_are_refused(kind: str) -> None:
    given_ = getattr(conditions_for(ALL, 2), kind)
    with pytest.raises(InputError):
        awake_unet(TINY_UNET)(torch.zeros(2, 2, *SIZE), torch.rand(2), Conditions(**{kind: given_}))


@pytest.mark.parametrize(
    ("x", "t"), [(torch.zeros(2, 3, *SIZE), torch.rand(2)), (torch.zeros(2, 2, *SIZE), torch.rand(1))]
)
def test_latents_that_do_not_fit_are_refused(x: Tensor, t: Tensor) -> None:
    with pytest.raises(InputError, match="latent"):
        awake_unet(TINY_UNET)(x, t)


# --- does it learn? ---------------------------------------------------------------------------------------------------


def toy_batch(kind: str, count: int, generator: torch.Generator) -> tuple[Tensor, Conditions, Conditions]:
    """Latents that are what the condition says and a little noise; the condition; the same without what it says.

    Vector and tokens tell the level of the whole latent; lifted features tell it for each column along H, as an X-ray.
    """
    if kind == "lifted":
        level = torch.randint(0, 2, (count, 1, 4, 1, 4), generator=generator).float() * 2 - 1  # (D, W) of level 0
        map_ = level.expand(count, 1, 4, 4, 4)
        mean = level.repeat_interleave(2, 4).expand(count, 1, 4, 8, 8)
        features = (map_, map_[:, :0, ::2, ::2, ::2])
        given_, null = Conditions(lifted=features), Conditions(lifted=tuple(torch.zeros_like(f) for f in features))
    else:
        level = torch.randint(0, 2, (count, 1), generator=generator).float() * 2 - 1
        mean = level[:, :, None, None, None].expand(count, 1, *SIZE)
        value = level if kind == "vector" else level[:, None].expand(count, 3, 1)
        value = value.repeat(1, 1, 4) if kind == "tokens" else value.repeat(1, 4)
        if kind == "tokens":  # LayerNorm takes away what all channels share
            value = value * torch.tensor([1.0, -1.0, 0.5, -0.5])
        given_, null = Conditions(**{kind: value}), Conditions(**{kind: torch.zeros_like(value)})
    x0 = mean.repeat(1, 2, 1, 1, 1) + 0.2 * torch.randn(count, 2, *SIZE, generator=generator)
    return x0, given_, null


KINDS = {
    "vector": {"vector_channels": 4},
    "tokens": {"token_channels": 4},
    "lifted": {"lifted_channels": (1, 0)},
}


def train(diffusion: Diffusion, kind: str, steps: int) -> tuple[UNet3D, float, float]:
    torch.manual_seed(0)
    net = UNet3D(replace(TINY_UNET, **KINDS[kind]))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    history = []
    for step in range(steps):
        x0, conditions, null = toy_batch(kind, 16, generator)
        dropped = null if step % 8 == 7 else conditions
        noise = torch.randn(x0.shape, generator=generator)
        t = diffusion.sample_times(16, generator)
        loss = diffusion.losses(lambda x, t, c=dropped: net(x, t, c), x0, noise, t).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    return net, sum(history[:5]) / 5, sum(history[-20:]) / 20


def check_learning(diffusion: Diffusion, kind: str, steps: int = 200) -> None:
    net, first, last = train(diffusion, kind, steps)
    assert last < 0.5 * first, (first, last)
    x0, conditions, null = toy_batch(kind, 32, torch.Generator().manual_seed(1))
    rng = NoiseSource(0, range(32))
    with torch.no_grad():
        for scale, least in ((1.0, 0.3), (2.0, 0.6)):  # a short training is weak, and guidance makes up for it
            ends = (torch.tensor(-2.0), torch.tensor(2.0))  # as `LatentDiffusion.sample` has them for its latents
            denoise = GuidedDenoiser(net, diffusion, conditions, null, scale, x0_range=ends)
            noise = NoiseSource(0, range(32)).normal(x0.shape[1:])
            times = time_grid(10, diffusion.schedule)
            x = SAMPLERS["dpm_solver_pp_2m"](denoise, noise, times, diffusion, rng)
            agreement = torch.corrcoef(torch.stack([x.flatten(), x0.flatten()]))[0, 1]
            assert float(agreement) > least, (scale, float(agreement))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_from_every_kind_of_condition(kind: str) -> None:
    check_learning(Diffusion(weighting="min_snr"), kind)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_it_learns_with_every_objective(objective: str) -> None:
    if objective == "flow":
        check_learning(Diffusion(FlowSchedule(), "flow", "none", time_sampling="logit_normal"), "lifted")
    else:
        check_learning(Diffusion(CosineSchedule(), objective), "lifted")
