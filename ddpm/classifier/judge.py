"""A trained classifier as a judge of cases: what it may be shown, its scores, and its features for distances."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataset.geometry import spacing_mm
from dataset.intensity import HUWindow
from dataset.prepared import PreparedVolume
from dataset.sources import VolumeSource
from dataset.xray import load_xray
from ddpm.classifier.classifier import classifier_input, classifier_of, patient_hash, read_checkpoint
from ddpm.classifier.network import PEClassifier
from ddpm.classifier.radiographs import frontal_of
from errors import InputError
from evaluation.metrics.frechet import planes_of_map
from vq_gan_3d.latents import FrozenCodec

# A grid is another one where its voxels are by more than this smaller or larger than any that were trained on.
_SPACING_TOLERANCE = 0.1


# How a report names distances by the features of such a classifier.
OWN_FEATURES = "features of the project's own trained PE classifier"


class Judge:
    """A classifier, frozen, with all that it needs to look at a case.

    Args:
        path: checkpoint of `train_classifier.py`.
        device: where to compute.
        codec: for a classifier on latents, the codec or its checkpoint.

    Attributes:
        digest: SHA-256 of the file.

    Raises:
        InputError: missing, damaged, no classifier, or the codec is missing or another one.
    """

    def __init__(self, path: Path, device: torch.device | str = "cpu", codec: FrozenCodec | Path | None = None) -> None:
        checkpoint = read_checkpoint(path)
        self.path = path
        self.device = torch.device(device)
        self.classifier: PEClassifier = classifier_of(checkpoint).to(self.device)
        self.config = self.classifier.config
        self.window = HUWindow(self.config.hu_min, self.config.hu_max)
        self.codec: FrozenCodec | None = None
        # None in checkpoints from before classifiers remembered their patients
        known = checkpoint.get("trained_on")
        self._trained_on = None if known is None else frozenset(known)
        if checkpoint["codec_hash"] is not None:
            if codec is None:
                raise InputError(f"{path}: judges latents: name their codec with --codec")
            self.codec = FrozenCodec.load(codec, device) if isinstance(codec, Path) else codec
            if self.codec.content_hash != checkpoint["codec_hash"]:
                name = codec if isinstance(codec, Path) else "the codec of the run"
                raise InputError(f"{name}: not the codec that {path} was trained on: give that one")
        with path.open("rb") as handle:
            self.digest = hashlib.file_digest(handle, "sha256").hexdigest()

    @property
    def sees(self) -> str:
        """What it is shown: ``volume``, ``latent`` or ``xray``."""
        return self.config.input

    @torch.inference_mode()
    def score_volume(self, hu: np.ndarray) -> float:
        """Log-odds of an embolism in (D, H, W) HU."""
        return float(self.classifier(self._input(hu)))

    @torch.inference_mode()
    def score_picture(self, path: Path) -> float:
        """Log-odds of an embolism from a frontal radiograph alone.

        Raises:
            InputError: no sound frontal radiograph.
        """
        image = load_xray(path, self.config.xray_size, view="frontal").image
        return float(self.classifier(image[None].to(self.device)))

    def score_case(self, source: VolumeSource, volume: PreparedVolume, cache: Path) -> float:
        """Log-odds of an embolism in a prepared case, by what the classifier sees of it.

        Raises:
            InputError: the volume or its radiograph is damaged or missing.
        """
        if self.sees == "xray":
            return self.score_picture(frontal_of(source, volume, cache))
        return self.score_volume(np.asarray(volume.open()))

    @torch.inference_mode()
    def feature_map(self, hu: np.ndarray) -> Tensor:
        """Features (C, d, h, w) of (D, H, W) HU, before pooling."""
        return self.classifier.feature_map(self._input(hu))[0]

    def _input(self, hu: np.ndarray) -> Tensor:
        volume = torch.from_numpy(np.ascontiguousarray(hu))[None, None].to(self.device)  # (1, 1, D, H, W)
        return classifier_input(volume, self.window, self.codec)

    def require_volumes(self) -> None:
        """Refuse a classifier of radiographs.

        Raises:
            InputError: it is one.
        """
        if self.sees == "xray":
            raise InputError(f"{self.path}: a classifier of radiographs: give one of volumes (model.input=volume)")

    def require_radiographs(self) -> None:
        """Refuse a classifier of volumes.

        Raises:
            InputError: it is one.
        """
        if self.sees != "xray":
            raise InputError(f"{self.path}: a classifier of {self.sees}s: give one of radiographs (model.input=xray)")

    def require_window(self, window: HUWindow, ours: str) -> None:
        """Refuse volumes of another HU window.

        Raises:
            ConfigurationError: the windows differ.
        """
        window.require_same(self.window, ours=ours, theirs=str(self.path))

    def require_grid(self, shape: Iterable[int], affine: np.ndarray) -> None:
        """Refuse volumes on another grid than that of the training volumes: what fills a voxel would look otherwise.

        Args:
            shape: voxels [D, H, W].
            affine: (4, 4).

        Raises:
            InputError: another size, or voxels more than a tenth beyond the range of those trained on.
        """
        c = self.config
        if c.spacing_low_mm is None or c.spacing_high_mm is None:
            raise InputError(f"{self.path}: does not say on which grid it was trained: train it again")
        size, steps = tuple(shape), spacing_mm(affine)
        if c.size_dhw is not None and size != tuple(c.size_dhw):
            raise InputError(
                f"{self.path}: trained on volumes of {list(c.size_dhw)} voxels [D, H, W], these have {list(size)}: "
                "train one with their dataset.size"
            )
        for low, high, step in zip(c.spacing_low_mm, c.spacing_high_mm, steps, strict=True):
            if not low * (1 - _SPACING_TOLERANCE) <= step <= high * (1 + _SPACING_TOLERANCE):
                raise InputError(
                    f"{self.path}: trained on voxels of {_mm(c.spacing_low_mm)} to {_mm(c.spacing_high_mm)} mm "
                    f"(d, h, w), these have {_mm(steps)}: train one on their grid"
                )

    def require_unseen(self, patients: Iterable[str]) -> None:
        """Refuse cases that it was trained on: it would know their answers.

        Raises:
            InputError: some are among its training patients, or it does not remember those.
        """
        if self._trained_on is None:
            raise InputError(f"{self.path}: does not say which patients it was trained on: train it again")
        patients = list(patients)
        if seen := [patient for patient in patients if patient_hash(patient) in self._trained_on]:
            raise InputError(
                f"{self.path}: was trained on {len(seen)} of {len(patients)} held-out patients, the first is "
                f"{seen[0]}: train one with the split of the run"
            )


def plane_features(judge: Judge) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Features of the slices of three planes, of (D, H, W) HU, for `evaluation.metrics.frechet.frechet_25d`."""
    return lambda hu: planes_of_map(judge.feature_map(hu))


def _mm(steps: Iterable[float]) -> str:
    return "×".join(f"{step:.3g}" for step in steps)
