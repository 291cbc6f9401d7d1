"""Clinical evaluation of a patient: what the model is told, known overlaps, lesions."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dataset.phantom import make_phantom
from dataset.sources import NiftiSource, PhantomSource
from ddpm.conditions import UNKNOWN_LABEL, ConditionBatch
from errors import InputError
from evaluation.clinical_case import (
    Drawn,
    draw_case,
    frontal_picture,
    lesions_of,
    overlaps,
    phantom_of,
)
from evaluation.held_out import HeldOut, told
from tests.ddpm.tiny import tiny_codec

SIZE, SPACING = (32, 64, 64), (10.0, 6.5, 6.5)


@functools.cache
def phantom(seed, size=SIZE, spacing=SPACING):
    return make_phantom(seed, size, spacing)


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
    alone = told(batch)
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
    held_out = HeldOut(SimpleNamespace(codec=codec, device=torch.device("cpu")), None, Path(), "")
    held_out.__dict__["cases"] = cases
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
