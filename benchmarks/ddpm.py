"""Speed of the diffusion U-Net at two latent sizes, beside MONAI's DiffusionModelUNet of equal parameters, in one run.

python benchmarks/ddpm.py [--quick] [--json FILE] [--device cuda]

MONAI's is given the cheapest form of that size, narrow where the grid is fine, and is timed in both memory layouts; the
faster one is the reference. Rows "told of an X-ray" are those of the shipped model, ``model=ddpm``: lifted features,
tokens and a vector, in training with the encoder of the radiograph (in sampling it is asked once a volume). MONAI's, of
as many parameters as U-Net and encoder together, is given as many tokens of the same width and need not make them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# A script's own folder comes first on the path, and there this file would hide the package `ddpm`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Row, medians, print_table, standard_parser, time_interleaved, write_report
from benchmarks.peers import why_no_monai
from benchmarks.reference import fused_adam
from dataset.intensity import HUWindow
from ddpm.conditioner import TOKEN_GRID
from ddpm.conditions import ConditionBatch
from ddpm.network import DDPMConfig, LatentDiffusion
from ddpm.unet import UNet3D, UNetConfig
from vq_gan_3d.latents import LatentStatistics

Stride = tuple[int, int, int]
Predictor = Callable[[Tensor, Tensor], Tensor]  # x (B, C, d, h, w), t (B,) in [0, 1] -> the shape of x
MODEL = Path(__file__).resolve().parents[1] / "config/model/ddpm.yaml"
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last_3d}


@dataclass(frozen=True)
class Contender:
    """A model as it is timed.

    Attributes:
        model: whose parameters are trained.
        training: what a training step calls.
        sampling: what a sampling step calls.
        x: noisy latent in the memory layout of the model.
    """

    model: nn.Module
    training: Predictor
    sampling: Predictor
    x: Tensor


@dataclass(frozen=True)
class Case:
    """A latent and the stride at which our network meets it, so that both have features on 16×32×32 cells."""

    channels: int
    shape: tuple[int, int, int]
    stem_stride: Stride

    @property
    def name(self) -> str:
        """Size and channels for the report."""
        return f"{'×'.join(map(str, self.shape))} latent of {self.channels} channels, bf16"


CASES = (Case(4, (16, 64, 64), (1, 2, 2)), Case(64, (16, 32, 32), (1, 1, 1)))
QUICK_CASES = (Case(4, (8, 16, 16), (1, 2, 2)), Case(64, (8, 8, 8), (1, 1, 1)))


def our_unet(case: Case) -> UNet3D:
    """Ours for one case, some 13.5 M parameters."""
    config = UNetConfig(
        in_channels=case.channels, out_channels=case.channels, strides=(case.stem_stride, *UNetConfig().strides[1:])
    )
    return UNet3D(config)


def our_conditional(case: Case) -> LatentDiffusion:
    """The shipped model for one case, 24.2 M parameters."""
    settings: Any = OmegaConf.to_container(OmegaConf.load(MODEL), resolve=True)
    config = DDPMConfig.build(
        settings["unet"],
        settings["diffusion"],
        settings["conditioner"],
        channels=case.channels,
        statistics=LatentStatistics((0.0,) * case.channels, (1.0,) * case.channels),
        codec_hash="",
        window=HUWindow(),
        stride_dhw=(4, 4, 4),
        latent_dhw=case.shape,
        crop_dhw=None,
        context_dhw=None,
        spacing_mm=((1.0, 1.0, 1.0), (0.0, 0.0, 0.0)),
    )
    return LatentDiffusion(config)


def monai_unet(channels: int, token_channels: int = 0) -> nn.Module | None:
    """MONAI's U-Net of equal parameters, or ``None`` where it is not installed.

    Args:
        channels: of the latent.
        token_channels: of what it attends to; 0 for the one that is told nothing.
    """
    if why_no_monai():
        return None
    told = {"with_conditioning": True, "cross_attention_dim": token_channels} if token_channels else {}
    model: nn.Module = importlib.import_module("monai.networks.nets").DiffusionModelUNet(
        spatial_dims=3,
        in_channels=channels,
        out_channels=channels,
        channels=(32, 64, 240 if token_channels else 192),
        attention_levels=(False, False, True),
        num_res_blocks=1,
        num_head_channels=60 if token_channels else 48,
        norm_num_groups=16,
        **told,
    )
    return model


def training_step(contender: Contender) -> Callable[[], object]:
    """Forward, backward and optimizer in bf16."""
    x, predict = contender.x, contender.training
    optimizer, t = fused_adam(contender.model), torch.full((len(x),), 0.5, device=x.device)
    target = torch.randn_like(x)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16):
            output = predict(x, t)
        (output.float() - target).square().mean().backward()
        optimizer.step()

    return step


def sampling_step(contender: Contender) -> Callable[[], object]:
    """One call of the network in bf16, without gradients."""
    x, predict = contender.x, contender.sampling
    t = torch.full((len(x),), 0.5, device=x.device)

    def step() -> None:
        with torch.inference_mode(), torch.autocast(x.device.type, torch.bfloat16):
            predict(x, t)

    return step


def gflop_of(contender: Contender) -> float:
    """Counted GFLOP of a sampling step; a multiplication and an addition count as 2."""
    x = contender.x
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        contender.sampling(x, torch.full((len(x),), 0.5, device=x.device))
    return counter.get_total_flops() / 1e9


def _call_peer(peer: nn.Module, tokens: Tensor | None, x: Tensor, t: Tensor) -> Tensor:
    output: Tensor = peer(x, 1000 * t, tokens)  # it counts steps of 1000
    return output  # (B, C, d, h, w)


def _noisy(case: Case, device: str) -> Tensor:
    x = torch.randn(1, case.channels, *case.shape, device=device)
    return x.contiguous(memory_format=torch.channels_last_3d)  # (1, C, d, h, w)


def peers(case: Case, x: Tensor, tokens: Tensor | None) -> dict[str, Contender]:
    """MONAI's U-Net in both memory layouts; none where it is not installed."""
    found: dict[str, Contender] = {}
    for layout, memory_format in LAYOUTS.items():
        if (peer := monai_unet(case.channels, 0 if tokens is None else tokens.shape[-1])) is not None:
            peer = peer.to(x.device).to(memory_format=memory_format)  # type: ignore[call-overload]
            call = partial(_call_peer, peer, tokens)
            found[f"MONAI {layout}"] = Contender(peer, call, call, x.contiguous(memory_format=memory_format))
    return found


