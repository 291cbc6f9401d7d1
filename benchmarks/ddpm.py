"""Speed of the diffusion U-Net at two latent sizes, beside MONAI's DiffusionModelUNet of equal parameters, in one run.

python benchmarks/ddpm.py [--quick] [--json FILE] [--device cuda]

MONAI's is given the cheapest form of that size, narrow where the grid is fine, and is timed in both memory layouts; the
faster one is the reference.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# A script's own folder comes first on the path, and there this file would hide the package `ddpm`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Row, medians, print_table, standard_parser, time_interleaved, write_report
from benchmarks.peers import why_no_monai
from benchmarks.reference import fused_adam
from ddpm.unet import UNet3D, UNetConfig

Stride = tuple[int, int, int]
Predictor = Callable[[Tensor, Tensor], Tensor]  # x (B, C, d, h, w), t (B,) in [0, 1] -> the shape of x
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last_3d}


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


def monai_unet(channels: int) -> nn.Module | None:
    """MONAI's U-Net of equal parameters for a latent of so many channels, or ``None`` where it is not installed."""
    if why_no_monai():
        return None
    model: nn.Module = importlib.import_module("monai.networks.nets").DiffusionModelUNet(
        spatial_dims=3,
        in_channels=channels,
        out_channels=channels,
        channels=(32, 64, 192),
        attention_levels=(False, False, True),
        num_res_blocks=1,
        num_head_channels=48,
        norm_num_groups=16,
    )
    return model


def training_step(model: nn.Module, predict: Predictor, x: Tensor) -> Callable[[], object]:
    """Forward, backward and optimizer in bf16."""
    optimizer, t = fused_adam(model), torch.full((len(x),), 0.5, device=x.device)
    target = torch.randn_like(x)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16):
            output = predict(x, t)
        (output.float() - target).square().mean().backward()
        optimizer.step()

    return step


def sampling_step(predict: Predictor, x: Tensor) -> Callable[[], object]:
    """One call of the network in bf16, without gradients."""
    t = torch.full((len(x),), 0.5, device=x.device)

    def step() -> None:
        with torch.inference_mode(), torch.autocast(x.device.type, torch.bfloat16):
            predict(x, t)

    return step


def gflop_of(predict: Predictor, x: Tensor) -> float:
    """Counted GFLOP of one call; a multiplication and an addition count as 2."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        predict(x, torch.full((len(x),), 0.5, device=x.device))
    return counter.get_total_flops() / 1e9


def _call_peer(peer: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    output: Tensor = peer(x, 1000 * t)  # it counts steps of 1000
    return output  # (B, C, d, h, w)


def case_rows(case: Case, device: str, rounds: int, warmup: int) -> list[Row]:
    """All rows of one latent size."""
    torch.manual_seed(0)
    x = torch.randn(1, case.channels, *case.shape, device=device).contiguous(memory_format=torch.channels_last_3d)
    ours = our_unet(case).to(device)
    contenders: dict[str, tuple[nn.Module, Predictor, Tensor]] = {"ours": (ours, ours, x)}
    for layout, memory_format in LAYOUTS.items():
        if (peer := monai_unet(case.channels)) is not None:
            peer = peer.to(device).to(memory_format=memory_format)  # type: ignore[call-overload]
            contenders[f"MONAI {layout}"] = (peer, partial(_call_peer, peer), x.contiguous(memory_format=memory_format))
    rows = []
    for kind in ("sampling step", "training step"):
        steps = {
            name: training_step(*contender) if kind == "training step" else sampling_step(*contender[1:])
            for name, contender in contenders.items()
        }
        seconds = medians(time_interleaved(steps, rounds, warmup))
        value = seconds.pop("ours")
        what = f"{kind}, {case.name}"
        if seconds:
            peer_layout = min(seconds, key=lambda name: seconds[name])
            rows.append(Row.compared(f"{what}, over {peer_layout}", value, "s", seconds[peer_layout]))
        else:
            rows.append(Row(what, value, "s"))
    parameters = {name: sum(p.numel() for p in model.parameters()) / 1e6 for name, (model, _, _) in contenders.items()}
    gflop = {name: gflop_of(predict, example) for name, (_, predict, example) in contenders.items()}
    peer_name = f"MONAI {next(iter(LAYOUTS))}"
    rows.append(Row(f"parameters, {case.name}", parameters["ours"], "M", parameters.get(peer_name)))
    rows.append(Row(f"operations of a call, {case.name}", gflop["ours"], "GFLOP", gflop.get(peer_name)))
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
    for case in QUICK_CASES if arguments.quick else CASES:
        rows += case_rows(case, arguments.device, rounds, warmup)
    print_table(rows)
    if arguments.json:
        write_report(arguments.json, rows, packages=("monai",))


if __name__ == "__main__":
    main()
