"""Each optional condition by itself: the diffusion loss falls, and samples follow what is said of the patient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ddpm.latent_dataset import condition_batch
from ddpm.network import LatentDiffusion, Sampling
from tests.ddpm.test_text import bert_folder
from tests.ddpm.test_training import batch_of, fit, network

OFF = {"lifting": False, "cross_attention": False, "pooled": False}
REPORTS = ("No embolus in the lung.", "Emboli in the lung.")
SETTINGS: dict[str, dict[str, object]] = {
    "bytes": OFF | {"text": "bytes"},
    "sentence": OFF | {"text": "sentence"},
    "label": OFF | {"label": True},
    "lateral": OFF | {"lifting": True, "views": ["frontal", "lateral"]},
}


def patients(kind: str, count: int, seed: int = 0) -> dict[str, object]:
    """Latents that follow from one condition alone; the frontal radiograph is the same grey for everybody.

    Report and label tell whether all cells are bright or dark; a lateral view tells it for every ray, which runs along
    W, as a frontal one's runs along H.
    """
    batch = batch_of(count, seed, views=2 if kind == "lateral" else 1)
    picture = batch["xray"].clone()
    picture[:, 0] = 0.5
    batch["xray"] = picture
    if kind == "lateral":
        grid = batch["ray_grid"].clone()  # (B, V, d, h, w, 2)
        grid[:, 1] = grid[:, 1].transpose(2, 3)
        seen = picture[:, 1, :, ::8, ::8].flip(-2)  # (B, 1, d, h)
        code = (2 * seen - 1)[..., None].expand(count, 4, 4, 4, 4)
        return batch | {"ray_grid": grid, "code": code}
    drawn = torch.randint(0, 2, (count,), generator=torch.Generator().manual_seed(seed))
    code = (drawn - 0.5).reshape(-1, 1, 1, 1, 1).expand(count, 4, 4, 4, 4)
    said = {"label": drawn} if kind == "label" else {"text": [REPORTS[number] for number in drawn.tolist()]}
    return batch | said | {"code": code}


def sampled(model: LatentDiffusion, batch: dict[str, object]) -> torch.Tensor:
    """Latents (B, 4, 4, 4, 4), patient by patient from the same noise."""
    count = len(batch["code"])
    codes = model.sample(condition_batch(batch), (4, 4, 4), Sampling(steps=6), 0, range(count))
    return model.scaler.to_latent(codes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SETTINGS)
def test_samples_follow_the_option(kind: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    folder = {"text_path": str(bert_folder(tmp_path / "bert"))} if kind == "sentence" else {}
    # with so much noise that a bright latent is not known from a dark one by its mean: the condition must tell
    noisy = {"schedule": {"name": "cosine", "shift": 8.0}}
    model = network(conditioner=SETTINGS[kind] | folder, diffusion=noisy)
    losses = fit(model, lambda step: patients(kind, 8, step), 100)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    model.eval()
    held_out = patients(kind, 8, 10_000)
    other = {key: value[::-1] if isinstance(value, list) else value.flip(0) for key, value in held_out.items()}
    changed = (held_out["code"] != other["code"]).flatten(1).any(dim=1)
    assert int(changed.sum()) >= 2
    truth, wrong = (model.scaler.to_latent(batch["code"])[changed] for batch in (held_out, other))
    for batch, right, not_right in ((held_out, truth, wrong), (other, wrong, truth)):
        latent = sampled(model, batch)[changed]
        assert (latent - right).square().mean() < 0.3 * (latent - not_right).square().mean()
