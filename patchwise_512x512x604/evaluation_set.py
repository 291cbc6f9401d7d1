"""What the patch-wise evaluation scripts share: which volumes, which codec, how volumes come back, their metrics."""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from dataset.atomic import atomic_write, make_folder
from dataset.intensity import HUWindow
from dataset.sources import NiftiSource, StoreSource, VolumeSource, find_nifti, find_stores
from dataset.store import SUFFIX, LazyHU, verify_store
from dataset.tiling import Triple
from dataset.volume_io import Volume
from errors import ConfigurationError, ExitCode, InputError, one_line
from evaluation.metrics.seams import PlaneErrors
from evaluation.metrics.streamed import SliceStream
from patchwise_512x512x604.utils.patch_utils import Kind, Write
from patchwise_512x512x604.utils.reconstruction import Mode, ReconstructionResult, reconstruct_volume
from patchwise_512x512x604.utils.scratch import ScratchVolume
from vq_gan_3d.codec import VQCodec
from vq_gan_3d.pretrained import load_codec
from vq_gan_3d.tiled import HUArray

log = logging.getLogger(__name__)
_PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Model:
    """A codec and how it is applied to volumes larger than itself.

    Attributes:
        codec: frozen, on its device.
        window: its HU window.
        mode: ``halo`` or ``blend``, see `reconstruct_volume`.
        tile_dhw: of its tiles; None: chosen by the mode.
        overlap: of blended tiles, a share in [0, 1).
        weights: of blended tiles.
        precision: of autocast; None: fp32.
        batch: tiles at a time; None: by the memory that is free.
    """

    codec: VQCodec
    window: HUWindow
    mode: Mode = "halo"
    tile_dhw: Triple | None = None
    overlap: float = 0.25
    weights: Kind = "linear"
    precision: torch.dtype | None = None
    batch: int | None = None

    def reconstruct(self, hu: HUArray, write: Write | None = None) -> ReconstructionResult:
        """Encode, quantise and decode a volume (D, H, W) of any size; what comes back, or is written, is int16 HU."""
        return reconstruct_volume(
            self.codec,
            hu,
            self.window,
            mode=self.mode,
            tile_dhw=self.tile_dhw,
            overlap=self.overlap,
            weights=self.weights,
            batch=self.batch,
            precision=self.precision,
            write=write,
        )

    def measure(self, hu: HUArray) -> tuple[ReconstructionResult, dict[str, float]]:
        """Reconstruct a volume (D, H, W) and measure its slices as they come: the reconstruction is never held.

        Returns:
            The result, without its volume, and the metrics of `volume_metrics` with ``seam_ratio``.
        """
        original = _second_reader(hu)
        metrics, errors = SliceStream(hu.shape, self.window), PlaneErrors(hu.shape)

        def measure(first: int, slices: np.ndarray) -> None:
            target = as_shown(original[first : first + len(slices)], self.window)
            metrics.update(slices, target)
            errors.update(slices, target, first)

        result = self.reconstruct(hu, measure)
        return result, metrics.result() | {"seam_ratio": errors.seam_ratio(result.tiling)}

    def reconstruct_beside(self, hu: HUArray, restored: ScratchVolume, shown: ScratchVolume) -> ReconstructionResult:
        """Reconstruct a volume (D, H, W) into ``restored``, and write it as the codec sees it into ``shown``."""
        original = _second_reader(hu)

        def keep(first: int, slices: np.ndarray) -> None:
            restored.append(slices)
            shown.append(as_shown(original[first : first + len(slices)], self.window))

        return self.reconstruct(hu, keep)


def load_model(arguments: argparse.Namespace) -> Model:
    """The codec of ``--checkpoint`` on ``--device``, averaged weights; options of whole volumes where there are any.

    Raises:
        ConfigurationError: no such device, or a size that cannot be. InputError: no checkpoint of the first stage.
    """
    codec, window = load_codec(arguments.checkpoint, checked_device(arguments.device))
    model = Model(codec, window, precision=_PRECISIONS[arguments.precision])
    if "mode" not in arguments:
        return model
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise ConfigurationError(f"--batch_size {arguments.batch_size}: give a positive number of tiles")
    blending = {key: getattr(arguments, key) for key in ("overlap", "weights") if getattr(arguments, key) is not None}
    if blending and arguments.mode != "blend":
        raise ConfigurationError(f"--{next(iter(blending))} is for blended tiles: add --mode blend, or leave it out")
    if not 0 <= blending.get("overlap", 0) < 1:
        raise ConfigurationError(f"--overlap {arguments.overlap}: give a share of the tile from 0 to below 1")
    tile = checked_tile(arguments.tile_size, codec)
    return replace(model, mode=arguments.mode, tile_dhw=tile, batch=arguments.batch_size, **blending)


