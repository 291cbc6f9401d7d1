"""LPIPS on slices, from weights that the user has on disk; nothing is ever downloaded.

Zhang et al. 2018, https://arxiv.org/abs/1801.03924, equation 1, with a VGG-16 backbone (Simonyan & Zisserman 2014).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import InputError

# Index of each convolution in the published VGG-16's ``features``, by block; pooling lies between blocks.
VGG16_BLOCKS = (
    ((0, 3, 64), (2, 64, 64)),
    ((5, 64, 128), (7, 128, 128)),
    ((10, 128, 256), (12, 256, 256), (14, 256, 256)),
    ((17, 256, 512), (19, 512, 512), (21, 512, 512)),
    ((24, 512, 512), (26, 512, 512), (28, 512, 512)),
)
# ImageNet statistics folded with LPIPS's input range [-1, 1], as published with its weights.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


class LPIPS(nn.Module):
    """Perceptual distance of grey-value slices in [0, 1]; frozen.

    Args:
        weights: a file of tensors that ``torch.load(weights_only=True)`` reads, holding VGG-16's convolutions as
            ``features.N.weight`` / ``features.N.bias`` and the five LPIPS layers as ``linK.model.1.weight``: the
            published state dicts of both, merged.

    Raises:
        InputError: the file is missing, unreadable or lacks a tensor.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        path = Path(weights)
        if not path.is_file():
            raise InputError(f"{path}: no LPIPS weights: set model.lpips_weights to a file or model.lpips_weight=0")
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(tensors, dict):
                raise TypeError(f"a {type(tensors).__name__}, no dictionary of tensors")
            self.convs = nn.ModuleList()
            self.lins = nn.ParameterList()
            for level, block in enumerate(VGG16_BLOCKS):
                for index, before, after in block:
                    conv = nn.Conv2d(before, after, 3, padding=1)
                    conv.load_state_dict({key: tensors[f"features.{index}.{key}"] for key in ("weight", "bias")})
                    self.convs.append(conv)
                self.lins.append(tensors[f"lin{level}.model.1.weight"].float().reshape(1, -1, 1, 1))
        except (KeyError, RuntimeError, OSError, AttributeError, TypeError, EOFError) as error:
            raise InputError(f"{path}: not usable as LPIPS weights ({type(error).__name__}: {error})") from error
        except Exception as error:  # torch's unpickler refuses code with a class of its own
            raise InputError(f"{path}: refused, it holds more than tensors ({type(error).__name__})") from error
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def _features(self, slices: Tensor) -> list[Tensor]:
        x = (slices * 2 - 1 - self.shift) / self.scale  # (B, 3, H, W)
        features, convs = [], iter(self.convs)
        for level, block in enumerate(VGG16_BLOCKS):
            if level:
                x = F.max_pool2d(x, 2)
            for _ in block:
                x = F.relu(next(convs)(x))  # (B, C, h, w)
            features.append(F.normalize(x.float(), dim=1, eps=1e-10))
        return features

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Mean distance of (B, 1, H, W) and (B, 1, H, W), both at least 16 × 16: scalar."""
        pairs = zip(self._features(a), self._features(b), self.lins, strict=True)
        return torch.stack([((x - y).square() * lin).sum(1).mean() for x, y, lin in pairs]).sum()
