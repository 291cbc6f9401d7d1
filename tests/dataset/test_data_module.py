"""Who is trained on and who is held out: the split that sources name, else the hash; the test split is never opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from dataset.data_module import VolumeDataModule
from dataset.on_volumes import OnVolumesDataModule
from dataset.sources import PhantomSource, VolumeSource
from dataset.volume_dataset import VolumeDataset
from dataset.volume_io import Volume
from errors import ConfigurationError


@dataclass(frozen=True)
class Case:
    """A source that names its split, as the cases of cohorts do."""

    name: str
    patient: str
    split: str | None = None

    @property
    def identity(self) -> str:
        return self.name

    def load(self) -> Volume:
        if self.split == "test":
            raise AssertionError("the test split was opened")
        return Volume(np.zeros((4, 4, 4), np.int16), np.eye(4))


def module(sources: Sequence[VolumeSource], cache: Path = Path("unused"), **options: object) -> VolumeDataModule:
    settings: dict = {
        "size_dhw": None,
        "patch_dhw": (2, 2, 2),
        "patches_per_volume": 1,
        "validation_fraction": 0.2,
        "validation": [],
        "cache": cache,
        "batch_size": 1,
        "num_workers": 0,
        "worker_timeout_s": 10,
        "seed": 0,
        "max_bad_fraction": 0.0,
    }
    return VolumeDataModule(sources, **settings | options)


def names(data: VolumeDataModule) -> dict[str, list[str]]:
    return {split: [source.name for source in sources] for split, sources in data.sources.items()}


def test_the_split_of_the_sources_is_honoured_and_test_is_never_opened(tmp_path: Path) -> None:
    cases = [Case("a", "p", "train"), Case("b", "q", "validation"), Case("c", "r", "test"), Case("d", "p", "train")]
    data = module(cases, tmp_path)
    assert names(data) == {"training": ["a", "d"], "validation": ["b"]}
    data.build(0, 1)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("c-")]
    assert [volume.name for volume in data.datasets["training"].volumes] == ["a", "d"]


def test_sources_without_split_go_by_hash_as_before() -> None:
    data = module([PhantomSource(seed, (4, 4, 4)) for seed in range(30)])
    assert len(data.sources["training"]) + len(data.sources["validation"]) == 30
    assert 1 <= len(data.sources["validation"]) <= 12
    unnamed = module([Case(f"phantom_{seed:05d}", f"phantom_{seed:05d}") for seed in range(30)])
    assert names(unnamed) == names(data)


@pytest.mark.parametrize(
    ("cases", "words"),
    [
        ([Case("a", "p", "train"), Case("b", "p", "validation")], "two splits"),
        ([Case("a", "p", "train"), Case("b", "p", None)], "two splits"),
        ([Case("a", "p", "trian"), Case("b", "q", "test")], "trian"),
        ([Case("a", "p", "train"), Case("b", "q", "test")], "validation split"),
        ([Case("a", "p", "train"), Case("b", "q", None)], "no split"),
    ],
)
def test_splits_that_contradict_each_other(cases: list[Case], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        module(cases)


def test_a_changed_split_is_another_cohort() -> None:
    cases = [Case(name, name) for name in "abcdefgh"]
    base = module(cases, validation=["a"])
    assert module(cases[::-1], validation=["a"]).manifest == base.manifest
    others = [
        module(cases, validation=["b"]),
        module(cases, validation=["a", "b"]),
        module(cases[:-1], validation=["a"]),
    ]
    marked = [Case(case.name, case.name, "validation" if case.name == "a" else "train") for case in cases]
    assert module(marked).manifest == base.manifest  # however they were assigned
    assert len({base.manifest, *(other.manifest for other in others)}) == 4


@pytest.mark.parametrize("few", [0, -1, 1.5, True, "two"])
def test_a_number_of_fixed_patches_that_cannot_be_is_refused(few: object) -> None:
    with pytest.raises(ConfigurationError, match=rf"dataset\.overfit_patches={few}: give a number"):
        module([Case("a", "p", "train"), Case("b", "q", "validation")], overfit_patches=few)


def test_fixed_patches_are_of_training_and_name_their_volumes(tmp_path: Path) -> None:
    cases = [*(Case(name, name, "train") for name in "abcd"), Case("z", "z", "validation")]
    data = module(cases, tmp_path, overfit_patches=2)
    sampler = data.build(0, 1)
    training = data.datasets["training"]
    assert isinstance(training, VolumeDataset)
    seen = {training[key]["name"] for key in sampler}
    assert seen == {"a", "b"}
    assert set(data.names_of_training(1)) <= seen
    assert data.datasets["validation"][0]["name"] == "z"
    with pytest.raises(ConfigurationError, match=r"dataset\.overfit_patches=2"):
        OnVolumesDataModule(data)
