from __future__ import annotations

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddpm.diffusion import OBJECTIVES, TIME_MARGIN, WEIGHTINGS, Diffusion
from ddpm.schedules import (
    SCHEDULES,
    CosineSchedule,
    FlowSchedule,
    LinearSchedule,
    NoiseSchedule,
    ZeroTerminalSchedule,
    build_schedule,
    schedule_from_dict,
)
from errors import ConfigurationError

ALL_SCHEDULES: list[NoiseSchedule] = [
    CosineSchedule(),
    CosineSchedule(shift=3.0),
    LinearSchedule(),
    ZeroTerminalSchedule(),
    ZeroTerminalSchedule(CosineSchedule()),
    FlowSchedule(),
    FlowSchedule(shift=3.0),
]
VARIANCE_PRESERVING = [schedule for schedule in ALL_SCHEDULES if not isinstance(schedule, FlowSchedule)]
ids = str
DIFFUSERS_TIMES = (torch.arange(1000, dtype=torch.float64) + 1) / 1000


def linear_scheduler(**settings: object) -> diffusers.DDPMScheduler:
    return diffusers.DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", **settings)


@pytest.mark.parametrize("schedule", ALL_SCHEDULES, ids=ids)
def test_schedules_run_from_clean_to_noise(schedule: NoiseSchedule) -> None:
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(t)
    assert alpha[0] == 1
    assert sigma[0] == 0
    assert alpha[-1] < 0.02
    assert sigma[-1] > 0.99
    log_snr = schedule.log_snr(t)
    assert (log_snr.diff() < 0).all()
    inner = slice(1, -1)
    torch.testing.assert_close(log_snr[inner], 2 * torch.log(alpha[inner] / sigma[inner]))


