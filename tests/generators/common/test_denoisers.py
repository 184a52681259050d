"""Denoisers on flat vectors: which suits which layout, and how its values are laid out for it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raywgen.config import ConfigError, load_config
from raywgen.generators.common.denoisers import (
    ChunkWeights,
    Denoiser,
    FlatWeights,
    HeadWeights,
    build_denoiser,
    from_rows,
    is_head,
    num_head_classes,
    suited_normalizers,
    to_rows,
)
from raywgen.generators.common.network import NetworkConfig
from raywgen.generators.interface import DataSpec
from raywgen.generators.mcdi import McDiConfig
from tests.builders import DEEP, NUM_FEATURES, SMALL, layout_of, network, normalizers
from tests.generators.mcdi.builders import DATA, HEAD, config, head_batch, head_normalizers, support_and_query

pytestmark = pytest.mark.usefixtures("one_thread")


def built(kind: str = "auto", **settings: Any) -> Denoiser:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_denoiser(config(network={"kind": kind, **settings}).network, head_normalizers(), DATA)


@given(num_classes=st.integers(1, 7), num_features=st.integers(1, 9), leading=st.lists(st.integers(1, 3), max_size=2))
@settings(max_examples=20)
def test_rows_of_a_head_are_its_weights_and_bias_class_by_class(
    num_classes: int, num_features: int, leading: list[int]
) -> None:
    layout = layout_of((num_features, num_classes))
    values = torch.randn(*leading, layout.num_values)
    rows = to_rows(values, layout)
    assert rows.shape == (*leading, num_classes, num_features + 1)
    assert torch.equal(from_rows(rows, layout), values)
    if not leading:
        head = network((num_features, num_classes))
        head.load_state_dict(layout.unflatten(values))
        x_SF = torch.randn(5, num_features)
        logits_SC = x_SF @ rows[:, :-1].T + rows[:, -1]
        torch.testing.assert_close(logits_SC, head(x_SF), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("widths", "num_features", "wanted"),
    [(HEAD, 6, True), ((6, 1), 6, True), (HEAD, 5, False), (SMALL, 6, False), (DEEP, 6, False)],
)
def test_a_head_is_one_linear_layer_on_the_tasks_samples(widths: tuple[int, ...], num_features: int, wanted) -> None:
    assert is_head(layout_of(widths), num_features) == wanted


def test_classes_of_a_head() -> None:
    assert num_head_classes(layout_of(HEAD)) == 3


def test_a_linear_layer_without_bias_is_no_head() -> None:
    layout = type(layout_of(HEAD))(layout_of(HEAD).tensors[:1])
    assert not is_head(layout, NUM_FEATURES)


@pytest.mark.parametrize(
    ("kind", "widths", "wanted"),
    [
        ("auto", [HEAD], HeadWeights),
        ("head", [HEAD, (6, 5)], HeadWeights),
        ("chunks", [HEAD], ChunkWeights),
        ("flat", [HEAD], FlatWeights),
        ("auto", [SMALL], FlatWeights),
        ("chunks", [SMALL], ChunkWeights),
        ("auto", [HEAD, (6, 5)], HeadWeights),
        ("auto", [(6, 2340, 2)], ChunkWeights),
        ("auto", [SMALL, DEEP], ChunkWeights),
        ("auto", [HEAD, SMALL], ChunkWeights),
    ],
)
def test_the_kind_follows_from_the_layouts(kind: str, widths: list[tuple[int, ...]], wanted: type[Denoiser]) -> None:
    assert type(build_denoiser(config(network={"kind": kind}).network, normalizers(*widths), DATA)) is wanted


def test_a_head_denoiser_of_other_networks_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"kind=head.*0\.weight \[4, 6\].*6 values.*kind=chunks"):
        build_denoiser(config(network={"kind": "head"}).network, normalizers(HEAD, SMALL), DATA)
    with pytest.raises(ValueError, match="kind=flat: the corpus has 2 layouts; give kind=chunks"):
        build_denoiser(config(network={"kind": "flat"}).network, normalizers(HEAD, SMALL), DATA)
    with pytest.raises(ValueError, match="kind=chunks"):
        build_denoiser(NetworkConfig(kind="head"), normalizers(HEAD), DataSpec(num_features=5, max_classes=2))


@pytest.mark.parametrize("kind", ["head", "flat", "chunks"])
def test_a_prediction_is_one_flat_vector_for_each_noised_version(kind: str) -> None:
    denoiser, layout = built(kind), layout_of(HEAD)
    support, _ = support_and_query(4, 3, seed=0)
    x_BnD, time_Bn = torch.randn(4, 2, layout.num_values), torch.rand(4, 2)
    predicted = denoiser(x_BnD, time_Bn, support.samples_BSF, support.labels_BS, layout)
    assert predicted.shape == x_BnD.shape
    condition_embedding = denoiser.embed_condition(support.samples_BSF, support.labels_BS, layout)
    assert torch.equal(denoiser.predict(x_BnD, time_Bn, condition_embedding, layout), predicted)


@given(permutation=st.permutations(range(3)))
@settings(max_examples=6)
def test_a_head_does_not_depend_on_the_order_of_classes(permutation: list[int]) -> None:
    denoiser, layout = built("head"), layout_of(HEAD)
    support, _ = support_and_query(4, 3, seed=0)
    x_BnD, time_Bn = torch.randn(4, 2, layout.num_values), torch.rand(4, 2)
    order = torch.tensor(permutation)
    plain = denoiser(x_BnD, time_Bn, support.samples_BSF, support.labels_BS, layout)
    permuted = from_rows(to_rows(x_BnD, layout)[:, :, order], layout)
    found = denoiser(permuted, time_Bn, support.samples_BSF, order.argsort()[support.labels_BS], layout)
    # Sums over classes in another order, in float32.
    torch.testing.assert_close(to_rows(found, layout), to_rows(plain, layout)[:, :, order], rtol=1e-4, atol=1e-5)


def test_the_usual_spread_of_support_sets_is_kept_with_the_weights() -> None:
    denoiser, again = built("head"), built("head")
    before = copy.deepcopy(denoiser.state_dict())
    batches = [head_batch(4, seed) for seed in range(3)]
    denoiser.setup(iter(batches), predicts_weights=False)
    changed = {name for name, tensor in denoiser.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"net.spread"}
    again.load_state_dict(denoiser.state_dict())
    # Equally many samples of each class, so that the centre is their mean.
    sets = torch.cat([batch.condition.samples_BSF for batch in batches])
    spread_B = (sets - sets.mean(dim=1, keepdim=True)).square().mean(dim=(1, 2)).sqrt()
    torch.testing.assert_close(again.state_dict()["net.spread"], spread_B.mean())


@pytest.mark.parametrize("num_classes", [3, 5])
def test_predicted_heads_begin_at_nearest_class_means(num_classes: int) -> None:
    denoiser, layout = built("head"), layout_of((NUM_FEATURES, num_classes))
    assert isinstance(denoiser, HeadWeights)
    denoiser.setup([head_batch(4)], predicts_weights=True)
    generator = torch.Generator().manual_seed(0)
    # Features far from those it has begun with.
    support, _ = support_and_query(4, num_classes, seed=0)
    condition = replace(support, samples_BSF=3.0 * support.samples_BSF + 5.0)
    query_XF = 3.0 * torch.randn(100, NUM_FEATURES, generator=generator) + 5.0
    x_BnD, time_Bn = torch.randn(4, 2, layout.num_values, generator=generator), torch.rand(4, 2, generator=generator)
    predicted = denoiser(x_BnD, time_Bn, condition.samples_BSF, condition.labels_BS, layout).detach()
    for b in range(4):
        shown_SF, labels_S = condition.samples_BSF[b], condition.labels_BS[b]
        means_CF = torch.stack([shown_SF[labels_S == c].mean(dim=0) for c in range(num_classes)])
        expected_XC = -torch.cdist(query_XF, means_CF).square()
        for n in range(2):
            rows_CR = to_rows(denoiser.decode(predicted[:, n], condition, layout)[b], layout)
            logits_XC = query_XF @ rows_CR[:, :-1].T + NUM_FEATURES**0.5 * rows_CR[:, -1]
            # Equal but for a factor and what all classes have in common.
            for part in (logits_XC, expected_XC):
                part -= part.mean(dim=1, keepdim=True)
            factor = float((logits_XC * expected_XC).sum() / expected_XC.square().sum())
            assert factor > 0
            torch.testing.assert_close(logits_XC / factor, expected_XC, rtol=1e-3, atol=1e-2)


def test_predicted_noise_does_not_begin_at_a_head() -> None:
    denoiser = built("head")
    before = copy.deepcopy(denoiser.state_dict())
    denoiser.setup([head_batch(4)], predicts_weights=False)
    assert all(torch.equal(p.detach(), before[name]) for name, p in denoiser.named_parameters())


@pytest.mark.parametrize("kind", ["flat", "chunks"])
def test_denoisers_of_whole_networks_need_no_beginning(kind: str) -> None:
    denoiser = built(kind)
    before = copy.deepcopy(denoiser.state_dict())
    denoiser.setup([head_batch(4)], predicts_weights=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in denoiser.state_dict().items())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"inner_steps": 0}, "inner_steps"),
        ({"num_draws": 0}, "num_draws"),
        ({"inner_rate": 0.0}, "inner_rate: above 0"),
    ],
)
def test_settings_that_make_no_denoiser_are_named(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(denoiser=setting)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_heads": 0}, "num_heads"),
        ({"width": 20, "num_heads": 4}, "width=20"),
    ],
)
def test_sizes_that_make_no_network_are_named(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(network=setting)


def test_an_unknown_kind_of_network_is_named() -> None:
    with pytest.raises(ValueError, match="auto, head, flat, chunks"):
        load_config(NetworkConfig, None, ["kind=heads"])


@pytest.mark.parametrize(
    ("diffusion", "task_loss", "message"),
    [
        ({"num_targets": 7}, {}, "num_targets=7"),
        ({}, {"num_steps": 1, "sampling_steps": 7}, "sampling_steps=7"),
    ],
)
def test_settings_that_make_no_chain_are_named(diffusion: dict, task_loss: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(diffusion=diffusion, task_loss=task_loss)


def test_settings_that_walk_no_chain_are_named() -> None:
    with pytest.raises(ValueError, match=r"sampling\.num_steps=7"):
        config(sampling={"num_steps": 7})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("denoiser.meta=maml", "reptile, joint"),
        ("diffusion.targets=tw", "consistent, naive"),
        ("diffusion.schedule=sqrt", "cosine, linear"),
        ("diffusion.parameterisation=score", "weights, noise"),
        ("diffusion.weighting=snr", "local, paper, noise, weights"),
        ("sampling.sampler=ddim", "mean, stochastic, deterministic"),
    ],
)
def test_unknown_choices_are_named(wrong: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(McDiConfig, None, [wrong])


def test_a_heads_bias_counts_for_as_much_as_the_weights_of_its_class() -> None:
    """On features of unit size a weight's error reaches a logit once a feature, a bias's once: the root of F apart."""
    known = head_normalizers()
    ((layout, normalizer),) = known.values()
    ((_, suited),) = suited_normalizers(config().network, known, DATA).values()
    num_classes, num_features = layout.generated[0].shape
    weights = num_classes * num_features
    assert torch.equal(suited.scale_D[:weights], normalizer.scale_D[:weights])
    wanted = normalizer.scale_D[0] * num_features**0.5
    torch.testing.assert_close(suited.scale_D[weights:], wanted.expand(num_classes))
