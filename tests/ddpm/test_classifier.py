"""The PE classifier: it learns what a clot is, its gradient guides, and its run is one of the shared machinery."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dataset.intensity import HUWindow
from ddpm.classifier.classifier import augment, classifier_input, load_classifier, patient_hash
from ddpm.classifier.network import ClassifierConfig, PEClassifier
from ddpm.guidance import ClassifierGuidance
from errors import ConfigurationError, InputError
from evaluation.metrics.statistics import auroc
from tests.ddpm.tiny import saved_codec, tiny_codec
from tests.helpers import assert_one_line_error, run
from vq_gan_3d.checkpointing import load_checkpoint, save_checkpoint

TRAIN = "ddpm/classifier/train_classifier.py"
EVALUATE = "ddpm/classifier/evaluate_classifier.py"
SMALL = ClassifierConfig(widths=(8, 16), strides=((2, 2, 2), (1, 2, 2)), blocks=(1, 1), dropout=0.0)
TINY = [
    "model.widths=[4,8]",
    "model.strides=[[2,2,2],[1,2,2]]",
    "model.blocks=[1,1]",
    "dataset.size=[12,16,16]",
    "dataset.n_patients=12",
    "dataset.validation=[phantom_00000,phantom_00001,phantom_00002,phantom_00003]",
    "training.batch_size=2",
    "training.num_workers=0",
    "training.warmup_steps=2",
    "hardware.device=cpu",
    "hardware.mixed_precision=off",
    "callbacks.progress_bar=false",
]


def vessels(n, seed, size=(12, 16, 16)):
    """A bright tube in fat at a random place; half of them with a dark plug inside. HU (n, 1, D, H, W), labels (n,)."""
    generator = torch.Generator().manual_seed(seed)
    hu = torch.full((n, 1, *size), -80.0)
    labels = torch.arange(n) % 2
    for i in range(n):
        h, w = (int(torch.randint(3, 9, (), generator=generator)) for _ in range(2))
        hu[i, :, :, h : h + 5, w : w + 5] = 350
        d = int(torch.randint(2, 7, (), generator=generator))
        if labels[i]:
            hu[i, :, d : d + 4, h + 1 : h + 4, w + 1 : w + 4] = 50
        else:  # the same amount of soft tissue, beside the tube
            hu[i, :, d : d + 4, 0:3, 0:3] = 50
    return (hu + 20 * torch.randn(hu.shape, generator=generator)).to(torch.int16), labels


@pytest.fixture(scope="module")
def trained():
    """A classifier that was shown 64 vessels, and its losses."""
    torch.manual_seed(0)
    classifier = PEClassifier(SMALL)
    hu, labels = vessels(64, seed=0)
    x = classifier_input(hu, HUWindow(), None)
    optimizer = torch.optim.Adam(classifier.parameters(), 0.01)
    losses = []
    for step in range(60):
        part = slice(step % 4 * 16, step % 4 * 16 + 16)
        loss = F.binary_cross_entropy_with_logits(classifier(x[part]), labels[part].float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return classifier.eval(), losses


def test_it_learns_to_see_a_filling_defect(trained):
    classifier, losses = trained
    assert sum(losses[-4:]) / 4 < 0.3 * sum(losses[:4]) / 4
    hu, labels = vessels(40, seed=1)
    with torch.no_grad():
        scores = classifier(classifier_input(hu, HUWindow(), None))
    assert auroc(scores.numpy(), labels.numpy() > 0) > 0.95


def test_its_gradient_guides_towards_the_label(trained):
    classifier, _ = trained
    hu, _ = vessels(6, seed=2)
    x = classifier_input(hu, HUWindow(), None)
    before = classifier.logits(x)
    for label in (0, 1):
        guidance = ClassifierGuidance(classifier.logits, torch.full((6,), label))
        gradient = guidance.gradient(x)
        assert gradient.shape == x.shape
        after = classifier.logits(x + 0.001 * gradient / gradient.abs().amax(dim=(1, 2, 3, 4), keepdim=True))
        assert ((after - before) * (2 * label - 1) > 0).all()


def test_features_are_what_the_logits_come_from(trained):
    classifier, _ = trained
    x = classifier_input(vessels(4, seed=3)[0], HUWindow(), None)
    features = classifier.features(x)
    assert features.shape == (4, 2 * SMALL.widths[-1])
    torch.testing.assert_close(classifier.head(features)[:, 0], classifier.logits(x))


def test_any_size_is_padded_with_air(trained):
    classifier, _ = trained
    hu, _ = vessels(2, seed=4)
    cut = hu[..., :11, :14, :15]
    padded = F.pad(cut, (0, 1, 0, 2, 0, 1), value=-1000)
    one, other = (classifier(classifier_input(x, HUWindow(), None)) for x in (cut, padded))
    torch.testing.assert_close(one, other)


def test_the_reading_window_is_seen_beside_the_whole():
    prepared = PEClassifier(SMALL)._prepare(
        HUWindow().to_unit(torch.tensor([-1000, -250, 100, 450, 1000])).reshape(5, 1, 1, 1, 1)
    )
    torch.testing.assert_close(prepared[:, 1].flatten(), torch.tensor([-1.0, -1.0, 0.0, 1.0, 1.0]))
    torch.testing.assert_close(prepared[:, 0].flatten(), torch.tensor([-1.0, -0.25, 0.1, 0.45, 1.0]))


def test_it_learns_on_latents_as_well():
    """Latents of a codec that nobody trained still tell a bright volume from a dark one."""
    torch.manual_seed(0)
    codec = tiny_codec()
    hu = torch.randint(-300, 300, (16, 1, 16, 16, 16), dtype=torch.int16)
    labels = torch.arange(16) % 2
    hu[labels == 1] += 250
    x = classifier_input(hu, HUWindow(), codec)
    assert x.shape == (16, codec.channels, 4, 4, 4)
    assert x.abs().max() <= 1.01
    config = ClassifierConfig("latent", codec.channels, (8,), ((1, 2, 2),), (1,), dropout=0.0)
    classifier = PEClassifier(config)
    losses = fit(classifier, x, labels, 0.02, 30)
    assert losses[-1] < 0.3 * losses[0]
    assert classifier(x[..., :3]).shape == (16,)  # crops of latents too
    gradient = ClassifierGuidance(classifier.logits, labels).gradient(x)
    assert gradient.abs().sum() > 0


def fit(classifier, x, labels, learning_rate, steps):
    """Train; the loss of each step."""
    optimizer = torch.optim.Adam(classifier.parameters(), learning_rate)
    losses = []
    for _ in range(steps):
        loss = F.binary_cross_entropy_with_logits(classifier(x), labels.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def pictures(n, seed):
    """Noisy radiographs; half of them with a bright blot somewhere. (n, 1, 32, 32) in [0, 1], labels (n,)."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.4 + 0.1 * torch.randn((n, 1, 32, 32), generator=generator)
    labels = torch.arange(n) % 2
    for i in range(n):
        row, column = (int(torch.randint(2, 24, (), generator=generator)) for _ in range(2))
        x[i, :, row : row + 6, column : column + 6] += 0.4 * labels[i]
    return x.clamp(0, 1), labels


