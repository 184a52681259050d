"""The speed of decoding, at sizes that say nothing of it."""

from __future__ import annotations

import pytest

from raywgen.benchmarks.run import run


def test_both_write_and_every_figure_is_there() -> None:
    pytest.importorskip("transformers")
    sizes = ["width=16", "num_layers=1", "num_heads=2", "num_codes=8", "num_tokens=24", "batches=[2]"]
    found = run(["decode", *sizes, "limit_batch=2", "rounds=1"])
    assert found["figures"].keys() == {
        "ratio_to_hf_batch2", "ratio_fp32_batch2", "ratio_bf16_batch2", "compiled_batch2", "share_of_limit",
        "share_of_limit_fp32", "share_of_limit_bf16",
    }  # fmt: skip
    sizes = found["conditions"]["parameters"]
    assert sizes["prior_trunk"] == sizes["gpt2"] == 12 * 16 * 16
