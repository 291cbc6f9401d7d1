"""A codec on single patches: each tile of a volume by itself, the worst one drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataset.geometry import spacing_mm
from dataset.prepared import PreparedVolume
from dataset.tiling import Triple
from dataset.volume_dataset import TileDataset
from errors import ConfigurationError, InputError
from evaluation.metrics.codebook import CodeUsage
from evaluation.metrics.streamed import MetricSums
from evaluation.panels import comparison_panel
from patchwise_512x512x604.evaluation_set import Model
from patchwise_512x512x604.utils.reconstruction import require_finite
from vq_gan_3d.checkpointing import load_checkpoint
from vq_gan_3d.tiled_batches import computing_in


def patch_size_of(checkpoint: Path) -> Triple:
    """The patch [D, H, W] that a checkpoint was trained on.

    Raises:
        ConfigurationError: it was trained on whole volumes.
    """
    size = load_checkpoint(checkpoint).get("resume_contract", {}).get("dataset.patch_size")
    if not size:
        raise ConfigurationError(f"{checkpoint}: trained on whole volumes: give --patch_size D H W")
    return int(size[0]), int(size[1]), int(size[2])


@torch.inference_mode()
def validate_volume(
    model: Model, volume: PreparedVolume, patch_dhw: Triple, limit: int | None, usage: CodeUsage, folder: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Code and decode the patches of a volume; the worst is drawn into ``folder``.

    Args:
        model: the codec.
        volume: native grid.
        patch_dhw: of each patch.
        limit: of patches, evenly spaced; None: all that cover the volume.
        usage: counts the codes of all volumes.
        folder: for ``NAME_worst.png``.

    Returns:
        The volume's row (metrics over the voxels of the volume, each counted once) and one row for each patch.

    Raises:
        InputError: damaged data in the volume, or the codec gives values that are not finite.
    """
    dataset = TileDataset([volume], patch_dhw, limit=limit)
    device = next(model.codec.parameters()).device
    sums = MetricSums(dataset.tilings[0].shape_dhw[0], model.window)
    rows: list[dict[str, Any]] = []
    worst: tuple[float, np.ndarray, np.ndarray] | None = None
    for index in range(len(dataset)):
        sample = dataset[index]
        for _, reason in sample["skipped"]:
            raise InputError(reason)
        unit = model.window.to_unit(sample["hu"].to(device))[None]  # (1, 1, D, H, W)
        with computing_in(model.precision, device):
            result = model.codec(unit)
        require_finite(bool(result.volume.isfinite().all()))
        output, target = result.volume.float().clamp(0, 1)[0, 0], unit[0, 0]
        start, own = sample["start"].tolist(), sample["own"].tolist()
        part = tuple(slice(first, last) for first, last in own)
        sums.update(output[part], target[part], start[0] + own[0][0])
        inside = tuple(
            slice(0, min(size, length - at))
            for size, length, at in zip(patch_dhw, dataset.tilings[0].shape_dhw, start, strict=True)
        )
        usage.update(result.indices)
        of_patch = MetricSums(patch_dhw[0], model.window)
        of_patch.update(output[inside], target[inside])
        metrics = of_patch.result()
        place = dict(zip(("d", "h", "w"), start, strict=True))
        keys = ("psnr_db", "psnr_pe_window_db", "mae_hu", "bias_hu")
        rows.append({"name": volume.name} | place | {key: metrics[key] for key in keys})
        if worst is None or metrics["psnr_db"] < worst[0]:
            pictures = (model.window.to_hu(x[inside]).cpu().numpy() for x in (target, output))
            worst = (metrics["psnr_db"], *pictures)
    assert worst is not None
    comparison_panel(worst[1], worst[2], spacing_mm(volume.affine), folder / f"{volume.name}_worst.png")
    row = {"name": volume.name, "patches": len(rows), "worst_psnr_db": worst[0]} | sums.result()
    return row, rows
