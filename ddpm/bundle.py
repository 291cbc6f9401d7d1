"""The inference bundle: codec, diffusion network and all that their use depends on, in one safetensors file.

It is recognised by its content, whatever its name, and read without pickle: tensors, and one JSON text of plain numbers
and words. The text carries its own SHA-256 and the digests of both sets of weights, so a flipped bit anywhere is
noticed (safetensors does not notice it), and the SHA-256 of the text names the whole content.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dataset.atomic import atomic_write
from dataset.intensity import HUWindow
from dataset.xray_standard import LANDMARK_PERCENTILES, STANDARD_LANDMARKS
from ddpm.device import room_on
from ddpm.lora_file import base_digest
from ddpm.network import DDPMConfig, LatentDiffusion
from errors import ConfigurationError, InputError, ProjectError, one_line
from vq_gan_3d.codec import CodecConfig, VQCodec
from vq_gan_3d.latents import FrozenCodec

FORMAT = "x-ray2ctpa bundle 1"
_KEY = "bundle"  # of the metadata: one entry, since safetensors writes several in an order that changes
_DIGEST_CHARS = 64
_CODEC, _NETWORK = "codec.", "network."
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle.

    Attributes:
        network: the diffusion model, frozen and in evaluation mode.
        codec: whose latents it draws.
        meta: the JSON text as plain containers.
        checksum: SHA-256 (hex) that names the whole content.
    """

    network: LatentDiffusion
    codec: FrozenCodec
    meta: dict[str, Any]
    checksum: str

    @property
    def config(self) -> DDPMConfig:
        """Of the network."""
        return self.network.config

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.network.parameters()).device

    def move_to(self, device: torch.device | str) -> None:
        """Compute there from now on.

        Raises:
            MemoryExhaustedError: the device has no room for it.
        """
        with room_on(device):
            self.network.to(device)
            self.codec.to(device)

    @property
    def shape_dhw(self) -> tuple[int, int, int]:
        """Voxels of a volume that covers the whole field."""
        d, h, w = (n * step for n, step in zip(self.config.latent_dhw, self.config.stride_dhw, strict=True))
        return d, h, w


def write_bundle(
    path: str | Path,
    network: LatentDiffusion,
    codec: FrozenCodec,
    *,
    training: Mapping[str, Any] | None = None,
    report: Mapping[str, Any] | None = None,
) -> Bundle:
    """Write a bundle, atomically: the same bytes for the same input.

    Args:
        path: any name; its folder must exist.
        network: averaged weights, adapters folded in.
        codec: whose latents it was trained on.
        training: JSON-able facts of the training, for the model card; no paths, no names of patients.
        report: the summary of ``evaluation/xray_to_ct.py``.

    Raises:
        ConfigurationError: a model of crops, which draws no whole volume.
        InputError: the codec is another one.
        StorageError: the disk refuses.
    """
    if network.config.codec_hash != codec.content_hash:
        raise InputError(
            f"codec {codec.content_hash[:12]}: the diffusion model was trained on latents of codec "
            f"{network.config.codec_hash[:12]}: give the checkpoint of that one"
        )
    if network.config.crop_dhw is not None:
        raise ConfigurationError(
            "a model of crops draws no whole volume: what surrounds a crop is nothing that it is told, or the true "
            "latent, which nothing draws at inference: export a model of whole fields (dataset.patch_size=null)"
        )
    config = network.config.as_dict()
    # folders of the machine it was trained on: their use elsewhere names them anew
    config["conditioner"] = config["conditioner"] | {"text_path": None, "image_encoder_path": None}
    meta = {
        "format": FORMAT,
        "codec": codec.codec.config.as_dict(),
        "codec_hash": codec.content_hash,
        "hu_window": codec.window.as_dict(),
        "ddpm": config,
        "network_hash": base_digest(network),
        "xray": _xray_preparation(),
        "training": dict(training or {}),
        "report": None if report is None else dict(report),
        "versions": {name: metadata.version(name) for name in ("torch", "numpy", "safetensors")},
    }
    text = json.dumps(meta, sort_keys=True)
    checksum = hashlib.sha256(text.encode()).hexdigest()
    content = safetensors.torch.save(
        _tensors(_CODEC, codec.codec) | _tensors(_NETWORK, network), {_KEY: checksum + text}
    )
    with atomic_write(path) as handle:
        handle.write(content)
    return Bundle(network, codec, json.loads(text), checksum)


