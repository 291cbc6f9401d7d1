"""Speed, memory and size of the 3D VQ-GAN, beside the reference plan and MONAI's VQVAE, in one run.

python benchmarks/vqgan.py [--quick] [--json FILE] [--device cuda]
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn
from torch.utils.data import DataLoader

import config as shared_config
from benchmarks.harness import (
    Row,
    conv_mflop_per_voxel_step,
    conv_roof_steps,
    medians,
    print_table,
    standard_parser,
    time_interleaved,
    write_report,
)
from benchmarks.memory import PeakMemory, peak_rss_of
from benchmarks.peers import monai_step, monai_vqvae, why_no_monai
from benchmarks.reference import ReferenceVQGAN, fused_adam, reference_step
from vq_gan_3d.hardware import return_memory_early
from vq_gan_3d.quantizer import nearest_codes
from vq_gan_3d.runner import build_module
from vq_gan_3d.vqgan import VQGAN

# The roof of the reference: the plain convolution in which its plan does half of its work, at the size of the step.
PLAIN_CONV_CHANNELS, PLAIN_CONV_SIZE, QUICK_CONV_SIZE = 128, 64, 16
MEGABYTE = 1e6
Prepare = Callable[[str, int, int, int, int], Callable[[], object]]


def our_module(*overrides: str) -> VQGAN:
    """The LightningModule of the default configuration."""
    base = Path(next(iter(shared_config.__path__))).parent / "baseline_256x256x64" / "config"
    with initialize_config_dir(version_base="1.3", config_dir=str(base)):
        return build_module(compose("base_cfg", list(overrides)))


class OurStep(nn.Module):
    """Our codec in the form that the reference's step takes: (B, 1, D, H, W) -> reconstruction, codebook loss."""

    def __init__(self, checkpointing: bool) -> None:
        super().__init__()
        codec = our_module().codec
        codec.set_checkpointing(checkpointing)
        self.codec = codec

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1, D, H, W) -> (B, 1, D, H, W) and a scalar."""
        result = self.codec(x)
        return result.volume, result.codebook_loss


def stepper(model: nn.Module, batch: Tensor, dtype: torch.dtype, device: str) -> Callable[[], object]:
    """One training step of a model on a batch: forward, backward, optimizer."""
    model, batch = model.to(device).train(), batch.to(device)
    optimizer = fused_adam(model)
    return lambda: reference_step(model, optimizer, batch, dtype)


def prepare_peak(device: str, batch: int, depth: int, height: int, width: int) -> Callable[[], object]:
    """A step of ours in bf16 with block checkpointing, after a small one that makes gradients and optimizer state."""
    if device == "cpu":
        return_memory_early()  # as the trainer does with hardware.checkpointing=true
    model = OurStep(checkpointing=True).to(device).train()
    optimizer = fused_adam(model)
    reference_step(model, optimizer, torch.rand(1, 1, 16, 32, 32, device=device), torch.bfloat16)
    for parameter in model.parameters():  # gradients belong to the baseline
        parameter.grad = torch.zeros_like(parameter)
    volume = torch.rand(batch, 1, depth, height, width, device=device)

    def step() -> None:
        with torch.autocast(volume.device.type, torch.bfloat16):
            reconstruction, loss = model(volume)
        (torch.nn.functional.l1_loss(reconstruction.float(), volume) + loss).backward()
        optimizer.step()

    return step


def prepare_whole_peak(device: str, batch: int, depth: int, height: int, width: int) -> Callable[[], object]:
    """The trainer's own step with both discriminators at work, otherwise as in `prepare_peak`."""
    if device == "cpu":
        return_memory_early()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    module = our_module("model.discriminator_iter_start=0", "hardware.checkpointing=true")

    def step(*shape: int) -> None:
        hu = torch.randint(-1000, 1000, shape, dtype=torch.int16)
        trainer = pl.Trainer(
            accelerator="gpu" if device == "cuda" else device,
            devices=1,
            precision="bf16-mixed",
            max_epochs=1,
            barebones=True,
        )
        trainer.fit(module, DataLoader([{"hu": hu}], batch_size=None))  # type: ignore[arg-type]  # a list serves

    step(1, 1, 16, 32, 32)
    module.to(device)
    for parameter in module.parameters():  # gradients belong to the baseline
        parameter.grad = torch.zeros_like(parameter)
    return lambda: step(batch, 1, depth, height, width)


