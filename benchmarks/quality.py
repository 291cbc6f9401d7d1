"""Reconstruction quality against time: our codec with each quantizer, beside the reference plan, on the same patches.

python benchmarks/quality.py --data DIR --validation NAME NAME --minutes 4 --models fsq reference
python benchmarks/quality.py --steps 600 --models fsq ema simvq          # phantoms
"""

from __future__ import annotations

import math
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.harness import Row, print_table, standard_parser, write_report
from benchmarks.reference import ReferenceVQGAN
from benchmarks.vqgan import OurStep
from dataset.intensity import HUWindow
from dataset.sources import PhantomSource, VolumeSource, default_cache, find_nifti, prepare_all
from dataset.splits import split_patients
from dataset.volume_dataset import VolumeDataset
from evaluation.metrics.codebook import CodeUsage
from evaluation.metrics.image import psnr
from vq_gan_3d.codec import CodecConfig, VQCodec

VALIDATION_PATCHES = 96
WARMUP_STEPS = 30
POINTS = 8  # of each curve


def patches(arguments: Namespace) -> tuple[VolumeDataset, Tensor]:
    """Training patches, and a fixed set of validation patches (N, 1, P, P, P) in [0, 1]."""
    size = (arguments.patch,) * 3
    sources: list[VolumeSource] = (
        list(find_nifti(arguments.data))
        if arguments.data
        else [PhantomSource(seed, (128, 160, 160)) for seed in range(14)]
    )
    training, held_out = split_patients([s.patient for s in sources], 0.25, arguments.validation)

    def dataset(patients: set[str], seed: int) -> VolumeDataset:
        volumes, _ = prepare_all([s for s in sources if s.patient in patients], None, default_cache(), "volumes")
        return VolumeDataset(volumes, size, random=True, patches_per_volume=1, seed=seed)

    validation = dataset(held_out, seed=1)
    drawn = [
        validation[(index // len(validation), index % len(validation))]["hu"] for index in range(VALIDATION_PATCHES)
    ]
    return dataset(training, seed=0), HUWindow().to_unit(torch.stack(drawn))


def batches(dataset: VolumeDataset, batch_size: int) -> Iterator[Tensor]:
    """Endless batches (B, 1, P, P, P) in [0, 1]; every model sees the same."""
    step = 0
    while True:
        numbers = range(step * batch_size, (step + 1) * batch_size)
        yield HUWindow().to_unit(torch.stack([dataset[divmod(n, len(dataset))]["hu"] for n in numbers]))
        step += 1


def build(name: str) -> tuple[nn.Module, float, int]:
    """Model, learning rate and number of codes; ``fsq``, ``ema:8`` (with that many code channels) … are ours."""
    torch.manual_seed(0)
    if name == "reference":
        return ReferenceVQGAN(), 3e-4, 512
    ours = OurStep(checkpointing=False)
    quantizer, _, channels = name.partition(":")
    settings = ours.codec.config.as_dict() | {"quantizer": quantizer, "code_channels": int(channels or 4)}
    ours.codec = VQCodec(CodecConfig.from_dict(settings))
    return ours, 4e-4, ours.codec.config.n_codes


def codes_of(model: nn.Module, patches: Tensor) -> Tensor:
    """Indices of the codes that stand for patches (B, 1, P, P, P)."""
    if isinstance(model, OurStep):
        return model.codec(patches).indices
    assert isinstance(model, ReferenceVQGAN)
    return model.codebook.nearest(model.encoder(patches).float().movedim(1, -1).flatten(0, -2))


@torch.no_grad()
def score(model: nn.Module, validation: Tensor, n_codes: int) -> tuple[float, float]:
    """Mean PSNR in dB over validation patches, and share of codes used there."""
    model.eval()
    usage, values = CodeUsage(n_codes), []
    for part in validation.split(8):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(part)[0].float().clamp(0, 1)
            usage.update(codes_of(model, part))
        values += [psnr(a[0], b[0]) for a, b in zip(output, part, strict=True)]
    model.train()
    return sum(values) / len(values), usage.usage()


def train(
    name: str, dataset: VolumeDataset, validation: Tensor, arguments: Namespace
) -> list[tuple[int, float, float, float]]:
    """Train for a time or a number of steps; returns (step, seconds of training, PSNR, usage) along the way."""
    model, learning_rate, n_codes = build(name)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, (0.9, 0.99), weight_decay=1e-4, fused=True)
    curve: list[tuple[int, float, float, float]] = []
    seconds, step, next_score = 0.0, 0, 0.0

    def progress() -> float:
        """Share of the budget that is spent; the learning rate follows it, so that every curve ends annealed."""
        return step / arguments.steps if arguments.steps else seconds / (60 * arguments.minutes)

    for batch in batches(dataset, arguments.batch):
        start = time.perf_counter()
        for group in optimizer.param_groups:
            cosine = 0.025 + 0.975 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress())))
            group["lr"] = learning_rate * cosine * min(1.0, (step + 1) / WARMUP_STEPS)
        with torch.autocast("cpu", torch.bfloat16):
            output, own_loss = model(batch)
        loss = torch.nn.functional.l1_loss(output.float(), batch) + own_loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds += time.perf_counter() - start
        step += 1
        if progress() >= next_score or progress() >= 1:
            next_score += 1 / POINTS
            curve.append((step, seconds, *score(model, validation, n_codes)))
            _, _, decibel, usage = curve[-1]
            print(f"{name}: step {step}, {seconds:.0f} s, {decibel:.2f} dB, {usage:.1%} of the codes", flush=True)
        if progress() >= 1:
            return curve
    raise AssertionError("the stream of batches is endless")


def main() -> None:
    """Train each model in turn and compare."""
    parser = standard_parser(__doc__ or "")
    parser.add_argument("--data", help="folder of NIfTI (default: phantoms)")
    parser.add_argument("--validation", nargs="*", default=[], help="names of held-out patients")
    parser.add_argument("--models", nargs="+", default=["fsq", "reference"], help="fsq, ema, simvq:8, reference")
    parser.add_argument("--minutes", type=float, default=4.0, help="training time of each model")
    parser.add_argument("--steps", type=int, default=0, help="number of steps instead of a time")
    parser.add_argument("--patch", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.minutes = min(arguments.minutes, 0.2)
    dataset, validation = patches(arguments)
    curves = {name: train(name, dataset, validation, arguments) for name in arguments.models}
    rows = []
    reference = curves["reference"][-1][2] if "reference" in curves else None
    for name, curve in curves.items():
        for step, seconds, value, _ in curve[:-1]:
            rows.append(Row(f"curve {name}: PSNR after {seconds:.0f} s, step {step}", value, "dB"))
        _, seconds, value, usage = curve[-1]
        rows.append(Row(f"{name}: PSNR at the end, {curve[-1][0]} steps, {seconds:.0f} s", value, "dB", reference))
        rows.append(Row(f"{name}: codes used on validation patches", usage, "share"))
    print_table(rows)
    if arguments.json:
        write_report(Path(arguments.json), rows)


if __name__ == "__main__":
    main()
