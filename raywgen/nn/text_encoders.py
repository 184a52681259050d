"""Encoders of instruction texts, trained along with a generator or frozen.

Here B counts texts, N distinct texts, T bytes, and E is the width of a frozen encoder's features.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from torch.nn.utils.rnn import pad_sequence

from raywgen.extras import hub_needed
from raywgen.names import one_of
from raywgen.trust import HUB, check_address

KINDS = ("words", "bytes", "hf:NAME")
_WORD = re.compile(r"\w+")


class TextEncoderError(ValueError):
    """A text encoder cannot be used, or does not take a text; the message names the remedy."""


def check_text_encoder(name: str) -> None:
    """Refuses names that `build_text_encoder` does not know.

    Raises:
        TextEncoderError: The name is none of the known ones.
    """
    if name not in ("words", "bytes") and not (name.startswith(HUB) and len(name) > len(HUB)):
        raise TextEncoderError(one_of("text_encoder", name, KINDS))


def build_text_encoder(name: str, width: int) -> nn.Module:
    """Builds a module that maps B texts to `(B, H)`.

    Args:
        name: `words`, `bytes`, or `hf:NAME_OR_PATH` for a frozen model of the hub or in a folder.
        width: H.

    Raises:
        TextEncoderError: The name is unknown, or the model cannot be loaded.
    """
    check_text_encoder(name)
    if name.startswith(HUB):
        return HubTextEncoder(name, width)
    return WordEncoder(width) if name == "words" else ByteEncoder(width)


class WordEncoder(nn.Module):
    """Encodes the set of a text's hashed words (Joulin et al. 2017, "Bag of tricks for efficient text classification").

    It is trained with the generator and needs no download and no vocabulary file. It ignores the order of words, their
    counts, and punctuation: commas alone would outweigh the words that distinguish tasks.
    """

    def __init__(self, width: int, num_buckets: int = 1024) -> None:
        super().__init__()
        self.num_buckets = num_buckets
        self.words = nn.EmbeddingBag(num_buckets, width, mode="sum")
        nn.init.normal_(self.words.weight, std=1.0)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Returns the embeddings `(B, H)` of B texts."""
        bags = [self._buckets(text) for text in texts]
        device = self.words.weight.device
        offsets = torch.tensor([0] + [len(bag) for bag in bags[:-1]], device=device).cumsum(0)
        flat = torch.tensor([bucket for bag in bags for bucket in bag], device=device)
        return self.head(self.words(flat, offsets))

    def _buckets(self, text: str) -> list[int]:
        words = dict.fromkeys(_WORD.findall(text.lower()))
        return [zlib.crc32(word.encode()) % self.num_buckets for word in words] or [0]


