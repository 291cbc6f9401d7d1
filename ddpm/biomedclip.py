"""The frozen image encoder of BiomedCLIP (Zhang et al. 2023, https://arxiv.org/abs/2303.00915), from a local folder.

The folder is what the model's authors publish: open_clip_config.json and the weights of both towers. Only the image
tower is built, by open_clip's own class: the text tower would ask the network for its tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.frozen import FrozenIdentity, frozen_folder
from errors import ConfigurationError, InputError, one_line

_CONFIG = "open_clip_config.json"
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_PREFIX = "visual."


class BiomedCLIPEncoder(nn.Module):
    """One feature map of each picture: the patches' features, and the embedding of the whole picture in all of them.

    ``channels`` holds their number. The weights are frozen and no part of checkpoints.

    Args:
        path: folder of the model.

    Raises:
        ConfigurationError: no folder, no weights, or no open_clip.
        InputError: the files are damaged or of another model.
    """

    def __init__(self, path: str | None) -> None:
        super().__init__()
        if path is None:
            raise ConfigurationError(
                f"image_encoder=biomedclip needs image_encoder_path, the folder of {_CONFIG} and {_WEIGHTS[1]}"
            )
        folder = frozen_folder(path, (_CONFIG,), "image_encoder_path")
        weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
        if weights is None:
            raise ConfigurationError(f"{folder}: holds neither {' nor '.join(_WEIGHTS)}: copy the whole model there")
        tower, mean, std = _load_tower(folder, weights)
        # in a list: no part of state_dict, parameters, averages, nor of .train()
        self._tower = [tower.requires_grad_(False).eval()]
        self.origin = FrozenIdentity(weights, "BiomedCLIP image encoder")
        self.register_buffer("mean", torch.tensor(mean).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(1, 3, 1, 1), persistent=False)
        with torch.no_grad():
            self.channels = (self._features(torch.zeros(1, 1, 32, 32)).shape[1],)

    @torch.no_grad()
    def forward(self, xray: Tensor, view: Tensor) -> list[Tensor]:
        """(N, 1, S, S) in [0, 1] of any size -> [(N, channels, s, s)]; ``view`` says nothing to it."""
        return [self._features(xray)]

    def _features(self, xray: Tensor) -> Tensor:
        tower: Any = self._tower[0].to(xray.device)
        assert isinstance(self.mean, Tensor)
        assert isinstance(self.std, Tensor)
        # bicubic as its authors resize, the whole picture: their centre crop takes nothing from a square one
        picture = F.interpolate(xray, tower.image_size, mode="bicubic", antialias=True).clamp(0, 1)
        x = (picture.expand(-1, 3, -1, -1) - self.mean) / self.std  # (N, 3, S', S')
        tokens = tower.trunk.forward_features(x)  # (N, 1 + P², C)
        patches = tokens[:, tower.trunk.num_prefix_tokens :].transpose(1, 2)  # (N, C, P²)
        side = round(patches.shape[-1] ** 0.5)
        whole = tower.head(tower.trunk.forward_head(tokens))[:, :, None].expand(-1, -1, side * side)
        return torch.cat([patches, whole], dim=1).unflatten(-1, (side, side))  # (N, C + embedding, P, P)


def _load_tower(folder: Path, weights: Path) -> tuple[nn.Module, list[float], list[float]]:
    """The image tower with its weights, and mean and standard deviation of its pictures."""
    try:
        from open_clip.timm_model import TimmModel
    except ImportError as error:
        raise ConfigurationError(
            f"image_encoder=biomedclip needs open_clip ({one_line(error)}): pip install open_clip_torch"
        ) from error
    try:
        config = json.loads((folder / _CONFIG).read_text("utf-8"))
        model, pictures = config["model_cfg"], config["preprocess_cfg"]
        vision = model["vision_cfg"]
        size = vision.get("image_size", 224)
        tower = TimmModel(
            vision["timm_model_name"],
            embed_dim=model["embed_dim"],
            image_size=size,
            pool=vision.get("timm_pool", "avg"),
            proj=vision.get("timm_proj", "linear"),
            pretrained=False,
        )
        tower.image_size = (size, size)
        if weights.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(weights)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        visual = {name.removeprefix(_PREFIX): value for name, value in state.items() if name.startswith(_PREFIX)}
        tower.load_state_dict(visual)
        return tower, pictures["mean"], pictures["std"]
    except Exception as error:  # whatever damaged files make of json, timm, safetensors and torch
        reason = one_line(f"{type(error).__name__}: {error}")[:300]
        raise InputError(f"{folder}: no BiomedCLIP image encoder ({reason}): copy the model again") from error
