"""Engines against each other, and what they keep of the optimiser, in one process."""

from __future__ import annotations

import copy
import gc
import mmap
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from raywgen.generators import Stage
from raywgen.generators.igpg.stages import PriorStage
from raywgen.nn.blocks import Blocks
from raywgen.nn.precision import Precision
from raywgen.training.engine import (
    DeviceMemoryError,
    Engine,
    EngineSettings,
    LocalEngine,
    Offload,
    distributed_engine,
    load_parameters,
    sharded,
)
from raywgen.weights import KeyedNoise, WeightBatch
from tests.builders import igpg, tokenizer_stage, weight_batch
from tests.training.engine_states import Held, averages_of, moments_of, parameters_of, state_of

NUM_STEPS = 6


def prior_stage() -> Stage:
    generator = igpg()
    return PriorStage(generator.prior, generator.tokenizer, generator.normalizers)


def steps(engine: Engine, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        batch = weight_batch(seed=step)
        scalars = engine.train_step(batch, KeyedNoise(0, batch.sample_index_B + 100 * step), 1e-2 / (step + 1))
        losses.append(float(scalars["loss"]))
    return losses


def num_mapped_bytes() -> int:
    """Address space of this process, used or not."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE


def distributed(zero_stage: int, precision: Precision = "fp32") -> Callable[[Stage], Engine]:
    """In ZeRO-3 every parameter is sharded, also in a group of one worker."""
    settings = EngineSettings(zero_stage=zero_stage, precision=precision, min_sharded=0)
    return lambda stage: distributed_engine(stage, 1, settings)


def assert_equal_states(one: Engine, other: Engine) -> None:
    theirs = parameters_of(other)
    for name, mine in parameters_of(one).items():
        # ZeRO flattens parameters into one buffer: the norm for clipping is summed in another order.
        torch.testing.assert_close(mine, theirs[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: n + m)


def test_a_step_is_that_of_plain_torch() -> None:
    stage = prior_stage()
    expected = copy.deepcopy(stage)
    steps(LocalEngine(stage), 0, NUM_STEPS)
    adam = torch.optim.AdamW(
        expected.parameters(), betas=(0.9, 0.99), weight_decay=expected.config.optimizer.weight_decay
    )
    for step in range(NUM_STEPS):
        batch = weight_batch(seed=step)
        adam.param_groups[0]["lr"] = 1e-2 / (step + 1)
        adam.zero_grad()
        expected.train()(batch, KeyedNoise(0, batch.sample_index_B)).loss.backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), expected.config.optimizer.grad_clip)
        adam.step()
    for mine, theirs in zip(stage.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_deepspeed_takes_the_steps_of_plain_torch(zero_stage: int) -> None:
    alone, sharded, plain_linear = prior_stage(), prior_stage(), torch.nn.functional.linear
    local, engine = LocalEngine(alone), distributed(zero_stage)(sharded)
    assert steps(engine, 0, NUM_STEPS) == pytest.approx(steps(local, 0, NUM_STEPS), rel=1e-5)
    assert_equal_states(engine, local)
    assert torch.nn.functional.linear is plain_linear
    assert all(bool(parameter.numel()) == (zero_stage < 3) for parameter in sharded.parameters())
    mine, theirs = moments_of(engine), moments_of(local)
    assert mine.keys() == theirs.keys()
    for name, moment in theirs.items():
        torch.testing.assert_close(mine[name], moment, rtol=1e-3, atol=1e-8)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (LocalEngine, LocalEngine),
        (LocalEngine, distributed(0)),
        (LocalEngine, distributed(2)),
        (LocalEngine, distributed(3)),
        (distributed(2), distributed(1)),
        (distributed(2), distributed(3)),
        (distributed(3), LocalEngine),
        (distributed(3), distributed(2)),
    ],
    ids=["local-local", "local-0", "local-2", "local-3", "2-1", "2-3", "3-local", "3-2"],
)
def test_a_run_goes_on_under_another_engine(
    before: Callable[[Stage], Engine], after: Callable[[Stage], Engine]
) -> None:
    undisturbed = LocalEngine(prior_stage())
    expected = steps(undisturbed, 0, 2 * NUM_STEPS)[NUM_STEPS:]
    first, second = prior_stage(), prior_stage()
    engine = before(first)
    steps(engine, 0, NUM_STEPS)
    stored = state_of(engine)
    load_parameters(second, stored, "model.")
    resumed = after(second)
    resumed.load(stored)
    assert steps(resumed, NUM_STEPS, 2 * NUM_STEPS) == pytest.approx(expected, rel=1e-5)
    assert_equal_states(undisturbed, resumed)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(("zero_stage", "offload"), [(1, "optimizer"), (2, "optimizer"), (3, "parameters")])
def test_offloading_changes_no_step_and_goes_on(zero_stage: int, offload: Offload) -> None:
    undisturbed = LocalEngine(prior_stage())
    expected = steps(undisturbed, 0, 2 * NUM_STEPS)
    first, second = prior_stage(), prior_stage()
    settings = EngineSettings(zero_stage=zero_stage, offload=offload, min_sharded=0)
    engine = distributed_engine(first, 1, settings)
    assert steps(engine, 0, NUM_STEPS) == pytest.approx(expected[:NUM_STEPS], rel=1e-5)
    stored = state_of(engine)
    load_parameters(second, stored, "model.")
    resumed = distributed_engine(second, 1, settings)
    resumed.load(stored)
    assert steps(resumed, NUM_STEPS, 2 * NUM_STEPS) == pytest.approx(expected[NUM_STEPS:], rel=1e-5)
    assert_equal_states(undisturbed, resumed)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("zero_stage", [None, 2, 3])
def test_recomputed_activations_change_no_step(zero_stage: int | None) -> None:
    settings = EngineSettings(zero_stage=zero_stage or 0, activation_checkpointing=True, min_sharded=0)
    stage = prior_stage()
    engine = LocalEngine(stage, settings) if zero_stage is None else distributed_engine(stage, 1, settings)
    assert any(part.recompute for part in stage.modules() if isinstance(part, Blocks))
    assert steps(engine, 0, NUM_STEPS) == pytest.approx(steps(LocalEngine(prior_stage()), 0, NUM_STEPS), rel=1e-5)


@pytest.mark.slow
def test_compiled_blocks_take_the_same_steps() -> None:
    plain = steps(LocalEngine(prior_stage()), 0, NUM_STEPS)
    assert steps(LocalEngine(prior_stage(), EngineSettings(compile=True)), 0, NUM_STEPS) == pytest.approx(
        plain, rel=1e-4
    )


def test_without_a_compiler_a_stage_is_trained_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raywgen.training.engine.base.compile_error", lambda device: "no g++")
    with pytest.warns(UserWarning, match=r"compile=true has no effect: nothing compiles for cpu here \(no g\+\+\)"):
        engine = LocalEngine(prior_stage(), EngineSettings(compile=True))
    assert steps(engine, 0, 2) == steps(LocalEngine(prior_stage()), 0, 2)


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        (
            EngineSettings(),
            r"8 networks at a time: give accumulate=2 \(now 1\), activation_checkpointing=true, a",
        ),
        (EngineSettings(accumulate=5), r"2 networks at a time: give accumulate=8 \(now 5\), activation_checkpointing"),
        (EngineSettings(accumulate=8, activation_checkpointing=True), "1 networks at a time: give a higher zero_stage"),
    ],
)
def test_where_memory_runs_out_it_is_said_what_to_lower(settings: EngineSettings, remedy: str) -> None:
    engine, batch = LocalEngine(prior_stage(), settings), weight_batch()
    engine.stage.register_forward_hook(lambda *_: torch.empty(1 << 60))
    with pytest.raises(DeviceMemoryError, match=f"stage 'prior' has no memory left with {remedy}"):
        engine.train_step(batch, KeyedNoise(0, batch.sample_index_B), 1e-3)


def test_other_errors_of_a_step_are_left_alone() -> None:
    engine, batch = LocalEngine(prior_stage()), weight_batch()
    engine.stage.register_forward_hook(lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size") as failure:
        engine.train_step(batch, KeyedNoise(0, batch.sample_index_B), 1e-3)
    assert not isinstance(failure.value, DeviceMemoryError)


def test_moments_that_are_lost_are_noticed() -> None:
    """Without its moments a resumed run differs, so the tests above could fail."""
    undisturbed, second = prior_stage(), prior_stage()
    first = LocalEngine(undisturbed)
    steps(first, 0, NUM_STEPS)
    second.load_state_dict(copy.deepcopy(undisturbed.state_dict()))
    expected = steps(first, NUM_STEPS, 2 * NUM_STEPS)
    assert steps(LocalEngine(second), NUM_STEPS, 2 * NUM_STEPS) != pytest.approx(expected, rel=1e-3)


def descent_stage(weight_decay: float = 0.1) -> Stage:
    stage = prior_stage()
    stage.config.optimizer.kind = "sgd"
    stage.config.optimizer.weight_decay = weight_decay
    return stage


def test_descent_takes_exactly_the_rate_times_the_gradient() -> None:
    stage = descent_stage()
    stage.config.optimizer.grad_clip = 1e9
    before = {name: parameter.detach().clone() for name, parameter in stage.named_parameters()}
    steps(LocalEngine(stage), 0, 1)
    for name, parameter in stage.named_parameters():
        assert parameter.grad is not None
        # Decay by the same rate; one rounding each.
        expected = before[name] - 1e-2 * (parameter.grad + 0.1 * before[name])
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: n + m)
    assert any(not torch.equal(before[name], parameter) for name, parameter in stage.named_parameters())


def test_descent_has_no_moments_and_goes_on_without_them() -> None:
    undisturbed, first, second = descent_stage(), descent_stage(), descent_stage()
    expected = steps(LocalEngine(undisturbed), 0, 2 * NUM_STEPS)[NUM_STEPS:]
    engine = LocalEngine(first)
    steps(engine, 0, NUM_STEPS)
    assert moments_of(engine) == {}
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    resumed = LocalEngine(second)
    resumed.load(state_of(engine))
    assert steps(resumed, NUM_STEPS, 2 * NUM_STEPS) == expected
    for mine, theirs in zip(undisturbed.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_descent_by_deepspeed_is_that_of_plain_torch_and_goes_on(zero_stage: int) -> None:
    alone, sharded, second = descent_stage(), descent_stage(), descent_stage()
    local = LocalEngine(alone)
    expected = steps(local, 0, 2 * NUM_STEPS)
    engine = distributed(zero_stage)(sharded)
    assert steps(engine, 0, NUM_STEPS) == pytest.approx(expected[:NUM_STEPS], rel=1e-5)
    assert moments_of(engine) == {}
    stored = state_of(engine)
    load_parameters(second, stored, "model.")
    resumed = distributed(zero_stage)(second)
    resumed.load(stored)
    assert steps(resumed, NUM_STEPS, 2 * NUM_STEPS) == pytest.approx(expected[NUM_STEPS:], rel=1e-5)
    assert_equal_states(local, resumed)


@pytest.mark.usefixtures("process_group")
def test_replicas_train_where_a_step_reaches_only_some_parameters() -> None:
    alone, replicated = prior_stage(), prior_stage()
    for stage in (alone, replicated):
        stage.register_parameter("unreached", nn.Parameter(torch.ones(3)))
    engine = distributed(0)(replicated)
    assert steps(engine, 0, 3) == pytest.approx(steps(LocalEngine(alone), 0, 3))
    assert torch.equal(replicated.get_parameter("unreached"), torch.ones(3))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_closed_engine_frees_its_stage_and_takes_no_more_than_that_needs(zero_stage: int) -> None:
    """Otherwise what a stage takes stays while the next ones are trained."""
    before = num_mapped_bytes()
    engine = distributed(zero_stage)(prior_stage())
    steps(engine, 0, 1)
    # A stage of less than a MiB; what threads and allocators map beside it varies.
    assert num_mapped_bytes() - before < 1 << 30
    parts = [weakref.ref(engine.stage), weakref.ref(engine)]
    engine.close()
    del engine
    gc.collect()
    assert [part() for part in parts] == [None, None]


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_the_size_of_buckets_changes_no_step(zero_stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = distributed(zero_stage)(prior_stage())
    expected = steps(engine, 0, NUM_STEPS)
    monkeypatch.setattr(sharded, "MAX_BUCKET", 500)  # Less than the largest parameter.
    many = distributed(zero_stage)(prior_stage())
    assert steps(many, 0, NUM_STEPS) == expected
    theirs = parameters_of(engine)
    assert all(torch.equal(mine, theirs[name]) for name, mine in parameters_of(many).items())


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("zero_stage", [None, 0, 2, 3])
@pytest.mark.parametrize("accumulate", [3, 8])
def test_parts_of_a_batch_give_the_gradient_of_all(zero_stage: int | None, accumulate: int) -> None:
    """Parts of 3, 3 and 2 networks, or of one each."""
    settings = EngineSettings(accumulate=accumulate, zero_stage=zero_stage or 0, min_sharded=0)
    whole = LocalEngine(prior_stage())
    split = (
        LocalEngine(prior_stage(), settings) if zero_stage is None else distributed_engine(prior_stage(), 1, settings)
    )
    assert steps(split, 0, NUM_STEPS) == pytest.approx(steps(whole, 0, NUM_STEPS), rel=1e-4)
    theirs = parameters_of(whole)
    for name, mine in parameters_of(split).items():
        torch.testing.assert_close(mine, theirs[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: n + m)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("make", [LocalEngine, distributed(2)], ids=["local", "zero 2"])
def test_betas_and_epsilon_are_those_of_plain_torch(make: Callable[[Stage], Engine]) -> None:
    stage = prior_stage()
    stage.config.optimizer.betas, stage.config.optimizer.epsilon = (0.5, 0.7), 1e-3
    expected = copy.deepcopy(stage)
    engine = make(stage)
    steps(engine, 0, NUM_STEPS)
    adam = torch.optim.AdamW(
        expected.parameters(), betas=(0.5, 0.7), eps=1e-3, weight_decay=expected.config.optimizer.weight_decay
    )
    for step in range(NUM_STEPS):
        batch = weight_batch(seed=step)
        adam.param_groups[0]["lr"] = 1e-2 / (step + 1)
        adam.zero_grad()
        expected.train()(batch, KeyedNoise(0, batch.sample_index_B + 100 * step)).loss.backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), expected.config.optimizer.grad_clip)
        adam.step()
    for name, mine in parameters_of(engine).items():
        torch.testing.assert_close(mine, expected.state_dict()[name], rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("kept_whole", [0, 100], ids=["all sharded", "small ones whole"])
@pytest.mark.parametrize("zero_stage", [None, 2, 3])
def test_averages_are_those_of_the_parameters_after_each_step(zero_stage: int | None, kept_whole: int) -> None:
    stage = prior_stage()
    stage.config.optimizer.ema_decay = 0.6
    if zero_stage is None:
        engine = LocalEngine(stage)
    else:
        engine = distributed_engine(stage, 1, EngineSettings(zero_stage=zero_stage, min_sharded=kept_whole))
    expected = {name: tensor.double() for name, tensor in parameters_of(engine).items()}
    for step in range(NUM_STEPS):
        steps(engine, step, step + 1)
        for name, tensor in parameters_of(engine).items():
            expected[name] = 0.6 * expected[name] + 0.4 * tensor.double()
    for name, average in averages_of(engine).items():
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-7)
    own = parameters_of(engine)
    averaged = judged(engine)
    assert_same(parameters_of(engine), own)
    engine.finish()
    assert_same(parameters_of(engine), averages_of(engine))
    settings, again = engine.settings, prior_with(own)
    again.config.optimizer.ema_decay = 0.6
    resumed = LocalEngine(again) if zero_stage is None else distributed_engine(again, 1, settings)
    resumed.load(Held({f"ema.{name}": average + 1 for name, average in averages_of(engine).items()}))
    assert_same(averages_of(resumed), {name: average + 1 for name, average in averages_of(engine).items()})
    assert judged(LocalEngine(prior_with(averages_of(engine)))) == pytest.approx(averaged, rel=1e-6)
    assert judged(LocalEngine(prior_with(own))) != pytest.approx(averaged, rel=1e-3)


def judged(engine: Engine) -> float:
    batch = weight_batch()
    return float(engine.evaluate(batch, KeyedNoise(0, batch.sample_index_B))["loss"])


def prior_with(parameters: dict[str, Tensor]) -> Stage:
    stage = prior_stage()
    load_parameters(stage, Held({**stage.state_dict(), **parameters}), "")
    return stage


def assert_same(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor), name


def test_a_gradient_is_clipped_to_the_norm_of_the_config() -> None:
    stage = prior_stage()
    stage.config.optimizer.grad_clip = 1e-9
    before = [parameter.detach().clone() for parameter in stage.parameters()]
    batch = weight_batch()
    engine = LocalEngine(stage)
    engine.train_step(batch, KeyedNoise(0, batch.sample_index_B), 1e-3)
    total = torch.stack([p.grad.norm() for p in stage.parameters() if p.grad is not None]).norm()
    assert float(total) <= 1.01e-9
    assert any(not torch.equal(old, new) for old, new in zip(before, stage.parameters(), strict=True))


def test_evaluation_learns_nothing() -> None:
    generator = igpg()
    stage = tokenizer_stage(generator)
    before = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    batch = weight_batch()
    scalars = LocalEngine(stage).evaluate(batch, KeyedNoise(0, batch.sample_index_B))
    assert all(isinstance(value, Tensor) and not value.requires_grad for value in scalars.values())
    assert {"loss", "reconstruction", "snr_db"} <= scalars.keys()
    for name, tensor in generator.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("accumulate", [1, 2])
def test_unequal_parts_count_for_their_size(accumulate: int) -> None:
    """The mean of what three workers' gradients give is what the gradient of the whole batch gives."""

    def step(part: WeightBatch, num_workers: int, total: int | None) -> tuple[dict[str, Tensor], float]:
        stage = descent_stage(weight_decay=0.0)
        stage.config.optimizer.grad_clip = 1e9
        engine = LocalEngine(stage, EngineSettings(accumulate=accumulate))
        # Those of all alike.
        engine.num_workers, engine.begin_all_reduce = num_workers, lambda tensor: lambda: tensor * num_workers
        metrics = engine.train_step(part, KeyedNoise(0, part.sample_index_B), 1.0, total)
        return parameters_of(engine), float(metrics["loss"])

    batch = weight_batch()
    whole, loss = step(batch, 1, None)
    parts = [step(batch.take(torch.tensor(rows)), 3, 8) for rows in ([0, 3, 6], [1, 4, 7], [2, 5])]
    assert sum(part[1] for part in parts) / 3 == pytest.approx(loss, rel=1e-5)
    for name, mine in whole.items():
        mean = torch.stack([part[0][name] for part in parts]).mean(dim=0)
        torch.testing.assert_close(mean, mine, rtol=1e-4, atol=1e-6)


def test_metrics_are_means_over_workers_and_codebooks_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every worker seeing the same batch, means stay and counts add up."""
    stage = tokenizer_stage(igpg())
    engine = LocalEngine(stage)
    alone = engine.evaluate(weight_batch(), KeyedNoise(0, torch.arange(8)))
    monkeypatch.setattr(engine, "num_workers", 3)
    monkeypatch.setattr(engine, "begin_all_reduce", lambda tensor: lambda: tensor * 3)
    three = engine.evaluate(weight_batch(), KeyedNoise(0, torch.arange(8)))
    for name, value in alone.items():
        torch.testing.assert_close(three[name], value, rtol=1e-6, atol=0)


def test_a_flag_of_any_worker_is_known_to_all_after_the_step() -> None:
    engine, batch = LocalEngine(tokenizer_stage(igpg())), weight_batch()
    engine.num_workers = 3
    for mine, of_others, expected in ((0.0, 0.0, False), (1.0, 0.0, True), (0.0, 1.0, True)):
        sums: list[Tensor] = []

        def added(tensor: Tensor, of_others: float = of_others, sums: list[Tensor] = sums) -> Callable[[], Tensor]:
            sums.append(tensor)
            # The first sum of a step is of its metrics, with the flag at the end.
            total = torch.cat([tensor[:-1] * 3, tensor[-1:] + of_others]) if len(sums) == 1 else tensor
            return lambda: total

        engine.begin_all_reduce = added
        engine.train_step(batch, KeyedNoise(0, batch.sample_index_B), 1e-3, has_flag=lambda mine=mine: bool(mine))
        assert engine.is_flagged is expected


def task_loss_stage() -> Stage:
    """What also writes networks, with a cache."""
    return igpg().stages()[-1]


@pytest.mark.parametrize("build", [prior_stage, task_loss_stage])
def test_bf16_trains_as_fp32_does_but_for_rounding(build: Callable[[], Stage]) -> None:
    plain = build()
    half = copy.deepcopy(plain)
    one, other = (
        steps(LocalEngine(plain), 0, NUM_STEPS),
        steps(LocalEngine(half, EngineSettings(precision="bf16")), 0, NUM_STEPS),
    )
    assert one != other
    # Eight bits of mantissa: 0.4 % a product, and losses here are means over hundreds of them.
    assert other == pytest.approx(one, rel=1e-2)
    assert all(parameter.dtype == torch.float32 for parameter in half.parameters())


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("zero_stage", [0, 3])
def test_deepspeed_in_bf16_takes_the_steps_of_one_process_in_bf16(zero_stage: int) -> None:
    alone = prior_stage()
    sharded = copy.deepcopy(alone)
    local = LocalEngine(alone, EngineSettings(precision="bf16"))
    engine = distributed(zero_stage, "bf16")(sharded)
    assert steps(engine, 0, NUM_STEPS) == pytest.approx(steps(local, 0, NUM_STEPS), rel=1e-3)
    assert all(parameter.dtype == torch.float32 for parameter in sharded.parameters())


def test_a_stage_is_evaluated_in_eval_mode_and_trained_in_train_mode() -> None:
    engine, batch = LocalEngine(prior_stage()), weight_batch(seed=0)
    engine.evaluate(batch, KeyedNoise(0, batch.sample_index_B))
    assert not engine.stage.training
    engine.train_step(batch, KeyedNoise(0, batch.sample_index_B), 1e-3)
    assert engine.stage.training
