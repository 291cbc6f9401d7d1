"""Finite scalar quantisation: its grid, and the entropy of code use that its loss misses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tests.vq_gan_3d.test_codebook import as_grid, unsquash
from vq_gan_3d import fsq
from vq_gan_3d.fsq import FSQ, sampled_cells


@pytest.mark.parametrize("levels", [(8, 4, 4, 4), (8, 8, 8), (5, 3), (2, 2, 2)])
def test_fsq_is_the_grid_of_all_levels(levels):
    quantizer = FSQ(levels)
    everything = torch.arange(quantizer.n_codes)
    codes = quantizer.lookup(everything)
    assert len(codes.unique(dim=0)) == quantizer.n_codes
    assert float(codes.min()) == -1
    assert float(codes.max()) == 1
    for channel, level in enumerate(levels):
        torch.testing.assert_close(codes[:, channel].unique(), torch.linspace(-1, 1, level))
    torch.manual_seed(0)
    out = quantizer(as_grid(torch.cat([5 * torch.randn(40_000, len(levels)), torch.randn(40_000, len(levels))])))
    assert torch.equal(out.indices.unique(), everything)  # every code can be reached
    torch.testing.assert_close(quantizer.lookup(out.indices).permute(0, 4, 1, 2, 3), out.codes, atol=1e-6, rtol=0)


def test_missing_entropy_of_even_and_of_single_use():
    quantizer = FSQ((8, 4), entropy_weight=1.0)
    grid = torch.cartesian_prod(torch.arange(8.0), torch.arange(4.0))  # each code once
    z = unsquash(2 * (grid + 0.5) / torch.tensor([8.0, 4.0]) - 1)
    even, single = quantizer(as_grid(z)).loss, quantizer(as_grid(z[:1].repeat(32, 1))).loss
    assert 0 <= float(even) < 0.01
    assert math.log(32) - 1 < float(single) <= math.log(32)
    assert float(quantizer.eval()(as_grid(z[:1].repeat(32, 1))).loss) == 0  # training's business alone
    assert float(FSQ((8, 4))(as_grid(z)).loss) == 0


def test_missing_entropy_of_pure_air_has_a_finite_gradient():
    """All vectors in one corner: the opposite corner's soft use underflows to exactly 0."""
    z = torch.full((1, 4, 4, 4, 4), -3.0, requires_grad=True)
    out = FSQ((8, 4, 4, 4), entropy_weight=1.0)(z)
    out.loss.backward()
    assert out.loss.isfinite()
    assert z.grad.isfinite().all()
    assert z.grad.abs().max() > 0


def test_missing_entropy_drives_vectors_to_unused_codes():
    torch.manual_seed(0)
    quantizer = FSQ((8, 4, 4, 4), entropy_weight=1.0)
    # uncorrelated but not independent: on the sphere most corners of the grid are empty
    z = F.normalize(torch.randn(4000, 4)) * 1.2
    z = z.requires_grad_()
    optimizer = torch.optim.Adam([z], 0.03)
    before = len(quantizer(as_grid(z)).indices.unique())
    for _ in range(60):
        optimizer.zero_grad()
        quantizer(z.T[None, :, :, None, None]).loss.backward()
        optimizer.step()
    after = len(quantizer(as_grid(z.detach())).indices.unique())
    assert before < 400
    assert after > 500


@pytest.mark.parametrize("shape", [(16, 64, 64), (32, 64, 64), (8, 16, 16), (3, 17, 129)])
def test_missing_entropy_sees_all_planes_of_a_volume(shape):
    """Every n-th cell of the row-major grid fell on 4 of 64 planes, or on one."""
    cells = sampled_cells(math.prod(shape))
    assert len(cells) == min(4096, math.prod(shape))
    assert len(cells.unique()) == len(cells)
    for axis, size in enumerate(shape):
        counts = torch.unravel_index(cells, shape)[axis].bincount(minlength=size)
        assert counts.min() > 0.4 * counts.float().mean()


def test_missing_entropy_of_a_batch_is_that_of_its_volumes_whatever_the_processes():
    """Above the sampled number of cells, too: a batch sees of each volume what a process with it alone sees."""
    torch.manual_seed(0)
    quantizer = FSQ((8, 4, 4, 4), entropy_weight=1.0)
    volumes = torch.randn(3, 4, 8, 32, 32, requires_grad=True)
    use = []
    with pytest.MonkeyPatch.context() as patch:  # the code use of each volume, as ranks would bring it together
        patch.setattr(fsq, "all_reduce_mean", lambda mean: (use.append(mean), mean)[1])
        alone = [quantizer(volume[None]).loss for volume in volumes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsq, "all_reduce_mean", lambda mean: torch.stack(use).mean(0))
        ranks = [quantizer(volume[None]).loss for volume in volumes]
    together = quantizer(volumes).loss
    assert len({round(float(value.detach()), 4) for value in alone}) > 1
    for rank in ranks:
        torch.testing.assert_close(rank, together)
    (gradient,) = torch.autograd.grad(together, volumes)
    (shared,) = torch.autograd.grad(torch.stack(ranks).mean(), volumes)  # as DDP averages
    torch.testing.assert_close(shared, gradient)
    assert (gradient != 0).any(1).flatten(1).sum(1).tolist() == [4096] * 3


def test_missing_entropy_is_that_of_the_joint_code_use():
    torch.manual_seed(0)
    quantizer = FSQ((5, 4, 3), entropy_weight=1.0)
    bounded = quantizer._bound(torch.randn(200, 3))
    use = torch.ones(200, 1)
    for channel, level in enumerate((5, 4, 3)):
        soft = torch.softmax(-2 * (bounded[:, channel, None] - torch.arange(level)).square(), 1)
        use = (use[:, :, None] * soft[:, None, :]).flatten(1)
    expected = math.log(60) + torch.xlogy(use.mean(0), use.mean(0)).sum()
    torch.testing.assert_close(quantizer._missing_entropy(bounded, 2), expected)


def test_fsq_meets_infinite_and_huge_input():
    quantizer = FSQ((8, 4, 4, 4))
    out = quantizer(as_grid(torch.tensor([[1e30] * 4, [-1e30] * 4, [float("inf")] * 4])))
    assert out.indices.flatten().tolist() == [511, 0, 511]
    assert out.codes.isfinite().all()


def test_fsq_orders_codes_along_each_channel():
    quantizer = FSQ((8,))
    out = quantizer(as_grid(torch.linspace(-3, 3, 100)[:, None]))
    assert (out.indices.flatten().diff() >= 0).all()
    z = torch.randn(1, 1, 4, 4, 4, requires_grad=True)
    quantizer(z).codes.sum().backward()
    assert (z.grad > 0).all()  # the derivative of the bound, no zero as rounding has
