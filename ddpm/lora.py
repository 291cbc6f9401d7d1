"""Low-rank adapters: a trained model made fit for a new hospital, by one small file.

Hu et al. 2021, https://arxiv.org/abs/2106.09685:
y = W·x + (alpha / rank)·B·A·x for chosen linear and 3D convolution layers. For a convolution A has the layer's kernel,
stride and padding and B is pointwise. B starts at 0, so that an adapted model begins as the one it adapts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from errors import ConfigurationError
from vq_gan_3d.settings import Settings


@dataclass(frozen=True)
class LoraConfig(Settings):
    """Shape of the adapters.

    Attributes:
        rank: of each update.
        alpha: its scale is alpha / rank.
        targets: patterns of module names (``fnmatch``); all linear and Conv3d layers that match one are adapted.
    """

    subject: ClassVar[str] = "LoRA"
    rank: int = 8
    alpha: float = 8.0
    targets: tuple[str, ...] = ("*query", "*key_value", "*out", "*conv_space", "*conv_channels")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigurationError(f"lora.rank={self.rank}: it must be at least 1")


class LoraLayer(nn.Module):
    """A linear or Conv3d layer, frozen, with a low-rank update beside it.

    Args:
        base: the layer.
        rank: of the update.
        scale: factor on the update.
    """

    def __init__(self, base: nn.Linear | nn.Conv3d, rank: int, scale: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.rank = rank
        self.scale = scale
        self.a: nn.Linear | nn.Conv3d
        self.b: nn.Linear | nn.Conv3d
        like: dict[str, Any] = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        if isinstance(base, nn.Conv3d):
            if base.groups != 1:
                raise ConfigurationError("lora: grouped convolutions cannot be adapted: leave them out of lora.targets")
            same: dict[str, Any] = {
                name: getattr(base, name) for name in ("stride", "padding", "dilation", "padding_mode")
            }
            self.a = nn.Conv3d(base.in_channels, rank, base.kernel_size, **same, **like)  # type: ignore[arg-type]
            self.b = nn.Conv3d(rank, base.out_channels, 1, **like)
        else:
            self.a = nn.Linear(base.in_features, rank, **like)
            self.b = nn.Linear(rank, base.out_features, **like)
        nn.init.kaiming_uniform_(self.a.weight, a=math.sqrt(5))
        nn.init.zeros_(self.b.weight)
        if base.weight.dim() == 5:
            self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self._original: Tensor | None = None  # of the base while merged

    @property
    def merged(self) -> bool:
        """Whether the base holds the update."""
        return self._original is not None

    @property
    def original(self) -> Tensor:
        """The base's weight without the update."""
        return self.base.weight if self._original is None else self._original

    def update(self) -> Tensor:
        """(alpha / rank)·B·A in the shape of the base's weight, float32."""
        b, a = self.b.weight.float(), self.a.weight.float()
        return self.scale * (b.flatten(1) @ a.flatten(1)).reshape(self.base.weight.shape)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the base: inference at no extra cost. The original weight is kept beside it."""
        if self._original is None:
            self._original = self.base.weight.detach().clone()
            self.base.weight.copy_((self._original.float() + self.update()).to(self._original.dtype))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the original weight, bit for bit."""
        if self._original is not None:
            self.base.weight.copy_(self._original)
            self._original = None

    def forward(self, x: Tensor) -> Tensor:
        """The base's input -> its output with the update."""
        y = self.base(x)
        return y if self.merged else y + self.scale * self.b(self.a(x))


def inject_lora(model: nn.Module, config: LoraConfig) -> list[str]:
    """Put adapters on the layers whose names match, and freeze everything else, in place.

    Args:
        model: trained, without adapters.
        config: rank, scale and name patterns.

    Returns:
        Names of the adapted layers.

    Raises:
        ConfigurationError: a pattern matches no layer, or the model has adapters.
    """
    if any(isinstance(module, LoraLayer) for module in model.modules()):
        raise ConfigurationError("lora: the model has adapters already: remove them first")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv3d)}
    for pattern in config.targets:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise ConfigurationError(f"lora.targets: no linear or Conv3d layer matches {pattern!r}")
    chosen = [name for name in layers if any(fnmatchcase(name, pattern) for pattern in config.targets)]
    model.requires_grad_(False)
    for name in chosen:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoraLayer(layers[name], config.rank, config.alpha / config.rank))
    return chosen


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Adapted layers by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def lora_parameters(model: nn.Module) -> list[Tensor]:
    """What an optimizer shall train: A and B of all adapters."""
    return [part.weight for _, layer in lora_layers(model) for part in (layer.a, layer.b)]


def merge_lora(model: nn.Module) -> None:
    """Fold all updates into the weights: the same output at no extra cost."""
    for _, layer in lora_layers(model):
        layer.merge()


def unmerge_lora(model: nn.Module) -> None:
    """Undo :func:`merge_lora`: every weight is what it was, bit for bit."""
    for _, layer in lora_layers(model):
        layer.unmerge()


def remove_lora(model: nn.Module, *, keep_update: bool = False) -> None:
    """Give the model its plain layers back, in place; parameters stay frozen.

    Args:
        model: with or without adapters.
        keep_update: fold the update into the weights first; else they are what they were, bit for bit.
    """
    for name, layer in list(lora_layers(model)):
        if keep_update:
            layer.merge()
        else:
            layer.unmerge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base)


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Contiguous tensors ``<layer>.a`` and ``<layer>.b`` of all adapters, and nothing of the model they adapt."""
    return {
        f"{name}.{part}": getattr(layer, part).weight.detach().contiguous().cpu()
        for name, layer in lora_layers(model)
        for part in ("a", "b")
    }


@torch.no_grad()
def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Inverse of :func:`adapter_state_dict`, for a model with the same adapters, none of them merged.

    Raises:
        ConfigurationError: tensors are missing, left over or of another shape; the adapters are merged.
    """
    own = adapter_state_dict(model)
    wrong = sorted(own.keys() ^ state.keys()) + [
        key for key in own.keys() & state.keys() if own[key].shape != state[key].shape
    ]
    if wrong:
        raise ConfigurationError(f"lora: {len(wrong)} tensor(s) do not fit the model's adapters, first {wrong[0]!r}")
    for name, layer in lora_layers(model):
        if layer.merged:
            raise ConfigurationError("lora: adapters are merged: unmerge them before others are loaded")
        for part in ("a", "b"):
            weight = getattr(layer, part).weight
            weight.copy_(state[f"{name}.{part}"])
