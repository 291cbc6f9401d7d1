from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ddpm.conditions import Conditions
from ddpm.diffusion import OBJECTIVES, Diffusion
from ddpm.guidance import ClassifierGuidance, GuidedDenoiser, join_conditions
from ddpm.samplers import SAMPLERS, NoiseSource, time_grid
from ddpm.schedules import CosineSchedule
from errors import ConfigurationError

SHAPE = (2, 3, 4, 4)
NULL = Conditions(vector=torch.zeros(5, 1))
GIVEN = Conditions(vector=torch.linspace(-1, 1, 5)[:, None])


class Network:
    """A trained network stands for x0 = 0.5·x_t + vector; whatever the objective, that is what its output means."""

    def __init__(self, diffusion: Diffusion) -> None:
        self.diffusion = diffusion
        self.batches: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        self.batches.append(len(x))
        assert conditions.vector is not None
        x0 = 0.5 * x + conditions.vector.reshape(-1, *(1,) * (x.dim() - 1))
        alpha, sigma = self.diffusion.alpha_sigma_like(t, x)
        return self.diffusion.target(x0, (x - alpha * x0) / sigma, t)


def noisy() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, *SHAPE, generator=generator), torch.linspace(0.1, 0.9, 5)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_scales_the_effect_of_the_condition(objective: str, scale: float) -> None:
    diffusion, (x, t) = Diffusion(objective=objective), noisy()
    network = Network(diffusion)
    assert GIVEN.vector is not None
    guided = GuidedDenoiser(network, diffusion, GIVEN, NULL, scale)(x, t)
    expected = 0.5 * x + scale * GIVEN.vector.reshape(5, 1, 1, 1, 1)
    torch.testing.assert_close(guided, expected, atol=1e-4, rtol=1e-4)
    assert network.batches == ([5] if scale == 1 else [10])  # one call for both, and none for what cancels out


