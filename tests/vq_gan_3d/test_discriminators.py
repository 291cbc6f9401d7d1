"""PatchGANs and the slices that they see."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from vq_gan_3d.discriminators import PatchDiscriminator, plane_slices


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("size", [16, 17, 24, 33])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_shapes_from_16_voxels_up(dims, size, layers):
    torch.manual_seed(0)
    network = PatchDiscriminator(dims, width=4, layers=layers)
    logits, features = network(torch.rand(2, 1, *[size] * dims))
    assert logits.shape[:2] == (2, 1)
    assert logits.ndim == dims + 2
    assert min(logits.shape[2:]) >= 2
    assert [f.shape[1] for f in features] == [4 * 2 ** min(level, 3) for level in range(layers + 1)]
    assert all(a.shape[2] > b.shape[2] for a, b in pairwise(features[:layers]))
    logits.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_channels_stop_growing_at_eight_times_the_width():
    features = PatchDiscriminator(2, width=2, layers=5)(torch.rand(1, 1, 64, 64)).features
    assert [f.shape[1] for f in features] == [2, 4, 8, 16, 16, 16]


def test_a_verdict_is_local_and_no_matter_of_the_batch():
    torch.manual_seed(0)
    network, x = PatchDiscriminator(2, width=4, layers=2), torch.rand(3, 1, 96, 96)
    logits = network(x).logits
    torch.testing.assert_close(network(x[1:2]).logits, logits[1:2])  # no batch statistics
    other = x.clone()
    other[0, 0, 0, 0] += 1
    changed = network(other).logits != logits
    assert changed[0].any()
    assert not changed[0, 0, -1, -1]
    assert not changed[1:].any()


def positions_volume(batch=2, d=5, h=7, w=9):
    """Every voxel says where it is: 1000000·b + 10000·d + 100·h + w."""
    grids = torch.meshgrid(*[torch.arange(n) for n in (batch, d, h, w)], indexing="ij")
    return (1_000_000 * grids[0] + 10_000 * grids[1] + 100 * grids[2] + grids[3]).float()[:, None]


def test_plane_slices_are_the_right_ones():
    volume = positions_volume()
    positions = torch.tensor([[0.0, 0.99], [0.5, 0.15], [0.34, 0.999999]])
    axial, coronal, sagittal = plane_slices(volume, positions)
    assert axial.shape == (4, 1, 7, 9)
    assert coronal.shape == (4, 1, 5, 9)
    assert sagittal.shape == (4, 1, 5, 7)
    for b in range(2):
        for k, (d, h, w) in enumerate([(0, 3, 3), (4, 1, 8)]):  # floor(position · size); the same for every volume
            assert torch.equal(axial[b * 2 + k, 0], volume[b, 0, d])
            assert torch.equal(coronal[b * 2 + k, 0], volume[b, 0, :, h])
            assert torch.equal(sagittal[b * 2 + k, 0], volume[b, 0, :, :, w])


def test_slices_do_not_depend_on_how_a_batch_is_spread():
    volume, positions = torch.rand(4, 1, 6, 7, 8), torch.rand(3, 2)
    whole = plane_slices(volume, positions)
    parts = [plane_slices(part, positions) for part in volume.split(2)]
    for plane, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(plane, torch.cat(pieces))


def test_gradients_reach_the_slices_alone():
    volume = torch.rand(1, 1, 4, 5, 6, requires_grad=True)
    plane_slices(volume, torch.zeros(3, 1))[0].sum().backward()
    assert torch.equal(volume.grad[0, 0].sum((1, 2)), torch.tensor([30.0, 0, 0, 0]))
