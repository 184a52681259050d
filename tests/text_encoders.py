"""A small text encoder and a causal model in the form of the hub, and sentences that single words tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

SIGNS = ["dog", "red", "rain", "song"]
"""The word of each class."""
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *SIGNS, "very", "the", "is", "of", "old", "new"]
WIDTH, NUM_LAYERS = 16, 3


def make_encoder(folder: Path, seed: int = 0) -> str:
    """Writes a BERT of random values and returns its folder."""
    transformers: Any = pytest.importorskip("transformers")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 2}
    torch.manual_seed(seed)
    config = transformers.BertConfig(**sizes, intermediate_size=32, vocab_size=len(WORDS), initializer_range=0.2)
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


def make_decoder(folder: Path, seed: int = 0) -> str:
    """Writes a Llama of random values and returns its folder."""
    transformers: Any = pytest.importorskip("transformers")
    tokenizers: Any = pytest.importorskip("tokenizers")
    numbers = {word: number for number, word in enumerate(["<s>", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>").save_pretrained(folder)
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 2}
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**sizes, intermediate_size=32, vocab_size=len(numbers), initializer_range=0.2)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def make_sentences(path: Path, num: int = 120) -> str:
    """Writes sentences of four classes and returns their file."""
    random = np.random.default_rng(0)
    label_S = np.arange(num) % len(SIGNS)
    others = random.choice(WORDS[5 + len(SIGNS) :], (num, 3))
    sentences = [f"{a} {SIGNS[label]} {b} {c}" for label, (a, b, c) in zip(label_S, others, strict=True)]
    split = ["test" if row % 3 == 0 else "train" for row in range(num)]
    pq.write_table(pa.table({"split": split, "label": label_S, "sentence": sentences}), path)
    return str(path)
