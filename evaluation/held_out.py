"""The patients of a diffusion run, held out as a rule, and how volumes of them are drawn."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from omegaconf import OmegaConf

from dataset.from_config import run_config, sources_of_test_split
from dataset.geometry import crop_or_pad
from dataset.projection import View
from dataset.xray import load_xray
from dataset.xray_drr import read_info, read_line_integrals
from ddpm.classifier.guide import load_guide
from ddpm.classifier.network import PEClassifier
from ddpm.conditions import ConditionBatch
from ddpm.data_module import LatentDataModule, latent_data_module
from ddpm.generate import Generator, load_ddpm
from ddpm.guidance import ClassifierGuidance
from ddpm.latent_dataset import LatentDataset, collate_latents, condition_batch
from errors import ConfigurationError, InputError
from evaluation.controls import told
from evaluation.metrics.linear import RidgeWeights
from evaluation.metrics.projection import cone_ncc

Split = Literal["validation", "training", "test"]
# What a model may be told of a patient beside the radiograph, if it was trained with that.
TELLABLE = ("report", "label")
# Voxels of a volume, evenly spaced, by which the penalty of the linear control is chosen.
_LINEAR_VOXELS = 1 << 15


@dataclass(frozen=True)
class Guide:
    """A classifier of latents that pulls every volume towards one label, whatever the radiograph says.

    Attributes:
        classifier: of `ddpm.classifier.guide.load_guide`.
        label: 1 for an embolism, 0 for none.
        scale: 1 is Bayes' rule.
        digest: SHA-256 of the classifier's file.
    """

    classifier: PEClassifier
    label: int
    scale: float
    digest: str

    @classmethod
    def load(cls, path: Path, generator: Generator, label: int, scale: float) -> Guide:
        """From a checkpoint.

        Raises:
            InputError: missing, damaged, or no classifier of this generator's latents.
        """
        classifier = load_guide(path, generator.codec, generator.device)
        with path.open("rb") as handle:
            return cls(classifier, label, scale, hashlib.file_digest(handle, "sha256").hexdigest())

    def of(self, patients: int, device: torch.device) -> ClassifierGuidance:
        """For a batch of so many patients."""
        return ClassifierGuidance(self.classifier, torch.full((patients,), self.label, device=device), self.scale)


@dataclass(frozen=True)
class Sampling:
    """How volumes are drawn; see `ddpm.generate.Generator.generate`."""

    steps: int = 20
    sampler: str = "dpm_solver_pp_2m"
    guidance: float = 1.0
    rescale: float = 0.0
    seed: int = 0

    def draw(
        self,
        generator: Generator,
        batch: ConditionBatch,
        shape_dhw: tuple[int, ...],
        number: int,
        samples: int = 1,
        guide: Guide | None = None,
    ) -> np.ndarray:
        """Volumes float32 HU (B, samples, D, H, W); all entries of the batch share the noise of patient ``number``.

        Raises:
            InputError: the model gives numbers that are not finite.
        """
        volumes = generator.generate(
            batch,
            shape_dhw,
            steps=self.steps,
            sampler=self.sampler,
            guidance=self.guidance,
            rescale=self.rescale,
            seed=self.seed,
            indices=[number] * len(batch.text),
            samples=samples,
            guide=None if guide is None else guide.of(len(batch.text), generator.device),
        ).numpy()
        if not np.isfinite(volumes).all():
            raise InputError("the model gives volumes that are not finite: take another checkpoint or sampler")
        return volumes


@dataclass(frozen=True)
class LinearMap:
    """A linear control: the frontal radiograph -> the volume, by ridge regression on the training patients.

    Attributes:
        weights: of training volumes for a picture.
        numbers: of the training patients that have a frontal radiograph.
    """

    weights: RidgeWeights
    numbers: tuple[int, ...]

    @classmethod
    def fit(cls, held_out: HeldOut, shape_dhw: tuple[int, ...]) -> LinearMap | None:
        """From whole training volumes padded to a shape; None for fewer than three training radiographs."""
        count = len(held_out.data.datasets["training"].cases)
        pictures = {number: held_out.frontal("training", number) for number in range(count)}
        numbers = tuple(number for number, picture in pictures.items() if picture is not None)
        if len(numbers) < 3:
            return None
        every = -(-math.prod(shape_dhw) // _LINEAR_VOXELS)
        voxels = [hu.reshape(-1)[::every] for hu in held_out.training_volumes(shape_dhw, numbers)]
        known = np.stack([picture for picture in pictures.values() if picture is not None])
        return cls(RidgeWeights(known, np.stack(voxels)), numbers)

    def volume(self, held_out: HeldOut, number: int, shape_dhw: tuple[int, ...]) -> np.ndarray | None:
        """What it makes of a held-out radiograph, float32 HU; None where there is none. One volume in memory a time."""
        if (picture := held_out.frontal(held_out.split, number)) is None:
            return None
        total = np.zeros(shape_dhw)
        training = held_out.training_volumes(shape_dhw, self.numbers)
        for weight, volume in zip(self.weights(picture), training, strict=True):
            total += weight * volume
        window = held_out.generator.codec.window
        return total.clip(window.min_hu, window.max_hu).astype(np.float32)


@dataclass(frozen=True)
class HeldOut:
    """A trained model and the patients on whom it is evaluated.

    Attributes:
        generator: of the checkpoint.
        data: of the run, built.
        checkpoint: file of the model.
        digest: SHA-256 of that file.
        split: ``validation`` or ``test``, patients that the model has not seen, or ``training``, to see what it
            remembers.
        limit: at most so many patients; None for all.
        tell: of `TELLABLE`, what the model is told beside the radiograph.
    """

    generator: Generator
    data: LatentDataModule
    checkpoint: Path
    digest: str
    split: Split = "validation"
    limit: int | None = None
    tell: tuple[str, ...] = ()

    def conditions(self, sample: dict[str, Any]) -> ConditionBatch:
        """What the model is told of one patient, as a batch of one; the sample is of `cases`."""
        return told(condition_batch(collate_latents([sample])), self.tell)

    @cached_property
    def views(self) -> tuple[View, ...]:
        """Of the radiographs, in the order in which the model takes them."""
        return self.cases.settings.views

    @cached_property
    def cases(self) -> LatentDataset:
        """The patients, each as validation sees one."""
        known = self.data.datasets[self.split]
        return LatentDataset(known.cases[: self.limit], known.settings, known.scaler, training=False)

    def training_volumes(
        self, shape_dhw: tuple[int, ...], numbers: Sequence[int] | None = None
    ) -> Iterator[np.ndarray]:
        """Training volumes (D, H, W) HU inside the codec's window, padded with air as held-out ones are.

        Args:
            shape_dhw: of each.
            numbers: which, in this order; None for all.
        """
        window, cases = self.generator.codec.window, self.data.datasets["training"].cases
        for case in cases if numbers is None else [cases[number] for number in numbers]:
            hu, _ = crop_or_pad(np.asarray(case.volume.open()), case.volume.affine, shape_dhw, (0, 0, 0))
            yield np.clip(hu, window.min_hu, window.max_hu)

    def frontal(self, split: str, number: int) -> np.ndarray | None:
        """Standard frontal radiograph of a case as (S·S,) float64 in [0, 1]; None where there is none."""
        cases = self.data.datasets[split]
        for view, pictures in zip(cases.settings.views, cases.cases[number].xrays, strict=True):
            if view == "frontal" and pictures:
                return load_xray(pictures[0], cases.settings.xray_size, view=view).image.double().numpy().ravel()
        return None

    def cone_ncc(self, number: int, generated_hu: np.ndarray, affine: np.ndarray) -> float | None:
        """NCC with the rendered frontal radiograph; None where the radiograph is a real one, or there is none."""
        for view, pictures in zip(self.cases.settings.views, self.cases.cases[number].xrays, strict=True):
            if view == "frontal" and pictures and read_info(pictures[0]) is not None:
                line_integrals, info = read_line_integrals(pictures[0])
                return cone_ncc(generated_hu, affine, line_integrals, info.geometry)
        return None


def open_run(
    run: Path,
    checkpoint: Path | None,
    codec: Path | None,
    cases: int | None,
    device: str,
    split: Split = "validation",
    tell: Collection[str] = (),
) -> HeldOut:
    """Load a run's model and build its data.

    Args:
        run: ``output_dir`` of ``ddpm/train/train_ddpm.py``.
        checkpoint: default ``checkpoints/final.ckpt`` of the run.
        codec: checkpoint of the first stage; default the run's copy.
        cases: at most so many patients; None for all.
        device: where to compute, as `ddpm.device.chosen_device` gives it.
        split: whom to evaluate.
        tell: of `TELLABLE`, what the model is told beside the radiograph.

    Raises:
        InputError: no such run, a checkpoint or data cannot be read, or the cohort has no test patients.
        ConfigurationError: a number of cases below 1, or the model was trained without what it is to be told.
    """
    config = run_config(run)
    if cases is not None and cases < 1:
        raise ConfigurationError(f"--cases {cases}: give 1 or more")
    if OmegaConf.select(config, "model.conditioner") is None:
        raise InputError(
            f"{run / 'config.yaml'}: of another training: --run wants the output_dir of a diffusion training"
        )
    path = checkpoint or run / "checkpoints" / "final.ckpt"
    generator = load_ddpm(path, codec, device)
    conditioner = generator.network.config.conditioner
    heard = {"report": conditioner.text != "none", "label": conditioner.label}
    if unheard := [name for name in tell if not heard[name]]:
        raise ConfigurationError(f"--tell {unheard[0]}: {path} was trained without it: leave it")
    config.validation.cases = cases or 1_000_000
    data = latent_data_module(config, generator.codec, generator.network.config.statistics)
    if split == "test":
        data.sources["validation"] = sources_of_test_split(config)
    data.build(0, 1)
    if split == "test":
        data.datasets["test"] = data.datasets.pop("validation")
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    return HeldOut(generator, data, path, digest, split, cases, tuple(name for name in TELLABLE if name in tell))