def test_it_learns_on_radiographs_alone():
    """The 2D classifier: its loss falls, and it finds blots in pictures that it has not seen."""
    torch.manual_seed(0)
    classifier = PEClassifier(ClassifierConfig("xray", widths=(8, 16), xray_size=32, dropout=0.0))
    assert all(p.dim() <= 4 for p in classifier.parameters())  # no convolution in 3D
    x, labels = pictures(64, seed=0)
    losses = fit(classifier, x, labels, 0.01, 40)
    assert losses[-1] < 0.3 * losses[0]
    unseen, truth = pictures(40, seed=1)
    with torch.no_grad():
        scores = classifier.eval()(unseen)
    assert auroc(scores.numpy(), truth.numpy() > 0) > 0.95
    assert classifier.features(unseen).shape == (40, 32)
    assert classifier.feature_map(unseen).shape == (40, 16, 8, 8)


def test_augmentation_moves_and_mirrors_but_changes_no_value():
    hu = torch.arange(8 * 9 * 10, dtype=torch.int16).reshape(1, 1, 8, 9, 10)
    torch.manual_seed(0)
    seen = [augment(hu, -1000) for _ in range(20)]
    assert all(x.shape == hu.shape and x.dtype == torch.int16 for x in seen)
    assert all(set(x.unique().tolist()) <= {-1000, *range(720)} for x in seen)
    assert len({tuple(x.flatten().tolist()) for x in seen}) > 10
    torch.manual_seed(0)
    assert torch.equal(augment(hu, -1000), seen[0])
    picture = torch.arange(1, 145, dtype=torch.float32).reshape(1, 1, 12, 12)
    pictures = [augment(picture, 0) for _ in range(20)]
    assert all(x.shape == picture.shape for x in pictures)
    assert len({tuple(x.flatten().tolist()) for x in pictures}) > 10
    assert set(pictures[0].unique().tolist()) <= set(range(145))


