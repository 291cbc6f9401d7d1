"""The codec: shapes, refusals, and the receptive field that makes tiles equal the whole volume."""

from __future__ import annotations

from dataclasses import fields
from itertools import product

import pytest
import torch
from omegaconf import OmegaConf

from errors import ConfigurationError, InputError
from tests.helpers import ROOT
from vq_gan_3d.codec import CodecConfig, VQCodec

STRIDES = {
    "default": ((2, 2, 2), (1, 2, 2), (2, 1, 1)),
    "in plane first": ((1, 2, 2), (2, 2, 2), (2, 1, 1)),
    "8x8x8": ((2, 2, 2),) * 3,
    "two blocks": ((2, 2, 2), (2, 2, 2)),
}


def tiny_config(strides=STRIDES["default"], encoder_blocks=None, decoder_blocks=None, **more) -> CodecConfig:
    levels = len(strides)
    return CodecConfig(
        widths=(4, 6, 8)[:levels],
        strides=strides,
        encoder_blocks=encoder_blocks or (1,) * levels,
        decoder_blocks=decoder_blocks or (1,) * levels,
        embedding_dim=6,
        **more,
    )


def randomized(config: CodecConfig, seed: int = 0) -> VQCodec:
    """All weights random, those that start at zero included: otherwise every block is the identity."""
    codec = VQCodec(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in codec.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return codec


def names_of(settings):
    return {entry.name for entry in fields(settings)}


def default_model():
    from vq_gan_3d.vqgan import VQGAN, HUWindow, LossConfig, OptimizerConfig

    values = OmegaConf.to_container(OmegaConf.load(ROOT / "config/model/vq_gan_3d.yaml"))
    codec = CodecConfig.from_dict({k: v for k, v in values.items() if k in names_of(CodecConfig)})
    losses = LossConfig(**{k: v for k, v in values.items() if k in names_of(LossConfig)})
    assert set(values) == names_of(CodecConfig) | names_of(LossConfig)
    return VQGAN(codec, losses, OptimizerConfig(), HUWindow())


@pytest.mark.parametrize("strides", STRIDES.values(), ids=STRIDES)
@pytest.mark.parametrize("quantizer", ["fsq", "ema", "simvq"])
def test_shapes(strides, quantizer):
    codec = VQCodec(tiny_config(strides, quantizer=quantizer)).eval()
    total = codec.config.total_stride
    volume = torch.rand(2, 1, *(2 * s for s in total))
    code = codec.encode(volume)
    assert code.shape == (2, 4, 2, 2, 2)
    out = codec(volume)
    assert out.volume.shape == volume.shape
    assert out.indices.shape == (2, 2, 2, 2)
    assert out.indices.dtype == torch.int64
    assert 0 <= int(out.indices.min()) <= int(out.indices.max()) < 512
    assert out.codebook_loss.shape == ()
    torch.testing.assert_close(codec.decode(code), out.volume)
    torch.testing.assert_close(codec.decode_indices(out.indices), out.volume)


@pytest.mark.parametrize(("size", "total"), [((10, 16, 16), "[4, 4, 4]"), ((8, 18, 16), "[4, 4, 4]")])
def test_sizes_that_do_not_divide_are_refused(size, total):
    with pytest.raises(InputError) as caught:
        VQCodec(tiny_config()).encode(torch.zeros(1, 1, *size))
    assert str(list(size)) in str(caught.value)
    assert total in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"widths": (4, 6)}, "model.widths"),
        ({"encoder_blocks": (1, 1)}, "model.encoder_blocks"),
        ({"strides": ((2, 2), (2, 2, 2), (1, 1, 1))}, "[2, 2]"),
        ({"strides": ((2, 2, 0), (2, 2, 2), (1, 1, 1))}, "[2, 2, 0]"),
        ({"code_channels": 3}, "model.fsq_levels"),
        ({"width": 3}, "width"),
        ({"quantizer": "vq", "n_codes": 3}, "ema, simvq or fsq"),
        ({"n_codes": 256}, "512"),
        ({"fsq_levels": (1, 8, 8, 8)}, "at least 2"),
        ({"fsq_levels": (16, 16, 16, 8)}, "model.entropy_weight"),
    ],
)
def test_bad_configurations_are_refused(values, words):
    with pytest.raises(ConfigurationError) as caught:
        VQCodec(CodecConfig.from_dict({"widths": (4, 6, 8), **values}))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_config_round_trips_through_plain_containers():
    config = tiny_config(quantizer="ema", n_codes=16)
    as_lists = OmegaConf.to_container(OmegaConf.create(config.as_dict()))
    assert CodecConfig.from_dict(as_lists) == config


