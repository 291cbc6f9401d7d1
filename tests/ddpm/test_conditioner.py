"""What the U-Net is told: dropping is exact, every option trains and changes the output, lifting follows the rays."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddpm.conditioner import TOKEN_GRID, Conditioner, Keep
from ddpm.conditioner_config import ConditionerConfig
from ddpm.conditions import UNKNOWN_LABEL, ConditionBatch, Conditions
from errors import ConfigurationError

STRIDES = ((1, 1, 1), (1, 2, 2), (2, 2, 2))
LATENT = (4, 8, 8)
CONFIG = ConditionerConfig(
    xray_size=32, widths=(4, 8, 16), lifted_channels=(6, 8, 8), token_channels=8, vector_channels=12
)
EVERYTHING = replace(CONFIG, views=("frontal", "lateral"), text="bytes", label=True)


def axis_grid(b=2, v=1, shape=LATENT):
    """Cells seen along the axis: x along w in the first view, along h in the second; y against d."""
    d, h, w = (torch.linspace(-1, 1, 2 * n + 1)[1::2] for n in shape)
    planes = []
    for view in range(v):
        y, front, side = torch.meshgrid(-d, h, w, indexing="ij")
        planes.append(torch.stack([side if view == 0 else front, y], dim=-1))
    return torch.stack(planes)[None].expand(b, -1, -1, -1, -1, -1).contiguous()


def batch_of(b=2, v=1, size=32, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    batch = ConditionBatch(
        torch.rand(b, v, 1, size, size, generator=generator),
        torch.ones(b, v, dtype=torch.bool),
        axis_grid(b, v),
        torch.arange(b) % 2,
        tuple(f"report {i}: embolus in segment {i}" for i in range(b)),
        torch.rand(b, 3, *LATENT, generator=generator),
    )
    return replace(batch, **changes)


def outputs(conditions: Conditions):
    return [*(conditions.lifted or ()), conditions.tokens, conditions.vector, conditions.extra]


def keep_of(b=2, xray=True, text=True, label=True):
    return Keep(*(torch.full((b,), value) for value in (xray, text, label)))


def test_shapes_are_what_the_unet_is_told():
    from ddpm.unet import UNet3D, UNetConfig

    conditioner = Conditioner(EVERYTHING, STRIDES, LATENT)
    told = conditioner(batch_of(v=2))
    assert [tuple(x.shape[1:]) for x in told.lifted] == [(6, 4, 8, 8), (8, 4, 4, 4), (8, 2, 2, 2)]
    assert told.tokens.shape == (2, 2 * TOKEN_GRID**2 + 16, 8)
    assert told.vector.shape == (2, 12)
    unet = UNet3D(
        UNetConfig(
            in_channels=2,
            out_channels=2,
            extra_channels=3,
            widths=(8, 16, 16),
            strides=STRIDES,
            blocks=(1, 1, 1),
            attention_levels=(2,),
            heads=2,
            **EVERYTHING.unet_arguments(3),
        )
    )
    assert unet(torch.zeros(2, 2, *LATENT), torch.tensor([0.1, 0.9]), told).shape == (2, 2, *LATENT)


def test_a_latent_that_is_padded_by_the_unet_has_the_same_levels():
    from ddpm.unet import UNetConfig

    conditioner = Conditioner(CONFIG, STRIDES, (5, 7, 6))
    batch = batch_of(ray_grid=axis_grid(shape=(5, 7, 6)))
    widths = UNetConfig(in_channels=1, out_channels=1, widths=(8, 8, 8), strides=STRIDES, blocks=(1, 1, 1))
    assert [tuple(x.shape[2:]) for x in conditioner(batch).lifted] == list(widths.level_shapes((5, 7, 6)))


@pytest.mark.parametrize("view", [0, 1])
def test_the_xray_is_lifted_onto_exactly_the_cells_on_the_ray(view):
    """One bright column of the picture changes the cells behind it, all along the ray, and no others."""
    config = replace(EVERYTHING, text="none", cross_attention=False, pooled=False)
    conditioner = Conditioner(config, STRIDES, LATENT)
    plain = batch_of(v=2)
    conditioner.encoder = PixelPyramid()
    conditioner.lifters = nn.ModuleList(nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(2)) for _ in range(3))
    spot = plain.xray.clone()
    spot[:, view, :, 8:12, 20:24] += 1  # the cell d = 4 - 1 - 1 (rows run down), and w or h = 5
    changed = [
        b - a for a, b in zip(conditioner(plain).lifted, conditioner(replace(plain, xray=spot)).lifted, strict=True)
    ]
    touched = changed[0].abs().amax(dim=(0, 1)) > 1e-6  # (d, h, w)
    expected = torch.zeros(LATENT, dtype=torch.bool)
    if view == 0:
        expected[2, :, 5] = True
    else:
        expected[2, 5, :] = True
    assert torch.equal(touched, expected)
    # along the ray it is the same everywhere
    along = changed[0][0, :, 2, :, 5] if view == 0 else changed[0][0, :, 2, 5, :]
    assert torch.allclose(along, along[:, :1].expand_as(along), atol=1e-6)


class PixelPyramid(nn.Module):
    """Mean brightness at 1/2 of the resolution, and at coarser ones: features whose place is beyond doubt."""

    def forward(self, xray, view):
        maps = [F.avg_pool2d(xray, 2 * 2**scale).expand(-1, 4, -1, -1) for scale in range(3)]
        return maps


def test_cells_outside_the_picture_get_nothing_and_say_so():
    conditioner = Conditioner(replace(CONFIG, label=False), STRIDES, LATENT)
    grid = axis_grid()
    grid[..., 0] *= 2  # the picture shows the middle half of the width
    lifted = conditioner(batch_of(ray_grid=grid)).lifted[0]
    inside = torch.zeros(8, dtype=torch.bool)
    inside[2:6] = True
    assert torch.equal(lifted[:, -1].bool(), inside.expand(2, 4, 8, 8))
    assert (lifted[..., ~inside] == 0).all()
    assert (lifted[..., inside].abs().sum(dim=1) > 1).all()


def test_a_dropped_xray_cannot_reach_the_output():
    torch.manual_seed(0)
    conditioner = Conditioner(EVERYTHING, STRIDES, LATENT)
    one, other = batch_of(v=2, seed=1), batch_of(v=2, seed=2)
    other = replace(other, ray_grid=other.ray_grid * 0.7, extra=one.extra)
    drop = keep_of(xray=False)
    for a, b in zip(outputs(conditioner(one, drop)), outputs(conditioner(other, drop)), strict=True):
        assert torch.equal(a, b)
    # it is what a patient without an X-ray has, whatever lies in the pixels, NaN included
    absent = replace(one, xray=torch.full_like(one.xray, torch.nan), xray_present=torch.zeros(2, 2, dtype=torch.bool))
    for a, b in zip(outputs(conditioner(one, drop)), outputs(conditioner(absent)), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(outputs(conditioner(one))[:-1], outputs(conditioner(other))[:-1], strict=True):
        assert not torch.equal(a, b)


def test_dropping_is_by_patient_and_by_condition():
    conditioner = Conditioner(EVERYTHING, STRIDES, LATENT)
    batch = batch_of(b=3, v=2)
    full, null = conditioner(batch), conditioner.null(batch)
    mixed = conditioner(batch, Keep(*(torch.tensor([True, False, True]) for _ in range(3))))
    for a, b, c in zip(outputs(full), outputs(null), outputs(mixed), strict=True):
        torch.testing.assert_close(c[[0, 2]], a[[0, 2]])
        torch.testing.assert_close(c[1], b[1])
    for name in ("xray", "text", "label"):
        without = conditioner(batch, keep_of(3, **{name: False}))
        assert not torch.equal(without.vector, full.vector)
        assert torch.equal(without.lifted[0], full.lifted[0]) == (name != "xray")


def test_null_knows_nothing_but_the_place():
    conditioner = Conditioner(EVERYTHING, STRIDES, LATENT)
    one = batch_of(v=2, seed=1)
    other = batch_of(v=2, seed=2, label=torch.tensor([1, 0]), text=("a", ""))
    null, other_null = conditioner.null(one), conditioner.null(other)
    for a, b in zip(outputs(null)[:-1], outputs(other_null)[:-1], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(null.extra, one.extra)
    unknown = replace(one, xray_present=~one.xray_present, label=torch.full((2,), UNKNOWN_LABEL), text=("", ""))
    for a, b in zip(outputs(null), outputs(conditioner(unknown)), strict=True):
        assert torch.equal(a, b)


def test_one_view_of_two_may_be_missing():
    conditioner = Conditioner(EVERYTHING, STRIDES, LATENT)
    batch = batch_of(v=2)
    frontal_only = replace(batch, xray_present=torch.tensor([[True, False]] * 2))
    noise = batch.xray.clone()
    noise[:, 1] = torch.rand(2, 1, 32, 32)
    a, b = conditioner(frontal_only), conditioner(replace(frontal_only, xray=noise))
    assert all(torch.equal(x, y) for x, y in zip(outputs(a), outputs(b), strict=True))
    assert (a.lifted[0][:, -2] == 1).all()
    assert (a.lifted[0][:, -1] == 0).all()
    both = conditioner(batch)
    assert not torch.equal(a.lifted[0], both.lifted[0])
    # the views are told apart
    swapped = conditioner(replace(batch, xray=batch.xray.flip(1), ray_grid=batch.ray_grid.flip(1)))
    assert not torch.allclose(swapped.vector, both.vector)


def test_draws_follow_the_probabilities_and_the_seed():
    config = replace(EVERYTHING, drop_probability=0.25, text_drop_probability=0.0, label_drop_probability=1.0)
    conditioner = Conditioner(config, STRIDES, LATENT)
    torch.manual_seed(3)
    keep = conditioner.draw_keep(4000)
    assert float(keep.xray.float().mean()) == pytest.approx(0.75, abs=0.03)
    assert keep.text.all()
    assert not keep.label.any()
    torch.manual_seed(3)
    assert torch.equal(conditioner.draw_keep(4000).xray, keep.xray)


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    conditioner = Conditioner(EVERYTHING, STRIDES, LATENT)
    for parameter in conditioner.parameters():  # zero-initialised layers hide what is before them
        nn.init.normal_(parameter, std=0.2)
    batch = batch_of(b=3, v=2, text=("a report. with two sentences", "", "x"))
    conditions = conditioner(batch, Keep(torch.tensor([True, False, True]), torch.ones(3) > 0, torch.ones(3) > 0))
    sum((x * torch.randn_like(x)).sum() for x in outputs(conditions)[:-1]).backward()
    unknown = [name for name, p in conditioner.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert unknown == []


@pytest.mark.parametrize(
    ("switch", "field"),
    [
        ("lifting", "lifted"),
        ("cross_attention", "tokens"),
        ("pooled", "vector"),
        ("text", "tokens"),
        ("label", "vector"),
    ],
)
def test_every_option_alone_trains_and_its_input_changes_its_output(switch, field):
    """Each condition alone can tell two patients apart, and nothing else is given."""
    torch.manual_seed(0)
    off = {"lifting": False, "cross_attention": False, "pooled": False}
    config = replace(CONFIG, **(off | {switch: "bytes" if switch == "text" else True}))
    conditioner = Conditioner(config, STRIDES, LATENT)
    batch = batch_of(text=("no embolus", "emboli"))
    given = {name for name in ("lifted", "tokens", "vector") if getattr(conditioner(batch), name) is not None}
    assert given == {field} | ({"vector"} if switch == "text" else set())

    def read(conditions):
        value = getattr(conditions, field)
        value = value[0] if field == "lifted" else value
        return value.movedim(1, -1).flatten(1, -2).mean(dim=1) if value.dim() > 2 else value  # (B, C)

    head = nn.Linear(read(conditioner(batch)).shape[1], 1)
    optimizer = torch.optim.Adam([*conditioner.parameters(), *head.parameters()], 0.005)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(head(read(conditioner(batch)))[:, 0], torch.tensor([-1.0, 1.0]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]
    swapped = replace(batch, xray=batch.xray.flip(0), label=batch.label.flip(0), text=batch.text[::-1])
    before, after = head(read(conditioner(batch)))[:, 0], head(read(conditioner(swapped)))[:, 0]
    assert (before - after).abs().min() > 1  # the answer goes with the input
    null = head(read(conditioner.null(batch)))[:, 0]
    assert torch.equal(null[0], null[1])


def test_nothing_at_all_is_a_condition_too():
    config = replace(CONFIG, lifting=False, cross_attention=False, pooled=False)
    told = Conditioner(config, STRIDES, LATENT)(batch_of())
    assert (told.lifted, told.tokens, told.vector) == (None, None, None)
    assert config.unet_arguments(3) == {"lifted_channels": (0, 0, 0), "token_channels": 0, "vector_channels": 0}


def test_configurations_survive_a_checkpoint_and_typos_are_named():
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in EVERYTHING.as_dict().items()}
    assert ConditionerConfig.from_dict(plain) == EVERYTHING
    with pytest.raises(ConfigurationError, match="liftign"):
        ConditionerConfig.from_dict({"liftign": True})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "words"}, "text='words'"),
        ({"image_encoder": "clip"}, "image_encoder='clip'"),
        ({"views": ("oblique",)}, "views"),
        ({"views": ("frontal", "frontal")}, "views"),
        ({"xray_size": 36}, "xray_size=36"),
        ({"lifted_channels": (8, 1, 8)}, "lifted_channels"),
        ({"drop_probability": 1.2}, "drop_probability=1.2"),
    ],
)
def test_impossible_settings_are_named(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        replace(CONFIG, **changes)


def test_batches_that_do_not_fit_are_refused():
    conditioner = Conditioner(CONFIG, STRIDES, LATENT)
    with pytest.raises(ConfigurationError, match="2 view"):
        conditioner(batch_of(v=2))
    with pytest.raises(ConfigurationError, match="64×64"):
        conditioner(batch_of(size=64))
    with pytest.raises(ConfigurationError, match="2 levels"):
        Conditioner(CONFIG, STRIDES[:2], LATENT)