def test_settings_survive_a_checkpoint_and_mistakes_are_named():
    plain = json.loads(json.dumps(SMALL.as_dict()))
    assert ClassifierConfig.from_dict(plain) == SMALL
    with pytest.raises(ConfigurationError, match="widht"):
        ClassifierConfig.from_dict({"widht": 3})
    with pytest.raises(ConfigurationError, match=r"model\.input='mri'"):
        replace(SMALL, input="mri")
    with pytest.raises(ConfigurationError, match=r"model\.xray_size=50: .* a multiple of 4"):
        replace(SMALL, input="xray", xray_size=50)
    with pytest.raises(ConfigurationError, match="one entry for each resolution"):
        replace(SMALL, blocks=(1,))


def test_other_checkpoints_are_refused(tmp_path):
    codec = saved_codec(tmp_path)
    with pytest.raises(InputError, match="no checkpoint of a PE classifier"):
        load_classifier(codec)
    save_checkpoint(tmp_path / "a.ckpt", {
        "kind": "pe_classifier", "classifier": SMALL.as_dict(), "codec_hash": None,
        "state_dict": {f"classifier.{name}": value for name, value in PEClassifier(SMALL).state_dict().items()},
    })  # fmt: skip
    classifier, codec_hash = load_classifier(tmp_path / "a.ckpt")
    assert codec_hash is None
    assert not classifier.training
    assert not any(p.requires_grad for p in classifier.parameters())


@pytest.mark.slow
def test_a_run_trains_evaluates_and_is_compared(tmp_path):
    cache = f"dataset.cache_dir={tmp_path / 'cache'}"
    run(TRAIN, *TINY, cache, "output_dir=a", "training.num_epochs=2", tiny=False, cwd=tmp_path)
    checkpoint = tmp_path / "a/checkpoints/final.ckpt"
    content = load_checkpoint(checkpoint)
    assert content["kind"] == "pe_classifier"
    assert int(content["state_dict"]["steps"]) == 8
    run(TRAIN, *TINY, cache, "output_dir=b", "training.num_epochs=1", "training.seed=1", tiny=False, cwd=tmp_path)
    result = run(
        EVALUATE, "--run", "a", "--compare", "b/checkpoints/final.ckpt", tiny=False, cwd=tmp_path
    )  # fmt: skip
    assert "AUROC" in result.stdout
    assert "DeLong" in result.stdout
    report = json.loads((tmp_path / "a/validation_results/classifier.json").read_text())
    assert report["volumes"] == 4
    assert set(report["cases"]) == {f"phantom_{i:05d}" for i in range(4)}
    assert report["auroc"]["low"] <= report["auroc"]["estimate"] <= report["auroc"]["high"]
    # a judge that knows one of these patients is refused, whichever of the two it is
    leak = dict(content, trained_on=[*content["trained_on"], patient_hash("phantom_00002")])
    save_checkpoint(tmp_path / "leak.ckpt", leak)
    for flag in ("--compare", "--checkpoint"):
        refused = run(EVALUATE, "--run", "a", flag, "leak.ckpt", tiny=False, cwd=tmp_path, check=3)
        assert_one_line_error(refused, "leak.ckpt", "1 of 4 held-out patients", "phantom_00002")
    # again from the same checkpoint: the same scores
    run(EVALUATE, "--run", "a", "--output", "again.json", tiny=False, cwd=tmp_path)
    again = json.loads((tmp_path / "again.json").read_text())
    assert {name: case["scores"] for name, case in again["cases"].items()} == {
        name: case["scores"] for name, case in report["cases"].items()
    }