def step_rows(device: str, rounds: int, warmup: int) -> list[Row]:
    """Training steps at 64³, interleaved."""
    size = 64
    voxels = size**3
    torch.manual_seed(0)
    batch = torch.rand(1, 1, size, size, size)
    precisions = {"fp32": torch.float32, "bf16": torch.bfloat16}
    steps: dict[str, Callable[[], object]] = {}
    edge = PLAIN_CONV_SIZE if rounds > 1 else QUICK_CONV_SIZE
    roof_gflop = 0.0
    for precision, dtype in precisions.items():
        steps[f"ours {precision}"] = stepper(OurStep(False), batch, dtype, device)
        steps[f"ours {precision} checkpointed"] = stepper(OurStep(True), batch, dtype, device)
        steps[f"reference {precision}"] = stepper(ReferenceVQGAN(), batch, dtype, device)
        if (monai := monai_vqvae()) is not None:
            model = monai.to(device).train()
            steps[f"monai {precision}"] = partial(monai_step, model, fused_adam(model), batch.to(device), dtype)
        roof_gflop, plain = conv_roof_steps(PLAIN_CONV_CHANNELS, edge, dtype, device)
        steps |= {f"plain {precision} {layout}": step for layout, step in plain.items()}
    seconds = medians(time_interleaved(steps, rounds, warmup))
    rate = {name: voxels / value / 1e3 for name, value in seconds.items()}

    def row(ours: str, theirs: str, note: str) -> Row:
        what = f"step 64³ {ours.removeprefix('ours ')}, {note}"
        return Row.compared(what, rate[ours], "kvoxel/s", rate[theirs], better="higher")

    rows = []
    for precision in precisions:
        rows.append(row(f"ours {precision}", f"reference {precision}", "no checkpointing, over reference"))
        checkpointed = f"ours {precision} checkpointed"
        rows.append(row(checkpointed, f"reference {precision}", "block checkpointing, over reference"))
    rows.append(row("ours bf16", "reference fp32", "no checkpointing, over reference fp32"))
    if (missing := why_no_monai()) is None:
        rows += [
            row(f"ours {precision}", f"monai {precision}", "no checkpointing, over MONAI VQVAE")
            for precision in precisions
        ]
    else:
        print(f"MONAI left out: {missing}")
    mflop, timed = (conv_mflop_per_voxel_step(ReferenceVQGAN(), n) for n in (32, size if rounds > 1 else 32))
    rows.append(Row("reference: MFLOP per voxel and step", mflop, "MFLOP"))
    rows.append(Row("ours: MFLOP per voxel and step", conv_mflop_per_voxel_step(OurStep(False)), "MFLOP", mflop))
    for precision in precisions:
        roof = roof_gflop / min(value for name, value in seconds.items() if name.startswith(f"plain {precision}"))
        reached = timed * rate[f"reference {precision}"]  # MFLOP x kvoxel/s = GFLOP/s
        rows.append(
            Row(f"reference {precision}: share of a plain convolution", reached, "GFLOP/s", roof, reached / roof)
        )
    return rows


def memory_rows(device: str, quick: bool) -> list[Row]:
    """Peak memory of a step above weights, gradients and optimizer state, each in a process of its own."""

    def peak(batch: int, depth: int, height: int, width: int, prepare: Prepare = prepare_peak) -> float:
        return peak_rss_of(prepare, device, batch, depth, height, width, device=device)

    size = 64 if quick else 128
    what = f"peak bytes per voxel, {size}³ bf16, block checkpointing"
    rows = [Row(what, peak(1, size, size, size) / size**3, "B")]
    if not quick:
        whole = peak(1, size, size, size, prepare_whole_peak)
        rows.append(Row(f"{what}, the trainer's step with discriminators", whole / size**3, "B"))
    if not quick:
        rows.append(Row("peak of 1×256×256×64 bf16, block checkpointing", peak(1, 64, 256, 256) / MEGABYTE, "MB"))
    if device == "cuda":
        rows.append(Row("peak of 4×256×256×128 bf16, block checkpointing", peak(4, 128, 256, 256) / MEGABYTE, "MB"))
    return rows


def size_rows() -> list[Row]:
    """Parameters by part."""
    parts = our_module().parameters_by_part()
    names = {"total": "parameters", "generator": "parameters: generator"}
    return [Row(names.get(name, f"parameters: {name}"), count / 1e6, "M") for name, count in parts.items()]


def codebook_rows(device: str, quick: bool) -> list[Row]:
    """Lookup of a million vectors among 512 codes."""
    count = 2**17 if quick else 2**20
    vectors, codebook = torch.randn(count, 64, device=device), torch.randn(512, 64, device=device)
    nearest_codes(vectors[:8192], codebook)
    seconds = medians(time_interleaved({"ours": lambda: nearest_codes(vectors, codebook)}, 3))["ours"]
    with PeakMemory(device) as memory:
        nearest_codes(vectors, codebook)
    what = f"codebook: {count} vectors × 512 codes of 64 channels"
    return [Row(what, seconds, "s"), Row(f"{what}, memory", memory.bytes / MEGABYTE, "MB")]


def main() -> None:
    """Measure, print, write."""
    parser = standard_parser(__doc__ or "")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    arguments = parser.parse_args()
    rounds, warmup = (1, 0) if arguments.quick else (5, 1)
    rows = size_rows()
    rows += memory_rows(arguments.device, arguments.quick)
    rows += codebook_rows(arguments.device, arguments.quick)
    rows += step_rows(arguments.device, rounds, warmup)
    print_table(rows)
    if arguments.json:
        write_report(arguments.json, rows, packages=("monai",))


if __name__ == "__main__":
    main()
