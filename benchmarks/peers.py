"""Published models to compare with, where they are installed; nothing of the project depends on them."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.reference import reference_step


@cache
def _monai_networks() -> tuple[Any, str | None]:
    """MONAI's module of networks and ``None``, or ``None`` and why it cannot be had (importing it takes seconds)."""
    try:
        return importlib.import_module("monai.networks.nets"), None
    except ImportError as error:
        return None, f"MONAI is not available ({error}); `pip install --no-deps monai` adds this comparison"


def why_no_monai() -> str | None:
    """``None`` where MONAI's networks can be imported, else the reason in one line."""
    return _monai_networks()[1]


def monai_vqvae() -> nn.Module | None:
    """MONAI's VQVAE at total stride 4×4×4 with a 512 × 64 codebook, or ``None`` (see ``why_no_monai``).

    The same size as the reference, with the work where a peer puts it: nothing but the last transposed convolution
    runs at full resolution. Counted: 22.8 M parameters, 4.5 MFLOP per voxel and training step.
    """
    networks, missing = _monai_networks()
    if missing:
        return None
    model: nn.Module = networks.VQVAE(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        channels=(128, 256),
        num_res_layers=2,
        num_res_channels=(128, 256),
        downsample_parameters=((2, 4, 1, 1),) * 2,  # stride, kernel, dilation, padding
        upsample_parameters=((2, 4, 1, 1, 0),) * 2,  # stride, kernel, dilation, padding, output padding
        num_embeddings=512,
        embedding_dim=64,
    )
    return model


def monai_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """One training step of MONAI's VQVAE, the same as the reference's: ``(B, 1, D, H, W)`` → loss ``()``."""
    return reference_step(model, optimizer, batch, dtype)  # ()
