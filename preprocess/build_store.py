"""Turn NIfTI volumes into training stores: int16 HU in compressed chunks, checksummed, with affine and metadata.

python preprocess/build_store.py --input data/nifti --output data/stores --workers 8
python preprocess/build_store.py --input data/nifti --output data/baseline --grid 256x256x64

`--grid native` (the default) keeps the scanner's grid, for training on patches. A size W×H×D resamples the whole field
of view, nothing is cropped. The tree of folders is kept, `a/b.nii.gz` becomes `a/b.b2nd`. A store that is already there
and was made from the same bytes in the same way is checked and kept; anything else of that name needs --overwrite. A
volume without a voxel of air is hardly in HU and refused; --allow-no-air takes it for a crop of tissue.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

from dataset.atomic import make_folder
from dataset.pairs_case import SIDECAR_FORMAT, sidecar_path
from dataset.verification import NIFTI_SUFFIXES, STORE_SUFFIX
from errors import InputError, run_command
from preprocess.batch import Job, add_batch_arguments, run_as_asked, summarise
from preprocess.batch_report import describe_output
from preprocess.volume_tree import named_volumes

log = logging.getLogger(__name__)
REPORT_NAME = "build_store.json"
# Part of every store: raise it when the same file and grid give another store, and `--resume` builds it again.
BUILDER_VERSION = 4
_SIDECAR_BYTES = 1 << 20
_MAX_SIZE = 4096


def build_one(
    source: str,
    sidecar: str | None,
    output: str,
    grid: list[int] | None,
    overwrite: bool,
    allow_no_air: bool,
    version: int,
) -> dict[str, Any]:
    """Make one store.

    Args:
        source: NIfTI file.
        sidecar: the JSON beside it, if any; see `read_sidecar`.
        output: the store.
        grid: new size [D, H, W], or None for the file's own grid.
        overwrite: replace a store of this name that was made from something else.
        allow_no_air: take a volume without a voxel of air.
        version: `BUILDER_VERSION`.

    Returns:
        A record for the batch: what the store holds.

    Raises:
        InputError: the source or its sidecar is damaged, it holds no air, or another store has this name.
        StorageError: the disk refuses.
    """
    from dataset.body import body_metadata
    from dataset.geometry import resample_to_size
    from dataset.store import open_store, write_store
    from dataset.volume_io import (
        AIR_HU,
        NO_GEOMETRY,
        Volume,
        floored,
        holds_air,
        read_nifti,
        to_int16_hu,
        without_geometry,
    )

    path, target = Path(source), Path(output)
    facts = read_sidecar(Path(sidecar)) if sidecar else {}
    wanted = {"source": _origin(path), "builder_version": version, "grid": grid_name(grid), "sidecar": facts}
    if overwrite or not is_there(target, wanted):
        volume = read_nifti(path)
        if facts and facts["shape_dhw"] != list(volume.hu.shape):
            raise InputError(f"{sidecar}: says shape {facts['shape_dhw']}, {path.name} has {list(volume.hu.shape)}: "
                             "it belongs to another volume, remove it or convert again")  # fmt: skip
        (hu, padded), affine = floored(volume.hu), volume.affine
        if not allow_no_air and not holds_air(hu):
            raise InputError(f"{path}: no voxel is below {AIR_HU} HU, so it is not in HU: convert it again, or give "
                             "--allow-no-air if it is a crop of tissue")  # fmt: skip
        if without_geometry(affine, hu.shape):
            log.warning("%s: %s", path, NO_GEOMETRY)
        if grid is not None:
            resampled, affine = resample_to_size(hu, affine, grid)
            hu, _, _ = to_int16_hu(resampled)
        make_folder(target.parent)
        metadata = {
            **wanted,
            "rounded_voxels": volume.rounded,
            "clipped_voxels": volume.clipped,
            "padded_voxels": padded,
            "body": body_metadata(hu, affine),
        }
        write_store(target, Volume(hu, affine, source=source), metadata)
    store = open_store(target)
    return {
        "shape_dhw": [int(size) for size in store.hu.shape],
        "checksum": store.checksum,
        "body": {key: value for key, value in store.metadata["body"].items() if key != "map"},
        "outputs": [output],
    }


def is_there(target: Path, wanted: dict[str, Any]) -> bool:
    """Whether a sound store of this origin is there already.

    Args:
        target: the store.
        wanted: what its metadata must say.

    Raises:
        InputError: what is there is damaged, or of another origin.
    """
    from dataset.store import open_store, verify_store

    if not target.exists():
        return False
    try:
        verify_store(target)
        metadata = open_store(target).metadata
    except InputError as error:
        raise InputError(f"{error}; --overwrite builds it again") from error
    differing = [key for key, value in wanted.items() if metadata.get(key) != value]
    if differing:
        raise InputError(f"{target}: there already with another {differing[0]}: --overwrite or another --output")
    return True


def read_sidecar(path: Path) -> dict[str, Any]:
    """The facts that `dicom_to_nifti` wrote beside a volume; nothing from any other program's JSON.

    Only ours is known to hold no name of a patient (dcm2niix writes PatientName), so only ours goes into stores, and of
    ours only what the conversion writes: whatever else somebody added may name the patient as well.

    Raises:
        InputError: it cannot be read, or is not JSON.
    """
    from preprocess.dicom_sidecar import FIELDS

    try:
        with open(path, "rb") as handle:
            text = handle.read(_SIDECAR_BYTES + 1)
        content = json.loads(text) if len(text) <= _SIDECAR_BYTES else {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: no readable JSON ({error}): convert the series again, or remove it") from error
    if not isinstance(content, dict) or content.get("format") != SIDECAR_FORMAT or "shape_dhw" not in content:
        log.warning("%s: not written by dicom_to_nifti, left out: it may name the patient", path)
        return {}
    if foreign := len(content.keys() - FIELDS):
        log.warning("%s: %d fields not of dicom_to_nifti, left out: they may name the patient", path, foreign)
    return {key: value for key, value in content.items() if key in FIELDS}


def _origin(path: Path) -> dict[str, Any]:
    if not path.is_file():  # a pipe would block on opening
        raise InputError(f"{path}: not a file: give one .nii or .nii.gz")
    try:
        return {"name": path.name, "sha256": describe_output(str(path))["sha256"]}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def make_jobs(arguments: argparse.Namespace) -> list[Job]:
    """One job for each NIfTI file; stores keep the tree of the input.

    Raises:
        ConfigurationError: no such folder.
        InputError: no NIfTI in it, or two that would become one store.
    """
    jobs = []
    for name, path in named_volumes(arguments.input, NIFTI_SUFFIXES).items():
        sidecar = sidecar_path(path)
        details = {
            "source": str(path),
            "sidecar": str(sidecar) if sidecar.is_file() else None,
            "output": str(arguments.output / f"{name}{STORE_SUFFIX}"),
            "grid": arguments.grid,
            "overwrite": arguments.overwrite,
            "allow_no_air": arguments.allow_no_air,
            "version": BUILDER_VERSION,
        }
        jobs.append(Job(name, details))
    return jobs


def leftovers(arguments: argparse.Namespace, jobs: list[Job]) -> list[Path]:
    """Stores in the output that no volume of the input gives; none where the input is one file.

    They may be of another input, so that nobody but the user can remove them.
    """
    ours = {job.arguments["output"] for job in jobs}
    if not arguments.input.is_dir():
        return []
    return sorted(path for path in arguments.output.rglob(f"[!.]*{STORE_SUFFIX}") if str(path) not in ours)


def parse_grid(text: str) -> list[int] | None:
    """``native`` -> None, ``256x256x64`` (W×H×D, as users write) -> [D, H, W]."""
    if text == "native":
        return None
    match = re.fullmatch(r"(\d{1,4})[x×](\d{1,4})[x×](\d{1,4})", text)
    sizes = [int(number) for number in match.groups()] if match else [0]
    if not all(1 <= size <= _MAX_SIZE for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r}: native, or a size W×H×D such as 256x256x64 (at most {_MAX_SIZE})")
    return sizes[::-1]


def grid_name(grid: list[int] | None) -> str:
    """The inverse of `parse_grid`."""
    return "native" if grid is None else "x".join(str(size) for size in reversed(grid))


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_batch_arguments(parser)
    parser.add_argument("--grid", type=parse_grid, default="native", help="native (default) or a size W×H×D")
    parser.add_argument("--allow-no-air", action="store_true", help="take crops of tissue, without a voxel of air")
    parser.add_argument("--overwrite", action="store_true", help="replace stores that were made from something else")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> int:
    """Build the stores of a folder; exit 4 if some failed, 3 if all did."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.DEBUG if arguments.debug else None)
    jobs = make_jobs(arguments)
    begin = time.monotonic()
    result = run_as_asked(build_one, jobs, arguments, REPORT_NAME, f"building stores ({grid_name(arguments.grid)})")
    seconds = time.monotonic() - begin
    slices = sum(record["shape_dhw"][0] for record in result.records.values())
    raw = sum(2 * math.prod(record["shape_dhw"]) for record in result.records.values())
    stored = sum(Path(path).stat().st_size for record in result.records.values() for path in record["outputs"])
    if raw:
        print(f"{slices} slices, {stored / 1e6:.1f} MB = {stored / raw:.1%} of raw int16; {seconds:.1f} s")
    if others := leftovers(arguments, jobs):
        log.warning("%s: %d stores there are of no volume in --input, the first: %s: remove those whose volume is "
                    "gone, they go into training", arguments.output, len(others), others[0].name)  # fmt: skip
    return summarise(result, "volumes stored")


if __name__ == "__main__":
    args = parse_arguments()
    sys.exit(run_command(lambda: main(args), debug=args.debug))
