"""Random patches of a native-grid chest CT as float tensors: the store beside .nii.gz, .npy, zarr and nibabel.

python benchmarks/patches.py [--quick] [--json FILE] [--volume CT.nii.gz]

Every reader gives the same voxels of the same random patches, warm (files in the page cache), in [0, 1]. The reference
is what a plain data set does: read the .nii.gz whole, then cut. The volume is a real CT, mirrored in depth up to 604
slices, which keeps its own noise and spacing: ``--volume``, else lidc_0002 of the shared data, else a phantom.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks.harness import Row, medians, print_table, standard_parser, time_interleaved, write_report
from dataset.body import body_metadata
from dataset.intensity import HUWindow
from dataset.phantom import make_phantom
from dataset.sources import StoreSource, prepare
from dataset.store import CHUNKS_DHW, open_store, write_store
from dataset.volume_dataset import VolumeDataset, collate
from dataset.volume_io import Volume, read_nifti

SIZE_DHW, PATCH_DHW = (604, 512, 512), (128, 256, 256)
QUICK_SIZE_DHW, QUICK_PATCH_DHW = (64, 256, 256), (32, 128, 128)
SHARED_CT = Path(__file__).resolve().parents[2] / "shared" / "data" / "ct_native" / "lidc_0002.nii.gz"
WORKERS = 2
MEGABYTE = 1e6
Size = tuple[int, int, int]
Window = tuple[slice, slice, slice]


def mirrored(hu: np.ndarray, depth: int) -> np.ndarray:
    """(D, H, W) -> (depth, H, W): run up and down through the slices as often as it takes."""
    last = len(hu) - 1
    index = last - np.abs(np.arange(depth) % max(1, 2 * last) - last)
    return np.ascontiguousarray(hu[index])


def random_patches(size: Size, patch: Size, seed: int = 0) -> Callable[[], Window]:
    """A stream of random windows; two streams of one seed are the same."""
    rng = np.random.default_rng(seed)

    def draw() -> Window:
        starts = [int(rng.integers(0, n - p + 1)) for n, p in zip(size, patch, strict=True)]
        d, h, w = (slice(start, start + p) for start, p in zip(starts, patch, strict=True))
        return d, h, w

    return draw


def readers(folder: Path, volume: Volume) -> dict[str, Callable[[Window], np.ndarray]]:
    """Write the volume in every format; returns by name what cuts a window (D, H, W) out of it."""
    import zarr

    hu = volume.hu
    paths = {kind: folder / f"volume{kind}" for kind in (".b2nd", ".nii.gz", ".nii", ".npy", ".zarr")}
    write_store(paths[".b2nd"], volume, {"body": body_metadata(hu, volume.affine)})
    # written by nibabel as others do; the standard axes (D, H, W) are its (k, j, i)
    image = nib.Nifti1Image(hu.transpose(2, 1, 0), np.diag([-1.0, -1.0, 1.0, 1.0]))
    nib.save(image, paths[".nii.gz"])
    nib.save(image, paths[".nii"])
    np.save(paths[".npy"], hu)
    chunks = tuple(min(n, c) for n, c in zip(hu.shape, CHUNKS_DHW, strict=True))
    zarr.create_array(str(paths[".zarr"]), data=hu, chunks=chunks)

    def whole(path: Path, at: Window) -> np.ndarray:
        return np.asarray(nib.load(path).dataobj).transpose(2, 1, 0)[at]  # type: ignore[attr-defined]

    def sliced(path: Path, at: Window) -> np.ndarray:
        return np.asarray(nib.load(path).dataobj[at[::-1]]).transpose(2, 1, 0)  # type: ignore[attr-defined]

    return {
        "store": lambda at: open_store(paths[".b2nd"]).hu[at],
        "nii.gz": lambda at: whole(paths[".nii.gz"], at),
        "nibabel's slicing of .nii.gz": lambda at: sliced(paths[".nii.gz"], at),
        "nibabel's slicing of .nii": lambda at: sliced(paths[".nii"], at),
        ".npy memory map": lambda at: np.load(paths[".npy"], mmap_mode="r")[at],
        "zarr": lambda at: np.asarray(zarr.open_array(str(paths[".zarr"]), mode="r")[at]),
    }


def as_tensor(hu: np.ndarray, window: HUWindow) -> torch.Tensor:
    """(D, H, W) int16 -> (1, D, H, W) float32 in [0, 1]."""
    return torch.from_numpy(window.to_unit(hu))[None]


def patch_rows(folder: Path, volume: Volume, patch: Size, rounds: int) -> list[Row]:
    """Time of one patch by each reader; the answers are compared first."""
    window = HUWindow()
    cut = readers(folder, volume)
    at = random_patches(volume.hu.shape, patch)()
    for name, read in cut.items():
        if not np.array_equal(read(at), volume.hu[at]):
            raise AssertionError(f"{name} gave other voxels")

    def step(read: Callable[[Window], np.ndarray]) -> Callable[[], object]:
        draw = random_patches(volume.hu.shape, patch)
        return lambda: as_tensor(read(draw()), window)

    seconds = medians(time_interleaved({name: step(read) for name, read in cut.items()}, rounds))
    ours = 1e3 * seconds.pop("store")
    return [Row.compared(f"patch: store over {name}", ours, "ms", 1e3 * other) for name, other in seconds.items()]


def loader_row(folder: Path, patch: Size, patches: int) -> Row:
    """Patches a second of the training data set itself, tissue-biased, by worker processes."""
    prepared = prepare(StoreSource(folder / "volume.b2nd"), None, folder)
    dataset = VolumeDataset([prepared], patch, random=True, patches_per_volume=patches, tissue_bias=0.75)
    loader = DataLoader(dataset, num_workers=WORKERS, collate_fn=collate)
    window, count = HUWindow(), 0
    start = time.perf_counter()
    for batch in loader:
        count += len(window.to_unit(batch["hu"]))
    return Row(f"patches a second, {WORKERS} loader workers", count / (time.perf_counter() - start), "1/s")


def size_rows(folder: Path, volume: Volume) -> list[Row]:
    """Bytes on disk; the ratio is the format's over raw int16 (below 1 is smaller)."""
    raw = volume.hu.nbytes / MEGABYTE
    rows = []
    for what, name in (("size of the store", "volume.b2nd"), ("size of .nii.gz", "volume.nii.gz")):
        size = (folder / name).stat().st_size / MEGABYTE
        rows.append(Row(what, size, "MB", raw, size / raw))
    size = sum(path.stat().st_size for path in (folder / "volume.zarr").rglob("*") if path.is_file()) / MEGABYTE
    rows.append(Row("size of zarr", size, "MB", raw, size / raw))
    start = time.perf_counter()
    write_store(folder / "again.b2nd", volume, {})
    rows.append(Row("writing the store", len(volume.hu) / (time.perf_counter() - start), "slices/s"))
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = standard_parser(__doc__ or "")
    parser.add_argument("--volume", type=Path, help="a chest CT (.nii.gz)")
    arguments = parser.parse_args()
    size, patch, rounds = (QUICK_SIZE_DHW, QUICK_PATCH_DHW, 3) if arguments.quick else (SIZE_DHW, PATCH_DHW, 9)
    path = arguments.volume or (SHARED_CT if SHARED_CT.exists() else None)
    if path:
        source = read_nifti(path)
        # at least a patch in plane, whatever the volume
        patch = (patch[0], min(patch[1], source.hu.shape[1]), min(patch[2], source.hu.shape[2]))
        volume = Volume(mirrored(source.hu, size[0]), source.affine)
    else:
        phantom = make_phantom(0, size)
        volume = Volume(phantom.hu, phantom.affine)
    print(f"{path.name if path else 'phantom'}: {'×'.join(map(str, volume.hu.shape))} voxels (D×H×W)")
    with tempfile.TemporaryDirectory() as scratch:
        rows = patch_rows(Path(scratch), volume, patch, rounds)
        rows.append(loader_row(Path(scratch), patch, 4 if arguments.quick else 60))
        rows += size_rows(Path(scratch), volume)
    print_table(rows)
    if arguments.json:
        write_report(arguments.json, rows, packages=("blosc2", "zarr", "nibabel"))


if __name__ == "__main__":
    main()