def checked_device(name: str) -> str:
    """A device of this machine.

    Raises:
        ConfigurationError: there is no such device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if count else "cpu"
    number = name.removeprefix("cuda:")
    if name != "cpu" and not (count and (name == "cuda" or (number.isdigit() and int(number) < count))):
        raise ConfigurationError(f"--device {name}: this machine has {count} CUDA device(s): use auto or cpu")
    return name


def checked_tile(size: Sequence[int] | None, codec: VQCodec) -> Triple | None:
    """A tile size [D, H, W], None for None.

    Raises:
        ConfigurationError: no positive multiples of the codec's total stride.
    """
    if size is None:
        return None
    stride = codec.config.total_stride
    if any(length < 1 or length % step for length, step in zip(size, stride, strict=True)):
        raise ConfigurationError(
            f"a tile of {list(size)} voxels [D, H, W]: positive multiples of the codec's stride {list(stride)} needed"
        )
    return size[0], size[1], size[2]


def find_cases(data: Path) -> list[VolumeSource]:
    """The volumes of a folder of NIfTI files or ``.b2nd`` stores, or one such file; of both kinds the stores.

    Raises:
        InputError: there are none.
    """
    data = data.expanduser()
    if data.is_file():
        return [StoreSource(data) if data.name.endswith(SUFFIX) else NiftiSource(data)]
    if not data.is_dir():
        raise InputError(f"{data}: no such file or folder: name a folder of .nii.gz files or .b2nd stores")
    if not any(data.rglob(f"*{SUFFIX}")):
        return list(find_nifti(str(data)))
    stores = find_stores(str(data))
    visible = [path.name.lower() for path in data.rglob("*") if not path.name.startswith(".")]
    if others := sum(name.endswith((".nii", ".nii.gz")) for name in visible):
        log.warning(
            "%s: holds %d stores (%s) and %d NIfTI files, which are left out: for these name a folder without stores",
            data, len(stores), SUFFIX, others,
        )  # fmt: skip
    return list(stores)


def run_of(checkpoint: Path) -> Path:
    """The output_dir of the run that wrote a checkpoint.

    Raises:
        InputError: its configuration is not beside it.
    """
    run = checkpoint.expanduser().resolve().parent.parent
    if not (run / "config.yaml").is_file():
        raise InputError(
            f"{run / 'config.yaml'}: not there, so the held-out cases of {checkpoint.name} are unknown: "
            "name the volumes (--data_dir, --test_data)"
        )
    return run


def held_out_cases(checkpoint: Path) -> list[VolumeSource]:
    """The held-out volumes of the run that wrote a checkpoint, on their native grids.

    Raises:
        InputError: its configuration is not beside it, or its data is gone.
    """
    from omegaconf import OmegaConf

    from dataset.from_config import data_module  # imports Lightning, which other data need not wait for

    record = run_of(checkpoint) / "config.yaml"
    try:
        data = data_module(OmegaConf.load(record))  # type: ignore[arg-type]
    except ConfigurationError as error:  # the run's folder has moved: nothing was typed wrongly here
        raise InputError(f"{record}: {error} (or name the volumes)") from error
    return list(data.sources["validation"])


class CaseLoop:
    """Applies a function to cases; one that cannot be read is told and skipped.

    Attributes:
        skipped: reasons by name.
    """

    def __init__(self) -> None:
        self.skipped: dict[str, str] = {}

    def over(self, cases: Sequence[VolumeSource]) -> Iterator[tuple[VolumeSource, Volume]]:
        """Cases with their volumes; the voxels of a store are verified, and read when they are sliced.

        Raises:
            InputError: none of them could be read.
        """
        done = 0
        for case in cases:
            try:
                volume = _open(case)
            except InputError as error:
                log.warning("skipped %s", error)
                self.skipped[case.name] = one_line(error)
                continue
            done += 1
            yield case, volume
        if not done:
            reason = next(iter(self.skipped.values()), "there are none")
            raise InputError(f"none of {len(cases)} volumes can be read; the first: {reason}")

    @property
    def exit_code(self) -> ExitCode:
        """4 where something was skipped."""
        return ExitCode.SKIPS if self.skipped else ExitCode.OK


def _second_reader(hu: HUArray) -> HUArray:
    """The same volume for another thread than the reconstruction's, which reads ahead: a handle is for one."""
    return LazyHU(hu.path, hu.shape) if isinstance(hu, LazyHU) else hu


def _open(case: VolumeSource) -> Volume:
    """A volume; that of a store with `LazyHU` in place of an array."""
    path: Path | None = getattr(case, "store", None)
    if path is None:
        return case.load()
    stored = verify_store(path)
    return Volume(cast(np.ndarray, stored.hu), stored.affine, source=str(path))


def as_shown(hu: np.ndarray, window: HUWindow) -> np.ndarray:
    """A volume as the codec sees it: metal and the like beyond the window are no error of a reconstruction."""
    return hu.clip(math.ceil(window.min_hu), math.floor(window.max_hu))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a report, atomically; numbers that are not finite become null, which JSON can hold.

    Raises:
        StorageError: the disk refuses.
    """
    make_folder(path.parent)
    with atomic_write(path) as handle:
        handle.write(json.dumps(_finite(content), indent=2, allow_nan=False).encode())


def print_table(rows: Sequence[dict[str, Any]], columns: Sequence[tuple[str, str, str]]) -> None:
    """Rows that have a ``name``, under columns of (key, heading, format)."""
    width = max(len("case"), *(len(row["name"]) for row in rows))
    print("  ".join(["case".ljust(width), *(heading for _, heading, _ in columns)]))
    for row in rows:
        cells = (form.format(row[key]).rjust(len(heading)) for key, heading, form in columns)
        print("  ".join([row["name"].ljust(width), *cells]))


def start_logging() -> Callable[[str], None]:
    """Messages of the libraries on stderr, one line each; returns what commands print progress with."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    return lambda text: print(text, flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