HALOS = [
    ("default", (2, 1, 1), (1, 1, 2)),
    ("in plane first", (1, 0, 2), (2, 1, 0)),
    ("8x8x8", (1, 1, 0), (0, 1, 1)),
    ("two blocks", (2, 1), (0, 2)),
]


@pytest.mark.parametrize(("name", "encoder_blocks", "decoder_blocks"), HALOS)
def test_encoder_looks_exactly_as_far_as_the_halo(name, encoder_blocks, decoder_blocks):
    config = tiny_config(STRIDES[name], encoder_blocks, decoder_blocks)
    codec, (halo, _) = randomized(config).double(), config.receptive_halo_vox()
    total = config.total_stride
    margin = [-(-h // s) + 1 for h, s in zip(halo, total, strict=True)]  # in cells, one more than needed
    volume = torch.rand(1, 1, *((2 * m + 1) * s for m, s in zip(margin, total, strict=True))).double()
    volume.requires_grad_()
    latent = codec.to_code(codec.encoder(volume))
    latent[0, :, margin[0], margin[1], margin[2]].sum().backward()
    expected = torch.zeros(volume.shape[2:], dtype=torch.bool)
    expected[tuple(slice(m * s - h, (m + 1) * s + h) for m, s, h in zip(margin, total, halo, strict=True))] = True
    assert torch.equal(volume.grad[0, 0] != 0, expected)


@pytest.mark.parametrize(("name", "encoder_blocks", "decoder_blocks"), HALOS)
def test_a_latent_reaches_exactly_as_far_as_the_decoders_halo(name, encoder_blocks, decoder_blocks):
    config = tiny_config(STRIDES[name], encoder_blocks, decoder_blocks)
    codec, (_, halo) = randomized(config).double(), config.receptive_halo_vox()
    total = config.total_stride
    margin = [-(-h // s) + 1 for h, s in zip(halo, total, strict=True)]
    codes = torch.randn(1, 4, *(2 * m + 1 for m in margin)).double()
    other = codes.clone()
    other[0, :, margin[0], margin[1], margin[2]] += 1
    with torch.no_grad():
        changed = codec.decode_quantized(other) != codec.decode_quantized(codes)
    expected = torch.zeros(changed.shape[2:], dtype=torch.bool)
    expected[tuple(slice(m * s - h, (m + 1) * s + h) for m, s, h in zip(margin, total, halo, strict=True))] = True
    assert torch.equal(changed[0, 0], expected)


def by_tiles(function, x, tile, halo, shrink, grow):
    """``function`` on tiles with a halo, in steps of ``x``'s grid, of which it makes one of grow/shrink the pitch."""
    size = x.shape[2:]
    whole = None
    for start in product(*(range(0, n, t) for n, t in zip(size, tile, strict=True))):
        stop = [min(a + t, n) for a, t, n in zip(start, tile, size, strict=True)]
        low = [max(a - h, 0) for a, h in zip(start, halo, strict=True)]
        high = [min(b + h, n) for b, h, n in zip(stop, halo, size, strict=True)]
        y = function(x[(..., *map(slice, low, high))])
        if whole is None:
            whole = y.new_zeros(*y.shape[:2], *(n * g // s for n, g, s in zip(size, grow, shrink, strict=True)))
        axes = list(zip(start, stop, low, grow, shrink, strict=True))
        inner = [slice((a - lo) * g // s, (b - lo) * g // s) for a, b, lo, g, s in axes]
        whole[(..., *(slice(a * g // s, b * g // s) for a, b, _, g, s in axes))] = y[(..., *inner)]
    return whole


@pytest.mark.parametrize("name", STRIDES)
def test_tiles_with_a_halo_equal_the_whole_volume(name):
    torch.manual_seed(1)
    config = tiny_config(STRIDES[name])
    codec, total = randomized(config).eval(), config.total_stride
    ones = (1, 1, 1)
    volume = torch.rand(1, 1, *(10 * s for s in total))
    encoder_halo, decoder_halo = (
        [-(-h // s) for h, s in zip(halo, total, strict=True)] for halo in config.receptive_halo_vox()
    )
    with torch.no_grad():
        code = codec.encode(volume)
        halo = [h * s for h, s in zip(encoder_halo, total, strict=True)]
        tiled = by_tiles(codec.encode, volume, [4 * s for s in total], halo, total, ones)
        torch.testing.assert_close(tiled, code, rtol=1e-4, atol=1e-5)
        codes = codec.quantizer(code).codes
        tiled = by_tiles(codec.decode_quantized, codes, (4, 4, 4), decoder_halo, ones, total)
        torch.testing.assert_close(tiled, codec.decode_quantized(codes), rtol=1e-4, atol=1e-5)
        # and the test can fail: with a halo that is one cell short, seams appear
        short = [h - 1 for h in decoder_halo]
        seams = by_tiles(codec.decode_quantized, codes, (4, 4, 4), short, ones, total) - tiled
        assert seams.abs().max() > 1e-4


@pytest.mark.parametrize("quantizer", ["fsq", "ema"])
def test_checkpointing_changes_nothing(quantizer):
    volume = torch.rand(1, 1, 8, 16, 16)
    results = []
    for checkpointing in (False, True):
        codec = randomized(tiny_config(quantizer=quantizer))
        codec.set_checkpointing(checkpointing)
        out = codec(volume)
        (out.volume.square().mean() + out.codebook_loss).backward()
        results.append((out.volume, [p.grad for p in codec.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert a.abs().max() > 0 or a.numel() <= 4  # a bias before whitening has no effect
        assert torch.equal(a, b)


def test_the_default_model():
    module = default_model()
    config = module.codec.config
    assert config == CodecConfig()  # one truth: defaults of the class are those of the configuration
    assert config.total_stride == (4, 4, 4)
    for depth, height, width in config.receptive_halo_vox():
        assert depth <= 24
        assert max(height, width) <= 32
    counts = module.parameters_by_part()
    assert counts["generator"] >= 20e6
    assert 34e6 <= counts["total"] <= 39e6
    parts = counts["encoder"] + counts["decoder"] + counts["code projections and quantizer"]
    assert counts["generator"] == parts
    assert counts["total"] == parts + counts["discriminator (slices)"] + counts["discriminator (volume)"]
    assert counts["total"] == sum(p.numel() for p in module.parameters())


def test_a_fresh_decoder_shows_no_grid_of_the_voxel_shuffle():
    """Voxels of one shuffle block start equal: nearest-neighbour up-sampling, nothing to unlearn."""
    torch.manual_seed(0)
    codec = VQCodec(CodecConfig(widths=(8, 16, 16), encoder_blocks=(1, 1, 1), decoder_blocks=(1, 1, 1)))
    out = codec.decode_indices(torch.randint(512, (1, 2, 3, 4)))[0, 0]  # (8, 12, 16)
    blocks = out.reshape(4, 2, 6, 2, 8, 2)
    assert torch.equal(blocks, blocks[:, :1, :, :1, :, :1].expand_as(blocks))
    assert float(out.detach().std()) > 1e-3
