"""Guidance at sampling: what turns a trained network into the ``denoise(x_t, t) -> x0`` that samplers take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm.conditions import Conditions
from ddpm.diffusion import Diffusion
from errors import ConfigurationError

Network = Callable[[Tensor, Tensor, Conditions], Tensor]  # x_t, t, conditions -> output
Classifier = Callable[[Tensor], Tensor]  # x0 (B, C, ...) -> logits (B, K), or (B, 1) or (B,) of class 1
Range = tuple[Tensor, Tensor]  # least and greatest value, each broadcast to (B, C, ...)


@dataclass(frozen=True)
class ClassifierGuidance:
    """Pull towards what a classifier calls ``label``.

    Attributes:
        classifier: differentiable, on what is denoised: logits (B, K), or (B, 1) or (B,) for the log-odds of class 1.
            `ddpm.network.LatentDiffusion.sample` takes one of squashed codes, as ``PEClassifier(input=latent)`` is, and
            brings latents to those. One that judges volumes is wrapped together with the decoder.
        label: (B,) int64 classes.
        scale: 0 is off, 1 is Bayes' rule for cells that vary by themselves. Those of a latent vary together, which the
            covariance that is used leaves out: scales of tens move a sample as a whole.
    """

    classifier: Classifier
    label: Tensor
    scale: float = 1.0

    def gradient(self, x0: Tensor) -> Tensor:
        """∂ log p(label | x0) / ∂x0, (B, C, ...); works under ``no_grad`` and ``inference_mode`` too."""
        with torch.inference_mode(False), torch.enable_grad():
            x0 = x0.detach().clone().requires_grad_()
            logits = self.classifier(x0).float()
            label = self.label.to(x0.device).clone()
            if logits.dim() == 1 or logits.shape[1] == 1:
                log_odds = torch.where(label == 1, 1.0, -1.0) * logits.reshape(-1)
                log_probability = F.logsigmoid(log_odds).sum()
            else:
                log_probability = -F.cross_entropy(logits, label, reduction="sum")
            return torch.autograd.grad(log_probability, x0)[0]  # (B, C, ...)


@dataclass(frozen=True)
class GuidedDenoiser:
    """x0 prediction of a network with classifier-free and classifier guidance.

    Classifier-free (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598, equation 6, their w + 1 being ``scale``):
    x0 = null + scale·(conditioned - null), both from one call of twice the batch. All objectives are linear in x0, so
    it makes no difference that it is applied to x0.

    Classifier (Dhariwal & Nichol 2021, https://arxiv.org/abs/2105.05233, algorithm 2): Bayes' rule moves x0 by
    Cov[x0 | x_t]·∇ log p(label | x0). Latents are standardised, and for unit variance that covariance is σ²/(α² + σ²);
    the gradient is taken at the x0 prediction: the classifier need not know noise, the U-Net is not differentiated.

    Attributes:
        network: (x_t, t, conditions) -> output.
        diffusion: objective and schedule.
        conditions: of the batch.
        null_conditions: the same with what guidance drops dropped; needed for a scale other than 1.
        scale: 1 is off, above 1 strengthens the condition, 0 ignores it.
        rescale: in [0, 1], how far the spread of each guided sample is brought back to that of the conditioned one (Lin
            et al. 2023, https://arxiv.org/abs/2305.08891, section 3.4).
        classifier: optional.
        x0_range: the x0 prediction is kept inside. Objective ``epsilon`` needs it: near pure noise its error is divided
            by α, and a sampler of few steps never recovers.
    """

    network: Network
    diffusion: Diffusion
    conditions: Conditions
    null_conditions: Conditions | None = None
    scale: float = 1.0
    rescale: float = 0.0
    classifier: ClassifierGuidance | None = None
    x0_range: Range | None = None

    def __post_init__(self) -> None:
        if self.scale != 1 and self.null_conditions is None:
            raise ConfigurationError(f"guidance={self.scale}: a scale other than 1 needs the null condition")
        if not 0 <= self.rescale <= 1:
            raise ConfigurationError(f"guidance rescale={self.rescale}: give a number from 0 to 1")

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x_t (B, C, ...), t (B,) -> guided x0, (B, C, ...) float32."""
        x0 = self._bounded(self._classifier_free(x_t, t))
        if self.classifier is not None and self.classifier.scale:
            alpha, sigma = self.diffusion.alpha_sigma_like(t, x0)
            covariance = sigma.square() / (alpha.square() + sigma.square())
            x0 = self._bounded(x0 + self.classifier.scale * covariance * self.classifier.gradient(x0))
        return x0  # (B, C, ...)

    def _bounded(self, x0: Tensor) -> Tensor:
        return x0 if self.x0_range is None else x0.clamp(*self.x0_range)  # (B, C, ...)

    def _classifier_free(self, x_t: Tensor, t: Tensor) -> Tensor:
        if self.scale == 1 or self.null_conditions is None:
            return self.diffusion.to_x0(self.network(x_t, t, self.conditions), x_t, t)
        both = join_conditions(self.conditions, self.null_conditions)
        x_2, t_2 = torch.cat([x_t, x_t]), torch.cat([t, t])
        conditioned, null = self.diffusion.to_x0(self.network(x_2, t_2, both), x_2, t_2).chunk(2)  # (B, C, ...)
        guided = null + self.scale * (conditioned - null)
        if self.rescale:
            axes = tuple(range(1, guided.dim()))
            factor = conditioned.std(axes, keepdim=True) / guided.std(axes, keepdim=True).clamp_min(1e-8)
            guided = guided * (1 + self.rescale * (factor - 1))
        return guided  # (B, C, ...)


def join_conditions(first: Conditions, second: Conditions) -> Conditions:
    """One batch of both, the first's samples before the second's.

    Raises:
        ConfigurationError: one has a kind of condition that the other lacks.
    """

    def join(name: str, a: Tensor | None, b: Tensor | None) -> Tensor | None:
        if (a is None) != (b is None):
            raise ConfigurationError(f"conditions and null conditions do not agree about {name}")
        return None if a is None or b is None else torch.cat([a, b])

    if (first.lifted is None) != (second.lifted is None):
        raise ConfigurationError("conditions and null conditions do not agree about lifted")
    lifted = None
    if first.lifted is not None and second.lifted is not None:
        lifted = tuple(torch.cat([a, b]) for a, b in zip(first.lifted, second.lifted, strict=True))
    return Conditions(
        lifted=lifted,
        tokens=join("tokens", first.tokens, second.tokens),
        vector=join("vector", first.vector, second.vector),
        extra=join("extra", first.extra, second.extra),
    )
