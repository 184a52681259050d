"""Lo-Hp behind the generator interface."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raywgen.config import load_config
from raywgen.generators import GenerationRequest
from raywgen.generators.bundle import load_bundle, save_bundle
from raywgen.generators.common.network import NetworkConfig
from raywgen.generators.lohp import LoHp, LoHpConfig, PathConfig, PolicyConfig
from raywgen.generators.registry import METHODS
from tests.builders import DEEP, NUM_FEATURES, SMALL, layout_of, noise_for, normalizers, part_of
from tests.generators.lohp.builders import POLICIES, config, lohp
from tests.generators.mcdi.builders import HEAD, support_and_query

pytestmark = pytest.mark.usefixtures("one_thread")
TABLES = {"head": (HEAD,), "flat": (SMALL,), "chunks": (SMALL, DEEP)}
each_kind = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)


@each_kind
def test_four_networks_at_once_are_two_and_two(table: tuple[tuple[int, ...], ...]) -> None:
    generator, layout = lohp(table=normalizers(*table)), layout_of(table[-1])
    cond = support_and_query(4, 3, seed=0)[0]
    together = generator.generate(GenerationRequest(condition=cond, layout=layout, noise=noise_for(4))).values_BD
    assert together.shape == (4, layout.num_values)
    for part in (slice(0, 2), slice(2, 4)):
        alone = generator.generate(
            GenerationRequest(condition=part_of(cond, part), layout=layout, noise=noise_for(2, first=part.start))
        ).values_BD
        # Matrix products of other batch sizes round differently.
        torch.testing.assert_close(alone, together[part], rtol=1e-4, atol=1e-5)


def test_temperature_zero_is_deterministic_and_one_spreads_by_the_noise() -> None:
    generator, layout, cond = lohp(), layout_of(HEAD), support_and_query(3, 3, seed=0)[0]
    cold = [
        generator.generate(
            GenerationRequest(condition=cond, layout=layout, noise=noise_for(3, seed), temperature=0.0)
        ).values_BD
        for seed in (1, 2)
    ]
    warm = [
        generator.generate(GenerationRequest(condition=cond, layout=layout, noise=noise_for(3, seed))).values_BD
        for seed in (1, 2)
    ]
    assert torch.equal(cold[0], cold[1])
    assert not torch.equal(warm[0], warm[1])
    generator.policy.forward_net.predict = lambda x, *_: torch.full_like(x, 3.0)  # pyright: ignore[reportAttributeAccessIssue]
    many = support_and_query(500, 3, seed=0)[0]
    drawn = generator.generate(
        GenerationRequest(condition=many, layout=layout, noise=noise_for(500), temperature=0.5)
    ).values_BD
    normalised = generator.normalizers[layout.id][1].normalise(drawn)
    states = generator.policy.forward_net.encode(normalised.unsqueeze(1), many, layout)
    # 10,500 values; half of the path's noise of 0.5.
    assert float(states.mean()) == pytest.approx(3.0, abs=0.01)
    assert float(states.std()) == pytest.approx(0.25, abs=0.007)


@pytest.mark.parametrize("sampling_steps", [3, 6, 12])
def test_where_sub_trajectories_end_and_spread_does_not_depend_on_their_steps(sampling_steps: int) -> None:
    generator = lohp(config(path={"num_steps": 12, "length": 4}, sampling_steps=sampling_steps))
    generator.policy.forward_net.predict = lambda x, *_: torch.full_like(x, 3.0)  # pyright: ignore[reportAttributeAccessIssue]
    layout, many = layout_of(HEAD), support_and_query(500, 3, seed=0)[0]
    drawn = generator.generate(GenerationRequest(condition=many, layout=layout, noise=noise_for(500))).values_BD
    normalised = generator.normalizers[layout.id][1].normalise(drawn)
    states = generator.policy.forward_net.encode(normalised.unsqueeze(1), many, layout)
    # 10,500 values of spread 0.5. Two steps and more towards an end leave part of what the first ones drew before it.
    assert float(states.mean()) == pytest.approx(3.0, abs=0.02)
    assert float(states.std()) == pytest.approx(0.5, abs=0.015)


@pytest.mark.parametrize("sampling_steps", [3, 6])
def test_the_policy_is_asked_as_often_as_told_at_even_steps(sampling_steps: int) -> None:
    generator = lohp(config(path={"num_steps": 12, "length": 4}, sampling_steps=sampling_steps))
    asked, predict = [], generator.policy.forward_net.predict

    def watched(x: torch.Tensor, time: torch.Tensor, *rest: Any) -> torch.Tensor:
        asked.append(float(time[0, 0]) * 12)
        return predict(x, time, *rest)

    generator.policy.forward_net.predict = watched  # pyright: ignore[reportAttributeAccessIssue]
    generator.generate(
        GenerationRequest(
            condition=support_and_query(1, 3, seed=0)[0], layout=layout_of(HEAD), noise=noise_for(1), temperature=0.0
        )
    )
    assert asked == pytest.approx([12 / sampling_steps * n for n in range(sampling_steps)])


@each_kind
def test_a_bundle_writes_bit_equal_networks_and_knows_its_optimisers(
    tmp_path: Path, table: tuple[tuple[int, ...], ...]
) -> None:
    generator = lohp(config(policy={"backward": "learned"}), table=normalizers(*table))
    torch.nn.init.normal_(generator.policy.names_net)
    cond, layout = support_and_query(3, 3, seed=0)[0], layout_of(table[0])
    cond = replace(cond, policies=(*POLICIES, ""))
    save_bundle(generator, tmp_path, {"seed": 3})
    loaded = load_bundle(tmp_path)
    assert isinstance(loaded, LoHp)
    assert loaded.data.policies == POLICIES
    assert loaded.needs.num_targets == 3
    before, after = (
        each.generate(GenerationRequest(condition=cond, layout=layout, noise=noise_for(3))).values_BD
        for each in (generator, loaded)
    )
    assert torch.equal(before, after)


def test_a_head_takes_other_numbers_of_classes_and_the_order_of_classes_does_not_matter() -> None:
    generator, layout = lohp(), layout_of((NUM_FEATURES, 5))
    torch.nn.init.normal_(generator.policy.names_net)
    assert generator.knows(layout)
    assert generator.max_classes is None
    cond = replace(support_and_query(2, 5, seed=0)[0], policies=("adam", "adam"))
    order = torch.tensor([3, 0, 4, 1, 2])
    plain = layout.unflatten(
        generator.generate(
            GenerationRequest(condition=cond, layout=layout, noise=noise_for(2), temperature=0.0)
        ).values_BD
    )
    turned = replace(cond, labels_BS=order.argsort()[cond.labels_BS])
    moved = layout.unflatten(
        generator.generate(
            GenerationRequest(condition=turned, layout=layout, noise=noise_for(2), temperature=0.0)
        ).values_BD
    )
    for name, tensor in plain.items():
        torch.testing.assert_close(moved[name], tensor[:, order], rtol=1e-4, atol=1e-5)


def test_the_registry_builds_it_from_its_own_config() -> None:
    assert METHODS["lohp"].Config is LoHpConfig
    assert [stage.name for stage in lohp().stages()] == ["policy"]
    assert lohp(config(policy={"num_steps": 0})).stages() == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PathConfig(length=5), "length=5: must divide num_steps=12"),
        (lambda: PathConfig(noise=0), "noise=0: must be above 0"),
        (lambda: config(sampling_steps=4), r"sampling.num_steps=4: give a multiple of path.num_steps / path.length=3"),
        (lambda: load_config(PolicyConfig, None, ["objective=subtb"]), "objective=subtb: give one of"),
        (lambda: PolicyConfig(mix=1.5), "mix lies between 0 and 1"),
        (lambda: PolicyConfig(exploration=-1), "must be at least 0"),
        (lambda: load_config(NetworkConfig, None, ["kind=dense"]), "kind=dense: give one of"),
    ],
)
def test_settings_that_make_no_policy_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
