"""Digitally reconstructed radiographs: what an X-ray of the patient of a CT would look like, with its geometry.

python preprocess/render_drr.py --input data/nifti --output data/drr --workers 8
python preprocess/render_drr.py --input data/stores --output data/drr --views frontal --size 1024

Every NIfTI file or store `a/b` becomes `a/b_frontal.png` and `a/b_lateral.png`: 16-bit line integrals of attenuation,
head up, the patient's left on the right (lateral: the chest on the left), and a JSON file of the same name by which a
pixel can be followed along its ray into the volume (dataset/projection.py). The couch is removed; scatter, beam
hardening and arms that hang down are not simulated.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset.atomic import make_folder
from errors import InputError, run_command
from preprocess.batch import Job, add_batch_arguments, run_as_asked, summarise
from preprocess.volume_tree import named_volumes

if TYPE_CHECKING:
    from dataset.projection import View

REPORT_NAME = "render_drr.json"
VIEWS = ("frontal", "lateral")


def render_one(source: str, output: str, views: list[View], stand: dict[str, Any]) -> dict[str, Any]:
    """Render the radiographs of one volume.

    Args:
        source: NIfTI file or store.
        output: path of the pictures without ``_frontal.png``.
        views: which.
        stand: keywords of `dataset.drr_render.Stand`.

    Returns:
        A record for the batch: size, magnification and range of each picture.

    Raises:
        InputError: the volume is damaged or shows nothing that can be projected.
        StorageError: the disk refuses.
    """
    from dataset.body import isolate_body
    from dataset.drr import write_picture
    from dataset.drr_render import Stand
    from dataset.pairs_case import load_volume

    path = Path(source)
    volume = load_volume(path)
    outputs: list[str] = []
    pictures: dict[str, dict[str, Any]] = {}
    try:
        body = isolate_body(volume.hu, volume.affine)
        for view in views:
            picture = Path(f"{output}_{view}.png")
            make_folder(picture.parent)
            pictures[view] = write_picture(picture, body, volume.affine, Stand(**stand), view, path.name)
            outputs += [str(picture), str(picture.with_suffix(".json"))]
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return {"pictures": pictures, "voxels_set_to_air": body.removed_voxels, "outputs": outputs}


def main(arguments: argparse.Namespace) -> int:
    """Render every volume below --input."""
    from dataset.drr_render import Stand

    stand: dict[str, Any] = {
        "columns": arguments.size,
        "field_mm": arguments.field_mm,
        "source_detector_mm": arguments.source_detector_mm,
        "gap_mm": arguments.gap_mm,
    }
    Stand(**stand)  # a bad number ends here, before the first patient
    jobs = []
    for name, path in named_volumes(arguments.input).items():
        details = {
            "source": str(path),
            "output": str(arguments.output / name),
            "views": arguments.views,
            "stand": stand,
        }
        jobs.append(Job(name, details))
    result = run_as_asked(render_one, jobs, arguments, REPORT_NAME, "rendering radiographs")
    return summarise(result, "volumes rendered")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_batch_arguments(parser)
    parser.add_argument("--views", nargs="+", choices=VIEWS, default=list(VIEWS), help="which pictures (default: both)")
    parser.add_argument("--size", type=int, default=512, help="pixels across (default: 512)")
    parser.add_argument("--field-mm", type=float, default=430.0, help="width of the detector (default: 430)")
    parser.add_argument("--source-detector-mm", type=float, default=1800.0, help="default: 1800, a wall stand")
    parser.add_argument("--gap-mm", type=float, default=50.0, help="between body and detector (default: 50)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = parse_arguments()
    sys.exit(run_command(lambda: main(args), debug=args.debug))
