"""From one chest X-ray to a CTPA volume.

    from vqgan_inference import XRay2CTPA, load_xray
    model = XRay2CTPA.load_checkpoint("final_model.ckpt")
    ctpa_volume = model.generate(load_xray("patient_xray.png"))
    ctpa_volume.save_nifti("patient.nii.gz")

For a file or a folder of X-rays, PNG, JPEG or DICOM; an interrupted run goes on where it stopped:

    python vqgan_inference.py --checkpoint outputs/final_model.ckpt --xray FILE_OR_FOLDER --output FOLDER

Generated volumes are synthetic: research only, not for diagnosis.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm.device import DEVICE_HELP, chosen_device
from errors import ConfigurationError, ExitCode, InputError, run_command

if TYPE_CHECKING:
    from dataset.xray import XRay
    from dataset.xray_decode import XRayView
    from ddpm.bundle import Bundle
    from ddpm.ctpa_volume import CTPAVolume
    from ddpm.xray_files import XRayFiles

__all__ = ["XRay2CTPA", "load_xray"]


def load_xray(path: str | os.PathLike[str], size: int = 256, *, view: XRayView = "unknown") -> XRay:
    """Read a PNG, JPEG or DICOM chest X-ray; a model that looks at another size reads it again.

    Args:
        path: recognised by content, not by name.
        size: side of ``XRay.image`` in pixels.
        view: refuse a file that says to be another view.

    Raises:
        InputError: no sound radiograph; the message names the file.
    """
    from dataset.xray import load_xray as load

    return load(Path(path).expanduser().absolute(), size, view=view)


class XRay2CTPA:
    """A trained model, ready to use.

    Args:
        bundle: as `ddpm.bundle.load_bundle` gives it.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle

    @classmethod
    def load_checkpoint(
        cls,
        path: str | os.PathLike[str],
        device: str = "auto",
        *,
        text_path: str | None = None,
        image_encoder_path: str | None = None,
    ) -> XRay2CTPA:
        """Load an inference bundle, ``outputs/final_model.ckpt`` of ``ddpm/export_bundle.py``.

        Args:
            path: recognised by content, whatever its name.
            device: ``auto`` (a GPU where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
            text_path: folder of the frozen sentence encoder of a model that reads reports with one.
            image_encoder_path: folder of the frozen image encoder of a model that looks through one.

        Raises:
            InputError: missing, damaged, or no bundle.
            ConfigurationError: no such device, or a frozen encoder is missing.
            MemoryExhaustedError: the device has no room for the model.
        """
        from ddpm.bundle import load_bundle

        chosen = chosen_device(device)
        return cls(
            load_bundle(Path(path).expanduser(), chosen, text_path=text_path, image_encoder_path=image_encoder_path)
        )

    def generate(
        self,
        xray: XRay | Sequence[XRay],
        *,
        steps: int = 20,
        sampler: str = "dpm_solver_pp_2m",
        guidance: float = 1.0,
        rescale: float = 0.0,
        seed: int = 0,
        samples: int = 1,
        text: str = "",
        label: int | None = None,
        precision: str = "fp32",
        device: str | None = None,
    ) -> CTPAVolume:
        """Draw a CTPA volume for one patient; the same arguments give the same volume.

        Args:
            xray: of `load_xray`; several are views of the same patient.
            steps: of the sampler.
            sampler: ``dpm_solver_pp_2m``, ``ddim``, ``ddpm``, ``heun`` or ``euler``.
            guidance: scale of classifier-free guidance; 1 is off.
            rescale: how far guided samples get their spread back, in [0, 1].
            seed: of all randomness. Two X-rays under one seed share their noise, so what differs is due to them.
            samples: volumes; several give ``mean`` and ``uncertainty_hu``.
            text: report, for a model that was trained with reports.
            label: 1 for an embolism, 0 for none, for a model that was trained with labels.
            precision: ``fp32`` or ``bf16``.
            device: move the model there first and leave it there, as `load_checkpoint` names it; default where it is.

        Raises:
            InputError: an X-ray that this model does not take.
            ConfigurationError: settings or device out of range, or a text or label for a model that takes none.
            MemoryExhaustedError: the model or one volume is too much for the device.
        """
        from dataset.xray import XRay
        from ddpm.inference import Request, draw, volume_of
        from ddpm.network import Sampling
        from ddpm.patient import prepare_patient

        request = Request(Sampling(steps, sampler, guidance, rescale), seed, samples, precision)
        if device is not None:
            self.bundle.move_to(chosen_device(device))
        xrays = [xray] if isinstance(xray, XRay) else list(xray)
        patient = prepare_patient(self.bundle, xrays, text, label)
        (hu,) = draw(self.bundle, [patient], request)
        return volume_of(self.bundle, request, patient, hu)


