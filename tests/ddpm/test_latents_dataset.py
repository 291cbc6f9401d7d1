"""Samples: keyed by (seed, epoch, index), crops that agree with their rays and context, several X-rays of a patient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.prepared import PreparedVolume
from dataset.sources import PhantomSource, prepare
from dataset.xray_augment import XRayAugmentation
from ddpm.latent_dataset import LatentCase, LatentDataset, LatentSettings, collate_latents, condition_batch
from ddpm.prepare import LatentLibrary, label_of, prepare_cases
from errors import InputError
from tests.ddpm.tiny import tiny_codec
from vq_gan_3d.latents import LatentScaler, LatentStatistics

SIZE = (16, 24, 24)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[LatentCase]:
    cache = tmp_path_factory.mktemp("cache")
    sources = [PhantomSource(seed, SIZE) for seed in (3, 4)]
    volumes: list[PreparedVolume] = [prepare(source, None, cache) for source in sources]
    library = LatentLibrary(tiny_codec(), None, cache)
    found, failed = prepare_cases(sources, volumes, library, ("frontal", "lateral"), cache, "test")
    assert not failed
    again, _ = prepare_cases(sources, volumes, library, ("frontal", "lateral"), cache, "test")
    assert [case.latent.path for case in again] == [case.latent.path for case in found]
    assert [case.label for case in found] == [label_of(source) for source in sources]
    return found


def dataset(cases: list[LatentCase], **changes: object) -> LatentDataset:
    training = bool(changes.pop("training", True))
    settings = LatentSettings(**({"views": ("frontal", "lateral"), "xray_size": 32} | changes))  # type: ignore[arg-type]
    scaler = LatentScaler(LatentStatistics((0.0,) * 4, (0.5,) * 4))
    return LatentDataset(cases, settings, scaler, training=training, crops_per_volume=2)


def test_samples_depend_on_seed_epoch_and_index_alone(cases: list[LatentCase]):
    still = XRayAugmentation(rotation_deg=0, scale=0, shift=0)
    options = {"crop_dhw": (2, 4, 4), "context_dhw": (2, 2, 2), "augmentation": still}
    first, second = (dataset(cases, **options) for _ in range(2))
    samples = [first[(epoch, index)] for epoch in (0, 1) for index in range(4)]
    for number in (6, 1, 3):  # another order
        epoch, index = divmod(number, 4)
        again = second[(epoch, index)]
        for key, value in samples[number].items():
            same = torch.equal(value, again[key]) if isinstance(value, torch.Tensor) else value == again[key]
            assert same, key
    assert not torch.equal(samples[0]["code"], samples[4]["code"])  # another epoch, another crop
    assert not torch.equal(samples[0]["xray"], samples[4]["xray"])  # and another augmentation


def test_rays_follow_a_picture_that_was_moved(cases: list[LatentCase]):
    still = XRayAugmentation(rotation_deg=0, scale=0, shift=0)
    kept, moved = (dataset(cases, augmentation=augmentation)[(0, 0)] for augmentation in (still, XRayAugmentation()))
    plain = dataset(cases, augmentation=None)[(0, 0)]
    torch.testing.assert_close(kept["ray_grid"], plain["ray_grid"])
    assert 0.01 < float((moved["ray_grid"] - plain["ray_grid"]).abs().mean()) < 0.3


def test_crops_carry_their_part_of_everything(cases: list[LatentCase]):
    whole = dataset(cases, training=False)[0]
    assert whole["code"].shape == (4, 4, 6, 6)
    assert whole["hu"].shape == (1, *SIZE)
    assert whole["ray_grid"].shape == (2, 4, 6, 6, 2)
    crops = dataset(cases, crop_dhw=(2, 4, 4), context_dhw=(4, 6, 6))
    for index in (0, 2):
        crop = crops[(0, index)]
        place = crop["extra"][:3, 0, 0, 0]
        d, h, w = (int(((place[axis] + 1) * n / 2 - 0.5).round()) for axis, n in enumerate((4, 6, 6)))
        part = (slice(d, d + 2), slice(h, h + 4), slice(w, w + 4))
        assert torch.equal(crop["code"], whole["code"][(slice(None), *part)])
        assert torch.equal(crop["ray_grid"], whole["ray_grid"][(slice(None), *part)])
        # a context as fine as the latent is the latent itself
        latent = crops.scaler.to_latent(crop["code"])
        torch.testing.assert_close(crop["extra"][3:], latent, rtol=1e-4, atol=1e-4)
        # without a context a crop is told its place all the same
        assert torch.equal(dataset(cases, crop_dhw=(2, 4, 4))[(0, index)]["extra"], crop["extra"][:3])


def test_one_of_several_xrays_is_drawn(cases: list[LatentCase], tmp_path: Path):
    paths = []
    for number in range(3):
        rows = np.linspace(0, 200, 64)[:, None] + 10 * number * np.sin(np.arange(64))[None]
        path = tmp_path / f"{number}.png"
        Image.fromarray(np.clip(rows, 0, 255).astype(np.uint8)).save(path)
        paths.append(path)
    case = LatentCase(cases[0].volume, cases[0].latent, (tuple(paths), ()))
    data = dataset([case])
    drawn = {data[(epoch, 0)]["xray"][0].numpy().tobytes() for epoch in range(12)}
    assert len(drawn) == 3
    sample = data[(0, 0)]
    assert sample["xray_present"].tolist() == [True, False]
    assert not sample["xray"][1].any()
    assert bool((sample["ray_grid"][1].abs() > 1).all())
    held_out = dataset([case], training=False)
    assert torch.equal(held_out[0]["xray"], held_out[(5, 0)]["xray"])  # always the first


def test_a_bad_case_is_replaced_and_named(cases: list[LatentCase], tmp_path: Path):
    broken = LatentCase(cases[0].volume, cases[0].latent, ((tmp_path / "gone.png",), ()))
    data = dataset([broken, cases[1]])
    sample = data[(0, 0)]
    assert sample["name"] == cases[1].name
    assert [name for name, _ in sample["skipped"]] == [cases[0].name]
    with pytest.raises(InputError, match=r"none of 1 volumes.*gone\.png"):
        dataset([broken])[0]
    batch = collate_latents([sample, data[(0, 1)]])
    assert batch["code"].shape[0] == 2
    assert len(batch["skipped"]) == 1
    conditions = condition_batch(batch)
    assert conditions.text == ("", "")
    assert conditions.extra is None
