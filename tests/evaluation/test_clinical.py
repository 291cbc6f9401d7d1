"""Clinical evaluation: what the model is told, known overlaps, lesions, areas and distances; judges that do not fit."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dataset.intensity import HUWindow
from dataset.phantom import affine_of, make_phantom
from dataset.sources import NiftiSource, PhantomSource
from ddpm.classifier.classifier import classifier_input, patient_hash
from ddpm.classifier.judge import Judge, plane_features
from ddpm.classifier.network import ClassifierConfig, PEClassifier
from ddpm.conditions import UNKNOWN_LABEL, ConditionBatch
from errors import ConfigurationError, InputError
from evaluation.clinical_case import (
    Drawn,
    draw_case,
    features_of,
    frontal_picture,
    lesions_of,
    overlaps,
    phantom_of,
    radiograph_alone,
)
from evaluation.clinical_summary import frechet, summarise
from evaluation.clinical_table import print_report
from evaluation.metrics.statistics import auroc, delong
from evaluation.records import claim, read_arrays, read_record, write_arrays, write_record
from tests.ddpm.tiny import tiny_codec
from vq_gan_3d.checkpointing import save_checkpoint

SIZE, SPACING = (32, 64, 64), (10.0, 6.5, 6.5)
SMALL = ClassifierConfig(
    widths=(4, 8),
    strides=((2, 2, 2), (1, 2, 2)),
    blocks=(1, 1),
    size_dhw=(16, 16, 16),
    spacing_low_mm=(9.0, 6.0, 6.0),
    spacing_high_mm=(11.0, 7.0, 7.0),
)


@functools.cache
def phantom(seed, size=SIZE, spacing=SPACING):
    return make_phantom(seed, size, spacing)


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


def conditions(label, text, seed):
    rng = torch.Generator().manual_seed(seed)
    return ConditionBatch(
        torch.rand((1, 1, 1, 8, 8), generator=rng),
        torch.ones(1, 1, dtype=torch.bool),
        2 * torch.rand((1, 1, 4, 4, 4, 2), generator=rng) - 1,
        torch.tensor([label]),
        (text,),
    )


def test_a_label_and_a_report_do_not_carry_the_diagnosis():
    batch = conditions(1, "large saddle embolus", 0)
    alone = radiograph_alone(batch)
    assert alone.label.tolist() == [UNKNOWN_LABEL]
    assert alone.text == ("",)
    assert torch.equal(alone.xray, batch.xray)
    assert torch.equal(alone.ray_grid, batch.ray_grid)


def test_volumes_are_drawn_from_radiographs_alone_and_cut_to_the_scan():
    """Two patients of 14 slices, padded to the codec's stride; the generator is a recorder."""
    codec = tiny_codec()
    asked = {}

    def sample(number):
        batch = conditions(number, "embolus" if number else "no embolus", number)
        hu = torch.full((1, 16, 16, 16), 100 * number - 50, dtype=torch.int16)
        hu[0, 0, 0, 0] = 3000  # a metal voxel, beyond the window
        return {
            "hu": hu, "code": torch.zeros(codec.channels, 4, 4, 4), "affine": torch.eye(4, dtype=torch.float64),
            "xray": batch.xray[0], "xray_present": batch.xray_present[0], "ray_grid": batch.ray_grid[0],
            "label": batch.label[0], "text": batch.text[0], "name": f"p{number}", "skipped": [],
        }  # fmt: skip

    class Cases(list):
        cases = [SimpleNamespace(latent=SimpleNamespace(shape_dhw=(14, 16, 15)))] * 2

    def draw(generator, batch, shape, number, samples=1):
        asked.update(batch=batch, shape=shape, number=number)
        return np.stack([np.full((1, *shape), value, np.float32) for value in (1.0, 2.0)])

    cases = Cases([sample(0), sample(1)])
    held_out = SimpleNamespace(cases=cases, generator=SimpleNamespace(codec=codec, device=torch.device("cpu")))
    drawn = draw_case(held_out, 1, 0, SimpleNamespace(draw=draw))
    assert asked["batch"].label.tolist() == [UNKNOWN_LABEL] * 2
    assert asked["batch"].text == ("", "")
    assert torch.equal(asked["batch"].xray, torch.stack([cases[1]["xray"], cases[0]["xray"]]))
    assert torch.equal(asked["batch"].ray_grid, torch.stack([cases[1]["ray_grid"], cases[0]["ray_grid"]]))
    assert (asked["shape"], asked["number"]) == ((16, 16, 16), 1)
    assert {hu.shape for hu in drawn.volumes.values()} == {(14, 16, 15)}
    assert drawn.volumes["real"][0, 0, 0] == 1000
    assert drawn.volumes["real"][1, 1, 1] == pytest.approx(50, abs=1e-3)
    assert (drawn.volumes["generated"] == 1).all()
    assert (drawn.volumes["shuffled"] == 2).all()

    cases[0]["skipped"] = [("p0", "its file is damaged")]
    with pytest.raises(InputError, match="p0: its file is damaged"):
        draw_case(held_out, 1, 0, SimpleNamespace(draw=draw))


