"""The store builder on three phantoms, by its command and by its function."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dataset.phantom import make_phantom
from dataset.volume_io import Volume, write_nifti
from preprocess.build_store import BUILDER_VERSION, build_one
from tests.helpers import run

SCRIPT = "preprocess/build_store.py"


def build(source: Path, output: Path, *options: str, check: int | None = 0, **extra: str):
    return run(
        SCRIPT, "--input", str(source), "--output", str(output), *options, cwd=source, tiny=False, check=check, **extra
    )


def one(source: Path, output: Path, **changes: Any) -> dict[str, Any]:
    defaults = {
        "sidecar": None, "grid": None, "overwrite": False, "allow_no_air": False, "version": BUILDER_VERSION,
    }  # fmt: skip
    return build_one(str(source), output=str(output), **(defaults | changes))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of an output, the report without fingerprints, which hold times and folders."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    report = json.loads(files["build_store.json"])
    del report["resume"]
    return files | {"build_store.json": json.dumps(report).encode()}


@pytest.fixture(scope="module")
def phantoms():
    made = [make_phantom(seed, (20, 32, 40)) for seed in range(3)]
    return [Volume(phantom.hu, phantom.affine) for phantom in made]


@pytest.fixture
def source(tmp_path, phantoms):
    folder = tmp_path / "nifti"
    (folder / "deep").mkdir(parents=True)
    for name, phantom in zip(["a.nii.gz", "b.nii", "deep/a.nii.gz"], phantoms, strict=True):
        write_nifti(folder / name, phantom)
    return folder