class ByteEncoder(nn.Module):
    """Residual convolutions over UTF-8 bytes, trained with the generator; they read order, case and punctuation.

    Three layers of five bytes see 13 bytes around each position. The mean and the maximum of each feature over the
    text's own bytes are the embedding, so other texts of a batch do not matter.
    """

    max_bytes = 4096
    """Bytes of the longest text; a longer one is refused rather than cut."""

    def __init__(self, width: int, num_layers: int = 3, kernel: int = 5) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.layers = nn.ModuleList(nn.Conv1d(width, width, kernel, padding="same") for _ in range(num_layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(num_layers))
        self.head = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Returns the embeddings `(B, H)` of B texts.

        Raises:
            TextEncoderError: A text is longer than `max_bytes`.
        """
        distinct, index_B = _distinct(texts, self.bytes.weight.device)
        codes = [torch.tensor(list(self._encoded(text)), device=index_B.device) for text in distinct]
        padded_NT = pad_sequence(codes, batch_first=True, padding_value=-1)
        is_real_NT1 = (padded_NT >= 0).unsqueeze(-1)
        x_NTH = self.bytes(padded_NT.clamp(min=0)) * is_real_NT1
        for layer, norm in zip(self.layers, self.norms, strict=True):
            # Padding stays zero, as a convolution pads beyond an end.
            mixed_NTH = layer((norm(x_NTH) * is_real_NT1).transpose(1, 2)).transpose(1, 2)
            x_NTH = x_NTH + gelu(mixed_NTH) * is_real_NT1
        mean_NH = x_NTH.sum(dim=1) / is_real_NT1.sum(dim=1)
        most_NH = x_NTH.masked_fill(~is_real_NT1, -torch.inf).amax(dim=1)
        return self.head(torch.cat([mean_NH, most_NH], dim=-1))[index_B]

    def _encoded(self, text: str) -> bytes:
        encoded = text.encode()
        if len(encoded) > self.max_bytes:
            raise TextEncoderError(
                f"an instruction of {len(encoded)} bytes: text_encoder=bytes takes up to {self.max_bytes}; shorten it "
                f"('{text[:40]}...'), or train with text_encoder=words"
            )
        return encoded or b"\x00"


class HubTextEncoder(nn.Module):
    """A frozen text model of `transformers`, and a small trained head on its features.

    The features are the mean of the last hidden state over a text's tokens. They are computed once for each distinct
    text and cached. The model is no part of this module's state: loading a generator needs it under the same name.

    Args:
        name: `hf:NAME_OR_PATH`.
        width: H.

    Raises:
        TextEncoderError: `transformers` is not installed, or there is no such text model.
        UntrustedError: The name came as data, and the user did not give it; see `raywgen.trust`.
    """

    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        self._name = name
        # In a tuple, so that it is neither trained nor saved.
        self._frozen = _load_hub(name)
        self._features: dict[str, Tensor] = {}
        num_features = self._embed("width").shape[0]
        self.head = nn.Sequential(
            nn.LayerNorm(num_features), nn.Linear(num_features, width), nn.GELU(), nn.Linear(width, width)
        )

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Returns the embeddings `(B, H)` of B texts.

        Raises:
            TextEncoderError: A text is longer than the model takes.
        """
        weight = self.head[1].weight
        assert isinstance(weight, Tensor)
        distinct, index_B = _distinct(texts, weight.device)
        for text in distinct:
            if text not in self._features:
                self._features[text] = self._embed(text)
        features_NE = torch.stack([self._features[text] for text in distinct]).to(weight)
        return self.head(features_NE)[index_B]

    @torch.no_grad()
    def _embed(self, text: str) -> Tensor:
        """Returns features `(E,)` float32 of one text; without a batch, padding cannot matter."""
        tokenizer, model = self._frozen
        tokens = tokenizer(text or " ", return_tensors="pt")
        longest = getattr(model.config, "max_position_embeddings", None)
        num_tokens = tokens["input_ids"].shape[1]
        if longest is not None and num_tokens > longest:
            raise TextEncoderError(
                f"an instruction of {num_tokens} tokens: '{self._name}' takes up to {longest}; shorten it"
            )
        inputs = {key: tokens[key] for key in ("input_ids", "attention_mask") if key in tokens}
        return model(**inputs).last_hidden_state[0].float().mean(dim=0)


def _load_hub(name: str) -> tuple[Any, Any]:
    """Loads a tokenizer and its model, in eval mode."""
    check_address(name, "text_encoder")
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise TextEncoderError(hub_needed(f"text_encoder={name}", "transformers")) from error
    path = name.removeprefix(HUB)
    try:
        # Safetensors alone: the older files of the hub are pickles. Code that lies beside a model is never run.
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model = AutoModel.from_pretrained(path, use_safetensors=True, trust_remote_code=False)
    except Exception as error:  # The hub's client raises errors of several libraries.
        raise TextEncoderError(
            f"text_encoder={name} cannot be loaded ({error}); check the name and the connection"
        ) from error
    model = getattr(model, "text_model", model)  # The text part of a model of images and text.
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise TextEncoderError(f"text_encoder={name} takes {model.main_input_name}, not text; give a text model")
    return tokenizer, model.float().eval().requires_grad_(False)


def _distinct(texts: Sequence[str], device: torch.device) -> tuple[list[str], Tensor]:
    """Returns the distinct texts in order, and the index of each text among them, int64 `(B,)`."""
    order = {text: index for index, text in enumerate(dict.fromkeys(texts))}
    return list(order), torch.tensor([order[text] for text in texts], device=device)
