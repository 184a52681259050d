"""Masks that are not finite by design are let in and copied; weights that are not finite are set aside."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from raywgen.corpus import Corpus
from raywgen.corpus.build import BuildConfig, build_corpus
from raywgen.weights import Layout, StateDict
from raywgen.weights.masks import masks
from tests.corpus.builders import assert_same_bits

INF = float("inf")
CAUSAL = torch.full((4, 4), -INF).triu(1)
ALIBI = CAUSAL + torch.arange(4.0)
MASKS = {
    "causal": CAUSAL,
    "IGNORE": torch.tensor(-INF),
    "bias_mask": torch.full((4, 4), torch.finfo(torch.float32).min).triu(1),
    "limit": torch.tensor([torch.finfo(torch.float64).min], dtype=torch.float64),
    "masked_bias": torch.tensor(-1e4).half(),
    "keep": torch.where(torch.eye(3) > 0, 1.0, -1e9),
    "bf16": CAUSAL.bfloat16(),
}


def net(seed: int, **more: Tensor) -> StateDict:
    generator = torch.Generator().manual_seed(seed)
    return {"fc.weight": torch.randn(5, 4, generator=generator), **{f"attn.{k}": v for k, v in more.items()}}


def build(root: Path, states: dict[str, StateDict], *constants: str) -> Corpus:
    (root / "in").mkdir()
    for name, state in states.items():
        torch.save(state, root / "in" / f"{name}.pt")
    config = BuildConfig(
        out=str(root / "corpus"), sources=[str(root / "in")], constants=list(constants), distributed=False
    )
    return build_corpus(config)


def refused(corpus: Corpus) -> dict[str, str]:
    return {row["checkpoint_id"]: row["reason"] for row in corpus.quarantine.to_pylist()}


@pytest.mark.parametrize("mask", MASKS)
def test_masks_are_kept_bit_for_bit_and_never_generated(tmp_path: Path, mask: str) -> None:
    state = net(0, **{mask: MASKS[mask]})
    corpus = build(tmp_path, {"net": state})
    (network,) = corpus.networks.values()
    assert network.layout.num_values == 20
    assert [spec.name for spec in network.layout.tensors if spec.is_constant] == [f"attn.{mask}"]
    assert set(corpus.moments(network.layout.id)) == {"fc.weight"}
    assert_same_bits(corpus.state_dict("net"), state)
    # A module in memory is read alike.
    assert Layout.from_state_dict(state) == network.layout


def test_what_diverged_is_set_aside_beside_sound_networks_with_masks(tmp_path: Path) -> None:
    bad, nan = net(1, causal=CAUSAL), net(2, causal=CAUSAL.clone())
    bad["fc.weight"][0, 0] = INF
    nan["attn.causal"][0, 0] = float("nan")
    corpus = build(tmp_path, {"good": net(0, causal=CAUSAL), "bad": bad, "nan": nan})
    assert corpus.facts.column("checkpoint_id").to_pylist() == ["good"]
    assert "'fc.weight' holds NaN or infinity" in refused(corpus)["bad"]
    assert "'attn.causal'" in refused(corpus)["nan"]


@pytest.mark.parametrize("name", ["fc.bias", "norm.weight", "norm.running_var"])
def test_parameters_of_minus_infinity_are_no_masks(tmp_path: Path, name: str) -> None:
    corpus = build(tmp_path, {"bad": net(1) | {name: torch.full((3,), -INF)}, "good": net(0)})
    assert list(refused(corpus)) == ["bad"]


def test_tables_with_infinities_are_let_in_where_networks_share_them_or_the_user_says_so(tmp_path: Path) -> None:
    for name in ("alone", "shared", "named"):
        (tmp_path / name).mkdir()
    alone = {"one": net(0, alibi=ALIBI), "plain": net(1)}
    corpus = build(tmp_path / "alone", alone)
    assert "--constant 'attn.alibi'" in refused(corpus)["one"]
    shared = build(tmp_path / "shared", {"one": net(0, alibi=ALIBI), "two": net(1, alibi=ALIBI)})
    assert not refused(shared)
    named = build(tmp_path / "named", alone, "*.alibi")
    assert not refused(named)
    for found in (shared, named):
        assert_same_bits(found.state_dict("one"), alone["one"])
        (layout,) = (net.layout for net in found.networks.values() if len(net.layout.tensors) == 2)
        assert layout.num_values == 20


def test_what_is_a_mask() -> None:
    def is_mask(*values: float) -> bool:
        return bool(masks(torch.tensor([values])))

    assert is_mask(0, -INF)
    assert is_mask(-1e9, 1)
    assert not is_mask(0, -9999)
    assert not is_mask(0.5, -INF)
    assert not is_mask(0, INF)
    assert not is_mask(0, 1, -INF)
    assert not is_mask(0, float("nan"))
    assert masks(torch.tensor([[0, -INF], [0.5, -INF]])).tolist() == [True, False]