def _counted(jobs: Sequence[XRayFiles]) -> str:
    """How many radiographs there are, and how many of them with what goes along."""
    total, parts = len(jobs), [f"{len(jobs)} X-ray(s)"]
    for what, count in (
        ("lateral", sum(len(job.paths) > 1 for job in jobs)),
        ("report", sum(job.report is not None for job in jobs)),
    ):
        parts += [f"{count} of {total} with a {what}"] if count else []
    return ", ".join(parts)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="bundle of ddpm/export_bundle.py")
    parser.add_argument("--xray", type=Path, required=True, help="radiograph, or folder of radiographs")
    parser.add_argument("--lateral", type=Path, help="lateral view, or folder of those with the same names")
    parser.add_argument("--report", type=Path, help="its report as .txt, or folder of those with the same names")
    parser.add_argument("--label", type=int, choices=(0, 1), help="draw with (1) or without (0) an embolism")
    parser.add_argument("--output", type=Path, required=True, help="folder for results")
    parser.add_argument("--steps", type=int, default=20, help="of the sampler (default: 20)")
    parser.add_argument("--sampler", default="dpm_solver_pp_2m", help="(default: dpm_solver_pp_2m)")
    parser.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance, 1 is off (default: 1)")
    parser.add_argument("--rescale", type=float, default=0.0, help="of guided samples, 0 to 1 (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of all randomness (default: 0)")
    parser.add_argument("--samples", type=int, default=1, help="per X-ray; 2 or more give mean and uncertainty")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="(default: fp32)")
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    parser.add_argument("--batch", type=int, help="samples drawn together (default: as memory allows, 8 at most)")
    parser.add_argument("--image-encoder", help="folder of the frozen image encoder, for a model that has one")
    parser.add_argument("--text-encoder", help="folder of the frozen sentence encoder, for a model that has one")
    parser.add_argument("--dicom", action="store_true", help="also write a DICOM series of each volume")
    parser.add_argument("--png", action="store_true", help="also write a picture of each volume")
    parser.add_argument("--overwrite", action="store_true", help="replace results of other settings")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(arguments)


def main(arguments: argparse.Namespace) -> int:
    """Volumes for all X-rays; exit 4 if some had to be left out, 3 if all."""
    if arguments.batch is not None and arguments.batch < 1:
        raise ConfigurationError(f"--batch {arguments.batch}: give 1 or more")
    from ddpm.xray_files import find_xrays

    a, output = arguments, arguments.output.expanduser()
    jobs = find_xrays(a.xray, a.lateral, output, a.report)
    print(f"{_counted(jobs)}: loading {a.checkpoint}", flush=True)  # before torch, which takes seconds to import
    from ddpm.inference import Request
    from ddpm.inference_run import Results, run
    from ddpm.network import Sampling

    request = Request(Sampling(a.steps, a.sampler, a.guidance, a.rescale), a.seed, a.samples, a.precision)
    model = XRay2CTPA.load_checkpoint(
        a.checkpoint, a.device, text_path=a.text_encoder, image_encoder_path=a.image_encoder
    )
    bundle = model.bundle
    print(f"{a.steps} steps on {bundle.device}, bundle {bundle.checksum[:12]}", flush=True)
    results = Results(output, a.png, a.dicom, a.overwrite)
    finished, failed = run(bundle, request, jobs, results, label=a.label, batch=a.batch)
    if not finished:
        first = next(iter(failed.values()))
        raise InputError(first if len(jobs) == 1 else f"none of {len(jobs)} X-rays could be used; the first: {first}")
    print(f"{finished} volume(s) in {output}: synthetic, not for diagnosis")
    for reason in failed.values():
        print(f"left out: {reason}", file=sys.stderr)
    return ExitCode.SKIPS if failed else ExitCode.OK


if __name__ == "__main__":
    args = parse_arguments()
    sys.exit(run_command(lambda: main(args), debug=args.debug))