def test_who_has_no_frontal_radiograph_has_no_score_by_it():
    def held_out(views, pictures):
        cases = SimpleNamespace(settings=SimpleNamespace(views=views), cases=[SimpleNamespace(xrays=pictures)])
        return SimpleNamespace(cases=cases)

    first, second = Path("a.png"), Path("b.png")
    assert frontal_picture(held_out(("lateral", "frontal"), ((second,), (first, second))), 0) == first
    assert frontal_picture(held_out(("frontal",), ((),)), 0) is None
    assert frontal_picture(held_out(("lateral",), ((second,),)), 0) is None


def test_overlap_with_the_masks_a_phantom_knows():
    one, other = phantom(3), phantom(11)
    truth, stranger = one.hu.astype(np.float32), other.hu.astype(np.float32)
    air = np.full_like(truth, -1000)
    drawn = Drawn({"real": truth, "codec": truth + 3, "generated": stranger, "shuffled": air}, one.affine)
    found = overlaps(drawn, one)
    assert found["real"]["body"] > 0.98
    assert found["real"]["lungs"] > 0.92
    assert found["real"]["heart"] > 0.65
    for part in ("body", "lungs", "heart", "vessels"):
        assert found["codec"][part] == pytest.approx(found["real"][part], abs=0.03)
        assert found["generated"][part] < found["real"][part]
        assert found["shuffled"][part] == 0
    # of a patient nobody knows the masks: the scan's segmentation stands in, and has no row of its own
    by_scan = overlaps(drawn, None)
    assert "real" not in by_scan
    assert by_scan["codec"]["lungs"] > 0.99
    assert by_scan["shuffled"]["lungs"] == 0


def test_only_a_phantom_on_its_own_grid_has_known_masks(tmp_path):
    size = (6, 12, 12)
    source = PhantomSource(3, size, (50.0, 35.0, 35.0))
    known = phantom_of(source, size)
    assert np.array_equal(known.hu, source.load().hu)
    assert phantom_of(source, (16, 64, 64)) is None
    assert phantom_of(NiftiSource(tmp_path / "a.nii.gz"), size) is None


@functools.cache
def with_emboli():
    """A phantom with clots that its grid shows."""
    return phantom(2, (48, 128, 128), (5.5, 3.2, 3.2))


def test_emboli_that_were_filled_with_blood_have_not_survived():
    one = with_emboli()
    truth = one.hu.astype(np.float32)
    filled = truth.copy()
    filled[one.emboli_mask] = truth[one.mask("pulmonary_artery")].mean()
    mixed = 0.4 * truth + 0.6 * filled
    found = lesions_of(Drawn({"real": truth, "codec": truth, "generated": filled, "shuffled": mixed}, one.affine), one)
    assert found["painted_vox"] == one.emboli_mask.sum() > 0
    assert len(found["codec"]) == len(found["generated"]) >= 1
    assert all(lesion["contrast_after_hu"] == lesion["contrast_hu"] for lesion in found["codec"])
    for gone, part, whole in zip(found["generated"], found["shuffled"], found["codec"], strict=True):
        assert gone["contrast_after_hu"] < 0.5 * whole["contrast_hu"]
        assert gone["contrast_after_hu"] < part["contrast_after_hu"] < whole["contrast_after_hu"]


