"""Whole volumes by tiles: seams, time and memory of each way to put tiles together.

python benchmarks/seams.py [--quick] [--json FILE] [--checkpoint FILE] [--volume CT.nii.gz]

For each way the seam ratio at its own tile borders (see `evaluation.metrics.seams`), beside that of the whole volume
coded at once, measured at the same borders; seconds; the peak resident memory above the input, in a process of its own.
Without a checkpoint a small codec is trained on phantoms first; without a volume a phantom is coded.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.harness import Row, print_table, standard_parser, write_report
from benchmarks.memory import peak_rss_of
from dataset.phantom import make_phantom
from dataset.tiling import HaloTiling, Tiling, Triple
from dataset.volume_io import read_nifti
from evaluation.metrics.seams import seam_ratio
from evaluation.reconstruct import reconstruct
from patchwise_512x512x604.utils.patch_utils import Kind
from patchwise_512x512x604.utils.reconstruction import Mode, ReconstructionResult, reconstruct_volume
from vq_gan_3d.pretrained import load_codec

ROOT = Path(__file__).resolve().parents[1]
TILE_DHW: Triple = (64, 96, 96)
MAX_SHAPE_DHW: Triple = (150, 180, 180)
QUICK_MAX_SHAPE_DHW: Triple = (72, 112, 112)
TRAINING = [
    "dataset=phantom",
    "dataset.size=[48,96,96]",
    "dataset.patch_size=[32,64,64]",
    "dataset.patches_per_volume=8",
    "dataset.n_patients=12",
    "model=vq_gan_3d_small",
    "model.widths=[16,32,64]",
    "model.encoder_blocks=[1,1,2]",
    "model.decoder_blocks=[1,1,2]",
    "model.discriminator_width=4",
    "model.discriminator_iter_start=100000",
    "training.batch_size=2",
    "training.learning_rate=0.002",
    "training.lr_schedule=cosine",
    "training.warmup_steps=10",
    "training.num_epochs=1000",
    "training.num_workers=0",
    "training.validate_every_n_epochs=1000",
    "training.ema_decay=0.9",
    "hardware.device=cpu",
    "callbacks.progress_bar=false",
]


class Way(NamedTuple):
    """One way to put tiles together: arguments of `reconstruct_volume`."""

    mode: Mode
    overlap: float = 0.25
    weights: Kind = "linear"

    @property
    def name(self) -> str:
        """How a row calls it."""
        return "halo" if self.mode == "halo" else f"blend {self.weights}, overlap {self.overlap:g}"


WAYS = (
    Way("halo"),
    Way("blend", 0.0),
    *(Way("blend", overlap, kind) for overlap in (0.25, 0.5) for kind in ("linear", "cosine", "gaussian")),
)


def train(folder: Path, steps: int) -> Path:
    """Train a small codec on phantoms by the baseline's own script; returns its checkpoint."""
    script = ROOT / "baseline_256x256x64" / "train" / "train_vqgan.py"
    command = [sys.executable, str(script), *TRAINING, f"training.max_steps={steps}", f"output_dir={folder}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "checkpoints" / "final.ckpt"


def run(checkpoint: str, hu: np.ndarray, way: Way, tile: Triple) -> ReconstructionResult:
    """Code a volume one way, in fp32 on the CPU; float32 HU."""
    codec, window = load_codec(checkpoint)
    mode, overlap, weights = way
    return reconstruct_volume(
        codec, hu, window, mode=mode, tile_dhw=tile, overlap=overlap, weights=weights, dtype=np.float32
    )


def prepare(checkpoint: str, volume: str, way: Way, tile: Triple) -> Callable[[], object]:
    """For `peak_rss_of`: the input and a first small run are the baseline."""
    hu = np.load(volume)
    run(checkpoint, hu[:8, :8, :8], Way("halo"), tile)
    return lambda: run(checkpoint, hu, way, tile)


def rows_of(checkpoint: Path, hu: np.ndarray, tile: Triple, scratch: Path) -> list[Row]:
    """Seams, time and memory of every way."""
    codec, window = load_codec(checkpoint)
    clipped = window.to_hu(window.to_unit(hu))
    whole, _ = reconstruct(codec, window, hu)
    depth, height, width = hu.shape
    shape, stride = (depth, height, width), codec.config.total_stride
    np.save(scratch / "volume.npy", hu)
    rows = [
        Row(f"{what} along {axis}", n, "voxels")
        for what, sizes in (("volume", shape), ("tile", tile))
        for axis, n in zip("DHW", sizes, strict=True)
    ]
    for way in WAYS:
        result = run(str(checkpoint), hu, way, tile)
        assert result.hu is not None
        halo = codec.config.receptive_halo_vox()[1]
        tiling = (
            HaloTiling(shape, tile, halo, stride) if way.mode == "halo" else Tiling(shape, tile, way.overlap, stride)
        )
        peak = peak_rss_of(prepare, str(checkpoint), str(scratch / "volume.npy"), way, tile)
        own, reference = (seam_ratio(volume, clipped, tiling) for volume in (result.hu, whole))
        rows += [
            Row.compared(f"seams: {way.name}", own, "of inside", reference),
            Row.compared(
                f"error: {way.name}",
                float(np.abs(result.hu - clipped).mean()),
                "HU",
                float(np.abs(whole - clipped).mean()),
            ),
            Row(f"off the whole volume: {way.name}", float(np.abs(result.hu - whole).max()), "HU"),
            Row(f"time: {way.name}", result.seconds, "s"),
            Row(f"memory: {way.name}", peak / 1e6, "MB"),
        ]
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = standard_parser(__doc__ or "")
    parser.add_argument("--checkpoint", type=Path, help="a codec (default: trained on phantoms here)")
    parser.add_argument("--volume", type=Path, help="a chest CT (.nii.gz), cut to its middle (default: a phantom)")
    arguments = parser.parse_args()
    limit = QUICK_MAX_SHAPE_DHW if arguments.quick else MAX_SHAPE_DHW
    hu = read_nifti(arguments.volume).hu if arguments.volume else make_phantom(0, limit).hu
    middle = tuple(slice((n - min(n, m)) // 2, (n + min(n, m)) // 2) for n, m in zip(hu.shape, limit, strict=True))
    hu = np.ascontiguousarray(hu[middle])
    print(f"{'×'.join(map(str, hu.shape))} voxels (D×H×W), tiles of {'×'.join(map(str, TILE_DHW))}")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        checkpoint = arguments.checkpoint or train(scratch / "codec", 10 if arguments.quick else 150)
        rows = rows_of(checkpoint, hu, TILE_DHW, scratch)
    print_table(rows)
    if arguments.json:
        write_report(arguments.json, rows)


if __name__ == "__main__":
    main()
