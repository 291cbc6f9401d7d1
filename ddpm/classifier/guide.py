"""A trained classifier as a guide of sampling: which one a diffusion model can be guided by."""

from __future__ import annotations

from pathlib import Path

import torch

from ddpm.classifier.classifier import load_classifier
from ddpm.classifier.network import PEClassifier
from errors import InputError
from vq_gan_3d.latents import FrozenCodec


def load_guide(path: str | Path, codec: FrozenCodec, device: torch.device | str = "cpu") -> PEClassifier:
    """The classifier of a checkpoint, to be put in a `ddpm.guidance.ClassifierGuidance`, frozen.

    Args:
        path: a checkpoint of `train_classifier.py` with ``model.input=latent``.
        codec: of the diffusion model.
        device: where to compute.

    Raises:
        InputError: missing, damaged, no classifier, or it judges something else than latents of that codec.
    """
    classifier, codec_hash = load_classifier(path, device)
    if classifier.config.input != "latent":
        raise InputError(
            f"{path}: judges a {classifier.config.input}, sampling is guided by a classifier of latents: train one "
            "with model.input=latent"
        )
    if codec_hash != codec.content_hash:
        raise InputError(
            f"{path}: judges latents of codec {str(codec_hash)[:12]}, the diffusion model draws those of "
            f"{codec.content_hash[:12]}: train one with pretrained_vqgan set to that codec"
        )
    return classifier