@pytest.mark.parametrize("schedule", VARIANCE_PRESERVING, ids=ids)
@given(t=st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_variance_is_preserved(schedule: NoiseSchedule, t: float) -> None:
    alpha, sigma = schedule.alpha_sigma(torch.tensor([t], dtype=torch.float64))
    assert float(alpha**2 + sigma**2) == pytest.approx(1, abs=1e-12)


def test_linear_equals_diffusers_at_its_steps() -> None:
    theirs = linear_scheduler().alphas_cumprod.double().sqrt()
    torch.testing.assert_close(LinearSchedule().alpha(DIFFUSERS_TIMES), theirs, rtol=2e-5, atol=1e-7)


def test_linear_between_steps_lies_between_them() -> None:
    alpha = LinearSchedule().alpha(torch.tensor([0.5, 0.5004, 0.501], dtype=torch.float64))
    assert alpha[0] > alpha[1] > alpha[2]


def test_zero_terminal_snr_equals_diffusers_rescaling() -> None:
    theirs = linear_scheduler(rescale_betas_zero_snr=True).alphas_cumprod.double().sqrt()
    ours = ZeroTerminalSchedule().alpha(DIFFUSERS_TIMES)
    assert ours[-1] == 0
    torch.testing.assert_close(ours[:-1], theirs[:-1], rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("kind", [CosineSchedule, FlowSchedule])
def test_shift_multiplies_noise_over_signal(kind: type[CosineSchedule] | type[FlowSchedule]) -> None:
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    plain, shifted = kind(), kind(shift=3.0)
    ratio = shifted.sigma(t) / shifted.alpha(t) / (plain.sigma(t) / plain.alpha(t))
    torch.testing.assert_close(ratio, torch.full_like(t, 3.0))


def test_flow_shift_equals_the_published_formula() -> None:
    t = torch.linspace(0, 1, 11)
    torch.testing.assert_close(FlowSchedule(shift=3.0).sigma(t), 3 * t / (1 + 2 * t))


def test_times_keep_shape_and_dtype() -> None:
    for schedule in ALL_SCHEDULES:
        alpha, sigma = schedule.alpha_sigma(torch.rand(2, 3))
        assert alpha.shape == sigma.shape == (2, 3)
        assert alpha.dtype == torch.float32


@pytest.mark.parametrize("schedule", ALL_SCHEDULES, ids=ids)
def test_schedules_travel_as_plain_numbers(schedule: NoiseSchedule) -> None:
    assert schedule_from_dict(schedule.as_dict()) == schedule
    diffusion = Diffusion(schedule, objective="flow", gamma=2.0)
    assert Diffusion.from_dict(diffusion.as_dict()) == diffusion


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_schedules_by_name(name: str) -> None:
    assert build_schedule(name).name == name


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: build_schedule("cosinus"), "schedule=cosinus: choose one of cosine"),
        (lambda: build_schedule("linear", shift=2.0), "takes no shift"),
        (lambda: build_schedule("flow", shift=0.0), "shift=0.0"),
        (lambda: schedule_from_dict({"name": "flow", "shfit": 1.0}), "shfit"),
        (lambda: schedule_from_dict({"shift": 1.0}), "schedule=None"),
        (lambda: ZeroTerminalSchedule(FlowSchedule()), "ends in pure noise as it is"),
        (lambda: Diffusion(objective="eps"), "objective=eps: choose one of v"),
        (lambda: Diffusion(weighting="snr"), "weighting=snr"),
        (lambda: Diffusion(time_sampling="beta"), "time_sampling=beta"),
        (lambda: Diffusion(gamma=0.0), "gamma=0.0"),
        (lambda: Diffusion(ZeroTerminalSchedule(), objective="epsilon"), "choose objective v, x0 or flow"),
        (lambda: Diffusion(FlowSchedule(), objective="epsilon"), "schedule=flow"),
        (lambda: Diffusion.from_dict({"objectiv": "v"}), "objectiv"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(build: object, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as caught:
        build()  # type: ignore[operator]
    assert "\n" not in str(caught.value)


def pairs() -> list[tuple[NoiseSchedule, str]]:
    return [
        (schedule, objective)
        for schedule in ALL_SCHEDULES
        for objective in OBJECTIVES
        if not (objective == "epsilon" and schedule.ends_in_pure_noise)
    ]


@pytest.mark.parametrize(("schedule", "objective"), pairs(), ids=ids)
@given(t=st.floats(0.02, 0.98), seed=st.integers(0, 2**16))
@settings(max_examples=15, deadline=None)
def test_targets_invert_to_clean_and_noise(schedule: NoiseSchedule, objective: str, t: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 3, 4, generator=generator)
    diffusion, times = Diffusion(schedule, objective), torch.tensor([t, 1 - t])
    x_t = diffusion.add_noise(x0, noise, times)
    target = diffusion.target(x0, noise, times)
    alpha, sigma = schedule.alpha_sigma(times.double())
    slack = 1e-5 * float(1 + (1 / alpha).max() + (1 / sigma).max())  # float32, amplified by the division
    torch.testing.assert_close(diffusion.to_x0(target, x_t, times), x0, atol=slack, rtol=1e-4)
    torch.testing.assert_close(diffusion.to_epsilon(target, x_t, times), noise, atol=slack, rtol=1e-4)


@pytest.mark.parametrize(("schedule", "objective"), pairs(), ids=ids)
def test_min_snr_counts_the_error_of_x0(schedule: NoiseSchedule, objective: str) -> None:
    # Whatever the objective: weight × squared error of the output = min(SNR, γ) × squared error of x0.
    diffusion, t = Diffusion(schedule, objective, "min_snr", gamma=5.0), torch.linspace(0.05, 0.95, 19)
    x_t, output, error = torch.randn(19, 1), torch.randn(19, 1), torch.full((19, 1), 0.1)
    moved = diffusion.to_x0(output + error, x_t, t) - diffusion.to_x0(output, x_t, t)
    expected = schedule.log_snr(t).exp().clamp(max=5.0) * moved.square().flatten()
    torch.testing.assert_close(diffusion.loss_weight(t) * 0.1**2, expected, rtol=1e-2, atol=1e-6)


def test_min_snr_has_the_published_weights() -> None:
    t = torch.linspace(0.01, 0.99, 99)
    snr = CosineSchedule().log_snr(t).exp()
    for objective, expected in (
        ("epsilon", snr.clamp(max=5) / snr),
        ("v", snr.clamp(max=5) / (snr + 1)),
        ("x0", snr.clamp(max=5)),
    ):
        weight = Diffusion(objective=objective, weighting="min_snr").loss_weight(t)
        torch.testing.assert_close(weight, expected)
    assert (Diffusion(weighting="none").loss_weight(t) == 1).all()


@pytest.mark.parametrize(("schedule", "objective"), pairs(), ids=ids)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_are_finite_at_both_ends(schedule: NoiseSchedule, objective: str, weighting: str) -> None:
    weight = Diffusion(schedule, objective, weighting).loss_weight(torch.tensor([0.0, 1e-4, 0.5, 1 - 1e-4, 1.0]))
    assert weight.isfinite().all()
    assert (weight >= 0).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_are_those_of_each_sample(objective: str) -> None:
    diffusion = Diffusion(objective=objective, weighting="min_snr", gamma=2.0)
    t = torch.tensor([0.2, 0.5, 0.8])
    x0, noise = torch.randn(3, 2, 4, 4, 4), torch.randn(3, 2, 4, 4, 4)
    target = diffusion.target(x0, noise, t)
    torch.testing.assert_close(diffusion.losses(lambda x, t: target, x0, noise, t), torch.zeros(3))
    zero = diffusion.losses(lambda x, t: torch.zeros_like(x), x0, noise, t)
    torch.testing.assert_close(zero, diffusion.loss_weight(t) * target.square().mean((1, 2, 3, 4)))


def test_the_network_sees_the_noisy_sample() -> None:
    seen: list[Tensor] = []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return x

    x0, noise, t = torch.ones(1, 1, 2), torch.full((1, 1, 2), 2.0), torch.tensor([0.25])
    Diffusion(FlowSchedule(), "flow").losses(predict, x0, noise, t)
    torch.testing.assert_close(seen[0], torch.full((1, 1, 2), 0.75 * 1 + 0.25 * 2))


@given(count=st.integers(1, 64), seed=st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_times_are_stratified(count: int, seed: int) -> None:
    t = Diffusion().sample_times(count, torch.Generator().manual_seed(seed))
    assert ((t > 0) & (t < 1)).all()
    assert sorted((t * count).long().clamp(max=count - 1).tolist()) == list(range(count))
    assert torch.equal(t, Diffusion().sample_times(count, torch.Generator().manual_seed(seed)))


def test_logit_normal_times_prefer_the_middle() -> None:
    t = Diffusion(FlowSchedule(), "flow", time_sampling="logit_normal").sample_times(10_000)
    logits = torch.logit(t)
    assert float(logits.mean()) == pytest.approx(0, abs=0.02)
    assert float(logits.std()) == pytest.approx(1, abs=0.02)


def test_logit_normal_times_reach_both_ends() -> None:
    """Stratified draws follow the distribution to one draw: P(t < s) = Φ(logit s), in the tails as in the middle."""
    count = 1_000_000
    t = Diffusion(FlowSchedule(), "flow", time_sampling="logit_normal").sample_times(count).double()
    for share in (0.01, 0.02, 0.5, 0.98, 0.99):
        expected = count * float(torch.special.ndtr(torch.logit(torch.tensor(share, dtype=torch.float64))))
        assert abs(int((t < share).sum()) - expected) <= 1.5, share
    assert float(t.min()) >= TIME_MARGIN * 0.99
    assert float(t.max()) <= 1 - TIME_MARGIN