@pytest.mark.slow
def test_a_run_on_radiographs_is_compared_with_one_on_volumes(tmp_path):
    cache = f"dataset.cache_dir={tmp_path / 'cache'}"
    radiographs = ["model.input=xray", "training.max_steps=12", "training.learning_rate=0.01", "logger.every_n_steps=1"]
    run(TRAIN, *TINY, cache, *radiographs, "output_dir=x", "training.num_epochs=3", tiny=False, cwd=tmp_path)
    content = load_checkpoint(tmp_path / "x/checkpoints/final.ckpt")
    assert content["classifier"]["input"] == "xray"
    assert content["classifier"]["size_dhw"] == (12, 16, 16)
    assert content["trained_on"] == sorted(patient_hash(f"phantom_{number:05d}") for number in range(4, 12))
    assert content["codec_hash"] is None
    with (tmp_path / "x/logs/train.csv").open() as handle:
        losses = [float(row["loss"]) for row in csv.DictReader(handle)]
    assert len(losses) == 12
    assert sum(losses[-4:]) < sum(losses[:4])  # eight radiographs are learned by heart
    run(TRAIN, *TINY, cache, "output_dir=v", "training.max_steps=2", tiny=False, cwd=tmp_path)
    run(EVALUATE, "--run", "x", "--compare", "v/checkpoints/final.ckpt", tiny=False, cwd=tmp_path)
    report = json.loads((tmp_path / "x/validation_results/classifier.json").read_text())
    assert report["volumes"] == 4
    assert len({case["scores"] for case in report["cases"].values()}) == 4
    assert {"compared", "delong"} <= set(report)


@pytest.mark.slow
def test_a_run_on_latents_remembers_its_codec(tmp_path):
    codec, other = saved_codec(tmp_path), saved_codec(tmp_path, seed=1)
    latent = ["model.input=latent", "model.strides=[[1,1,1],[1,2,2]]", f"dataset.cache_dir={tmp_path / 'cache'}"]
    run(TRAIN, *TINY, *latent, f"pretrained_vqgan={codec}", "training.max_steps=2", tiny=False, cwd=tmp_path)
    result = run(EVALUATE, "--run", "outputs", "--codec", str(other), tiny=False, cwd=tmp_path, check=3)
    assert_one_line_error(result, other.name, "not the codec")
    run(EVALUATE, "--run", "outputs", tiny=False, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        (["model.input=latent"], 2, ["pretrained_vqgan"]),
        (["dataset.patch_size=[8,8,8]"], 2, ["dataset.patch_size"]),
        (["dataset.validation=[phantom_00000]"], 3, ["both kinds"]),
    ],
)
def test_runs_that_cannot_work_say_why(overrides, code, words, tmp_path):
    result = run(TRAIN, *TINY, *overrides, tiny=False, cwd=tmp_path, check=code)
    assert_one_line_error(result, *words)
