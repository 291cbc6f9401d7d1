from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from ddpm.diffusion import Diffusion
from ddpm.samplers import SAMPLERS, Denoiser, NoiseSource, sampler_by_name, time_grid
from ddpm.schedules import CosineSchedule, FlowSchedule, LinearSchedule, NoiseSchedule, ZeroTerminalSchedule
from errors import ConfigurationError

SCHEDULES: list[NoiseSchedule] = [CosineSchedule(), LinearSchedule(), ZeroTerminalSchedule(), FlowSchedule()]
DETERMINISTIC = [name for name in SAMPLERS if name != "ddpm"]
MEAN = torch.tensor([-1.0, 0.5])[:, None]  # of each channel
SPREAD = torch.tensor([0.3, 1.0])[:, None]
ids = str


def gaussian_denoiser(diffusion: Diffusion) -> Denoiser:
    """E[x0 | x_t] where x0 is normal with MEAN and SPREAD: the regression of x0 on x_t."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = diffusion.alpha_sigma_like(t.double(), x)
        gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
        return (MEAN + gain * (x - alpha * MEAN)).to(x.dtype)

    return denoise


def flow_of(noise: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Where the probability-flow equation of that Gaussian ends exactly: its standardised value never changes."""
    alpha, sigma = schedule.alpha_sigma(torch.ones((), dtype=torch.float64))
    return MEAN + SPREAD * (noise - alpha * MEAN) / (alpha**2 * SPREAD**2 + sigma**2).sqrt()


def run(name: str, denoise: Denoiser, noise: Tensor, steps: int, diffusion: Diffusion) -> Tensor:
    rng = NoiseSource(1, range(len(noise)))
    return SAMPLERS[name](denoise, noise, time_grid(steps, diffusion.schedule), diffusion, rng)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=ids)
@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_have_the_mean_and_spread_of_the_data(name: str, schedule: NoiseSchedule) -> None:
    diffusion = Diffusion(schedule)
    noise = NoiseSource(0, [0]).normal((2, 20_000))
    x = run(name, gaussian_denoiser(diffusion), noise, 250 if name == "ddpm" else 60, diffusion)[0]
    torch.testing.assert_close(x.mean(1, keepdim=True), MEAN, atol=0.03, rtol=0)
    torch.testing.assert_close(x.std(1, keepdim=True), SPREAD, atol=0, rtol=0.04)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=ids)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_samplers_follow_the_exact_trajectory(name: str, schedule: NoiseSchedule) -> None:
    diffusion = Diffusion(schedule)
    noise = torch.randn(3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = run(name, gaussian_denoiser(diffusion), noise, 400, diffusion)
    torch.testing.assert_close(x, flow_of(noise, schedule), atol=1e-2 if name in ("ddim", "euler") else 1e-3, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=ids)
@pytest.mark.parametrize(
    ("name", "least", "most"), [("euler", 1.7, 2.4), ("ddim", 1.7, 2.4), ("heun", 3.3, 5), ("dpm_solver_pp_2m", 2.6, 5)]
)
def test_order_of_convergence(name: str, least: float, most: float, schedule: NoiseSchedule) -> None:
    diffusion = Diffusion(schedule)
    noise = torch.randn(1, 2, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = flow_of(noise, schedule)
    coarse, fine = (
        (run(name, gaussian_denoiser(diffusion), noise, steps, diffusion) - exact).norm() for steps in (60, 120)
    )
    # Half the step: error / 2 at first order, / 4 at second (less for steps in ln SNR, unbounded at both ends)
    assert least < coarse / fine < most


@pytest.mark.parametrize("schedule", SCHEDULES, ids=ids)
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 40])
def test_a_single_point_is_reached_in_any_number_of_steps(name: str, schedule: NoiseSchedule, steps: int) -> None:
    diffusion, point = Diffusion(schedule), torch.tensor([[1.5, -2.0]])
    noise = NoiseSource(0, range(3)).normal((2,))
    x = run(name, lambda x, t: point.expand_as(x), noise, steps, diffusion)
    torch.testing.assert_close(x, point.expand(3, 2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_two_clusters_are_found_in_twenty_steps(name: str) -> None:
    diffusion = Diffusion(CosineSchedule())

    def denoise(x: Tensor, t: Tensor) -> Tensor:  # E[x0 | x_t] for points at -2 and +2, equally likely
        alpha, sigma = diffusion.alpha_sigma_like(t, x)
        return 2 * torch.tanh(2 * alpha * x / sigma.square())

    x = run(name, denoise, NoiseSource(0, range(2000)).normal((1,)), 20, diffusion)
    assert float((x.abs() - 2).abs().mean()) < 0.05
    assert float((x > 0).float().mean()) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=ids)
def test_euler_on_the_flow_is_ddim(schedule: NoiseSchedule) -> None:
    diffusion, noise = Diffusion(schedule), torch.randn(2, 2, 6, dtype=torch.float64)
    denoise = gaussian_denoiser(diffusion)
    euler, ddim = (run(name, denoise, noise, 9, diffusion) for name in ("euler", "ddim"))
    torch.testing.assert_close(euler, ddim)


# --- diffusers' schedulers as an oracle -------------------------------------------------------------------------------


def curved(x: Tensor, share: float) -> Tensor:
    """Some prediction of x0 that bends with x and time."""
    return torch.tanh(x) * (1 - 0.5 * share) + 0.1


LINEAR: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "sample",
    "timestep_spacing": "trailing",
}