def records(count=40, seed=0):
    """Patients whose scan is judged without a mistake, whose codec's volume well, and whose generated one by chance."""
    rng = np.random.default_rng(seed)
    found = {}
    for number in range(count):
        label = number % 2
        scores = {
            "real": 4.0 * label - 2 + 0.1 * rng.normal(),
            "codec": 2.0 * label - 1 + rng.normal(),
            "generated": rng.normal(),
            "shuffled": rng.normal(),
        }
        if number >= 4:
            scores["xray"] = 1.5 * label + rng.normal()
        dice = {role: {"lungs": 0.9, "heart": 0.5 + 0.01 * number} for role in ("real", "codec", "generated")}
        lesion = {"diameter_mm": 12.0, "contrast_hu": 200.0, "contrast_after_hu": 150.0}
        lost = lesion | {"contrast_after_hu": 20.0}
        clots = {"painted_vox": 9 * label, "codec": [lesion] * label, "generated": [lost] * label, "shuffled": []}
        if number == 1:  # its clot is smaller than a voxel
            clots = {"painted_vox": 0, "codec": [], "generated": [], "shuffled": []}
        found[f"p{number:02d}"] = {
            "label": label, "scores": scores, "dice": dice, "dice_with": "phantom", "lesions": clots,
        }  # fmt: skip
    return found


def test_areas_and_tests_are_those_of_the_scores():
    patients = records()
    report = summarise(patients, resamples=100)
    labels = np.array([record["label"] for record in patients.values()])
    scores = {role: np.array([r["scores"].get(role, np.nan) for r in patients.values()]) for role in report["auroc"]}
    assert (report["cases"], report["with_embolism"]) == (40, 20)
    assert report["auroc"]["real"]["estimate"] == 1.0
    assert report["auroc"]["codec"]["estimate"] == pytest.approx(auroc(scores["codec"], labels))
    assert report["auroc"]["codec"]["low"] < report["auroc"]["codec"]["estimate"] < report["auroc"]["codec"]["high"]
    assert report["auroc"]["xray"]["n"] == 36
    assert report["conclusive"]
    assert len(report["delong"]) == 10
    (row,) = [r for r in report["delong"] if (r["first"], r["second"]) == ("generated", "xray")]
    paired = delong(scores["generated"][4:], scores["xray"][4:], labels[4:])
    assert row["p_value"] == pytest.approx(paired.p_value)
    assert row["difference"]["estimate"] == pytest.approx(paired.difference.estimate)
    assert row["difference"]["n"] == 36
    calibration = report["calibration"]["real"]
    assert calibration["brier"]["estimate"] == pytest.approx((1 / (1 + math.exp(2))) ** 2, rel=0.1)
    assert calibration["brier_of_prevalence"] == 0.25


def test_a_judge_who_is_blind_to_the_scans_has_no_verdict():
    patients = records()
    for record in patients.values():
        record["scores"]["real"] = record["scores"]["shuffled"]
    assert not summarise(patients, resamples=100)["conclusive"]


def test_overlaps_and_lesions_over_the_cohort():
    report = summarise(records(), resamples=100)
    assert set(report["dice"]) == {"phantom"}
    heart = report["dice"]["phantom"]["generated"]["heart"]
    assert heart["estimate"] == pytest.approx(0.5 + 0.01 * 19.5)
    assert heart["low"] < heart["estimate"] < heart["high"]
    lesions = report["lesions"]
    assert lesions["patients_with_embolism"] == 20
    assert (
        lesions["patients_with_clot_voxels"] == lesions["patients_with_visible_clot"] == lesions["visible_clots"] == 19
    )
    assert lesions["survival"]["codec"]["all"]["survived"]["estimate"] == 1
    assert lesions["survival"]["generated"]["all"]["survived"]["estimate"] == 0
    assert lesions["survival"]["generated"]["all"]["kept"] == pytest.approx(0.1)


