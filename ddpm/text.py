"""Report text as a condition: a small encoder of bytes that is trained here, or a frozen sentence encoder."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.frozen import FrozenIdentity
from ddpm.sentence import load_sentence_encoder
from errors import ConfigurationError

# Bytes of a report that are read; what is longer is cut off.
MAX_BYTES = 1024
# Tokens of a report.
N_TOKENS = 16
_WIDTH = 128
_HEADS = 4
_LAYERS = 2
_STRIDE = 4
_PAD = 256  # after the 256 bytes
_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+|\n+")


class _Attention(nn.Module):
    """Pre-norm attention and MLP with residuals; ``queries`` look at ``values``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm_queries, self.norm_values, self.norm = (nn.LayerNorm(channels) for _ in range(3))
        self.query, self.key_value = nn.Linear(channels, channels), nn.Linear(channels, 2 * channels)
        self.out = nn.Linear(channels, channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, queries: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """(B, Q, C), (B, T, C), (B, T) bool of places that hold text -> (B, Q, C)."""
        key, value = self.key_value(self.norm_values(values)).chunk(2, -1)
        query, key, value = (
            x.unflatten(-1, (_HEADS, -1)).transpose(1, 2) for x in (self.query(self.norm_queries(queries)), key, value)
        )  # (B, heads, T, C / heads)
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
        x = queries + self.out(found.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm(x))  # (B, Q, C)


class ByteEncoder(nn.Module):
    """UTF-8 bytes -> tokens: strided convolution, self-attention, and learned queries that read the result.

    Bytes need no vocabulary and know every language (Xue et al. 2022, https://arxiv.org/abs/2105.13626).
    """

    def __init__(self) -> None:
        super().__init__()
        self.channels = _WIDTH
        self.embed = nn.Embedding(_PAD + 1, _WIDTH, padding_idx=_PAD)
        self.conv = nn.Conv1d(_WIDTH, _WIDTH, 2 * _STRIDE + 1, _STRIDE, padding=_STRIDE)
        self.place = nn.Parameter(0.02 * torch.randn(MAX_BYTES // _STRIDE, _WIDTH))
        self.layers = nn.ModuleList(_Attention(_WIDTH) for _ in range(_LAYERS))
        self.queries = nn.Parameter(0.02 * torch.randn(1, N_TOKENS, _WIDTH))
        self.read = _Attention(_WIDTH)

    def forward(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B texts -> (B, N_TOKENS, channels) and (B, N_TOKENS) bool: which tokens say something."""
        data = [text.encode("utf-8", "replace")[:MAX_BYTES] for text in texts]
        length = max(1, max(map(len, data)))
        length = -(-length // _STRIDE) * _STRIDE
        rows = [list(row) + [_PAD] * (length - len(row)) for row in data]
        ids = torch.tensor(rows, device=self.place.device)  # (B, T)
        mask = (ids != _PAD).unflatten(1, (-1, _STRIDE)).any(-1)  # (B, T / stride)
        given = mask.any(dim=1, keepdim=True)
        mask = mask | ~given  # attention over nothing would be NaN; what it finds there is not used
        x = self.conv(self.embed(ids).transpose(1, 2))[:, :, : mask.shape[1]].transpose(1, 2)  # (B, T / stride, C)
        x = x + self.place[: x.shape[1]]
        for layer in self.layers:
            x = layer(x, x, mask)
        tokens = self.read(self.queries.expand(len(texts), -1, -1), x, mask)  # (B, N_TOKENS, C)
        return tokens, given.expand(-1, N_TOKENS)


class SentenceTokens(nn.Module):
    """One token for each sentence of a report, by a frozen encoder whose weights stay out of checkpoints.

    Args:
        path: see `ddpm.sentence.load_sentence_encoder`.
    """

    def __init__(self, path: str | None) -> None:
        super().__init__()
        encoder = load_sentence_encoder(path)
        self._encoder = encoder  # no module: no part of state_dict, parameters or averages
        self.origin = FrozenIdentity(encoder.weights_file, "sentence encoder")
        self.channels = encoder.channels
        self.place = nn.Parameter(0.02 * torch.randn(N_TOKENS, self.channels))

    def forward(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B texts -> (B, N_TOKENS, channels) and (B, N_TOKENS) bool: which tokens say something."""
        device = self.place.device
        tokens = torch.zeros(len(texts), N_TOKENS, self.channels, device=device)
        given = torch.zeros(len(texts), N_TOKENS, dtype=torch.bool, device=device)
        for row, text in enumerate(texts):
            for column, sentence in enumerate(split_sentences(text)[:N_TOKENS]):
                # unit vectors: scaled so that a channel is about 1, as layers expect
                tokens[row, column] = self._encoder.embed(sentence).to(device) * self.channels**0.5
                given[row, column] = True
        return tokens + self.place, given


class TextEncoder(nn.Module):
    """Tokens and a vector of reports; learned ones where there is no report.

    Args:
        tokens: encoder with ``channels`` that maps texts to (B, N, channels) and (B, N) bool.
        token_channels: width of the tokens.
        vector_channels: width of the vector.
    """

    def __init__(self, tokens: ByteEncoder | SentenceTokens, token_channels: int, vector_channels: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.to_tokens = nn.Linear(tokens.channels, token_channels)
        self.to_vector = nn.Linear(tokens.channels, vector_channels)
        self.null_token = nn.Parameter(0.02 * torch.randn(token_channels))
        self.null_vector = nn.Parameter(torch.zeros(vector_channels))

    def forward(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B texts, "" where there is none -> (B, N_TOKENS, token_channels), (B, vector_channels)."""
        found, given = self.tokens(texts)
        tokens = torch.where(given[..., None], self.to_tokens(found), self.null_token)
        share = given / given.sum(dim=1, keepdim=True).clamp(min=1)
        mean = (found * share[..., None]).sum(dim=1)  # (B, channels)
        return tokens, torch.where(given.any(dim=1, keepdim=True), self.to_vector(mean), self.null_vector)


def split_sentences(text: str) -> list[str]:
    """Sentences and lines of a report, without empty ones."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part.strip()]


def build_text_encoder(kind: str, path: str | None, token_channels: int, vector_channels: int) -> TextEncoder:
    """The encoder that ``text=bytes`` or ``text=sentence`` names.

    Raises:
        ConfigurationError: an unknown kind, or a frozen encoder that is not there.
    """
    if kind not in ("bytes", "sentence"):
        raise ConfigurationError(f"text={kind!r}: bytes or sentence")
    encoder = ByteEncoder() if kind == "bytes" else SentenceTokens(path)
    return TextEncoder(encoder, token_channels, vector_channels)