class Ones(NoiseSource):
    """Noise that both sides can be given alike."""

    def normal(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        return torch.ones(len(self._streams), *shape, device=device)


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("ddpm", diffusers.DDPMScheduler(**LINEAR, clip_sample=False, variance_type="fixed_small")),
        ("ddim", diffusers.DDIMScheduler(**LINEAR, clip_sample=False, set_alpha_to_one=True)),
        ("dpm_solver_pp_2m", diffusers.DPMSolverMultistepScheduler(**LINEAR, final_sigmas_type="zero")),
    ],
)
@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_every_step_equals_diffusers(name: str, scheduler: Any, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("ddpm", "ddim", "dpmsolver_multistep"):
        monkeypatch.setattr(
            f"diffusers.schedulers.scheduling_{module}.randn_tensor",
            lambda shape, *_, **__: torch.ones(shape, dtype=torch.float64),
        )
    scheduler.set_timesteps(steps)
    noise = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, theirs = noise, []
    for timestep in scheduler.timesteps:
        x = scheduler.step(curved(x, float(timestep + 1) / 1000), timestep, x).prev_sample
        theirs.append(x)
    ours: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        ours.append(x)
        return curved(x, float(t[0]))

    times = torch.cat([(scheduler.timesteps.double() + 1) / 1000, torch.zeros(1)])
    ours.append(SAMPLERS[name](denoise, noise, times, Diffusion(LinearSchedule()), Ones(0, [0, 1])))
    assert len(ours) == steps + 1
    for index, (a, b) in enumerate(zip(ours[1:], theirs, strict=True)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, msg=lambda text, index=index: f"step {index}: {text}")


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_every_euler_step_equals_diffusers_flow_matching(shift: float) -> None:
    places = torch.linspace(1, 0, 11)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=places[:-1].tolist())
    diffusion = Diffusion(FlowSchedule(shift), "flow")
    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    x, theirs = noise, []
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        x0 = curved(x, float(sigma))
        x = scheduler.step((x - x0) / sigma, timestep, x).prev_sample  # velocity = ε - x0 = (x - x0) / t
        theirs.append(x)
    ours: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        ours.append(x)
        return curved(x, float(diffusion.schedule.sigma(t)[0]))

    ours.append(SAMPLERS["euler"](denoise, noise, places, diffusion, NoiseSource(0, [0, 1])))
    for a, b in zip(ours[1:], theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_every_heun_call_equals_diffusers_flow_matching(shift: float) -> None:
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(10)
    places = scheduler.sigmas.unique().flip(0)  # it names the places of second calls twice
    diffusion = Diffusion(FlowSchedule(), "flow")
    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    x, theirs = noise, []
    for timestep in scheduler.timesteps:
        sigma = float(timestep) / 1000
        x = scheduler.step((x - curved(x, sigma)) / sigma, timestep, x).prev_sample  # velocity = (x - x0) / t
        theirs.append(x)
    ours: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        ours.append(x)
        return curved(x, float(t[0]))

    ours.append(SAMPLERS["heun"](denoise, noise, places, diffusion, NoiseSource(0, [0, 1])))
    assert len(theirs) == 2 * 10 - 1  # two calls a step, one in the last
    for a, b in zip(ours[1:], theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


# --- seeds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sample_is_the_same_alone_in_a_batch_and_in_any_order(name: str) -> None:
    diffusion = Diffusion()

    def sample(indices: list[int]) -> Tensor:
        rng = NoiseSource(7, indices)
        noise = rng.normal((2, 4))
        denoise = gaussian_denoiser(diffusion)
        return SAMPLERS[name](denoise, noise, time_grid(6, diffusion.schedule), diffusion, rng)

    batch, alone, turned = sample([0, 1, 2, 3]), sample([2]), sample([3, 1])
    assert torch.equal(batch[2:3], alone)
    assert torch.equal(batch[[3, 1]], turned)
    assert len(torch.unique(batch[:, 0, 0])) == 4


def test_seeds_and_samples_have_streams_of_their_own() -> None:
    draws = [NoiseSource(seed, [index]).normal((1000,)) for seed in (0, 1) for index in (0, 1)]
    correlation = torch.corrcoef(torch.cat(draws)) - torch.eye(4)
    assert float(correlation.abs().max()) < 0.15
    again = NoiseSource(0, [0])
    first, second = again.normal((1000,)), again.normal((1000,))
    assert torch.equal(first, draws[0])
    assert not torch.equal(first, second)


def test_only_ancestral_sampling_draws_noise_on_the_way() -> None:
    diffusion, noise = Diffusion(), torch.randn(1, 2, 3)
    for name in SAMPLERS:
        results = [
            SAMPLERS[name](gaussian_denoiser(diffusion), noise, time_grid(5, diffusion.schedule), diffusion, rng)
            for rng in (NoiseSource(0, [0]), NoiseSource(1, [0]))
        ]
        assert torch.equal(*results) == (name != "ddpm"), name


@pytest.mark.parametrize("schedule", [*SCHEDULES, CosineSchedule(shift=3.0), FlowSchedule(shift=3.0)], ids=ids)
@pytest.mark.parametrize("steps", [1, 2, 17, 250])
def test_grids_fall_from_one_to_zero(schedule: NoiseSchedule, steps: int) -> None:
    times = time_grid(steps, schedule)
    assert len(times) == steps + 1
    assert (times[0], times[-1]) == (1, 0)
    assert (times.diff() < 0).all()


def test_grids_are_even_in_the_time_of_rectified_flow() -> None:
    torch.testing.assert_close(time_grid(4, FlowSchedule()), torch.tensor([1, 0.75, 0.5, 0.25, 0]).double())
    torch.testing.assert_close(time_grid(4, FlowSchedule(3.0)), torch.tensor([1, 0.75, 0.5, 0.25, 0]).double())
    alpha, sigma = LinearSchedule().alpha_sigma(time_grid(10, LinearSchedule()))
    steps = (sigma / (alpha + sigma)).diff()
    torch.testing.assert_close(steps, steps.mean().expand(10), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: time_grid(0, CosineSchedule()), "steps=0"),
        (lambda: sampler_by_name("plms"), "sampler=plms: choose one of ddpm"),
        (lambda: NoiseSource(-1, [0]), "seed=-1"),
        (lambda: NoiseSource(0, [-2]), "must not be negative"),
    ],
)
def test_wrong_settings_are_refused(call: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        call()
