"""Encode volumes with a frozen 3D VQ-GAN, once: what the diffusion model trains on.

python preprocess/encode_latents.py --input stores --output latents --checkpoint outputs/checkpoints/final.ckpt
python preprocess/encode_latents.py --input nifti --output latents --checkpoint final.ckpt --size 256x256x64

Without --size volumes keep their own grid and are encoded by tiles with a halo, which equals encoding them whole: for
the patch-wise model. A size W×H×D resamples the whole field of view, for the baseline. The tree of folders is kept,
`a/b.nii.gz` becomes `a/b.safetensors`. A latent that is there already, sound and made of the same volume by the same
codec, is kept: a run that was stopped, by SIGINT and SIGTERM at once, goes on where it was.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from dataset.pairs_case import volume_stem
from errors import ConfigurationError, ExitCode, InputError, ProjectError, StorageError, run_command
from preprocess.build_store import grid_name, parse_grid
from preprocess.stopping import Stop, stoppable
from preprocess.volume_tree import named_volumes

log = logging.getLogger(__name__)


def encode_file(path: Path, target: Path, codec: Any, grid: list[int] | None, dtype: str, bf16: bool) -> bool:
    """Encode one volume unless its latent is there; returns whether it had to.

    Args:
        path: .nii, .nii.gz or .b2nd.
        target: the latent.
        codec: a `vq_gan_3d.latents.FrozenCodec`.
        grid: size [D, H, W] to resample to; None keeps the volume's own.
        dtype: of the stored numbers.
        bf16: compute in bf16.

    Raises:
        InputError: the volume cannot be read.
        StorageError: the disk refuses.
    """
    import torch

    from dataset.geometry import resample_to_size
    from dataset.pairs_case import load_volume
    from dataset.volume_io import to_int16_hu
    from preprocess.batch_report import describe_output
    from vq_gan_3d.latent_files import write_latent

    try:
        origin = describe_output(str(path))["sha256"]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    source = {"name": volume_stem(path), "sha256": origin, "grid": grid_name(grid), "dtype": dtype,
              "bf16": bf16}  # fmt: skip
    if _is_there(target, codec, source):
        return False
    volume = load_volume(path)
    hu, affine = volume.hu, volume.affine
    if grid is not None and list(hu.shape) != grid:
        resampled, affine = resample_to_size(hu, affine, grid)
        hu, _, _ = to_int16_hu(resampled)
    code = codec.encode(hu, torch.bfloat16 if bf16 else None)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{target.parent}: cannot be created ({error.strerror}): choose another --output") from error
    write_latent(target, code, codec, affine, hu.shape, source=source, dtype=dtype)
    return True


def _is_there(target: Path, codec: Any, source: dict[str, Any]) -> bool:
    from vq_gan_3d.latent_files import open_latent

    if not target.exists():
        return False
    try:
        latent = open_latent(target).verify()
    except InputError as error:
        log.warning("%s", error)
        return False
    return bool(latent.meta["codec"] == codec.content_hash and latent.meta["source"] == source)


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="folder of .nii, .nii.gz or .b2nd, or one of them")
    parser.add_argument("--output", type=Path, required=True, help="folder for latents")
    parser.add_argument("--checkpoint", type=Path, required=True, help="of the 3D VQ-GAN, of either sibling")
    parser.add_argument("--size", type=parse_grid, default="native", help="native (default) or a size W×H×D")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16", help="of the stored numbers")
    parser.add_argument("--bf16", action="store_true", help="compute in bf16 (faster on GPUs; default: fp32)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--devices", type=int, default=1, help="processes, one per GPU (default: 1)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> int:
    """Encode a folder; exit 4 if some volumes failed, 3 if all did.

    Raises:
        TerminatedError: SIGTERM; KeyboardInterrupt: SIGINT. Latents that are finished stay.
    """
    with stoppable("finished latents are kept, the same command goes on from there") as stop:
        return _encode_all(arguments, stop)


def over_processes(strategy: Any, counts: list[int]) -> list[int]:
    """Sums of counts over all processes.

    Args:
        strategy: of a Lightning Trainer that has run.
        counts: of this process, the same number of them in each.
    """
    import torch

    # NCCL adds nothing up on the CPU, where the module is once the Trainer has run
    total = strategy.reduce(torch.tensor(counts, device=strategy.root_device), reduce_op="sum")
    return [int(count) for count in total]


def _encode_all(arguments: argparse.Namespace, stop: Stop) -> int:
    import os
    import warnings

    import pytorch_lightning as pl
    import torch
    from torch.utils.data import DataLoader

    from vq_gan_3d.latent_files import SUFFIX
    from vq_gan_3d.latents import FrozenCodec

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.DEBUG if arguments.debug else None)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    accelerator = arguments.device
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    available = torch.cuda.device_count()
    if accelerator not in ("cpu", "cuda") or arguments.devices < 1:
        raise ConfigurationError(
            f"--device {arguments.device} --devices {arguments.devices}: auto, cpu or cuda, from 1"
        )
    if accelerator == "cuda" and arguments.devices > available:
        raise ConfigurationError(f"--devices {arguments.devices}: this machine has {available} CUDA device(s)")
    codec = FrozenCodec.load(arguments.checkpoint)
    named = named_volumes(arguments.input)
    tasks = [(path, arguments.output / f"{name}{SUFFIX}") for name, path in named.items()]
    rank = int(os.environ.get("LOCAL_RANK", "0"))

    class Encoding(pl.LightningModule):
        """One volume a step; Lightning starts the processes and places each on its device."""

        def __init__(self) -> None:
            super().__init__()
            self.failures: dict[str, str] = {}
            self.encoded = 0

        def on_predict_start(self) -> None:
            stop.listen()  # Lightning has put its own handler there

        def predict_step(self, batch: int, batch_idx: int) -> None:
            stop.check()
            path, target = tasks[batch]
            codec.to(self.device)
            try:
                self.encoded += encode_file(path, target, codec, arguments.size, arguments.dtype, bool(arguments.bf16))
            except StorageError:
                raise
            except ProjectError as error:
                self.failures[str(path)] = str(error)
                print(f"failed: {error}", file=sys.stderr)

    module = Encoding()
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=arguments.devices,
        strategy="ddp" if arguments.devices > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    # every process takes each n-th volume: what a file holds depends on its volume alone
    share = list(range(len(tasks)))[rank :: arguments.devices]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        loader: DataLoader[int] = DataLoader(share, batch_size=None)  # type: ignore[arg-type]  # it has what is asked
        trainer.predict(module, loader, return_predictions=False)
    failed, encoded = over_processes(trainer.strategy, [len(module.failures), module.encoded])
    if rank == 0:
        print(f"{len(tasks) - failed} latents in {arguments.output}, {encoded} of them new, {failed} failed")
    if not failed:
        return ExitCode.OK
    return ExitCode.SKIPS if failed < len(tasks) else ExitCode.BAD_INPUT


if __name__ == "__main__":
    args = parse_arguments()
    sys.exit(run_command(lambda: main(args), debug=args.debug))
