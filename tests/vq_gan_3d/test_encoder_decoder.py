"""Voxel shuffles and the norm: exact inverses, a documented channel order, nothing that looks around."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vq_gan_3d.encoder_decoder import ChannelNorm, Decoder, Encoder, ResidualBlock, depth_to_space, space_to_depth

strides = st.tuples(*[st.integers(1, 4)] * 3)
cells = st.tuples(*[st.integers(1, 3)] * 3)


@settings(deadline=None, max_examples=40)
@given(strides, cells, st.integers(1, 2), st.integers(1, 3))
def test_shuffles_are_inverse_of_each_other(stride, grid, batch, channels):
    size = [n * s for n, s in zip(grid, stride, strict=True)]
    x = torch.arange(batch * channels * size[0] * size[1] * size[2], dtype=torch.float32).view(batch, channels, *size)
    deep = space_to_depth(x, stride)
    assert deep.shape == (batch, channels * stride[0] * stride[1] * stride[2], *grid)
    assert torch.equal(depth_to_space(deep, stride), x)
    y = torch.arange(deep.numel(), dtype=torch.float32).view(deep.shape)
    assert torch.equal(space_to_depth(depth_to_space(y, stride), stride), y)


def test_channel_order_and_memory():
    stride, channels = (2, 3, 1), 2
    x = torch.arange(2 * 2 * 4 * 6 * 3).float().view(2, channels, 4, 6, 3)
    deep = space_to_depth(x, stride)
    for p in range(2):
        for q in range(3):
            for c in range(channels):  # (p, q, r, C), the channel innermost
                assert torch.equal(deep[:, (p * 3 + q) * channels + c], x[:, c, p::2, q::3])
    assert deep.is_contiguous(memory_format=torch.channels_last_3d)
    assert depth_to_space(deep, stride).is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("spatial", [(5, 4), (3, 5, 4)])
def test_channel_norm_is_the_formula(spatial):
    torch.manual_seed(0)
    norm = ChannelNorm(6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 6, *spatial)
    shape = (1, 6) + (1,) * len(spatial)
    mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    expected = (x - mean) / (variance + 1e-5).sqrt() * norm.weight.view(shape) + norm.bias.view(shape)
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("spatial", [(5, 4), (3, 5, 4)])
def test_channel_norm_uses_no_statistics_of_space(spatial):
    torch.manual_seed(0)
    norm, x = ChannelNorm(6), torch.randn(2, 6, *spatial)
    other = x.clone()
    voxel = (1, slice(None), *[0] * len(spatial))
    other[voxel] += torch.randn(6)
    changed = (norm(other) != norm(x)).any(1)
    assert changed[(1, *[0] * len(spatial))]
    assert changed.sum() == 1


def test_channel_norm_keeps_the_dtype_under_autocast():
    x = torch.randn(1, 4, 2, 2, 2, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert ChannelNorm(4)(x).dtype == torch.bfloat16


def test_a_residual_block_starts_as_the_identity_and_learns():
    block, x = ResidualBlock(4), torch.randn(1, 4, 3, 3, 3)
    assert torch.equal(block(x), x)
    block(x).square().sum().backward()
    assert block.conv_channels.weight.grad.abs().max() > 0


def test_encoder_and_decoder_mirror_each_other():
    steps = ((2, 2, 2), (1, 2, 2), (2, 1, 1))
    encoder = Encoder(1, (4, 6, 8), steps, (1, 0, 1))
    decoder = Decoder(1, 5, (4, 6, 8), steps, (1, 0, 1))
    assert encoder(torch.rand(2, 1, 8, 12, 16)).shape == (2, 8, 2, 3, 4)
    assert decoder(torch.rand(2, 5, 2, 3, 4)).shape == (2, 1, 8, 12, 16)
