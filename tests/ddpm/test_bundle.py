"""The bundle: everything in one file, the same bytes, recognised by content, and no damage unnoticed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import ddpm.bundle
from dataset.xray import load_xray
from ddpm.bundle import load_bundle, write_bundle
from ddpm.inference import Request, draw
from ddpm.network import Sampling
from ddpm.patient import prepare_patient
from errors import ConfigurationError, InputError
from tests.dataset.xray_factory import save_picture
from tests.ddpm.test_text import bert_folder
from tests.ddpm.tiny import tiny_codec
from tests.inference_model import forged, meta_of, moved_network, places, small_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return small_bundle(tmp_path_factory.mktemp("bundle") / "final_model.ckpt")


def test_everything_comes_back_and_the_bytes_are_the_same(bundle: Path, tmp_path: Path) -> None:
    loaded, model, codec = load_bundle(bundle), moved_network(), tiny_codec()
    assert loaded.config == model.config
    assert loaded.shape_dhw == (16, 16, 16)
    assert loaded.codec.content_hash == codec.content_hash
    assert loaded.codec.window == codec.window
    for ours, theirs in ((loaded.network, model), (loaded.codec.codec, codec.codec)):
        assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(),
                                                     strict=True))  # fmt: skip
        assert not ours.training
        assert not any(p.requires_grad for p in ours.parameters())
    again = small_bundle(tmp_path / "nameless")
    assert again.read_bytes() == bundle.read_bytes()
    assert load_bundle(again).checksum == loaded.checksum


def test_what_is_exported_must_belong_together_and_nothing_is_left_behind(tmp_path: Path) -> None:
    target = small_bundle(tmp_path / "a.ckpt")
    before = target.read_bytes()
    with pytest.raises(InputError, match="trained on latents of codec"):
        write_bundle(target, moved_network(), tiny_codec(1))
    for context in (None, (2, 2, 2)):
        with pytest.raises(ConfigurationError, match="model of crops"):
            write_bundle(target, moved_network(context_dhw=context, crop_dhw=(4, 4, 4)), tiny_codec())
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_t06_a_truncated_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    content = bundle.read_bytes()
    for part in range(16):
        path = tmp_path / "part.ckpt"
        path.write_bytes(content[: len(content) * part // 16])
        with pytest.raises(InputError, match=r"part\.ckpt"):
            load_bundle(path)
    with pytest.raises(InputError, match=r"no\.ckpt.*cannot be read"):
        load_bundle(tmp_path / "no.ckpt")
    with pytest.raises(InputError, match="cannot be read"):
        load_bundle(tmp_path)


def test_t07_a_flipped_bit_is_noticed_wherever_it_is(bundle: Path, tmp_path: Path) -> None:
    content = bundle.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    rng = np.random.default_rng(0)
    spots = [*rng.integers(0, 8, 2), *rng.integers(8, header, 10), *rng.integers(header, len(content), 10)]
    path = tmp_path / "flipped.ckpt"
    for spot in map(int, spots):
        damaged = bytearray(content)
        damaged[spot] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"flipped\.ckpt"):
            load_bundle(path)


def test_t44_mutated_bundles_give_input_errors_alone(bundle: Path, tmp_path: Path) -> None:
    content = bundle.read_bytes()
    path = tmp_path / "mutated.ckpt"
    for seed in range(15):
        rng = np.random.default_rng(seed)
        damaged = bytearray(content)
        start, length = int(rng.integers(len(content) // 8)), int(rng.integers(1, 64))
        if seed % 3 == 0:
            damaged[start : start + length] = rng.bytes(length)
        elif seed % 3 == 1:
            del damaged[start : start + length]
        else:
            damaged[start:start] = rng.bytes(length)
        path.write_bytes(damaged)
        with pytest.raises(InputError):
            load_bundle(path)


def test_t44_metadata_of_any_shape_give_one_line(bundle: Path, tmp_path: Path) -> None:
    """Someone who knows the checksum may write anything into the metadata: it loads, or is refused in one line."""
    rng = np.random.default_rng(0)
    spots = [spot for spot in places(meta_of(bundle)) if spot[0] in ("codec", "ddpm", "hu_window", "xray", "format")]
    spots = [spots[number] for number in rng.permutation(len(spots))[:12]]
    values: list = [None, "text", -1, 0, [], {}, [[1]], 3.5]
    for spot, value in zip(spots, 2 * values, strict=False):

        def change(meta: dict, spot=spot, value=value) -> None:
            for key in spot[:-1]:
                meta = meta[key]
            meta[spot[-1]] = value

        path = forged(bundle, tmp_path / "forged.ckpt", change)
        told: list[str] = []
        try:
            load_bundle(path)
        except (InputError, ConfigurationError) as error:
            told.append(str(error))
        assert all(str(path) in line and "\n" not in line for line in told)


@pytest.mark.parametrize("where", [(), ("codec",), ("ddpm", "unet"), ("ddpm", "conditioner"), ("training",), ("xray",)])
def test_t39_a_hostile_target_in_the_metadata_is_refused_and_never_run(
    bundle: Path, tmp_path: Path, where: tuple[str, ...]
) -> None:
    canary = tmp_path / "canary"

    def change(meta: dict) -> None:
        for key in where:
            meta = meta[key]
        meta["_target_"] = "pathlib.Path.write_text"
        meta["_args_"] = [str(canary), "run"]

    path = forged(bundle, tmp_path / "hostile.ckpt", change)
    with pytest.raises(ConfigurationError, match=r"hostile\.ckpt.*_target_=pathlib\.Path\.write_text") as caught:
        load_bundle(path)
    assert caught.value.exit_code == 2
    assert not canary.exists()


def test_t38_a_pickle_is_never_run(bundle: Path, tmp_path: Path) -> None:
    import pickle

    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            return Path.touch, (canary,)

    class Tensor(Evil):
        pass

    (tmp_path / "a.ckpt").write_bytes(pickle.dumps(Evil()))
    (tmp_path / "b.ckpt").write_bytes(pickle.dumps({"state_dict": Evil()}, protocol=0))
    torch.save({"state_dict": Tensor()}, tmp_path / "c.ckpt")
    (tmp_path / "d.ckpt").write_bytes(bundle.read_bytes() + pickle.dumps(Evil()))
    text = pickle.dumps(Evil(), protocol=0).decode("latin-1")
    forged(bundle, tmp_path / "e.ckpt", lambda meta: meta["ddpm"].update(unet=text))
    for name in "abcde":
        with pytest.raises(InputError, match=rf"{name}\.ckpt"):
            load_bundle(tmp_path / f"{name}.ckpt")
    assert not canary.exists()


def test_a_bundle_of_other_parts_is_refused(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(change, reason: str) -> None:
        with pytest.raises(InputError, match=reason):
            load_bundle(forged(bundle, tmp_path / "forged.ckpt", change))

    refused(lambda meta: meta["ddpm"].update(codec_hash="0" * 64), "do not belong together")
    refused(lambda meta: meta["hu_window"].update(min_hu=-900), "do not match their checksum")
    refused(lambda meta: meta["ddpm"]["conditioner"].update(text_path="/etc"), "folders of another machine")
    refused(lambda meta: meta.update(format="other"), "not in the format")
    refused(lambda meta: meta["ddpm"]["unet"].update(widths=[16, 64]), "do not describe its model")
    monkeypatch.setattr(ddpm.bundle, "STANDARD_LANDMARKS", (0.0,))
    with pytest.raises(InputError, match="another preparation of X-rays"):
        load_bundle(bundle)


def test_a_frozen_encoder_is_named_anew_and_the_text_counts(tmp_path: Path) -> None:
    """The folder of a frozen encoder stays out of the file; the same encoder must be given where it is used."""
    folder = bert_folder(tmp_path / "bert")
    path = small_bundle(
        tmp_path / "a.ckpt", conditioner={"text": "sentence", "text_path": str(folder), "token_channels": 16}
    )
    assert str(folder).encode() not in path.read_bytes()
    bundle = load_bundle(path, text_path=str(folder))
    xray = load_xray(save_picture(tmp_path / "x.png", "L"), 32)
    request = Request(Sampling(steps=2))
    plain, told = (
        next(draw(bundle, [prepare_patient(bundle, [xray], text)], request)) for text in ("", "Embolus in the lung.")
    )
    assert not np.array_equal(plain, told)
    facts = prepare_patient(bundle, [xray], "Embolus in the lung.").facts
    assert "Embolus" not in json.dumps(facts)
    assert facts["text_sha256"]
    other = bert_folder(tmp_path / "other", seed=1)
    with pytest.raises(ConfigurationError, match="not the sentence encoder"):
        load_bundle(path, text_path=str(other))
