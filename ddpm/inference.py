"""Volumes in HU from a bundle and prepared patients, within the memory there is, with their provenance."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataset.geometry import spacing_mm
from ddpm.bundle import Bundle
from ddpm.ctpa_volume import NOTICE, CTPAVolume
from ddpm.network import Sampling, to_device
from ddpm.patient import Patient, joined
from ddpm.samplers import sampler_by_name
from errors import ConfigurationError, InputError, MemoryExhaustedError
from vq_gan_3d.tiled import decode_volume
from vq_gan_3d.tiled_batches import TileRunner, tile_budget

log = logging.getLogger(__name__)

FORMAT = "x-ray2ctpa provenance 1"
# Samples drawn together where nobody asks. On the CPU eight at once took 62 % of the time of one by one for a small
# network (8×16×16 cells), and the same time for the default one (2026-11-23).
_MOST_TOGETHER = 8
# Feature maps of the finest level that a sample holds at once: the default network took 49 to 64 MB a sample on the CPU
# (one to eight together), 8 to 10 of its maps of 6.3 MB.
_LIVE_MAPS = 10
# Streams of noise of the samples of a patient are as far apart as `ddpm.generate` has those of patients.
_STREAM = 1 << 20
PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Request:
    """How volumes are drawn.

    Attributes:
        sampling: steps, sampler, guidance and rescale.
        seed: of all randomness.
        samples: volumes of each patient.
        precision: ``fp32`` or ``bf16`` (autocast).

    Raises:
        ConfigurationError: a number out of range, an unknown sampler or precision.
    """

    sampling: Sampling
    seed: int = 0
    samples: int = 1
    precision: str = "fp32"

    def __post_init__(self) -> None:
        s = self.sampling
        sampler_by_name(s.sampler)
        if s.steps < 1 or self.samples < 1:
            raise ConfigurationError(f"steps={s.steps}, samples={self.samples}: give 1 or more of each")
        if self.seed < 0:
            raise ConfigurationError(f"seed={self.seed}: give 0, 1, 2, …")
        if not math.isfinite(s.guidance) or not 0 <= s.rescale <= 1:
            raise ConfigurationError(f"guidance={s.guidance}, rescale={s.rescale}: a number, and one from 0 to 1")
        if self.precision not in PRECISIONS:
            raise ConfigurationError(f"precision={self.precision}: one of {', '.join(PRECISIONS)}")


def draw(
    bundle: Bundle,
    patients: Sequence[Patient],
    request: Request,
    *,
    batch: int | None = None,
    on_step: Callable[[], object] | None = None,
) -> Iterator[np.ndarray]:
    """Draw the volumes of some patients, in order.

    The noise of a sample depends on the seed and its number alone, so what differs between two patients is due to their
    radiographs, and a patient's volume does not depend on who else is drawn. Batches of another size agree to rounding:
    kernels may sum in another order.

    Args:
        bundle: on the device that computes.
        patients: as `prepare_patient` made them.
        request: how.
        batch: samples that are drawn together, default `default_batch`; halved on out-of-memory.
        on_step: called after each pass of the network.

    Yields:
        float32 HU (samples, D, H, W) of each patient, NaN where the model gave numbers that are not finite.

    Raises:
        MemoryExhaustedError: one volume is too much.
    """
    network, precision = bundle.network, PRECISIONS[request.precision]
    jobs = [(number, sample) for number in range(len(patients)) for sample in range(request.samples)]
    runner = TileRunner(bundle.codec.codec, batch or default_batch(bundle, request), precision)

    def sample(numbers: Tensor) -> Tensor:
        chosen = [jobs[number] for number in numbers.tolist()]
        conditions = to_device(joined([patients[number].conditions for number, _ in chosen]), runner.device)
        streams = [number * _STREAM for _, number in chosen]
        return network.sample(conditions, bundle.config.latent_dhw, request.sampling, request.seed, streams)

    handle = network.unet.register_forward_hook(lambda *_: on_step()) if on_step is not None else None
    drawn: list[np.ndarray] = []
    try:
        for _, code in runner.map(sample, range(len(jobs)), torch.tensor):
            drawn.append(_decoded(bundle, code, precision))
            if len(drawn) == request.samples:
                yield np.stack(drawn)
                drawn = []
    except MemoryExhaustedError as error:
        raise MemoryExhaustedError(
            f"{runner.device}: no memory for one volume of {list(bundle.shape_dhw)} voxels: use a device with more"
        ) from error
    finally:
        if handle is not None:
            handle.remove()


def default_batch(bundle: Bundle, request: Request) -> int:
    """Samples that `draw` takes together where nobody says how many: as many as a decoder's tile would take memory."""
    unet = bundle.config.unet
    sample_bytes = 4 * _LIVE_MAPS * unet.widths[0] * math.prod(unet.level_shapes(bundle.config.latent_dhw)[0])
    sample_bytes *= 2 if request.sampling.guidance != 1 else 1
    return max(1, min(_MOST_TOGETHER, tile_budget(bundle.device) // sample_bytes))


def _decoded(bundle: Bundle, code: Tensor, precision: torch.dtype | None) -> np.ndarray:
    """HU (D, H, W) of a code (C, d, h, w), by tiles; they shrink while the device has no memory for one."""
    codec, shape = bundle.codec.codec, bundle.shape_dhw
    if not bool(code.isfinite().all()):
        return np.full(shape, np.nan, np.float32)  # quantised it would look sound
    return decode_volume(codec, code, bundle.codec.window, shape, precision=precision)


def settings_facts(bundle: Bundle, request: Request) -> dict[str, Any]:
    """The part of the provenance that all patients of a run share, JSON-able."""
    return {
        "format": FORMAT,
        "notice": NOTICE,
        "bundle": bundle.checksum,
        **asdict(request.sampling),
        "seed": request.seed,
        "samples": request.samples,
        "precision": request.precision,
        "device": bundle.device.type,
        "shape_dhw": list(bundle.shape_dhw),
        "versions": {name: metadata.version(name) for name in ("torch", "numpy")},
    }


def provenance_of(bundle: Bundle, request: Request, patient: Patient) -> dict[str, Any]:
    """All that a volume depends on, JSON-able and without a date: the same for the same volume."""
    grid = {"spacing_mm": list(spacing_mm(patient.affine)), "affine_ras_mm": patient.affine.tolist()}
    return settings_facts(bundle, request) | patient.facts | grid


def volume_of(bundle: Bundle, request: Request, patient: Patient, samples_hu: np.ndarray) -> CTPAVolume:
    """What was drawn for a patient, as a volume with its provenance.

    Raises:
        InputError: numbers that are not finite.
    """
    if not np.isfinite(samples_hu).all():
        raise InputError("the model gives numbers that are not finite: less guidance, another sampler or bundle")
    return CTPAVolume(samples_hu, patient.affine, provenance_of(bundle, request, patient))
