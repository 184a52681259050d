"""Stage II of Lo-Hp: paths, balance, what it must not look at, and that it learns.

Shape legend: B networks, k sub-trajectories, L steps of each, D values.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from raywgen.generators import GenerationRequest
from raywgen.generators.lohp import LoHp
from raywgen.generators.lohp.balance import draw_stored
from raywgen.generators.lohp.config import Hybrid, Objective
from raywgen.generators.lohp.paths import make_paths
from raywgen.generators.lohp.replay import ReplayBuffer, Rollout
from raywgen.generators.lohp.stages import PolicyStage
from raywgen.training.engine import LocalEngine
from raywgen.weights import KeyedNoise, WeightBatch
from tests.builders import noise_for, part_of, same
from tests.generators.lohp.builders import DATA, POLICIES, TABLES, config, lohp
from tests.generators.mcdi.builders import chunk_batch, head_batch, support_and_query
from tests.training.engine_states import moments_of

pytestmark = pytest.mark.usefixtures("one_thread")


def generator_of(kind: str = "head", path: dict[str, Any] | None = None, width: int = 16, **policy: Any) -> LoHp:
    return lohp(config(path=path, network={"kind": kind, "width": width}, policy=policy), table=TABLES[kind]())


def stage_of(generator: LoHp) -> PolicyStage:
    (stage,) = generator.stages()
    assert isinstance(stage, PolicyStage)
    return stage


def batch_of(kind: str, num: int = 8, seed: int = 0) -> WeightBatch:
    batch = head_batch(num, seed) if kind == "head" else chunk_batch(num, seed)
    return replace(batch, condition=replace(batch.condition, policies=("adam",) * num))


def learn(stage: PolicyStage, kind: str, num_steps: int = 60, rate: float = 2e-2) -> None:
    stage.setup([batch_of(kind, seed=step) for step in range(2)], seed=0)
    engine = LocalEngine(stage)
    for step in range(num_steps):
        batch = batch_of(kind, 16, seed=step)
        engine.train_step(batch, KeyedNoise(0, batch.sample_index_B), rate)
    stage.eval()


def written_distance(generator: LoHp, batch: WeightBatch) -> float:
    """Of written networks from the stored ones, in units of the reference."""
    written = generator.generate(
        GenerationRequest(
            condition=batch.condition, layout=batch.layout, noise=noise_for(len(batch.values_BD)), temperature=0.0
        )
    )
    normalizer = generator.normalizers[batch.layout.id][1]
    return float((normalizer.normalise(written.values_BD) - normalizer.normalise(batch.values_BD)).square().mean())


class Known(nn.Module):
    """Says where sub-trajectories end, of targets that it is given."""

    def __init__(self, targets_BAD: Tensor, length: int) -> None:
        super().__init__()
        self.targets_BAD, self.length = targets_BAD, length

    def predict(self, x_BnD: Tensor, time_Bn: Tensor, *_: object) -> Tensor:
        k = self.targets_BAD.shape[1]
        place_Bn = (time_Bn * k * self.length).round().long() // self.length
        return self.targets_BAD.gather(1, place_Bn.unsqueeze(2).expand(-1, -1, x_BnD.shape[2]))


@pytest.mark.parametrize("hybrid", ["mixed", "spliced"])
@pytest.mark.parametrize("flow", ["factored", "joint"])
@pytest.mark.parametrize("objective", [name for name in get_args(Objective) if name != "cloning"])
@pytest.mark.parametrize("length", [1, 2, 4])
def test_a_policy_that_knows_the_local_targets_is_in_balance(
    length: int, objective: str, flow: str, hybrid: str
) -> None:
    path = {"num_steps": 3 * length, "length": length}
    generator = generator_of(path=path, objective=objective, flow=flow, hybrid=hybrid, exploration=0.5)
    stage, batch = stage_of(generator), batch_of("head")
    known = Known(stage._targets(batch), length)
    for net in (stage.policy.forward_net, stage.policy.flow_net):
        net.predict = known.predict  # pyright: ignore[reportAttributeAccessIssue]
    loss = stage.train()(batch, noise_for(8)).loss
    # Log-densities of some tens in float32.
    assert float(loss.detach()) < 1e-8
    known.targets_BAD = known.targets_BAD + 0.3
    assert float(stage(batch, noise_for(8)).loss.detach()) > 1e-3


@pytest.mark.parametrize("hybrid", ["mixed", "spliced"])
def test_stored_paths_end_where_the_local_target_rewards_and_rolled_ones_where_the_policy_goes(hybrid: Hybrid) -> None:
    B, k, D, settings = 6, 3, 4000, config(path={"noise": 0.2}).path
    targets_BAD = torch.randn(B, 1, 1, generator=torch.Generator().manual_seed(0)) * torch.ones(B, k, D)
    is_stored_BA = torch.tensor([[True, False, True]] * 3 + [[False, True, False]] * 3)
    went = 7.0

    def ends(x_BD: Tensor, step: int) -> Tensor:
        return torch.full_like(x_BD, went)

    states = make_paths(
        ends, targets_BAD, is_stored_BA, noise_for(B), settings, hybrid=hybrid, exploration=0.0
    )  # (B, k, L + 1, D)
    assert states.shape == (B, k, settings.length + 1, D)
    wanted = torch.where(is_stored_BA, targets_BAD[..., 0], torch.tensor(went))
    # 4,000 values of spread 0.2: their mean is known to 0.2 / sqrt(4000) = 0.003, their spread to 0.0022.
    torch.testing.assert_close(states[:, :, -1].mean(dim=-1), wanted, atol=0.016, rtol=0)
    torch.testing.assert_close(states[:, :, -1].std(dim=-1), torch.full((B, k), 0.2), atol=0.012, rtol=0)
    assert torch.equal(states[:, 0, 0], torch.zeros(B, D))
    for i in (1, 2):
        came_from = states[:, i - 1, -1]
        if hybrid == "mixed":
            came_from = torch.where(is_stored_BA[:, i, None], targets_BAD[:, i - 1], came_from)
        assert torch.equal(states[:, i, 0], came_from)


def test_exploration_widens_rollouts_alone_and_has_gone_in_the_end() -> None:
    stage, batch = stage_of(generator_of(exploration=1.0, exploration_steps=10, mix=0.0)), batch_of("head")
    embedded, targets = stage.policy.embed_condition(batch.condition, batch.layout), stage._targets(batch)

    def spread(step: int) -> float:
        late = replace(batch, sample_index_B=torch.arange(8) + 8 * step)
        states = stage._roll_out(late, targets, embedded, noise_for(8)).states_BALD
        return float((states[:, :, 1:] - states[:, :, :-1]).square().mean())

    stage.train()
    first, last = spread(0), spread(10)
    assert first > 2 * last
    stage.eval()
    assert spread(0) == pytest.approx(last, rel=1e-5)


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_the_mix_is_the_share_of_stored_paths(mix: float) -> None:
    mixed = draw_stored(noise_for(4000), 3, mix, "mixed")
    assert bool((mixed == mixed[:, :1]).all())
    spliced = draw_stored(noise_for(4000), 3, mix, "spliced")
    # Standard error 0.007.
    assert float(mixed.float().mean()) == pytest.approx(mix, abs=0.03)
    assert float(spliced.float().mean()) == pytest.approx(mix, abs=0.02)
    if 0 < mix < 1:
        assert not bool((spliced == spliced[:, :1]).all())


@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        ("head", {}),
        ("head", {"hybrid": "spliced"}),
        ("head", {"mix": 0.0}),
        ("head", {"mix": 1.0}),
        ("head", {"objective": "cloning"}),
        ("head", {"objective": "trajectory"}),
        ("head", {"objective": "detailed"}),
        ("head", {"backward": "learned"}),
        ("head", {"replay_size": 4}),
        ("flat", {}),
        ("chunks", {}),
    ],
    ids=str,
)
def test_every_way_of_training_brings_what_is_written_towards_the_networks(kind: str, policy: dict) -> None:
    generator = generator_of(kind, width=32, **policy)
    stage, held = stage_of(generator), batch_of(kind, 32, seed=77)
    stage.setup([batch_of(kind, seed=step) for step in range(2)], seed=0)
    before = written_distance(generator, held)
    learn(stage, kind)
    # Whole networks follow from nothing that is shown: all that can be learned is where they lie.
    assert written_distance(generator, held) < (0.5 if kind == "head" else 0.98) * before


@pytest.mark.parametrize("policy", [{}, {"hybrid": "spliced"}, {"flow": "joint"}, {"objective": "cloning"}], ids=str)
def test_two_workers_parts_of_a_batch_average_to_the_whole(policy: dict) -> None:
    stage, whole = stage_of(generator_of(exploration=0.3, **policy)).train(), batch_of("head", 8)
    together = stage(whole, KeyedNoise(0, whole.sample_index_B)).loss
    assert whole.targets_BAD is not None
    parts = []
    for rank in range(2):
        rows = torch.arange(rank, 8, 2)
        part = replace(
            whole,
            values_BD=whole.values_BD[rows],
            targets_BAD=whole.targets_BAD[rows],
            sample_index_B=whole.sample_index_B[rows],
            condition=replace(
                whole.condition,
                instructions=("",) * 4,
                samples_BSF=whole.condition.samples_BSF[rows],
                labels_BS=whole.condition.labels_BS[rows],
                policies=("adam",) * 4,
            ),
        )
        parts.append(stage(part, KeyedNoise(0, part.sample_index_B)).loss)
    torch.testing.assert_close((parts[0] + parts[1]) / 2, together, rtol=1e-5, atol=1e-6)


def test_a_learned_backward_policy_begins_at_the_bridge() -> None:
    batch, losses = batch_of("head"), {}
    for backward in ("bridge", "learned"):
        stage = stage_of(generator_of(backward=backward))
        for net in (stage.policy.forward_net, stage.policy.flow_net):
            net.predict = Known(stage._targets(batch) + 0.2, 2).predict  # pyright: ignore[reportAttributeAccessIssue]
        stage.setup([batch], seed=0)
        loss = stage.train()(batch, noise_for(8)).loss
        losses[backward] = float(loss.detach())
        if stage.policy.backward_net is not None:
            loss.backward()
            assert stage.policy.backward_share.grad is not None
            assert float(stage.policy.backward_share.grad.abs()) > 0
    assert losses["learned"] == pytest.approx(losses["bridge"], rel=1e-6)


def test_asked_for_no_optimiser_it_behaves_like_the_only_one() -> None:
    generator = lohp(config(), data=replace(DATA, policies=("adam",)))
    learn(stage_of(generator), "head", num_steps=20)
    assert float(generator.policy.names_net.abs().max()) > 0
    batch = batch_of("head")
    anyone = replace(batch, condition=replace(batch.condition, policies=()))
    assert written_distance(generator, anyone) == pytest.approx(written_distance(generator, batch), rel=1e-5)


def test_stage_two_runs_with_the_task_data_deleted() -> None:
    stage, batch = stage_of(generator_of()), batch_of("head")
    blind = replace(batch, module=None, query=None)  # pyright: ignore[reportArgumentType]
    seeing, unseeing = (stage.train()(each, noise_for(8)).loss for each in (batch, blind))
    assert torch.equal(seeing, unseeing)


def test_a_task_reward_is_added_to_the_end_of_the_path_alone() -> None:
    batch = batch_of("head")
    rewards = []
    for weight in (0.0, 2.0):
        stage = stage_of(generator_of(task_reward=weight))
        embedded, targets = stage.policy.embed_condition(batch.condition, batch.layout), stage._targets(batch)
        rewards.append(stage._log_reward(stage._roll_out(batch, targets, embedded, noise_for(8)), targets))
    difference_BAD = rewards[0] - rewards[1]
    assert float(difference_BAD[:, :-1].abs().max()) == 0.0
    assert float(difference_BAD[:, -1].sum(dim=-1).min()) > 0.0


def test_a_named_optimiser_is_learned_and_asked_for() -> None:
    generator = generator_of(width=32)
    stage = stage_of(generator)

    def named(step: int, num: int = 16) -> WeightBatch:
        """The second optimiser's networks lie one unit beside the first one's."""
        batch = head_batch(num, step)
        assert batch.targets_BAD is not None
        shift_B = torch.arange(num) % 2
        normalizer = generator.normalizers[batch.layout.id][1]
        moved = batch.targets_BAD + shift_B.view(-1, 1, 1) * normalizer.scale_D
        names = tuple(POLICIES[int(number)] for number in shift_B)
        return replace(
            batch, targets_BAD=moved, values_BD=moved[:, -1], condition=replace(batch.condition, policies=names)
        )

    stage.setup([named(0)], seed=0)
    engine = LocalEngine(stage)
    for step in range(150):
        batch = named(step)
        engine.train_step(batch, KeyedNoise(0, batch.sample_index_B), 1e-2)
    stage.eval()
    cond, held = support_and_query(32, 3, seed=9)[0], head_batch(32, 9)
    normalizer = generator.normalizers[held.layout.id][1]
    written = [
        normalizer.normalise(
            generator.generate(
                GenerationRequest(
                    condition=replace(cond, policies=(name,) * 32),
                    layout=held.layout,
                    noise=noise_for(32),
                    temperature=0.0,
                )
            ).values_BD
        )
        for name in POLICIES
    ]
    assert float((written[1] - written[0]).mean()) == pytest.approx(1.0, abs=0.3)


def test_replayed_rollouts_are_kept_up_to_the_size_and_count_for_half() -> None:
    stage = stage_of(generator_of(replay_size=2, exploration=0.0))
    first = stage.train()(batch_of("head", seed=1), noise_for(8)).loss
    stage.after_step(same)
    assert len(stage._replay) == 1
    second = stage(batch_of("head", seed=2), noise_for(8)).loss
    stage.after_step(same)
    alone = stage_of(generator_of(exploration=0.0)).train()(batch_of("head", seed=2), noise_for(8)).loss
    torch.testing.assert_close(second, (alone + first) / 2)
    stage(batch_of("head", seed=3), noise_for(8))
    stage.after_step(same)
    assert len(stage._replay) == 2
    stage.eval()(batch_of("head", seed=4), noise_for(8))
    stage.after_step(same)
    assert len(stage._replay) == 2


def test_replayed_rollouts_of_two_workers_come_back_on_one_or_two() -> None:
    whole = batch_of("head", 8, seed=1)
    whole = replace(whole, sample_index_B=torch.arange(24, 32))

    def part(rank: int) -> WeightBatch:
        assert whole.targets_BAD is not None
        rows = slice(rank, 8, 2)
        condition = replace(part_of(whole.condition, rows), policies=("adam",) * 4)
        return replace(
            whole,
            values_BD=whole.values_BD[rows],
            targets_BAD=whole.targets_BAD[rows],
            condition=condition,
            query=part_of(whole.query, rows),
            sample_index_B=whole.sample_index_B[rows],
        )

    made = [stage_of(generator_of(batch_size=8, replay_size=2)).train() for _ in range(2)]
    for rank, stage in enumerate(made):
        stage(part(rank), KeyedNoise(0, part(rank).sample_index_B))
        stage.after_step(same)
    shares = [stage.state(lambda tensor: tensor) for stage in made]
    state = {name: shares[0][name] + shares[1][name] for name in shares[0]}
    assert set(state) == {"rollout.3"}
    for rank, stage in enumerate(made):
        again = stage_of(generator_of(batch_size=8, replay_size=2))
        again.set_state(state, lambda step, rank=rank: part(rank))
        assert torch.equal(again._replay.draw(0).states_BALD, stage._replay.draw(0).states_BALD)
    alone = stage_of(generator_of(batch_size=8, replay_size=2))
    alone.set_state(state, lambda step: whole)
    assert torch.equal(alone.state(lambda tensor: tensor)["rollout.3"], state["rollout.3"])


def test_parameters_that_cloning_never_reaches_do_not_set_adams_step_back() -> None:
    stage = stage_of(generator_of(objective="cloning"))
    stage.setup([batch_of("head")], seed=0)
    engine = LocalEngine(stage)
    for step in range(3):
        batch = batch_of("head", seed=step)
        engine.train_step(batch, KeyedNoise(0, batch.sample_index_B), 1e-3)
    assert float(moments_of(engine)["step"]) == 3


def test_a_replayed_rollout_may_be_any_of_those_kept_and_follows_from_the_step() -> None:
    buffer, batch = ReplayBuffer(4), batch_of("head")
    for number in range(6):
        buffer.add(Rollout(batch=batch, states_BALD=torch.full((1,), float(number))))
    drawn = [float(buffer.draw(step).states_BALD) for step in range(60)]
    assert set(drawn) == {2.0, 3.0, 4.0, 5.0}
    assert drawn == [float(buffer.draw(step).states_BALD) for step in range(60)]


def test_cloning_looks_from_even_places_on_the_way_between_local_targets() -> None:
    stage, batch = stage_of(generator_of(path={"num_steps": 12, "length": 4}, objective="cloning")), batch_of("head")
    seen: list[Tensor] = []
    predict = stage.policy.forward_net.predict

    def watched(x_BnD: Tensor, *rest: Any) -> Tensor:
        seen.append(x_BnD)
        return predict(x_BnD, *rest)

    stage.policy.forward_net.predict = watched  # pyright: ignore[reportAttributeAccessIssue]
    stage(batch, noise_for(8))
    targets_BAD = stage._targets(batch)
    wanted = []
    for i in range(targets_BAD.shape[1]):
        start_BD = targets_BAD[:, i - 1] if i else torch.zeros_like(targets_BAD[:, 0])
        wanted += [start_BD + n / 4 * (targets_BAD[:, i] - start_BD) for n in range(4)]
    torch.testing.assert_close(seen[0], torch.stack(wanted, dim=1))


def test_the_flow_of_every_state_but_the_last_holds_the_normaliser() -> None:
    """`log F` of the last state is the reward; where log Z grows by c, all others grow by c, spread over D values."""
    stage, batch = stage_of(generator_of(path={"num_steps": 9, "length": 3})), batch_of("head")
    embedded, targets_BAD = stage.policy.embed_condition(batch.condition, batch.layout), stage._targets(batch)
    rollout = stage._roll_out(batch, targets_BAD, embedded, noise_for(8))
    g, _ = stage._potentials(rollout, targets_BAD, embedded)
    moved, _ = stage._potentials(rollout, targets_BAD, embedded._replace(log_z_BA=embedded.log_z_BA + 6.0))
    wanted = torch.full_like(g, 6.0 / targets_BAD.shape[-1])
    wanted[:, :, -1] = 0
    torch.testing.assert_close(moved - g, wanted, rtol=0, atol=1e-4)


def test_a_joint_flow_balances_sums_over_values_at_a_residuals_size() -> None:
    stage, batch = stage_of(generator_of(flow="joint", objective="trajectory")), batch_of("head")
    embedded, targets_BAD = stage.policy.embed_condition(batch.condition, batch.layout), stage._targets(batch)
    rollout = stage._roll_out(batch, targets_BAD, embedded, noise_for(8))
    g, _ = stage._potentials(rollout, targets_BAD, embedded)
    residual_BA = (g[:, :, 0] - g[:, :, -1]).double().sum(dim=-1)
    loss, _ = stage._balance(rollout, targets_BAD, embedded)
    assert float(loss.detach()) == pytest.approx(float((residual_BA.square() / g.shape[-1]).mean().detach()), rel=1e-4)
