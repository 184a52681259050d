"""The speed of the tokeniser, at sizes that say nothing of it."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

from raywgen.benchmarks.run import main, run
from raywgen.benchmarks.tokenizer import check_codes
from raywgen.nn.quantisers import ResidualQuantiser

SIZES = ["num_values=1024", "rounds=1", "repeats=1", "beam=2"]
SIZES += [f"{name}.{size}" for name in ("small", "large") for size in ("num_levels=2", "num_codes=8", "width=8")]


def test_codes_are_the_peers_and_every_figure_is_there() -> None:
    pytest.importorskip("vector_quantize_pytorch")
    figures = run(["tokenizer", *SIZES])["figures"]
    shares = {f"{name}_share" for name in ("encode", "quantise", "beam", "decode", "tokens")}
    expected = shares | {"peer_ratio", "peer_ratio_whole"}
    assert figures.keys() == expected | {f"large_{name}" for name in expected}


def test_help_lists_the_settings_with_their_defaults(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "tokenizer", "--help"])
    main()
    rows = [[cell.strip() for cell in line.split("│")] for line in capsys.readouterr().out.splitlines()]
    assert {"small.chunk_length": "16", "large.chunk_length": "64"}.items() <= {
        row[1]: row[2] for row in rows if len(row) > 2
    }.items()


def test_without_the_peer_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def missing(name: str) -> object:
        if name == "vector_quantize_pytorch":
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ValueError, match="pip install vector-quantize-pytorch"):
        run(["tokenizer", *SIZES])


def test_other_codes_pass_only_where_two_are_equally_near() -> None:
    generator = torch.Generator().manual_seed(0)
    quantiser = ResidualQuantiser(2, 4, 3)
    quantiser.codebooks_LVK.copy_(torch.randn(2, 4, 3, generator=generator))
    quantiser.codebooks_LVK[0, 3] = quantiser.codebooks_LVK[0, 1]
    vectors_NK = torch.randn(400, 3, generator=generator)
    codes_NL = quantiser.encode(vectors_NK)
    row = int((codes_NL[:, 0] == 1).nonzero()[0])
    tied_NL, wrong_NL = codes_NL.clone(), codes_NL.clone()
    tied_NL[row, 0], wrong_NL[row, 1] = 3, (codes_NL[row, 1] + 1) % 4
    check_codes(quantiser, vectors_NK, codes_NL, tied_NL)
    with pytest.raises(AssertionError, match="other codes at level 1"):
        check_codes(quantiser, vectors_NK, codes_NL, wrong_NL)