def unconditional(case: Case, device: str) -> dict[str, Contender]:
    """U-Nets that are told nothing."""
    x, ours = _noisy(case, device), our_unet(case).to(device)
    return {"ours": Contender(ours, ours, ours, x), **peers(case, x, None)}


def conditional(case: Case, device: str) -> dict[str, Contender]:
    """The shipped model with a radiograph, and MONAI's U-Net with as many tokens."""
    x, ours = _noisy(case, device), our_conditional(case).to(device)
    told, size = ours.config.conditioner, ours.config.conditioner.xray_size
    batch = ConditionBatch(
        torch.rand(1, 1, 1, size, size, device=device),
        torch.ones(1, 1, dtype=torch.bool, device=device),
        2 * torch.rand(1, 1, *case.shape, 2, device=device) - 1,
        torch.zeros(1, dtype=torch.int64, device=device),
        ("",),
    )
    with torch.no_grad():
        conditions = ours.encode_conditions(batch)
    contender = Contender(
        ours, lambda x, t: ours(x, t, ours.encode_conditions(batch)), lambda x, t: ours(x, t, conditions), x
    )
    tokens = torch.randn(1, TOKEN_GRID**2, told.token_channels, device=device)  # (1, N, C)
    return {"ours": contender, **peers(case, x, tokens)}


def case_rows(name: str, contenders: dict[str, Contender], rounds: int, warmup: int) -> list[Row]:
    """All rows of one latent size, ours over the faster peer."""
    rows = []
    for kind, step_of in (("sampling step", sampling_step), ("training step", training_step)):
        steps = {who: step_of(contender) for who, contender in contenders.items()}
        seconds = medians(time_interleaved(steps, rounds, warmup))
        value = seconds.pop("ours")
        what = f"{kind}, {name}"
        if seconds:
            peer_layout = min(seconds, key=lambda who: seconds[who])
            rows.append(Row.compared(f"{what}, over {peer_layout}", value, "s", seconds[peer_layout]))
        else:
            rows.append(Row(what, value, "s"))
    parameters = {who: sum(p.numel() for p in each.model.parameters()) / 1e6 for who, each in contenders.items()}
    gflop = {who: gflop_of(contender) for who, contender in contenders.items()}
    peer_name = f"MONAI {next(iter(LAYOUTS))}"
    rows.append(Row(f"parameters, {name}", parameters["ours"], "M", parameters.get(peer_name)))
    rows.append(Row(f"operations of a call, {name}", gflop["ours"], "GFLOP", gflop.get(peer_name)))
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = standard_parser(__doc__ or "")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    arguments = parser.parse_args()
    rounds, warmup = (1, 0) if arguments.quick else (7, 2)
    if (missing := why_no_monai()) is not None:
        print(f"MONAI left out: {missing}")
    rows = []
    cases = QUICK_CASES if arguments.quick else CASES
    torch.manual_seed(0)
    for case in cases:
        rows += case_rows(case.name, unconditional(case, arguments.device), rounds, warmup)
    told = conditional(cases[0], arguments.device)
    rows += case_rows(f"{cases[0].name}, told of an X-ray", told, rounds, warmup)
    print_table(rows)
    if arguments.json:
        write_report(arguments.json, rows, packages=("monai",))


if __name__ == "__main__":
    main()
