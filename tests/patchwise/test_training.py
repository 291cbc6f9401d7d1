"""Patch-wise training: tiles that cover held-out volumes once, metrics of whole volumes from them, two processes."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.data_module import VolumeDataModule
from dataset.intensity import HUWindow
from dataset.prepared import PreparedVolume
from dataset.store import write_store
from dataset.volume_dataset import TileDataset, VolumeDataset, collate
from dataset.volume_io import Volume
from errors import ConfigurationError
from evaluation.metrics.image import volume_metrics
from evaluation.metrics.streamed import METRICS, MetricSums
from params import HU_AIR
from tests.dataset.test_data_module import Case
from tests.helpers import (
    PATCHWISE,
    STATE_KEYS,
    assert_one_line_error,
    assert_same_state,
    kill,
    run,
    start,
    wait_for,
)
from tests.vq_gan_3d.test_vqgan_module import build
from vq_gan_3d.checkpointing import load_checkpoint

AFFINE = np.diag([2.0, 1.0, 1.0, 1.0])
WINDOW = HUWindow()
# native grids of two depths would need files; phantoms of one shape go all the way in seconds
NATIVE = [
    "dataset.size=null",
    "dataset.phantom_size=[24,40,36]",
    "dataset.patch_size=[16,16,16]",
    "dataset.patches_per_volume=2",
    "dataset.validation=[phantom_00000,phantom_00001]",
]


def stored(folder: Path, name: str, shape: tuple[int, int, int], seed: int = 0) -> PreparedVolume:
    hu = np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)
    path = folder / f"{name}.b2nd"
    write_store(path, Volume(hu, AFFINE), {})
    return PreparedVolume(name, path, AFFINE)


def pair(shape: tuple[int, int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(shape, generator=generator)
    return (target + 0.1 * torch.randn(shape, generator=generator)).clamp(0, 1), target


def test_metrics_from_slabs_are_those_of_the_volume() -> None:
    prediction, target = pair((30, 18, 20))
    expected = volume_metrics(prediction, target, WINDOW)
    assert set(expected) == set(METRICS)
    sums = MetricSums(30, WINDOW)
    for first in range(0, 30, 7):
        sums.update(prediction[first : first + 7], target[first : first + 7], first)
    for first in range(0, 20, 5):  # window positions 0-4, 5-9, ...
        sums.update_ssim(prediction[first : first + 15], target[first : first + 15])
    assert sums.result() == pytest.approx(expected, rel=1e-5)
    assert sums.count == 30 * 18 * 20
    assert MetricSums(4, WINDOW).result() == {}


def test_metrics_of_equal_and_of_broken_volumes() -> None:
    _, target = pair((12, 12, 12))
    sums = MetricSums(12, WINDOW)
    sums.update(target, target)
    assert sums.result()["psnr_db"] == sums.result()["psnr_slice_db"] == float("inf")
    assert sums.result()["mae_hu"] == 0
    broken = target.clone()
    broken[3, 4, 5] = float("nan")
    sums = MetricSums(12, WINDOW)
    sums.update(broken, target)
    assert all(np.isnan(value) for value in sums.result().values())
    sums = MetricSums(12, WINDOW)
    sums.update(torch.full((12, 12, 12), 0.5), target)
    assert np.isnan(sums.result()["pearson_r"])


@settings(deadline=None, max_examples=20)
@given(st.tuples(*[st.integers(1, 30)] * 3), st.sampled_from([(16, 16, 16), (8, 16, 24), (4, 4, 4), (6, 10, 16)]))
def test_tiles_own_every_voxel_once(tmp_path_factory, shape, patch) -> None:
    volume = stored(tmp_path_factory.mktemp("tiles"), "a", shape)
    dataset = TileDataset([volume], patch)
    hu, owners = np.asarray(volume.open()), np.zeros(shape, int)
    for index in range(len(dataset)):
        sample = dataset[index]
        start, own = sample["start"].tolist(), sample["own"].tolist()
        assert sample["hu"].shape == (1, *patch)
        assert np.array_equal(sample["affine"][:3, 3], np.diag(AFFINE)[:3] * start)
        whole = tuple(slice(s, min(s + p, n)) for s, p, n in zip(start, patch, shape, strict=True))
        inside = tuple(slice(0, part.stop - part.start) for part in whole)
        assert np.array_equal(sample["hu"][0][inside], hu[whole])
        beyond = np.ones(patch, bool)
        beyond[inside] = False
        assert (sample["hu"][0].numpy()[beyond] == HU_AIR).all()
        assert all(0 <= first <= last <= size for (first, last), size in zip(own, patch, strict=True))
        owners[tuple(slice(s + a, s + b) for s, (a, b) in zip(start, own, strict=True))] += 1
    assert (owners == 1).all()


def test_what_the_codec_sees_beyond_a_small_volume_is_air(tmp_path: Path) -> None:
    """T: never grey; 0 in the tensor, on training patches and on tiles."""
    volume = stored(tmp_path, "a", (6, 8, 10))
    for dataset in (TileDataset([volume], (8, 16, 16)), VolumeDataset([volume], (8, 16, 16), random=True)):
        unit = WINDOW.to_unit(dataset[0]["hu"])[0]
        assert unit.numel() - torch.count_nonzero(unit) >= 8 * 16 * 16 - 6 * 8 * 10
        assert float(unit[-1].max()) == float(unit[:, -1].max()) == float(unit[:, :, -1].max()) == 0.0


def test_a_volume_of_604_slices_is_54_tiles_and_none_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for depth, tiles in ((604, 54), (700, 63), (100, 9)):
        volume = PreparedVolume(f"{depth}", tmp_path / "none", AFFINE)
        shape = SimpleNamespace(shape=(depth, 512, 512))
        monkeypatch.setattr(PreparedVolume, "open", lambda self, shape=shape: shape)
        dataset = TileDataset([volume], (128, 256, 256))
        assert len(dataset) == tiles
        assert max(start[0] for _, start in dataset.tiles) + 128 >= depth


def test_the_central_tile_comes_first_and_a_limit_spreads(tmp_path: Path) -> None:
    volumes = [stored(tmp_path, "a", (40, 48, 48)), stored(tmp_path, "b", (16, 16, 16))]
    dataset = TileDataset(volumes, (16, 16, 16))
    centre = np.array(dataset.tiles[0][1]) + 8 - np.array([20, 24, 24])
    assert np.abs(centre).max() <= 8
    few = TileDataset(volumes, (16, 16, 16), limit=3)
    assert [number for number, _ in few.tiles] == [0, 0, 0, 1]
    assert len({start[0] for _, start in few.tiles[:3]}) == 3
    assert few.of_volumes([1]) == [3]


@pytest.mark.parametrize("patch", [(16, 32, 32), (64, 64, 64)])
def test_validation_by_tiles_has_the_metrics_of_the_stitched_volume(tmp_path: Path, patch) -> None:
    """A codec without context (it returns 0.9 x²) gives the same volume by any tiles: so must the metrics be."""
    volumes = [stored(tmp_path, "a", (30, 40, 50)), stored(tmp_path, "b", (20, 64, 33), 1)]
    module = build()
    module.codec.forward = (
        lambda volume: SimpleNamespace(  # type: ignore[method-assign]
            volume=0.9 * volume**2, indices=torch.zeros(1, *(size // 4 for size in volume.shape[2:]), dtype=torch.int64)
        )
    )
    logged: dict[str, float] = {}
    module.log_dict = lambda values, **_: logged.update(values)  # type: ignore[method-assign, assignment]
    module.log = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    module.on_validation_epoch_start()
    dataset = TileDataset(volumes, patch)
    for index in range(len(dataset)):
        module.validation_step(collate([dataset[index]]), index)
    module.on_validation_epoch_end()
    targets = [WINDOW.to_unit(torch.from_numpy(np.asarray(volume.open()))) for volume in volumes]
    rows = [volume_metrics(0.9 * target**2, target, WINDOW) for target in targets]
    exact = [name for name in METRICS if name != "ssim" or patch[0] == 64]  # tiles of 16 overlap less than a window
    for name in exact:
        assert logged[f"val/{name}"] == pytest.approx(np.mean([row[name] for row in rows]), rel=1e-4), name
    assert logged["val/ssim"] == pytest.approx(np.mean([row["ssim"] for row in rows]), rel=0.02)
    cells = sum(int(np.prod([-(-n // 4) for n in target.shape])) for target in targets)
    assert int(module.usage.counts.sum()) == cells


def test_a_tile_that_cannot_be_read_leaves_its_volume_out(tmp_path: Path) -> None:
    volumes = [stored(tmp_path, "a", (16, 16, 16)), stored(tmp_path, "b", (16, 16, 16), 1)]
    dataset = TileDataset(volumes, (16, 16, 16))
    volumes[0].path.unlink()
    bad = dataset[0]
    assert bad["skipped"][0][0] == "a"
    assert int(bad["own"].abs().sum()) == 0
    module = build()
    module.on_validation_epoch_start()
    for index in range(2):
        module.validation_step(collate([dataset[index]]), index)
    assert module._tiled["a"] is None
    assert module._tiled["b"] is not None


def test_ranks_share_held_out_volumes_and_never_one_volume(tmp_path: Path) -> None:
    held_out = ["a", "b", "c"]
    sources = [Case(name, name) for name in "abcde"]

    def share(rank: int, world_size: int) -> list[str]:
        data = VolumeDataModule(
            sources, size_dhw=None, patch_dhw=(4, 2, 2), patches_per_volume=2, validation_fraction=0.2,
            validation=held_out, cache=tmp_path, batch_size=1, num_workers=0, worker_timeout_s=10, seed=0,
            max_bad_fraction=0.0, validation_tiles=None,
        )  # fmt: skip
        data.build(rank, world_size)
        names = data.names_of_validation()
        assert [batch["name"][0] for batch in data.val_dataloader()] == names
        return names

    assert share(0, 2) == ["a"] * 4 + ["c"] * 4
    assert share(1, 2) == ["b"] * 4
    assert set(share(3, 4)) == set(held_out)  # fewer volumes than ranks
    with pytest.raises(ConfigurationError, match="validation_tiles=-1"):
        VolumeDataModule(
            sources, size_dhw=None, patch_dhw=None, patches_per_volume=1, validation_fraction=0.2, validation=[],
            cache=tmp_path, batch_size=1, num_workers=0, worker_timeout_s=10, seed=0, max_bad_fraction=0.0,
            validation_tiles=-1,
        )  # fmt: skip


def validation_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "logs/validation.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_trainer_validates_whole_volumes_and_its_loss_falls(tmp_path: Path) -> None:
    options = ["training.max_steps=60", "training.num_epochs=99", "training.learning_rate=0.003"]
    off = ["model.discriminator_iter_start=999", "logger.every_n_steps=1", "training.validate_every_n_epochs=50"]
    run(PATCHWISE, *NATIVE, *options, *off, cwd=tmp_path)
    with (tmp_path / "outputs/logs/train.csv").open() as file:
        curve = [float(row["l1"]) for row in csv.DictReader(file)]
    assert np.mean(curve[-10:]) < 0.7 * np.mean(curve[:10])
    (row,) = validation_rows(tmp_path / "outputs")
    assert 5 < float(row["psnr_db"]) < 60
    panels = sorted(path.name for path in (tmp_path / "outputs/validation_results").glob("*.png"))
    assert panels == ["step_0060_phantom_00000.png"] or len(panels) == 2


@pytest.mark.slow
def test_the_cap_on_validation_tiles_is_a_key(tmp_path: Path) -> None:
    refused = run(PATCHWISE, *NATIVE, "dataset.validation_tiles=-1", "training.max_steps=1", cwd=tmp_path, check=None)
    assert refused.returncode == 2
    assert_one_line_error(refused, "dataset.validation_tiles=-1")


@pytest.mark.slow
def test_t09_two_processes_killed_and_resumed_end_where_an_unbroken_run_ends(tmp_path: Path) -> None:
    options = [
        *NATIVE, "hardware.processes=2", "training.max_steps=8", "training.num_epochs=9",
        "training.checkpoint_every_n_steps=1", "model.discriminator_iter_start=3",
    ]  # fmt: skip
    run(PATCHWISE, *options, "output_dir=whole", cwd=tmp_path)
    process = start(PATCHWISE, *options, "output_dir=broken", cwd=tmp_path)
    wait_for(tmp_path / "broken/checkpoints/epoch_00_step_0003.ckpt", process)
    kill(process)
    assert not (tmp_path / "broken/checkpoints/final.ckpt").exists()
    run(PATCHWISE, *options, "output_dir=broken", "ckpt_path=last", cwd=tmp_path)
    whole, broken = (load_checkpoint(tmp_path / f"{name}/checkpoints/final.ckpt") for name in ("whole", "broken"))
    assert int(whole["current_model_state"]["steps"]) == 8
    for key in STATE_KEYS:
        assert_same_state(whole[key], broken[key], key)
    assert validation_rows(tmp_path / "whole") == validation_rows(tmp_path / "broken")
