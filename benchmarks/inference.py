"""From an X-ray file to a volume on disk: seconds end to end, where they go, memory, and the start of a fresh process.

python benchmarks/inference.py [--quick] [--json FILE] [--checkpoint BUNDLE] [--device cuda] [--precision bf16]

Without a checkpoint a model of the default size draws 256×256×64 voxels with weights that nobody trained: its time is
that of a trained one. Memory is the resident set of a process of its own on the CPU, and what torch allocated on a GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# A script's own folder comes first on the path, and there ddpm.py would hide the package `ddpm`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import Row, medians, print_table, standard_parser, synchronize, time_interleaved, write_report
from dataset.intensity import HUWindow
from ddpm.bundle import write_bundle
from ddpm.network import DDPMConfig, LatentDiffusion
from vq_gan_3d.codec import CodecConfig, VQCodec
from vq_gan_3d.latents import FrozenCodec, LatentStatistics
from vq_gan_3d.memory import peak_rss_bytes
from vqgan_inference import XRay2CTPA, load_xray

ROOT = Path(__file__).resolve().parents[1]
STEPS = (10, 20)


def untrained_bundle(path: Path, quick: bool) -> None:
    """The sizes of ``model=vq_gan_3d`` and ``model=ddpm`` on 16×64×64 cells, or small ones."""
    torch.manual_seed(0)
    channels = 4
    codec = (
        CodecConfig(widths=(8, 8, 16), encoder_blocks=(1, 1, 1), decoder_blocks=(1, 1, 1)) if quick else CodecConfig()
    )
    frozen = FrozenCodec(VQCodec(codec), HUWindow())
    unet = {
        "widths": [32, 64] if quick else [96, 192, 320],
        "strides": [[1, 1, 1], [2, 2, 2]] if quick else [[1, 2, 2], [2, 2, 2], [2, 2, 2]],
        "blocks": [1, 1] if quick else [1, 2, 2],
        "attention_levels": [1 if quick else 2],
    }
    config = DDPMConfig.build(
        unet,
        {},
        {"lifted_channels": [8, 8], "xray_size": 64, "widths": [16, 32]} if quick else {},
        channels=channels,
        statistics=LatentStatistics((0.0,) * channels, (0.5,) * channels),
        codec_hash=frozen.content_hash,
        window=frozen.window,
        stride_dhw=codec.total_stride,
        latent_dhw=(4, 8, 8) if quick else (16, 64, 64),
        crop_dhw=None,
        context_dhw=None,
        spacing_mm=((5.0, 1.4, 1.4), (0.0, 0.0, 0.0)),
    )
    write_bundle(path, LatentDiffusion(config), frozen)


def make_xray(path: Path) -> None:
    """A picture of 2048×2048 pixels of 16 bits, as a detector gives."""
    y, x = np.mgrid[-1:1:2048j, -1:1:2048j]
    picture = np.exp(-2 * (x**2 + y**2)) + 0.1 * np.sin(40 * y) * np.exp(-4 * x**2)
    Image.fromarray(np.rint(60000 * np.clip(picture, 0, 1)).astype(np.uint16)).save(path)


def peak_gb(bundle: Path, xray: Path, device: str, precision: str, steps: int) -> float:
    """Largest memory of a fresh process that draws one volume, in GB."""
    code = (
        "import json, sys\nfrom vqgan_inference import XRay2CTPA, load_xray\n"
        "from benchmarks.inference import used_bytes\n"
        "bundle, xray, device, precision, steps = sys.argv[1:]\n"
        "model = XRay2CTPA.load_checkpoint(bundle, device)\n"
        "model.generate(load_xray(xray), steps=int(steps), precision=precision)\n"
        "print(json.dumps(used_bytes(device)))"
    )
    arguments = [sys.executable, "-c", code, str(bundle), str(xray), device, precision, str(steps)]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(json.loads(result.stdout.splitlines()[-1])) / 1e9


def used_bytes(device: str) -> int:
    """Largest memory so far: allocated by torch on a GPU, resident on the CPU."""
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else peak_rss_bytes()


def start_seconds(rounds: int) -> dict[str, float]:
    """Median seconds of fresh processes that import torch alone, and the inference road."""
    road = "import torch, ddpm.inference_run, ddpm.bundle, vqgan_inference"

    def run(code: str) -> None:
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

    return medians(time_interleaved({"torch": lambda: run("import torch"), "road": lambda: run(road)}, rounds))


def volume_rows(bundle: Path, device: str, precision: str, rounds: int, folder: Path) -> list[Row]:
    """Seconds by number of steps, the decoder's share, and memory."""
    picture = folder / "xray.png"
    make_xray(picture)
    model = XRay2CTPA.load_checkpoint(bundle, device)
    d, h, w = model.bundle.shape_dhw
    place = f"{w}×{h}×{d}, {'CPU' if device == 'cpu' else 'GPU'}, {precision}"
    spent = {"decode": 0.0}
    real = model.bundle.codec.codec.decode

    def timed_decode(code: torch.Tensor) -> torch.Tensor:
        synchronize()
        start = time.perf_counter()
        volume = real(code)
        synchronize()
        spent["decode"] += time.perf_counter() - start
        return volume

    def road(steps: int) -> None:
        volume = model.generate(load_xray(picture), steps=steps, precision=precision)
        volume.save_nifti(folder / f"{steps}.nii.gz")

    seconds = medians(time_interleaved({str(n): (lambda n=n: road(n)) for n in STEPS}, rounds))  # type: ignore[misc]
    model.bundle.codec.codec.decode = timed_decode  # type: ignore[method-assign]
    start = time.perf_counter()
    road(STEPS[0])
    share = 100 * spent["decode"] / (time.perf_counter() - start)
    rows = [Row(f"X-ray to volume: {n} steps, {place}", seconds[str(n)], "s") for n in STEPS]
    rows.append(Row(f"X-ray to volume: share of the decoder at {STEPS[0]} steps, {place}", share, "%"))
    memory = peak_gb(bundle, picture, device, precision, 2)
    return [*rows, Row(f"X-ray to volume: peak memory, {place}", memory, "GB")]


def main() -> None:
    """Measure, print, write."""
    parser = standard_parser(__doc__ or "")
    parser.add_argument("--checkpoint", type=Path, help="bundle (default: untrained weights of the default size)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="(default: fp32)")
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else 3
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = arguments.checkpoint
        if bundle is None:
            bundle = folder / "model.ckpt"
            untrained_bundle(bundle, arguments.quick)
        rows = volume_rows(bundle.resolve(), arguments.device, arguments.precision, rounds, folder)
    start = start_seconds(rounds)
    rows.append(Row("X-ray to volume: imports beyond torch", start["road"] - start["torch"], "s"))
    rows.append(Row("X-ray to volume: import of torch", start["torch"], "s"))
    print_table(rows)
    if arguments.json:
        write_report(arguments.json, rows)


if __name__ == "__main__":
    main()
