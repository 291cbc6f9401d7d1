"""Classifiers as judges, and those that do not fit."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dataset.intensity import HUWindow
from dataset.phantom import affine_of
from ddpm.classifier.classifier import classifier_input, patient_hash
from ddpm.classifier.evaluate_classifier import require_fit
from ddpm.classifier.judge import Judge, plane_features
from ddpm.classifier.network import ClassifierConfig, PEClassifier
from errors import ConfigurationError, InputError
from evaluation.clinical_case import (
    Drawn,
    features_of,
)
from tests.ddpm.tiny import tiny_codec
from vq_gan_3d.checkpointing import save_checkpoint

SMALL = ClassifierConfig(
    widths=(4, 8),
    strides=((2, 2, 2), (1, 2, 2)),
    blocks=(1, 1),
    size_dhw=(16, 16, 16),
    spacing_low_mm=(9.0, 6.0, 6.0),
    spacing_high_mm=(11.0, 7.0, 7.0),
)


def saved_judge(path: Path, config=SMALL, codec_hash=None, trained_on=("someone else",), seed=0) -> Path:
    """A classifier that nobody trained, as a checkpoint of the training script."""
    torch.manual_seed(seed)
    state = PEClassifier(config).state_dict()
    content = {
        "kind": "pe_classifier",
        "classifier": config.as_dict(),
        "codec_hash": codec_hash,
        "state_dict": {f"classifier.{name}": value for name, value in state.items()},
    }
    if trained_on is not None:
        content["trained_on"] = [patient_hash(patient) for patient in trained_on]
    save_checkpoint(path, content)
    return path


def test_a_judge_scores_as_its_network_and_its_features_are_of_three_planes(tmp_path):
    judge = Judge(saved_judge(tmp_path / "a.ckpt"))
    hu = np.random.default_rng(0).integers(-1000, 1000, (16, 16, 16)).astype(np.int16)
    unit = classifier_input(torch.from_numpy(hu)[None, None], HUWindow(), None)
    with torch.no_grad():
        assert judge.score_volume(hu) == pytest.approx(float(judge.classifier(unit)))
    assert judge.score_volume(hu.astype(np.float32)) == pytest.approx(judge.score_volume(hu))
    drawn = Drawn({role: hu + 10 * i for i, role in enumerate(("real", "codec", "generated", "shuffled"))}, np.eye(4))
    found = features_of(drawn, plane_features(judge))
    assert found["real_axial"].shape == (8, 16)
    assert found["generated_sagittal"].shape == (4, 16)
    assert len(found) == 12
    # a slice of the map is pooled as the whole map is
    pooled = judge.classifier.features(unit).detach().numpy()[0]
    np.testing.assert_allclose(found["real_axial"][:, :8].mean(0), pooled[:8], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["real_coronal"][:, 8:].max(0), pooled[8:], rtol=1e-5)


def test_judges_that_do_not_fit_are_refused(tmp_path):
    judge = Judge(saved_judge(tmp_path / "a.ckpt", trained_on=("p1", "p2")))
    affine = affine_of((16, 16, 16), (10.0, 6.5, 6.5))
    judge.require_grid((16, 16, 16), affine)
    judge.require_window(HUWindow(), "the codec")
    judge.require_volumes()
    judge.require_unseen(["p3"])
    with pytest.raises(InputError, match=r"a\.ckpt: trained on volumes of \[16, 16, 16\] voxels .* \[16, 16, 17\]"):
        judge.require_grid((16, 16, 17), affine)
    with pytest.raises(InputError, match=r"9×6×6 to 11×7×7 mm .* 10×6\.5×3\.25"):
        judge.require_grid((16, 16, 16), affine_of((16, 16, 16), (10.0, 6.5, 3.25)))
    with pytest.raises(ConfigurationError, match=r"a\.ckpt was made with HU window"):
        judge.require_window(HUWindow(-1000, 500), "the codec")
    with pytest.raises(InputError, match=r"trained on 1 of 2 held-out patients, the first is p2"):
        judge.require_unseen(["p2", "p3"])
    with pytest.raises(InputError, match="of volumes: give one of radiographs"):
        judge.require_radiographs()
    pictures = Judge(saved_judge(tmp_path / "b.ckpt", ClassifierConfig("xray", widths=(4, 8), xray_size=32)))
    with pytest.raises(InputError, match=r"b\.ckpt: a classifier of radiographs"):
        pictures.require_volumes()
    old = Judge(saved_judge(tmp_path / "c.ckpt", ClassifierConfig(widths=(4, 8, 8)), trained_on=None))
    with pytest.raises(InputError, match="on which grid"):
        old.require_grid((16, 16, 16), affine)
    with pytest.raises(InputError, match="which patients"):
        old.require_unseen(["p1"])


def test_each_judge_of_an_evaluation_must_fit_its_cases(tmp_path):
    affine = affine_of((16, 16, 16), (10.0, 6.5, 6.5))
    volumes = [SimpleNamespace(open=lambda: np.zeros((16, 16, 16)), affine=affine)]

    def fits(name, config=SMALL, patients=("p1", "p2"), **options):
        require_fit(Judge(saved_judge(tmp_path / name, config, **options)), volumes, patients, HUWindow())

    fits("a.ckpt")
    with pytest.raises(InputError, match=r"leak\.ckpt: was trained on 1 of 2 held-out patients, the first is p2"):
        fits("leak.ckpt", trained_on=("p2", "p3"))
    with pytest.raises(InputError, match=r"coarse\.ckpt: trained on voxels"):
        fits("coarse.ckpt", replace(SMALL, spacing_low_mm=(2.0, 1.0, 1.0), spacing_high_mm=(2.0, 1.0, 1.0)))
    with pytest.raises(ConfigurationError, match="HU window"):
        fits("bone.ckpt", replace(SMALL, hu_max=500.0))
    # a radiograph is on no grid and in no HU window
    pictures = ClassifierConfig("xray", widths=(4, 8), xray_size=32, hu_max=500.0)
    fits("x.ckpt", pictures)
    with pytest.raises(InputError, match=r"seen\.ckpt: was trained on"):
        fits("seen.ckpt", pictures, trained_on=("p1",))


def test_a_judge_of_latents_takes_the_codec_it_was_trained_on(tmp_path):
    codec = tiny_codec()
    config = ClassifierConfig("latent", codec.channels, (8,), ((1, 2, 2),), (1,))
    path = saved_judge(tmp_path / "a.ckpt", config, codec.content_hash)
    hu = np.random.default_rng(0).integers(-300, 300, (16, 16, 16)).astype(np.int16)
    assert math.isfinite(Judge(path, codec=codec).score_volume(hu))
    with pytest.raises(InputError, match="the codec of the run: not the codec"):
        Judge(path, codec=tiny_codec(seed=1))
    with pytest.raises(InputError, match="--codec"):
        Judge(path)
