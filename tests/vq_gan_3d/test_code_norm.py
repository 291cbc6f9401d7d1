"""Whitening of the code: exact on the first batch, frozen in use, a backward pass that lets nothing drift."""

from __future__ import annotations

import pytest
import torch

from vq_gan_3d.code_norm import CodeNorm


def correlated(channels=4, seed=0, scale=3.0):
    torch.manual_seed(seed)
    mix = torch.randn(channels, channels) + 2 * torch.eye(channels)
    z = torch.randn(2, channels, 8, 12, 12)
    return scale * torch.einsum("ij,bjdhw->bidhw", mix, z) + torch.arange(channels).view(1, -1, 1, 1, 1)


def flat(code):
    return code.movedim(1, -1).flatten(0, -2).double()


def test_first_batch_comes_out_with_mean_0_and_covariance_1():
    norm = CodeNorm(4)
    white = flat(norm(correlated()))
    assert white.mean(0).abs().max() < 1e-5
    covariance = white.T @ white / len(white)
    # exact but for the floor of 1e-4 of the mean variance
    torch.testing.assert_close(covariance, torch.eye(4).double(), atol=5e-3, rtol=0)
    assert int(norm.updates) == 1


def test_moments_start_as_plain_means_and_then_follow_with_the_decay():
    norm, batches = CodeNorm(4, decay=0.6), [correlated(seed=seed) for seed in range(3)]
    for batch in batches:
        norm(batch)
    # rates 1, 1/2 and then 1 - decay = 0.4, which is more than 1/3
    weights = (0.3, 0.3, 0.4)
    expected = sum(w * flat(x).mean(0) for w, x in zip(weights, batches, strict=True))
    torch.testing.assert_close(norm.mean.double(), expected, rtol=1e-4, atol=1e-4)
    covariances = [torch.cov(flat(x).T, correction=0) for x in batches]
    expected = sum(w * c for w, c in zip(weights, covariances, strict=True))
    torch.testing.assert_close(norm.covariance.double(), expected, rtol=1e-3, atol=1e-3)


def test_use_is_a_fixed_local_function():
    norm = CodeNorm(4)
    norm(correlated())
    norm.eval()
    state = {key: value.clone() for key, value in norm.state_dict().items()}
    x = correlated(seed=5)
    y = norm(x)
    assert torch.equal(y, norm(x))
    torch.testing.assert_close(norm(x[:1, :, 2:4, :3]), y[:1, :, 2:4, :3])  # a patch gets the values of the whole
    for key, value in norm.state_dict().items():
        assert torch.equal(value, state[key])


def test_moments_are_in_the_state():
    norm = CodeNorm(4)
    norm(correlated())
    other = CodeNorm(4)
    other.load_state_dict(norm.state_dict())
    x = correlated(seed=3)
    assert torch.equal(other.eval()(x), norm.eval()(x))


def gradient_of(loss, channels=4):
    x = correlated(channels).requires_grad_()
    white = CodeNorm(channels)(x)
    (gradient,) = torch.autograd.grad(loss(white), x)
    return gradient


def test_backward_drops_what_moves_whole_channels_and_keeps_rotations():
    reference = gradient_of(lambda z: (z[:, 0] * z[:, 1].detach() - z[:, 1] * z[:, 0].detach()).sum()).norm()
    assert reference > 1  # a rotation
    for loss in (
        lambda z: z[:, 0].sum(),  # shifts
        lambda z: (z * torch.arange(1.0, 5).view(1, 4, 1, 1, 1)).sum(),
        lambda z: 0.5 * z.square().sum(),  # scales
        lambda z: 0.5 * z[:, 2].square().sum(),
        lambda z: (z[:, 0] * z[:, 1]).sum(),  # correlates
    ):
        assert gradient_of(loss).norm() < 0.01 * reference


def test_one_channel_backward_is_autograd_through_batch_whitening():
    target = torch.randn(2, 1, 8, 12, 12, generator=torch.Generator().manual_seed(9))
    ours = gradient_of(lambda z: (z - target).abs().pow(1.5).sum(), channels=1)
    x = correlated(1).double().requires_grad_()
    variance = x.var(unbiased=False)
    white = (x - x.mean()) / (variance * (1 + 1e-4)).sqrt()
    (expected,) = torch.autograd.grad((white - target).abs().pow(1.5).sum(), x)
    assert (ours.double() - expected).norm() < 1e-3 * expected.norm()


def test_gradients_sum_to_zero_and_do_not_stretch():
    target = torch.randn(2, 4, 8, 12, 12, generator=torch.Generator().manual_seed(9))
    norm, x = CodeNorm(4), correlated().requires_grad_()
    white = norm(x)
    white.retain_grad()
    (white - target).pow(4).sum().backward()
    # the code moves by W⁻¹ of the projected gradient: no mean, and an antisymmetric moment with the code
    z, g = flat(white.detach()), flat(x.grad)
    whitening = torch.linalg.inv(torch.linalg.cholesky(norm.covariance.double()))
    projected = g @ torch.linalg.inv(whitening)
    scale = flat(white.grad).abs().mean()
    assert projected.mean(0).abs().max() < 1e-3 * scale
    moment = z.T @ projected / len(z)
    assert (moment + moment.T).abs().max() < 0.05 * moment.abs().max()  # 0 but for the floor of the variance


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("when", ["first", "later"])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_batch_of_pure_air_is_harmless(seed, when, scale):
    torch.manual_seed(seed)
    norm = CodeNorm(4, decay=0.9)  # fast enough to forget a spread of 100 in 100 steps
    if when == "later":
        norm(torch.randn(1, 4, 8, 8, 8))
    air = (scale * torch.randn(1, 4, 1, 1, 1)).expand(2, 4, 16, 16, 16).clone().requires_grad_()
    white = norm(air)
    white.square().sum().backward()
    assert white.isfinite().all()
    assert air.grad.isfinite().all()
    if when == "first":
        assert white.abs().max() < 10 * scale
    assert norm.covariance.isfinite().all()
    eigenvalues = torch.linalg.eigvalsh(norm.covariance.double())
    assert eigenvalues.min() >= -1e-9  # rounding must not make it indefinite
    # and training goes on from there
    for _ in range(100):
        white = norm(correlated())
    covariance = flat(white).T @ flat(white) / flat(white).shape[0]
    torch.testing.assert_close(covariance, torch.eye(4).double(), atol=0.15, rtol=0)


def test_a_small_spread_far_from_zero_is_measured():
    torch.manual_seed(0)
    norm = CodeNorm(2)
    white = flat(norm(30 + 0.01 * torch.randn(1, 2, 16, 16, 16)))
    torch.testing.assert_close(white.T @ white / len(white), torch.eye(2).double(), atol=0.02, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_does_not_outlive_its_step(bad):
    norm, x = CodeNorm(4), correlated()
    broken = x.clone()
    broken[0, 0, 0, 0, 0] = bad
    norm(broken)  # as the first one
    assert int(norm.updates) == 0
    norm(x)
    mean, covariance = norm.mean.clone(), norm.covariance.clone()
    norm(broken)
    assert torch.equal(norm.mean, mean)
    assert torch.equal(norm.covariance, covariance)
    assert norm(x).isfinite().all()


def test_fp32_under_autocast():
    norm = CodeNorm(4)
    with torch.autocast("cpu", torch.bfloat16):
        white = norm(correlated().bfloat16())
    assert white.dtype == torch.float32
    assert white.isfinite().all()