def test_a_cohort_without_visible_clots_says_so(capsys):
    patients = records(8)
    for record in patients.values():
        record["lesions"] = {"painted_vox": 0, "codec": [], "generated": [], "shuffled": []}
        record["dice_with"] = "scan"
    report = summarise(patients, resamples=100)
    assert "survival" not in report["lesions"]
    planes = dict.fromkeys(("frechet", "frechet_axial", "frechet_coronal", "frechet_sagittal"), 1.0)
    print_report(report | {"frechet": {"features": "some network", "by_role": {"codec": planes}}})
    printed = capsys.readouterr().out
    assert "of 4 phantoms with embolism 0 have a voxel of clot" in printed
    assert "Dice with the segmentation of the scan" in printed
    assert "some network" in printed
    assert "INCONCLUSIVE" not in printed
    print_report(report | {"conclusive": False, "frechet": {"features": "some network", "by_role": {"codec": planes}}})
    assert "INCONCLUSIVE" in capsys.readouterr().out
    # four patients of whom each kind is there twice have areas, but only four have a radiograph's score
    assert report["auroc"]["xray"]["n"] == 4


def test_a_shift_of_features_is_its_square_in_distance():
    rng = np.random.default_rng(0)
    shift = np.array([3.0, 0.0, 4.0])
    patients = []
    for _ in range(6):
        rows = {plane: rng.normal(size=(5, 3)) for plane in ("axial", "coronal", "sagittal")}
        added = {"real": 0 * shift, "codec": 0 * shift, "generated": shift, "shuffled": 2 * shift}
        patients.append({f"{role}_{plane}": rows[plane] + by for role, by in added.items() for plane in rows})
    found = frechet(patients)
    assert found["codec"]["frechet"] == pytest.approx(0, abs=1e-9)
    assert found["generated"]["frechet_axial"] == pytest.approx(25)
    assert found["shuffled"]["frechet"] == pytest.approx(100)


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


def test_records_survive_and_damaged_ones_are_made_again(tmp_path):
    output = tmp_path / "deep" / "results"
    claim(output, {"seed": 0, "cases": ["a"]})
    claim(output, {"seed": 0, "cases": ["a"]})
    with pytest.raises(ConfigurationError, match="another seed: give another --output"):
        claim(output, {"seed": 1, "cases": ["a"]})
    record = {"score": 1.5, "missing": math.nan, "lists": [{"x": math.inf}, 2], "name": "a"}
    write_record(output / "a.json", record)
    assert json.loads((output / "a.json").read_text())["missing"] is None
    back = read_record(output / "a.json")
    assert math.isnan(back.pop("missing"))
    assert math.isnan(back["lists"][0]["x"])
    assert back["score"] == 1.5
    (output / "a.json").write_text((output / "a.json").read_text()[:20])
    assert read_record(output / "a.json") is None
    assert read_record(output / "none.json") is None

    arrays = {"real": np.arange(6.0).reshape(2, 3), "codec": np.zeros((0, 3), np.float32)}
    write_arrays(output / "a.npz", arrays)
    found = read_arrays(output / "a.npz")
    assert all(np.array_equal(found[name], arrays[name]) for name in arrays)
    whole = (output / "a.npz").read_bytes()
    for part in range(0, len(whole), len(whole) // 16):
        (output / "a.npz").write_bytes(whole[:part])
        assert read_arrays(output / "a.npz") is None


class Canary:
    """Sings when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)


def test_t38_arrays_in_a_results_folder_are_never_unpickled(tmp_path):
    np.savez(tmp_path / "a.npz", real=np.array([Canary(tmp_path / "sung")], dtype=object))
    assert read_arrays(tmp_path / "a.npz") is None
    assert not (tmp_path / "sung").exists()
