"""Adversarial losses and their balance with the reconstruction loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vq_gan_3d.discriminators import Verdict
from vq_gan_3d.distributed import all_reduce_mean


def discriminator_loss(real: Sequence[Verdict], fake: Sequence[Verdict], kind: str) -> Tensor:
    """Loss of the discriminator, the mean over its verdicts: scalar.

    ``hinge``: Lim & Ye 2017, https://arxiv.org/abs/1705.02894; ``vanilla``: Goodfellow et al. 2014,
    https://arxiv.org/abs/1406.2661, equation 1.
    """
    terms = []
    for r, f in zip(real, fake, strict=True):
        if kind == "hinge":
            terms.append(0.5 * (F.relu(1 - r.logits.float()).mean() + F.relu(1 + f.logits.float()).mean()))
        else:
            terms.append(0.5 * (F.softplus(-r.logits.float()).mean() + F.softplus(f.logits.float()).mean()))
    return torch.stack(terms).mean()


def generator_loss(fake: Sequence[Verdict]) -> Tensor:
    """Non-saturating loss of the generator: minus the mean logit of its verdicts, a scalar."""
    return torch.stack([-verdict.logits.float().mean() for verdict in fake]).mean()


def feature_matching_loss(real: Sequence[Verdict], fake: Sequence[Verdict]) -> Tensor:
    """Mean L1 distance of inner activations (Wang et al. 2017, https://arxiv.org/abs/1711.11585, equation 3)."""
    terms = [
        F.l1_loss(b.float(), a.detach().float())
        for r, f in zip(real, fake, strict=True)
        for a, b in zip(r.features, f.features, strict=True)
    ]
    return torch.stack(terms).mean()


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor) -> Tensor:
    """λ of Esser et al. 2020, https://arxiv.org/abs/2012.09841, equation 7: the ratio of gradient norms, a scalar.

    The gradients at the last layer are averaged over ranks first, so λ belongs to the global batch.
    """

    def gradient_norm(loss: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
        return all_reduce_mean(gradient.detach().float()).norm()

    weight = gradient_norm(reconstruction_loss) / (gradient_norm(adversarial_loss) + 1e-4)
    return weight.clamp(0.0, 1e4).detach()
