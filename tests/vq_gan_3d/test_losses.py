"""Adversarial losses on logits whose loss is known by hand."""

from __future__ import annotations

import math

import pytest
import torch

from vq_gan_3d.discriminators import Verdict
from vq_gan_3d.losses import adaptive_weight, discriminator_loss, feature_matching_loss, generator_loss


def verdict(*logits, features=()):
    return Verdict(torch.tensor(logits, dtype=torch.float32), [torch.as_tensor(f) for f in features])


def test_hinge():
    loss = discriminator_loss([verdict(2.0, 0.5)], [verdict(-3.0, 1.0)], "hinge")
    assert float(loss) == pytest.approx(0.5 * ((0 + 0.5) / 2 + (0 + 2) / 2))
    sure = discriminator_loss([verdict(1.0, 7.0)], [verdict(-1.0, -9.0)], "hinge")
    assert float(sure) == 0


def test_vanilla():
    loss = discriminator_loss([verdict(0.0)], [verdict(0.0)], "vanilla")
    assert float(loss) == pytest.approx(math.log(2))  # undecided
    loss = discriminator_loss([verdict(2.0)], [verdict(1.0)], "vanilla")
    expected = -0.5 * (math.log(1 / (1 + math.exp(-2))) + math.log(1 - 1 / (1 + math.exp(-1))))
    assert float(loss) == pytest.approx(expected)
    assert discriminator_loss([verdict(1e4)], [verdict(1e4)], "vanilla").isfinite()


def test_several_verdicts_count_alike_whatever_their_size():
    one, two = ([verdict(0.0)], [verdict(0.0)]), ([verdict(*[3.0] * 50)], [verdict(*[-3.0] * 50)])
    both = discriminator_loss(one[0] + two[0], one[1] + two[1], "hinge")
    assert float(both) == pytest.approx((1.0 + 0.0) / 2)
    assert float(generator_loss([verdict(1.0), verdict(*[4.0] * 9)])) == pytest.approx(-2.5)


def test_generator_loss_pushes_logits_up():
    logits = torch.tensor([1.0, -2.0], requires_grad=True)
    generator_loss([Verdict(logits, [])]).backward()
    assert torch.equal(logits.grad, torch.tensor([-0.5, -0.5]))


def test_feature_matching():
    a, b = torch.randn(1, 3, 4, 4), torch.randn(1, 5, 2, 2)
    assert float(feature_matching_loss([verdict(features=[a, b])], [verdict(features=[a, b])])) == 0
    moved = feature_matching_loss([verdict(features=[a, b])], [verdict(features=[a + 2, b - 1])])
    assert float(moved) == pytest.approx(1.5)
    real, fake = torch.ones(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    feature_matching_loss([Verdict(a, [real])], [Verdict(a, [fake])]).backward()
    assert real.grad is None  # real volumes are the target
    assert torch.equal(fake.grad, torch.tensor([-0.5, -0.5]))


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    x = torch.tensor([3.0, 4.0])
    found = adaptive_weight((weight * x).sum(), -(weight * 2 * x).sum(), weight)
    assert float(found) == pytest.approx(5 / (10 + 1e-4))
    assert not found.requires_grad
    assert weight.grad is None
    huge = adaptive_weight((weight * x).sum() * 1e6, (weight * x).sum() * 0, weight)
    assert float(huge) == 1e4  # clamped
