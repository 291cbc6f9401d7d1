"""Write phantom patients as a hospital would hand them over: DICOM CT series, radiographs, and a table of patients.

python preprocess/make_phantom_cohort.py --output hospital --patients 84 --held-out 20 --workers 2

`ct/PATIENT/IM0001.dcm` … are one contrast-enhanced series a patient. The last patients of the cohort are held out: they
come with a frontal radiograph, `xray/PATIENT_frontal.png`, rendered from their volume, with its geometry as JSON beside
it. `patients.csv` says who is who: patient, xray, label (embolism or not) and split. `phantom.key` is a key for the
names of the conversion (`dicom_to_nifti.py --key`). Nothing here is random or secret: the same command writes the same
files, and with that key the conversion gives the same names, and training the same order, everywhere.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from pathlib import Path
from typing import Any

from dataset.atomic import atomic_write, make_folder
from errors import ConfigurationError, run_command
from preprocess.batch import Job, absolute_path, run_batch, summarise
from preprocess.build_store import parse_grid

REPORT_NAME = "phantom_cohort.json"
TABLE_NAME = "patients.csv"
KEY_NAME = "phantom.key"
# Any would do; a hospital's is random.
_KEY = "88076abb370d8574a45153fdfe6bef67e883f6a6fdcf9c90f8d68e66a72c92ea"


def write_patient(
    seed: int, size_dhw: list[int], spacing_mm: list[float], output: str, output_picture: str | None, pixels: int
) -> dict[str, Any]:
    """Write one patient.

    Args:
        seed: of the phantom.
        size_dhw: voxels of the CT.
        spacing_mm: of the voxels (d, h, w).
        output: folder of the series.
        output_picture: the radiograph; None for a patient without one.
        pixels: across the radiograph.

    Returns:
        A record for the batch: ``label`` (embolism) and the ``outputs``.

    Raises:
        ConfigurationError: a bad seed, size or spacing.
        InputError: the volume is too flat for a radiograph.
        StorageError: the disk refuses.
    """
    from dataset.body import isolate_body
    from dataset.drr import write_picture
    from dataset.drr_render import Stand
    from dataset.phantom import sample_patient
    from dataset.phantom_dicom import phantom_volume, write_dicom_series
    from dataset.xray_drr import sidecar_of

    (d, h, w), (dd, hh, ww) = size_dhw, spacing_mm
    volume, tags = phantom_volume(seed, (d, h, w), (dd, hh, ww))
    outputs = [str(path) for path in write_dicom_series(volume, output, tags)]
    if output_picture is not None:
        target = Path(output_picture)
        make_folder(target.parent)
        body = isolate_body(volume.hu, volume.affine)
        write_picture(target, body, volume.affine, Stand(columns=pixels), "frontal", tags.patient)
        outputs += [output_picture, str(sidecar_of(target))]
    return {"label": sample_patient(seed).has_pe, "outputs": outputs}


def write_table(path: Path, records: dict[str, dict[str, Any]], held_out: set[str]) -> None:
    """``patients.csv``, one row a patient; radiographs by their path from the table's folder."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("patient", "xray", "label", "split"))
    for name, record in records.items():
        out = name in held_out
        xray = f"xray/{name}_frontal.png" if out else ""
        writer.writerow((name, xray, "yes" if record["label"] else "no", "validation" if out else "train"))
    with atomic_write(path) as handle:
        handle.write(text.getvalue().encode())


def parse_spacing(text: str) -> list[float]:
    """``6.75x6.75x5`` (W×H×D in mm) -> [d, h, w]."""
    try:
        w, h, d = (float(part) for part in text.replace("×", "x").split("x"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: a spacing W×H×D in mm such as 6.75x6.75x5") from error
    return [d, h, w]


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=absolute_path, required=True, help="folder for the cohort")
    parser.add_argument("--patients", type=int, default=84, help="(default: 84)")
    parser.add_argument("--held-out", type=int, default=20, help="of them, with a radiograph (default: 20)")
    parser.add_argument("--first-seed", type=int, default=0, help="of the phantoms (default: 0)")
    parser.add_argument("--size", type=parse_grid, default="64x64x64", help="voxels W×H×D (default: 64x64x64)")
    parser.add_argument(
        "--spacing", type=parse_spacing, default="6.75x6.75x5", help="W×H×D in mm (default: 6.75x6.75x5)"
    )
    parser.add_argument("--pixels", type=int, default=256, help="across a radiograph of 430 mm (default: 256)")
    parser.add_argument("--workers", type=int, default=0, help="worker processes (default: 0, in this process)")
    parser.add_argument("--resume", action="store_true", help="skip what the report in --output says is done")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> int:
    """Write the cohort."""
    count, held_out, output = arguments.patients, arguments.held_out, arguments.output
    if not 0 <= held_out <= count or count < 1:
        raise ConfigurationError(f"--patients {count} --held-out {held_out}: hold out no more than there are")
    if arguments.first_seed < 0 or arguments.size is None:
        raise ConfigurationError("--first-seed counts from 0, and --size is W×H×D")
    names = {f"phantom_{seed:05d}": seed for seed in range(arguments.first_seed, arguments.first_seed + count)}
    last = set(list(names)[count - held_out :])
    jobs = [
        Job(
            name,
            {
                "seed": seed,
                "size_dhw": arguments.size,
                "spacing_mm": arguments.spacing,
                "output": str(output / "ct" / name),
                "output_picture": str(output / "xray" / f"{name}_frontal.png") if name in last else None,
                "pixels": arguments.pixels,
            },
        )
        for name, seed in names.items()
    ]
    result = run_batch(
        write_patient,
        jobs,
        workers=arguments.workers,
        report=output / REPORT_NAME,
        resume=arguments.resume,
        description="writing phantom patients",
    )
    write_table(output / TABLE_NAME, result.records, last)
    with atomic_write(output / KEY_NAME) as handle:
        handle.write(_KEY.encode())
    print(f"table of patients: {output / TABLE_NAME}")
    return summarise(result, "patients written")


if __name__ == "__main__":
    args = parse_arguments()
    sys.exit(run_command(lambda: main(args), debug=args.debug))
