"""Text encoders: what they see, and that other texts of a batch play no part.

Shape legend: B texts, H width.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raywgen.nn.text_encoders import ByteEncoder, TextEncoderError, WordEncoder, build_text_encoder
from raywgen.trust import trusting

WIDTH = 16
TEXTS = ["Is the digit one of 1, 4, 7?", "zwölf Bäume", "", "Is the digit one of 1, 4, 7 or 9? " * 20]

_ENCODE = """
import torch
from raywgen.nn.text_encoders import WordEncoder
torch.manual_seed(0)
encoder = WordEncoder(8)
print(encoder(["Is the digit one of 1, 4, 7?", "zwölf Bäume", ""]).detach().numpy().tobytes().hex())
"""


@pytest.fixture(autouse=True)
def _own_word(tmp_path: Path) -> Iterator[None]:
    with trusting(f"hf:{tmp_path}", "hf:bert"):
        yield


def test_hashed_words_are_the_same_in_another_process() -> None:
    torch.manual_seed(0)
    here = WordEncoder(8)(["Is the digit one of 1, 4, 7?", "zwölf Bäume", ""]).detach().numpy().tobytes().hex()
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    ran = subprocess.run([sys.executable, "-c", _ENCODE], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == here


def test_words_are_told_apart_but_not_case() -> None:
    torch.manual_seed(0)
    together_BH = WordEncoder(WIDTH)(["Is it 1?", "is IT 1?", "Is it 2?", ""])
    assert torch.equal(together_BH[0], together_BH[1])
    assert not torch.allclose(together_BH[0], together_BH[2], atol=1e-3)


def test_bytes_tell_case_order_and_punctuation_apart() -> None:
    torch.manual_seed(0)
    texts = ["1 before 4", "4 before 1", "1 Before 4", "1 before 4.", "", " "]
    together_BH = ByteEncoder(WIDTH)(texts)
    for a in range(len(texts)):
        for b in range(a):
            assert not torch.allclose(together_BH[a], together_BH[b], atol=1e-4), (texts[a], texts[b])


@pytest.mark.parametrize("name", ["words", "bytes"])
def test_a_text_is_encoded_alike_alone_and_beside_others(name: str) -> None:
    torch.manual_seed(0)
    encoder = build_text_encoder(name, WIDTH)
    texts = [*TEXTS, TEXTS[0]]
    together_BH = encoder(texts)
    assert torch.equal(together_BH[0], together_BH[-1])
    for row_H, text in zip(together_BH, texts, strict=True):
        # A row of a batch goes through another matrix kernel than alone.
        torch.testing.assert_close(encoder([text])[0], row_H, rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_part_of_the_byte_encoder() -> None:
    torch.manual_seed(0)
    encoder = ByteEncoder(WIDTH)
    encoder(TEXTS).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in encoder.parameters())


def test_the_longest_text_is_taken_and_a_longer_one_refused() -> None:
    encoder = ByteEncoder(4)
    assert bool(encoder(["ö" * (ByteEncoder.max_bytes // 2)]).isfinite().all())
    with pytest.raises(TextEncoderError, match=r"4097 bytes.*up to 4096"):
        encoder(["a" * (ByteEncoder.max_bytes + 1)])


@pytest.mark.parametrize("name", ["letters", "hf:", ""])
def test_unknown_encoders_are_refused(name: str) -> None:
    with pytest.raises(TextEncoderError, match="give one of words, bytes, hf:NAME"):
        build_text_encoder(name, WIDTH)


def test_without_transformers_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(TextEncoderError, match=r"hf:bert needs transformers; install it by `pip install 'raywgen\[hub"):
        build_text_encoder("hf:bert", WIDTH)


@pytest.fixture
def hub_model(tmp_path: Path) -> str:
    """A small BERT with random values and a vocabulary of letters, in a folder."""
    import transformers

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "is", "one", "two"]))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    torch.manual_seed(0)
    config = transformers.BertConfig(**sizes, vocab_size=8, max_position_embeddings=12)
    transformers.BertModel(config).save_pretrained(tmp_path)
    return f"hf:{tmp_path}"


def test_a_frozen_text_model_of_transformers(hub_model: str) -> None:
    encoder = build_text_encoder(hub_model, WIDTH)
    together_BH = encoder(["is one", "is two", "is one"])
    assert together_BH.shape == (3, WIDTH)
    assert torch.equal(together_BH[0], together_BH[2])
    assert not torch.allclose(together_BH[0], together_BH[1], atol=1e-4)
    # Neither trained nor saved: all parameters are of the head.
    assert all(name.startswith("head.") for name in encoder.state_dict())
    with pytest.raises(TextEncoderError, match=r"tokens.*takes up to 12"):
        encoder(["one " * 40])


def test_features_of_a_text_are_computed_once(hub_model: str) -> None:
    encoder = build_text_encoder(hub_model, WIDTH)
    calls = []
    model: nn.Module = encoder._frozen[1]  # pyright: ignore[reportAssignmentType, reportIndexIssue, reportOptionalSubscript]
    model.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        encoder(["is one", "is two", "is one"])
    assert len(calls) == 2


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(TextEncoderError, match=r"cannot be loaded.*check the name"):
        build_text_encoder(f"hf:{tmp_path / 'none'}", WIDTH)