def test_rescaling_brings_the_spread_back() -> None:
    diffusion, (x, t) = Diffusion(), noisy()

    def network(x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:  # the condition widens the prediction
        assert conditions.vector is not None
        x0 = x * (1 + conditions.vector.abs().reshape(-1, 1, 1, 1, 1))
        alpha, sigma = diffusion.alpha_sigma_like(t, x)
        return diffusion.target(x0, (x - alpha * x0) / sigma, t)

    def spread(**settings: float) -> Tensor:
        return GuidedDenoiser(network, diffusion, GIVEN, NULL, **settings)(x, t).std((1, 2, 3, 4))

    plain, guided = spread(scale=1.0), spread(scale=4.0)
    assert (guided[[0, 1, 3, 4]] > 1.3 * plain[[0, 1, 3, 4]]).all()  # the middle patient's vector is 0
    torch.testing.assert_close(spread(scale=4.0, rescale=1.0), plain)
    torch.testing.assert_close(spread(scale=4.0, rescale=0.5), (plain + guided) / 2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("form", ["classes", "one column", "flat"])
def test_the_classifier_pulls_towards_its_label(mode: type, form: str) -> None:
    diffusion, (x, t) = Diffusion(), noisy()

    def classifier(x0: Tensor) -> Tensor:
        log_odds = x0.mean((1, 2, 3, 4))
        return {
            "classes": torch.stack([torch.zeros_like(log_odds), log_odds], 1),
            "one column": log_odds[:, None],
            "flat": log_odds,
        }[form]

    label = torch.tensor([0, 1, 0, 1, 1])
    free = GuidedDenoiser(Network(diffusion), diffusion, GIVEN)
    pulled = replace(free, classifier=ClassifierGuidance(classifier, label, 100.0))
    with mode():
        moved = (pulled(x, t) - free(x, t)).mean((1, 2, 3, 4))
    assert torch.equal(moved > 0, label == 1)


def test_the_classifier_moves_by_bayes_rule() -> None:
    # log p(1 | x0) has the gradient (1 - p) / n in each of n numbers; it is worth the posterior's variance σ².
    diffusion = Diffusion(CosineSchedule())
    x, t = torch.zeros(1, 1, 2, 2, 2), torch.tensor([0.6])
    conditions = Conditions(vector=torch.zeros(1, 1))
    guidance = ClassifierGuidance(lambda x0: x0.sum((1, 2, 3, 4)), torch.tensor([1]), 1.0)
    guided = GuidedDenoiser(Network(diffusion), diffusion, conditions, classifier=guidance)(x, t)
    sigma = diffusion.schedule.sigma(t)
    torch.testing.assert_close(guided, (sigma**2 * 0.5).expand(8).reshape(x.shape))


def test_classifier_guidance_shifts_gaussian_samples_as_bayes_says() -> None:
    # Data N(0, 1) and p(1 | x0) ∝ exp(k·x0) for the log-odds k·x0 far below 0: the posterior is N(k, 1).
    diffusion, pull = Diffusion(), 0.5
    conditions = Conditions(vector=torch.zeros(4000, 1))

    def network(x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:  # E[x0 | x_t] = α·x_t
        alpha, sigma = diffusion.alpha_sigma_like(t, x)
        return diffusion.target(alpha * x, (x - alpha.square() * x) / sigma, t)

    guidance = ClassifierGuidance(lambda x0: pull * x0.flatten() - 30, torch.ones(4000, dtype=torch.long), 1.0)
    denoise = GuidedDenoiser(network, diffusion, conditions, classifier=guidance)
    rng = NoiseSource(0, range(4000))
    x = SAMPLERS["heun"](denoise, rng.normal((1,)), time_grid(30, diffusion.schedule), diffusion, rng)
    assert float(x.mean()) == pytest.approx(pull, abs=0.05)
    assert float(x.std()) == pytest.approx(1, abs=0.05)


def test_scale_zero_asks_no_classifier() -> None:
    diffusion, (x, t) = Diffusion(), noisy()

    def classifier(x0: Tensor) -> Tensor:
        raise AssertionError("asked")

    guidance = ClassifierGuidance(classifier, torch.zeros(5, dtype=torch.long), 0.0)
    GuidedDenoiser(Network(diffusion), diffusion, GIVEN, classifier=guidance)(x, t)


def test_predictions_are_bounded_where_asked() -> None:
    diffusion, (x, t) = Diffusion(), noisy()
    free = GuidedDenoiser(Network(diffusion), diffusion, GIVEN, NULL, 3.0)(x, t)
    low, high = (torch.tensor(ends).reshape(2, 1, 1, 1) for ends in ((-0.7, -0.2), (0.5, 0.9)))
    bounded = GuidedDenoiser(Network(diffusion), diffusion, GIVEN, NULL, 3.0, x0_range=(low, high))(x, t)
    for channel, ends in enumerate(((-0.7, 0.5), (-0.2, 0.9))):
        assert float(free[:, channel].max()) > ends[1]
        assert torch.equal(bounded[:, channel], free[:, channel].clamp(*ends))


def test_the_classifier_is_asked_about_nothing_out_of_bounds_and_cannot_push_there() -> None:
    diffusion, (x, t) = Diffusion(), noisy()
    seen: list[Tensor] = []

    def classifier(x0: Tensor) -> Tensor:
        seen.append(x0.detach())
        return x0.mean((1, 2, 3, 4))

    guidance = ClassifierGuidance(classifier, torch.ones(5, dtype=torch.long), 1000.0)
    ends = (torch.tensor(-0.7), torch.tensor(0.7))
    guided = GuidedDenoiser(Network(diffusion), diffusion, GIVEN, NULL, 3.0, classifier=guidance, x0_range=ends)(x, t)
    assert float(seen[0].abs().max()) == float(guided.abs().max()) == pytest.approx(0.7)


def test_joined_conditions_keep_their_order() -> None:
    first = Conditions(
        (torch.zeros(2, 3, 1, 1, 1),), torch.zeros(2, 4, 5), torch.zeros(2, 6), torch.zeros(2, 1, 1, 1, 1)
    )
    second = Conditions((torch.ones(2, 3, 1, 1, 1),), torch.ones(2, 4, 5), torch.ones(2, 6), torch.ones(2, 1, 1, 1, 1))
    both = join_conditions(first, second)
    assert both.lifted is not None
    for value in (both.lifted[0], both.tokens, both.vector, both.extra):
        assert value is not None
        assert value.flatten(1).mean(1).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("name", ["lifted", "tokens", "vector", "extra"])
def test_conditions_that_do_not_match_are_refused(name: str) -> None:
    value = torch.zeros(1, 1, 1)
    some = Conditions(**{name: (value,) if name == "lifted" else value})  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=name):
        join_conditions(some, Conditions())


def test_wrong_settings_are_refused() -> None:
    network, diffusion = Network(Diffusion()), Diffusion()
    with pytest.raises(ConfigurationError, match=r"guidance=2.0: .* null condition"):
        GuidedDenoiser(network, diffusion, GIVEN, scale=2.0)
    with pytest.raises(ConfigurationError, match=r"rescale=1.5"):
        GuidedDenoiser(network, diffusion, GIVEN, NULL, rescale=1.5)
