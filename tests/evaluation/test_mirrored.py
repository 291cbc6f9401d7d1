"""The mirrored patient: which view is mirrored, and that a crop is told one thing by everything it is told."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ddpm.conditions import ConditionBatch, positions
from ddpm.latent_dataset import context_at
from evaluation.controls import mirrored, shows_sides

FIELD, CROP = (2, 3, 9), (2, 3, 4)


def crop(start: int, context: torch.Tensor | None, views: int = 1) -> ConditionBatch:
    """Cells ``start`` to ``start`` + 4 along the patient's width, seen along the axis in pictures of 16 columns."""
    place = positions(FIELD, (0, 0, start), CROP)
    extra = place if context is None else torch.cat([place, context_at(context, FIELD, (0, 0, start), CROP)])
    rays = torch.stack([place[2], -place[0]], dim=-1)  # across the patient, and upwards
    rng = torch.Generator().manual_seed(0)
    return ConditionBatch(
        torch.rand((1, views, 1, 16, 16), generator=rng),
        torch.ones(1, views, dtype=torch.bool),
        rays.expand(1, views, *rays.shape),
        torch.tensor([1]),
        ("report",),
        extra[None],
    )


@pytest.mark.parametrize("start", [0, 2, 3])
@pytest.mark.parametrize("with_context", [False, True])
def test_a_mirrored_crop_is_the_crop_on_the_other_side(start: int, with_context: bool) -> None:
    context = torch.rand((2, 2, 3, 3), generator=torch.Generator().manual_seed(1)) if with_context else None
    other_side = None if context is None else context.flip(-1)
    turned = mirrored(crop(start, context), ("frontal",))
    expected = crop(FIELD[2] - start - CROP[2], other_side)
    assert turned.extra is not None
    assert expected.extra is not None
    torch.testing.assert_close(turned.extra, expected.extra)
    torch.testing.assert_close(turned.ray_grid, expected.ray_grid)
    assert torch.equal(turned.xray, expected.xray.flip(-1))


@pytest.mark.parametrize(
    ("views", "present"),
    [
        (("frontal",), [True]),
        (("lateral",), [False]),
        (("frontal", "lateral"), [True, False]),
        (("lateral", "frontal"), [False, True]),
    ],
)
def test_the_frontal_picture_is_mirrored_wherever_it_stands(views: tuple[str, ...], present: list[bool]) -> None:
    batch = crop(0, None, len(views))
    assert mirrored(batch, views).xray_present.tolist() == [present]
    assert shows_sides(batch, views) == any(present)
    missing = replace(batch, xray_present=~torch.tensor([present]))
    assert not mirrored(missing, views).xray_present.any()
    assert not shows_sides(missing, views)


def test_a_context_tells_the_side_itself() -> None:
    assert shows_sides(crop(0, None), ("frontal",))
    assert shows_sides(replace(crop(0, None), extra=None), ("frontal",))
    assert not shows_sides(crop(0, torch.zeros(2, 1, 1, 1)), ("frontal",))