def load_bundle(
    path: str | Path,
    device: torch.device | str = "cpu",
    *,
    text_path: str | None = None,
    image_encoder_path: str | None = None,
) -> Bundle:
    """Read a bundle; nothing in it is ever executed.

    Args:
        path: recognised by content.
        device: where to compute.
        text_path: folder of the frozen sentence encoder, for a model that reads reports with one (default: that of the
            installed package).
        image_encoder_path: folder of the frozen image encoder, for a model that looks through one.

    Raises:
        InputError: missing, truncated, damaged, no bundle, or made with another preparation of X-rays.
        ConfigurationError: its metadata name code to run, or a frozen encoder is missing.
        MemoryExhaustedError: the device has no room for it.
    """
    path = Path(path)
    checksum, meta, state = _read(path)
    _refuse_targets(path, meta)
    try:
        if meta["xray"] != _xray_preparation():
            raise InputError("made with another preparation of X-rays: use the version of this project that wrote it")
        try:
            config, shape = DDPMConfig.from_dict(meta["ddpm"]), CodecConfig.from_dict(meta["codec"])
            window = HUWindow(**meta["hu_window"])
        except ConfigurationError as error:  # the file's settings, not the user's
            raise InputError(f"metadata that describe no model ({error}): export it again") from error
        if config.conditioner.text_path or config.conditioner.image_encoder_path:
            raise InputError("its metadata name folders of another machine: export it again")
        paths = {"text_path": text_path, "image_encoder_path": image_encoder_path}
        config = replace(config, conditioner=replace(config.conditioner, **paths))  # type: ignore[arg-type]
        codec = FrozenCodec(_fill(VQCodec(shape), state, _CODEC), window)
        network = _fill(LatentDiffusion(config), state, _NETWORK)
        if codec.content_hash != meta["codec_hash"] or base_digest(network) != meta["network_hash"]:
            raise InputError("damaged (its weights do not match their checksum): copy it again")
        if config.codec_hash != codec.content_hash:
            raise InputError("its network and its codec do not belong together: export it again")
    except ProjectError as error:
        raise type(error)(one_line(f"{path}: {error}")) from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        # what malformed settings make of dataclasses and layers, and tensors that do not fit them
        reason = one_line(f"{type(error).__name__}: {error}")[:200]
        raise InputError(f"{path}: metadata that do not describe its model ({reason}): export it again") from error
    bundle = Bundle(network.requires_grad_(False).eval(), codec, meta, checksum)
    bundle.move_to(device)
    return bundle


def _read(path: Path) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Checksum, verified metadata and tensors."""
    try:
        with open(path, "rb") as handle:
            head = handle.read(4)
        if head[:2] == b"PK" or head[:1] == b"\x80":  # what torch.save and pickle write
            raise InputError(f"{path}: no inference bundle: make one of it with ddpm/export_bundle.py")
        with safe_open(path, "pt") as file:
            found = (file.metadata() or {}).get(_KEY, "")
            checksum, text = found[:_DIGEST_CHARS], found[_DIGEST_CHARS:]
            if hashlib.sha256(text.encode()).hexdigest() != checksum:
                reason = "damaged (its metadata do not match their checksum)" if found else "no inference bundle"
                raise InputError(f"{path}: {reason}: copy it again, or make it with ddpm/export_bundle.py")
            meta = json.loads(text)
            if not isinstance(meta, dict) or meta.get("format") != FORMAT:
                raise InputError(f"{path}: not in the format {FORMAT!r}: export it again with this version")
            return checksum, meta, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or one_line(error)})") from error
    except (SafetensorError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: truncated, damaged or no inference bundle ({one_line(error)[:200]}): copy it again, or make it "
            "with ddpm/export_bundle.py"
        ) from error


def _fill(module: Module, state: Mapping[str, Tensor], prefix: str) -> Module:
    """Put its part of the file's tensors into a module.

    Raises:
        RuntimeError: they do not fit.
    """
    module.load_state_dict({name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)})
    return module


def _tensors(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {prefix + name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}


def _xray_preparation() -> dict[str, Any]:
    """What decides how a radiograph is brought to the standard look; the size is the conditioner's."""
    return {"landmark_percentiles": list(LANDMARK_PERCENTILES), "landmarks": list(STANDARD_LANDMARKS)}


def _refuse_targets(path: Path, value: Any, where: str = "") -> None:
    """Nothing in a bundle may name code to run; nothing would run it either.

    Raises:
        ConfigurationError: a key ``_target_`` somewhere.
    """
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in items:
        here = f"{where}.{key}" if where else str(key)
        if key == "_target_":
            raise ConfigurationError(f"{path}: refused, its metadata name code to run ({here}={one_line(entry)[:200]})")
        _refuse_targets(path, entry, here)
